"""Checkpoints: the files of one, opening it, converting it."""
