"""A page of HTML in one file. Its policy has the browser load nothing from elsewhere, even if text got onto it unescaped."""

from __future__ import annotations

from html import escape

from .visible import visible

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; }
td, th { border-bottom: 1px solid #eee; vertical-align: top; text-align: left; overflow-wrap: anywhere; }
pre { font: 13px/1.5 ui-monospace, monospace; overflow: auto; }
"""


def html_page(title: str, style: str, body: str) -> str:
    """The page. style: CSS beside the common one; body: HTML, whose texts are escaped and whose pictures are data."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(visible(title))}</title>\n<style>{STYLE}{style.lstrip()}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
