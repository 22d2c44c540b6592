"""Behaviors, neutral texts, and what a run reads from them: contrasts, tuning examples, batches."""
