"""Every Python block of the README and of a docs page runs, in order and in one namespace.

And every row of results that they quote stands in the results.
"""

import re
from pathlib import Path

import pytest

from tests.marks import slow_unless

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(text: str) -> list[tuple[int, str]]:
    """The line at which each Python block starts, and its code."""
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in _BLOCK.finditer(text)]


def test_blocks_are_found_with_their_lines():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = x\n```\n"
    assert _blocks(text) == [(3, "x = 1\n"), (9, "y = x\n")]


@pytest.mark.parametrize(
    "page",
    slow_unless(
        ["README.md"],
        [
            page.relative_to(ROOT).as_posix()
            for page in PAGES
            if _blocks(page.read_text(encoding="utf-8"))
        ],
    ),
)
def test_a_page_runs(page, monkeypatch, tmp_path):
    page = ROOT / page
    blocks = _blocks(page.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)  # what a block writes does not land in the checkout
    namespace = {"__name__": page.stem}
    for line, code in blocks:
        # Padded, so that a traceback shows the page's own line numbers.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def _quoted(page: Path) -> list[tuple[str, str]]:
    """The tables of results in a page: where each is from, and its text."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^<!-- from (.*?) -->\n\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)


def _cells(row: str) -> list[str]:
    """What a row of a table says, however wide its columns are."""
    return [re.sub("^-+$", "-", cell.strip()) for cell in row.split("|")]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if _quoted(page)],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_the_results_quoted_are_those_of_the_files(page):
    """Every row of a results table stands in the file that the table says it is from."""
    for source, table in _quoted(page):
        rows = [_cells(line) for line in (ROOT / source).read_text(encoding="utf-8").splitlines()]
        assert [line for line in table.splitlines() if _cells(line) not in rows] == []


def test_results_are_quoted_from_their_files():
    quoting = {page.relative_to(ROOT).as_posix() for page in PAGES if _quoted(page)}
    assert "docs/results.md" in quoting
    for page in PAGES:  # a table of means and errors that says not where it is from
        lines = page.read_text(encoding="utf-8").splitlines()
        tables = sum("±" in line and line.startswith("|") for line in lines)
        quoted = sum("±" in line for _, table in _quoted(page) for line in table.splitlines())
        assert tables == quoted, page.name


def test_a_table_of_results_has_one_home():
    homes = {}
    for page in PAGES:
        for source, table in _quoted(page):
            for line in table.splitlines()[2:]:
                homes.setdefault((source, tuple(_cells(line))), set()).add(page.name)
    assert {row: pages for row, pages in homes.items() if len(pages) > 1} == {}


def test_the_readme_is_a_page():
    text = re.sub(r"^```.*?^```$", "", PAGES[0].read_text(encoding="utf-8"), flags=re.M | re.S)
    prose = re.sub(r"\]\(\S*\)", "]", re.sub(r"^[|!].*$", "", text, flags=re.M))
    assert len(prose.split()) <= 350
