"""The one optimizer step, and the optimizers."""
