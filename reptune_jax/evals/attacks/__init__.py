"""Attacks on a tuned model: what finds its vector, and what takes its behavior away again."""
