"""Losses: pure functions on tensors. Nothing is averaged here."""
