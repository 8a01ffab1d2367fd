"""Running a model: prompts to batches, prefill, decode."""
