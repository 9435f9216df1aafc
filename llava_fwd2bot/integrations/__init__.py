"""How other libraries open a Fwd2Bot checkpoint: sentence-transformers, mteb, transformers' command line."""
