"""A run's folder: files, lock, record, checkpoints, resuming."""
