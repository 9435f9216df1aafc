"""Benchmark scripts and studies that use the package. They run from a checkout: `python -m eval.studies.NAME`."""
