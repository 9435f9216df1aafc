"""Summaries on disk: codecs, the cache and its maintenance, filling it, search."""
