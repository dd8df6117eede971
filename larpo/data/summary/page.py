"""Facts of data as one page of HTML that needs nothing but itself.

It is built as a tree, so that all text on it is escaped; its one picture stands in it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from ..html_page import html_page
from ..visible import visible
from .facts import Answer, DataSummary, Example
from .plots import histograms
from .words import Row, sections

STYLE = """
body { max-width: 62rem; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 0 2rem;
          align-items: start; }
.wide { grid-column: 1 / -1; }
table { width: 100%; }
td { padding: .15rem .6rem .15rem 0; }
td:first-child { white-space: nowrap; color: #555; } td.note { color: #777; font-size: .85rem; }
tr.warns td:nth-child(2) { color: #a04000; font-weight: 600; }
img { width: 100%; }
article { border: 1px solid #ddd; border-radius: 6px; margin: .8rem 0; padding: .6rem .9rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem; max-height: 22rem; }
mark { background: #cdeccf; color: inherit; } .read { color: #888; } .about { color: #555; font-size: .85rem; }
"""


def page(summaries: Mapping[str, DataSummary]) -> str:
    """The page of one data set or several, by their names."""
    found = [element for name, summary in summaries.items() for element in _of_one(name, summary)]
    body = "\n".join(ElementTree.tostring(element, encoding="unicode", method="html") for element in found)
    return html_page(f"Data: {', '.join(summaries)}", STYLE, body)


def _of_one(name: str, summary: DataSummary) -> list[Element]:
    picture = base64.b64encode(histograms(summary)).decode()
    tables = [
        _tag(
            "section",
            _tag("h2", title),
            _table(rows),
            **({"class": "wide"} if title in ("How it was read", "Left out") else {}),
        )
        for title, rows in sections(summary).items()
    ]
    about = "Lists as they are trained on. The loss is of the tokens "
    return [
        _tag("h1", f"Data: {name}"),
        _tag("div", *tables, **{"class": "tables"}),
        _tag("img", src=f"data:image/svg+xml;base64,{picture}", alt="Histograms of sizes, scores and tokens"),
        _tag("h2", "Lists"),
        _tag("p", about, _tag("mark", "marked so"), "; others are read by the policy and not written by it."),
        *map(_example, summary.examples),
    ]


def _table(rows: list[Row]) -> Element:
    def cells(row: Row) -> list[Element]:
        return [_tag("td", row.label), _tag("td", row.value), _tag("td", row.note, **{"class": "note"})]

    return _tag("table", *(_tag("tr", *cells(row), **({"class": "warns"} if row.warns else {})) for row in rows))


def _example(example: Example) -> Element:
    cut = f", {example.prompt_cut:,} more cut" if example.prompt_cut else ""
    about = f"Row {example.row:,}: prompt of {example.prompt_tokens:,} tokens{cut}"
    more = [_about(f"and {example.answers_not_shown:,} more answers")] if example.answers_not_shown else []
    answers = [element for answer in example.answers for element in _answer(answer)]
    return _tag("article", _about(about), _tag("pre", "\n", example.prompt), *answers, *more)


def _answer(answer: Answer) -> list[Element]:
    cut = f", {answer.cut:,} more cut" if answer.cut else ""
    parts = [_tag("mark", text) if counted else _tag("span", text, **{"class": "read"}) for counted, text in answer.parts]
    return [_about(f"Score {answer.score:g}, {answer.tokens:,} tokens{cut}"), _tag("pre", "\n", *parts)]


def _about(text: str) -> Element:
    return _tag("div", text, **{"class": "about"})


def _tag(name: str, /, *children: Element | str, **attributes: str) -> Element:
    element = Element(name, attributes)
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + visible(child)
        else:
            element.text = (element.text or "") + visible(child)
    return element
