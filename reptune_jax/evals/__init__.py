"""Measuring what a steered or tuned model does: scores, statistics, one long results table."""
