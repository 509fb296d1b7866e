"""Long runs of whole commands, started by hand; their results are kept in results/."""
