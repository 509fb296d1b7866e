"""Reports of a run and their pictures."""
