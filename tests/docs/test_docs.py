"""The documentation's site: every name has its page, and what the hooks do to pages."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

import samax
import samax.flatness
import samax.flatness.plots
import samax.flax
from tests.methods import METHODS

ROOT = Path(__file__).parents[2]


def _hook(name):
    """A file of docs/hooks, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generated, reference, rendering = map(_hook, ("generated", "reference", "rendering"))


def _public(module):
    return {
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }


def test_every_public_name_is_on_one_page_of_the_reference_and_in_its_index():
    pages = reference.pages()
    index = pages.pop("index")
    documented = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE)
    wanted = {f"{m.__name__}.{name}" for m in (samax, samax.flatness) for name in m.__all__}
    wanted = wanted.union(*map(_public, (samax.flax, samax.flatness.plots)))
    assert sorted(documented) == sorted(wanted)
    rows = re.findall(r"^\| \[`(\S+)`\]\[samax\.(\S+)\] \| (\S.*\.) \|$", index, re.MULTILINE)
    assert sorted(f"samax.{label}" for label, _, _ in rows) == sorted(wanted)
    assert all(label == name for label, name, _ in rows)
    assert ("sam", "sam", "Sharpness-aware minimization.") in rows


def test_a_new_module_has_its_page_without_being_named():
    assert reference.page_of("samax._methods.tomorrow") == "methods"
    assert reference.page_of("samax._core.tomorrow") == "parts"
    assert reference.page_of("samax._methods.msam") == "cheaper"
    assert reference.page_of("samax.flatness.tomorrow") == "flatness"
    with pytest.raises(ValueError, match=r"module='samax\.tomorrow'.*PAGES"):
        reference.page_of("samax.tomorrow")


def test_every_file_of_methods_has_its_line_in_a_table():
    pages = [ROOT / "README.md", *(ROOT / "docs" / "methods").glob("*.md")]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    tables = "\n".join(line for line in lines if line.startswith("|"))
    named = {
        entry.module
        for entry in reference.entries()
        if re.search(rf"`(samax\.)?{entry.path.rsplit('.')[-1]}\b", tables)
    }
    files = (ROOT / "samax" / "_methods").glob("[a-z]*.py")
    assert {f"samax._methods.{path.stem}" for path in files} <= named


def test_every_row_of_the_tests_has_its_line_in_the_readmes_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in readme.splitlines() if line.startswith("|"))
    checked = [name for name, row in METHODS.items() if row.golden or row.reference]
    missing = [name for name in checked if f"`{name}" not in table]
    assert missing == ["where steep"]  # a policy of `occasionally`


def test_links_lead_to_the_sites_own_pages():
    led = generated.led_to_site
    assert led("[a](docs/lora.md#x)", "README.md") == "[a](lora.md#x)"
    assert led("[a](../README.md)", "docs/lora.md") == "[a](index.md)"
    assert led("[a](../lora.md)", "docs/methods/index.md") == "[a](../lora.md)"
    assert (
        led("![a](../../benchmarks/results/x/y.png)", "docs/methods/index.md")
        == "![a](../results/x/y.png)"
    )
    assert (
        led("[a](../../notebooks/01_x.ipynb)", "docs/methods/a.md") == "[a](../notebooks/01_x.md)"
    )
    assert led("[a](02_x.ipynb)", "notebooks/01_x.ipynb") == "[a](02_x.md)"
    for kept in ("[a](https://x.y/z.md)", "[a](#b)", "`f(x)[0](y)`"):
        assert led(kept, "docs/lora.md") == kept


def test_bars_in_the_code_of_tables_are_plain():
    assert generated.with_plain_bars("| `\\|w\\|` | a \\| b |") == "| `|w|` | a \\| b |"
    assert generated.with_plain_bars("`\\|w\\|`") == "`\\|w\\|`"


def test_a_notebook_becomes_a_page_with_its_outputs():
    text, figures = generated.notebook_page(
        {
            "cells": [
                {"cell_type": "markdown", "source": ["# Title\n", "[next](02_b.ipynb)"]},
                {
                    "cell_type": "code",
                    "source": ["x = 1\n", "print(x)"],
                    "outputs": [
                        {"output_type": "stream", "text": ["1\n"]},
                        {"output_type": "display_data", "data": {"image/png": "AAEC"}},
                    ],
                },
            ]
        },
        "01_a",
    )
    assert text == (
        "# Title\n[next](02_b.md)\n\n```python\nx = 1\nprint(x)\n```\n\n```text\n1\n```\n\n"
        "![A figure of this notebook](01_a-1.png)\n"
    )
    assert figures == {"01_a-1.png": bytes([0, 1, 2])}


def test_the_navigation_names_what_there_is():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1].split("\ntheme:")[0]
    pages = set(re.findall(r": (\S+\.md)$", nav, re.MULTILINE))
    made = {"index.md", "contributing.md", "changelog.md"}
    assert pages - made == {
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("**/*.md")
    }


def test_search_finds_names_by_their_parts():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    separator = re.search(r"separator: '(.*?)'", config)[1]
    words = re.split(separator, "samax.friendly_sam(rho=0.05)")
    assert words == ["samax", "friendly", "sam", "rho", "0.05", ""]


def test_names_of_samax_become_links_but_in_code_and_headings():
    linked = rendering.linked
    assert linked("<p><code>samax.sam(rho=0.1)</code></p>") == (
        '<p><autoref identifier="samax.sam" optional><code>samax.sam(rho=0.1)</code></autoref></p>'
    )
    for kept in (
        "<h2><code>samax.sam</code></h2>",
        '<a href="x"><code>samax.sam</code></a>',
        "<pre><code>samax.sam</code></pre>",
        "<code>optax.sgd</code>",
    ):
        assert linked(kept) == kept


def test_cells_of_tables_know_the_head_of_their_column():
    head = "<thead><tr><th>a <code>b</code></th><th>c</th></tr></thead>"
    table = f"<table>{head}<tbody><tr><td>1</td><td style='x'>2</td></tr></tbody></table>"
    assert rendering.labelled(f"<p>{table}<td>") == (
        f'<p><table>{head}<tbody><tr><td data-label="a b">1</td>'
        "<td data-label=\"c\" style='x'>2</td></tr></tbody></table><td>"
    )


def test_notebooks_are_executed_and_name_no_machine():
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert '"execution_count": null' not in text
        assert '"image/png"' in text
        for words in ("/home/", "/root/", "/tmp/", "Traceback", "Warning"):
            assert words not in text, f"{path.name}: {words}"
    assert sum(path.stat().st_size for path in paths) < 3_000_000


def test_notebooks_import_no_other_package_of_ours():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", code, re.MULTILINE)
        assert "samax" in imported
        assert {name.split(".")[0] for name in imported} & {
            "benchmarks",
            "notebooks",
            "tests",
        } == set()


def test_math_becomes_mathml():
    pytest.importorskip("latex2mathml", reason="it comes with the extra docs")
    inline = rendering.to_mathml(r"\lVert g \rVert", block=False)
    assert inline.startswith("<math")
    assert 'lspace="0"' in inline
    assert "\\" not in inline
    assert "\\" in rendering.to_mathml(r"\nosuchcommand", block=True)
