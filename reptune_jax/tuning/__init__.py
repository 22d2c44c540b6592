"""Representation tuning: the dual loss, the step, the loop, the checkpoints."""
