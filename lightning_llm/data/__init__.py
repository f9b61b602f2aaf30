"""From rows of text, conversations and pairs to the batches of a training step."""
