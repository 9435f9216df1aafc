"""Inputs of the model: images from files, conversations as prompts."""
