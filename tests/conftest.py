"""Configuration of the whole test suite."""

import os

import hypothesis

# Before matplotlib is imported: the tests need no display.
os.environ.setdefault("MPLBACKEND", "Agg")

# An example's first run compiles, so its time says nothing. Derandomized: a failure on one machine
# is a failure on every machine.
hypothesis.settings.register_profile("samax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("samax")
