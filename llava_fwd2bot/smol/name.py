"""The name by which every command knows smol-llava."""

NAME = "smol-llava"
