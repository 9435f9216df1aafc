"""Which way to make k tokens of an image keeps most, on a base whose images matter: see README.md beside this file."""
