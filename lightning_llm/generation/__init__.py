"""Text out of a model: batched, with a KV cache."""
