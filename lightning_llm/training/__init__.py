"""What surrounds a training run: loop, journal, loggers and console, and what a policy samples meanwhile."""
