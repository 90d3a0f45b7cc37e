"""What is done to the rendered pages: math becomes MathML, names of samax become links.

A number also stays on one line with its error, a figure opens in full size, and the cells of a
table know their column's head, which narrow screens show beside them.

MathML is made here and drawn by the browser itself, with a font of the site's own: reading a page
needs no script and no other server, as KaTeX and MathJax do unless they are copied into the site.
"""

from __future__ import annotations

import html
import logging
import re
from typing import Any

_MATH = re.compile(
    r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<tex>.*?)\\[\])]</(?P=tag)>', re.DOTALL
)
# What is not to hold a link: links, headings, blocks of code. Then, a name of samax as code.
_NAME = re.compile(
    r"(?P<kept><(?P<tag>a|h\d|pre|autoref)\b.*?</(?P=tag)>)"
    r"|<code>(?P<name>samax\.[a-z_.]*[A-Za-z_]+)(?P<call>\([^<]*\))?</code>",
    re.DOTALL,
)
_FIGURE = re.compile(r'<img\b[^>]*\bsrc="([^"]+)"[^>]*>')
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_log = logging.getLogger("mkdocs.hooks.rendering")


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Renders a page's math, and links the names of samax in it to the API reference."""
    del config, files

    def render(match: re.Match[str]) -> str:
        tex = html.unescape(match["tex"]).strip()
        mathml = to_mathml(tex, block=match["tag"] == "div")
        if "\\" in mathml:  # strict builds fail
            _log.warning("%s: a command is not known in the formula %r", page.file.src_uri, tex)
        return mathml

    content = labelled(linked(_MATH.sub(render, content)))
    content = _FIGURE.sub(r'<a href="\1">\g<0></a>', content)
    return content.replace(" ± ", "&nbsp;±&nbsp;")


def to_mathml(tex: str, *, block: bool) -> str:
    """Converts a formula to MathML."""
    from latex2mathml.converter import convert

    mathml = convert(tex, display="block" if block else "inline")
    # The bars of a norm are fences: without the space of a relation around them.
    for bar in ("&#x02016;", "&#x0007C;"):
        mathml = mathml.replace(
            f"<mo>{bar}</mo>", f'<mo stretchy="false" lspace="0" rspace="0">{bar}</mo>'
        )
    return f'<div class="formula">{mathml}</div>' if block else mathml


def linked(content: str) -> str:
    """Makes references of the names of samax that stand as code in rendered text."""

    def link(match: re.Match[str]) -> str:
        if match["kept"]:
            return match["kept"]
        name, call = match["name"], match["call"] or ""
        return f'<autoref identifier="{name}" optional><code>{name}{call}</code></autoref>'

    return _NAME.sub(link, content)


def labelled(content: str) -> str:
    """Writes the head of its column to each cell of the tables."""

    def label(match: re.Match[str]) -> str:
        heads = re.findall(r"<th[^>]*>(.*?)</th>", match[0], re.DOTALL)
        texts = [html.escape(re.sub("<[^>]*>", "", head)) for head in heads]
        rows = match[0].split("<tr>")
        for index, row in enumerate(rows):
            cells = row.split("<td")
            labels = [f'<td data-label="{text}"' for text in texts]
            rows[index] = cells[0] + "".join(map("".join, zip(labels, cells[1:], strict=False)))
        return "<tr>".join(rows)

    return _TABLE.sub(label, content)
