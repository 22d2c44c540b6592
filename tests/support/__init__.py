"""What test modules share: tiny models and behaviors, references, programs in processes."""
