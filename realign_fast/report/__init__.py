"""Pictures of an alignment, and the place for reports of a run."""
