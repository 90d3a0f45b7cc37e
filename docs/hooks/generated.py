"""Pages that are made and not written: the home page, notebooks, benchmark results.

MkDocs reads `docs/`; what the site shows from elsewhere in the checkout is added here, so that
nothing is copied by hand. Links are written for the checkout, where a reader of the files follows
them, and are led to the site's own pages.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from importlib.metadata import files as files_of
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOKS = ROOT / "notebooks"
MATH_FONT = "STIXTwoMath-Regular.ttf"

# Pages by their place in the checkout.
_MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)#\s]+)")
_CODE = re.compile(r"`[^`\n]+`")


def on_config(config: Any) -> None:
    """Expands the lines of the navigation that end in `*`."""
    for section in _sections(config.nav):
        for title, place in section.items():
            if place == "notebooks/*":
                section[title] = [f"notebooks/{path.stem}.md" for path in _notebooks()]
            elif place == "results/*":
                names = [_name(path) for path in _summaries()]
                section[title] = [{name: f"results/{name}/summary.md"} for name in names]


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages, and the figures that they show."""
    from mkdocs.structure.files import File

    def add(place: str, content: str | bytes) -> None:
        files.append(File.generated(config, place, content=content))

    for source, place in _MOVED.items():
        add(place, led_to_site((ROOT / source).read_text(encoding="utf-8"), source))
    for path in _notebooks():
        text, figures = notebook_page(json.loads(path.read_text(encoding="utf-8")), path.stem)
        add(f"notebooks/{path.stem}.md", text)
        for name, png in figures.items():
            add(f"notebooks/{name}", png)
    for path in _summaries():
        add(f"results/{_name(path)}/summary.md", results_page(path))
    for path in sorted(RESULTS.glob("**/*.png")):
        add(f"results/{path.relative_to(RESULTS).as_posix()}", path.read_bytes())
    # Brackets that grow need a font with the tables for math; most Linux systems have none.
    (font,) = (file for file in files_of("ziamath") or () if file.name == MATH_FONT)
    add(f"assets/{MATH_FONT}", font.read_binary())
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads the links of the pages under `docs/` to the site's."""
    del config, files
    if not page.file.generated_by:
        markdown = led_to_site(markdown, f"docs/{page.file.src_uri}")
    return with_plain_bars(markdown)


def with_plain_bars(markdown: str) -> str:
    r"""Writes `|` for `\|` in the code of tables: GitHub needs the backslash, MkDocs shows it."""
    lines = markdown.split("\n")
    return "\n".join(
        _CODE.sub(lambda code: code[0].replace(r"\|", "|"), line) if line.startswith("|") else line
        for line in lines
    )


def led_to_site(markdown: str, source: str) -> str:
    """Rewrites relative links that lead out of `docs/`.

    Args:
        markdown: A page.
        source: Its place in the checkout.

    Returns:
        The page with its links relative to its place on the site.
    """
    folder = posixpath.dirname(_site_place(source))

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] + posixpath.relpath(_site_place(target), folder or ".")

    return _LINK.sub(lead, markdown)


def _site_place(place: str) -> str:
    """The place on the site of a file of the checkout."""
    if place in _MOVED:
        return _MOVED[place]
    if place.startswith("notebooks/"):
        return place.removesuffix(".ipynb") + ".md" if place.endswith(".ipynb") else place
    return place.removeprefix("benchmarks/").removeprefix("docs/")


def notebook_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Makes a page of an executed notebook.

    Args:
        notebook: Its JSON.
        name: Its file's name without the suffix.

    Returns:
        The page, and its figures by file name.
    """
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(led_to_site(source, f"notebooks/{name}.ipynb"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                figure = f"{name}-{len(figures) + 1}.png"
                figures[figure] = base64.b64decode(data["image/png"])
                parts.append(f"![A figure of this notebook]({figure})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n", figures


def results_page(summary: Path) -> str:
    """Makes a page of a benchmark's summary, followed by the figures that it does not show itself.

    Args:
        summary: The path of `summary.md`.
    """
    folder = summary.parent
    inner = [path.parent for path in folder.glob("*/**/summary.md")]  # they have pages of their own
    text = summary.read_text(encoding="utf-8")
    if not text.startswith("# "):
        text = f"# {folder.name}\n\n{text}"
    for path in sorted(folder.glob("**/*.png")):
        place = path.relative_to(folder).as_posix()
        if f"]({place})" not in text and not any(path.is_relative_to(other) for other in inner):
            text += f"\n![{path.stem.replace('_', ' ')} of {folder.name}]({place})\n"
    return text


def _sections(nav: list[Any]) -> list[dict[str, Any]]:
    found = [item for item in nav if isinstance(item, dict)]
    inner = [place for section in found for place in section.values() if isinstance(place, list)]
    return found + [section for items in inner for section in _sections(items)]


def _notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def _summaries() -> list[Path]:
    return sorted(RESULTS.glob("**/summary.md"))


def _name(summary: Path) -> str:
    return summary.parent.relative_to(RESULTS).as_posix()
