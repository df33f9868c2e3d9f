"""Checkpoints: which are understood, how they are loaded, adapted and exported; the tiny model."""
