"""Checkpoints: which are supported, how they are loaded, adapted and exported; the tiny model."""
