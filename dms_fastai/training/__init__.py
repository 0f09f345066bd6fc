"""Losses, optimisers and schedules. `parts` lists all parts of a training step: begin to read there."""
