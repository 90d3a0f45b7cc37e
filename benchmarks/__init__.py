"""The benchmarks that reproduce the papers' claims, run with `python -m benchmarks.NAME`."""
