"""A page of Markdown, with its pictures, as one file of HTML that loads nothing from elsewhere."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #eee; vertical-align: top; text-align: left;
         overflow-wrap: anywhere; }
img { max-width: 100%; }
pre { font: 13px/1.5 ui-monospace, monospace; background: #f6f6f6; padding: .6rem .9rem; overflow: auto; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a browser's own guard, should text ever get through


def html(markdown: str, folder: Path, title: str) -> str:
    """The page. HTML in the Markdown is text; pictures are read from their places in the folder, PNG."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for picture in (child for token in tokens for child in token.children or [] if child.type == "image"):
        content = base64.b64encode((folder / str(picture.attrs["src"])).read_bytes()).decode()
        picture.attrSet("src", f"data:image/png;base64,{content}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{parser.renderer.render(tokens, parser.options, {})}</body>\n</html>\n"
    )
