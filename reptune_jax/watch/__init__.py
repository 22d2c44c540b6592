"""What watches a run: metrics.jsonl, TensorBoard events, cosines and their picture."""
