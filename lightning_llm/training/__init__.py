"""What surrounds a training run: progress on the console."""
