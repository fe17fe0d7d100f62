"""Opening a finished run, public checkpoints in and out."""
