"""Every Python block of the README and of a docs page runs, in order and in one namespace."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(text: str) -> list[tuple[int, str]]:
    """The line at which each Python block starts, and its code."""
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in _BLOCK.finditer(text)]


def test_blocks_are_found_with_their_lines():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = x\n```\n"
    assert _blocks(text) == [(3, "x = 1\n"), (9, "y = x\n")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page, monkeypatch, tmp_path):
    blocks = _blocks(page.read_text(encoding="utf-8"))
    assert blocks
    monkeypatch.chdir(tmp_path)  # what a block writes does not land in the checkout
    namespace = {"__name__": page.stem}
    for line, code in blocks:
        # Padded, so that a traceback shows the page's own line numbers.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_the_results_quoted_are_those_of_the_files():
    """Every row of a results table in the README stands in a summary under benchmarks/results."""
    summaries = sorted((ROOT / "benchmarks" / "results").glob("*/summary.md"))
    rows = {line for path in summaries for line in path.read_text(encoding="utf-8").splitlines()}
    quoted = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = re.findall(r"^<!-- from (.*?) -->\n\n(.*?)\n\n", quoted, re.MULTILINE | re.DOTALL)
    assert sections
    for source, table in sections:
        assert (ROOT / source).is_file()
        assert [line for line in table.splitlines() if line not in rows] == []
