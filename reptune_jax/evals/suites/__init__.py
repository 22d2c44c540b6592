"""Public tests of multiple choice: readers, scores, verdicts."""
