"""Nothing that a model wrote acts on the page that shows it."""

import re

import pytest

from larpo.align.markdown import block, cell, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\x07", r"a\\u001b\[31mb\\u0007"),
        ("a\u202eb\u2066c\u200fd\u061ce", r"a\\u202eb\\u2066c\\u200fd\\u061ce"),
        ("a\u200bb\ufeffc\u00add\U000e0041e", r"a\\u200bb\\ufeffc\\u00add\\ue0041e"),
        ("a\ud800b", r"a\\ud800b"),
        ("line\u2028one\x0ctwo\r\nthree\x85four", "line one two three four"),
        ("<script>x</script>&#x202e;", r"\<script\>x\</script\>\&\#x202e;"),
        ("a|b `c` [d](https://e.org) www.f.org", r"a\|b \`c\` \[d\](https:\//e.org) www\.f.org"),
        ("👩\u200d👧 क्\u200dष é 中文", "👩\u200d👧 क्\u200dष é 中文"),
        ([{"role": "assistant", "content": "**a**"}], r"\*\*a\*\*"),
    ],
)
def test_a_cell_shows_a_text_and_is_nothing_else(text, shown):
    assert cell(text) == shown
    shown.encode("utf-8")


def test_a_long_text_is_cut_before_it_is_escaped():
    assert cell("*" * 300) == "\\*" * 199 + "…"


def test_a_block_ends_where_it_ends():
    text = "a: 'x\n\n  ```\n\n  # y\u202e'"
    assert block(text, "yaml") == "````yaml\na: 'x\n\n  ```\n\n  # y\\u202e'\n````"
    assert visible("a\n\tb") == "a\n\\u0009b"


def test_a_page_of_html_shows_texts_as_they_are_and_loads_nothing(tmp_path):
    from larpo.align.page import html

    bad = "</pre></td><script>alert(1)</script> ![a](http://e.org/a.png) [b](javascript:alert(1)) <img src=x onerror=alert(1)>"
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.png").write_bytes(b"\x89PNG")
    page = f"# {cell(bad)}\n\n| a |\n| - |\n| {cell(bad)} |\n\n![Plot](plots/a.png)\n\n<b>raw</b>\n\n{block(bad, 'yaml')}\n"
    found = html(page, tmp_path, f"of {bad}")
    tags = set(re.findall(r"<(/?[a-z0-9]+)", found))
    assert not tags & {"script", "b", "a"} and found.count("<img") == 1
    assert '<img src="data:image/png;base64,iVBORw==" alt="Plot" />' in found
    assert found.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4 and "default-src 'none'" in found
    assert "<td>&lt;/pre&gt;&lt;/td&gt;&lt;script&gt;" in found and "&lt;b&gt;raw&lt;/b&gt;" in found
