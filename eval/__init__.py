"""Benchmarks. Importable as `llava_fwd2bot.eval` once the package is installed; each file is also a script."""
