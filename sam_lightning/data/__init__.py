"""Images from files to batches: ``sources`` read, ``datamodule`` serves, ``augment`` transforms."""
