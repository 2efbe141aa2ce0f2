"""A run's folder: its record, its checkpoints, its models."""
