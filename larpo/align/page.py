"""A page of Markdown, with its pictures, as one file of HTML that loads nothing from elsewhere."""

from __future__ import annotations

import base64
from pathlib import Path

from markdown_it import MarkdownIt

from ..data.html_page import html_page

STYLE = """
body { max-width: 70rem; }
td, th { padding: .2rem .8rem .2rem 0; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: .6rem .9rem; }
"""


def html(markdown: str, folder: Path, title: str) -> str:
    """The page. HTML in the Markdown is text; pictures are read from their places in the folder, PNG."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for picture in (child for token in tokens for child in token.children or [] if child.type == "image"):
        content = base64.b64encode((folder / str(picture.attrs["src"])).read_bytes()).decode()
        picture.attrSet("src", f"data:image/png;base64,{content}")
    return html_page(title, STYLE, parser.renderer.render(tokens, parser.options, {}))
