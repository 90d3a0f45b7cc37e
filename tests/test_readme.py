"""Every Python block of the README runs, in order and in one namespace, as a reader would."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(text: str) -> list[tuple[int, str]]:
    """The line at which each Python block starts, and its code."""
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in _BLOCK.finditer(text)]


def test_blocks_are_found_with_their_lines():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = x\n```\n"
    assert _blocks(text) == [(3, "x = 1\n"), (9, "y = x\n")]


def test_the_readme_runs(monkeypatch, tmp_path):
    text = README.read_text(encoding="utf-8")
    blocks = _blocks(text)
    if not blocks:
        pytest.skip("README.md has no Python block yet")
    monkeypatch.chdir(tmp_path)  # what a block writes does not land in the checkout
    namespace = {"__name__": "readme"}
    for line, code in blocks:
        # Padded, so that a traceback shows the README's own line numbers.
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)
