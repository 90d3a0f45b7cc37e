"""Type checkers find nothing in a script that uses every documented call."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import samax
import samax.flax

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "user_script.py"


def test_the_script_uses_every_factory():
    text = SCRIPT.read_text(encoding="utf-8")
    used = set(re.findall(r"samax\.(\w+)", text))
    types = {name for name in samax.__all__ if name[0].isupper() and name != "Sampling"}
    assert set(samax.__all__) - types <= used


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_checker_finds_nothing(checker):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed; mypy comes with the extra lint")
    where = {"mypy": "--python-executable", "pyright": "--pythonpath"}[checker]
    done = subprocess.run(
        [sys.executable, "-m", checker, where, sys.executable, str(SCRIPT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
