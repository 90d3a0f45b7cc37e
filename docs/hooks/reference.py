"""The API's pages: made of the package, so that a new name needs no line in the documentation.

A page holds the modules that it names, and a section is a module: its heading is the first line of
the module's docstring, and its entries are the module's public names. The files are parsed and not
imported, so that the site can be built without what the package needs.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Page(NamedTuple):
    """A page of the reference."""

    title: str
    text: str
    modules: tuple[str, ...]  # Their beginnings, in reading order; the longest that fits a name's


class Entry(NamedTuple):
    """A public name."""

    path: str  # As users write it
    module: str  # Where it is defined
    place: tuple[bool, bool, int]  # In its module: its namesake, other functions, classes
    summary: str


# By file name. What no longer beginning claims goes to `samax._core` or `samax._methods`.
PAGES = {
    "methods": Page(
        "SAM and its relatives",
        "Each section is a paper: the method, and the parts that it adds. Put a method first in "
        "`optax.chain`.",
        ("samax._methods",),
    ),
    "cheaper": Page(
        "Fewer gradients",
        "When the ascent is made, what is reused where it is not, and perturbations that cost no "
        "gradient at all.",
        (
            "samax._core.occasionally",
            "samax._core.policies",
            "samax._methods.looksam",
            "samax._core.one_gradient",
            "samax._methods.stale_sam",
            "samax._methods.msam",
        ),
    ),
    "parts": Page(
        "The combinator and its parts",
        "An ascent maps the gradient to the perturbation. A descent maps the clean and the "
        "perturbed gradient to a direction. `samax.sharpness_aware` evaluates between them.",
        ("samax._core.combinator", "samax._core.ascent", "samax._core.descent", "samax._core"),
    ),
    "training": Page(
        "In your training script",
        "One changed line, a step in two calls, Flax NNX, groups of examples and several devices.",
        (
            "samax._core.value_and_grad",
            "samax.flax",
            "samax._core.alternating",
            "samax._core.eval_params",
            "samax._core.m_sharpness",
            "samax._core.devices",
        ),
    ),
    "universal": Page(
        "The universal class",
        "Any function of the Hessian's quadratic forms, by random perturbations.",
        (
            "samax._universal.combinator",
            "samax._universal.methods",
            "samax._universal",
            "samax.distributions",
        ),
    ),
    "balancing": Page(
        "Balanced factors",
        "Optimizers that also scale the cores of a product, the leaves that are such cores, and "
        "measures of their balance.",
        ("samax._balance",),
    ),
    "flatness": Page(
        "Flatness",
        "What an optimizer found: `from samax import flatness`. The figures need the extra "
        "`plots`: `from samax.flatness import plots`.",
        (
            "samax.flatness.perturbations",
            "samax.flatness.operators",
            "samax.flatness.spectrum",
            "samax.flatness.landscape",
            "samax.flatness",
        ),
    ),
}


def on_config(config: Any) -> None:
    """Expands the line `api/*` of the navigation."""
    for section in config.nav:
        if section.get("API") == "api/*":
            section["API"] = ["api/index.md", *(f"api/{name}.md" for name in PAGES)]


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    from mkdocs.structure.files import File

    # A search for a name shows its entry before the pages that use it.
    head = "---\nsearch: { boost: 8 }\n---\n\n"
    for name, text in pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=head + text))
    return files


def pages() -> dict[str, str]:
    """Returns the pages and their index, in Markdown, by file name."""
    found = entries()
    chosen = {entry.path: page_of(entry.module) for entry in found}
    index = [
        "# API",
        "`import samax` offers everything below except `samax.flax` and `samax.flatness`, which "
        "are imported on their own.",
    ]
    made = {}
    for name, page in PAGES.items():
        mine = [entry for entry in found if chosen[entry.path] == name]
        modules = list(dict.fromkeys(entry.module for entry in mine))
        modules.sort(key=lambda module: _claim(page, module)[1])  # else in the order of imports
        text = [f"# {page.title}", page.text]
        rows = ["| name | |", "| --- | --- |"]
        for module in modules:
            text.append(f"## {_first_line(_tree(module)).removesuffix('.')}")
            for entry in sorted((e for e in mine if e.module == module), key=lambda e: e.place):
                text.append(f"::: {entry.path}")
                label = entry.path.removeprefix("samax.")
                summary = entry.summary.replace("|", r"\vert ")  # bars end a cell
                rows.append(f"| [`{label}`][{entry.path}] | {summary} |")
        index += [f"## [{page.title}]({name}.md)", "\n".join(rows)]
        made[name] = "\n\n".join(text) + "\n"
    return {"index": "\n\n".join(index) + "\n"} | made


def page_of(module: str) -> str:
    """Returns the page that holds a module."""
    claims = {name: _claim(page, module)[0] for name, page in PAGES.items()}
    page = min(claims, key=lambda name: claims[name])
    if not claims[page]:
        raise ValueError(f"module={module!r}: name it on one of the PAGES of {__file__}")
    return page


def entries() -> list[Entry]:
    """Returns the public names, by module in the order of the imports that offer them."""
    found = []
    for package in ("samax", "samax.flatness"):
        imports = (node for node in _tree(package).body if isinstance(node, ast.ImportFrom))
        for node in imports:
            for alias in node.names:
                found.append(_entry(package, str(node.module), alias.name))
    for module in ("samax.flax", "samax.flatness.plots"):
        names = (node.name for node in _tree(module).body if isinstance(node, ast.FunctionDef))
        found += [_entry(module, module, name) for name in names if not name.startswith("_")]
    return found


def _entry(package: str, module: str, name: str) -> Entry:
    for index, node in enumerate(_tree(module).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            is_class, is_other = isinstance(node, ast.ClassDef), not module.endswith(f".{name}")
            place = (is_class, is_other, index)
            return Entry(f"{package}.{name}", module, place, _first_line(node))
    raise ValueError(f"{package}.{name} is neither a function nor a class of {module}")


def _claim(page: Page, module: str) -> tuple[int, int]:
    """How well a page fits a module, the better the lower, and the place of the module there."""
    fits = [
        (-len(beginning), place)
        for place, beginning in enumerate(page.modules)
        if f"{module}.".startswith(f"{beginning}.")
    ]
    return min(fits, default=(0, 0))


def _tree(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _first_line(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str:
    docstring = ast.get_docstring(node)
    if not docstring:
        raise ValueError(f"{getattr(node, 'name', 'a module')} has no docstring")
    return docstring.split("\n\n")[0].replace("\n", " ")
