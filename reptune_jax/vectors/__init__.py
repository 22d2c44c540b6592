"""Behavior vectors: capture, aggregate, keep in a self-describing file."""
