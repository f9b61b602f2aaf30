"""Merging: pure functions that make one state of several. Nothing here reads a file or trains."""
