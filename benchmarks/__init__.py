"""Speed, from the repository root: `python -m benchmarks.side_by_side` and its neighbors."""
