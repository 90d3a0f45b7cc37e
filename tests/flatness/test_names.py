"""The namespace `samax.flatness`."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from samax import flatness


def test_no_public_name_hides_a_module():
    for name in flatness.__all__:
        assert callable(getattr(flatness, name))
        assert importlib.util.find_spec(f"samax.flatness.{name}") is None
    assert len(set(flatness.__all__)) == len(flatness.__all__)


def test_it_is_imported_by_who_asks_for_it():
    code = """
import sys, samax
assert not any(name.startswith("samax.flatness") for name in sys.modules)
import samax.flatness
assert "samax.flatness.plots" not in sys.modules
assert "matplotlib" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
