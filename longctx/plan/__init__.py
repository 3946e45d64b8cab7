"""Predicts a run before it starts: memory, traffic and time."""
