"""A run's plan, checks, checkpoints, progress, stop and resume; `stage` trains one run from beginning to end."""
