"""Speed, measured from the repository root: `python -m benchmarks.side_by_side`, `.throughput`, `.arms_in_one`."""
