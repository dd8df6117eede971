"""The page shows text as it is written, and loads nothing."""

import base64
import dataclasses
import re
import warnings
from html.parser import HTMLParser

import pytest

import larpo
from larpo import LarPOConfig
from larpo.data.summary.page import page
from larpo.data.summary.plots import histograms
from larpo.data.summary.spread import spread_of
from tests.helpers.tokenizer_families import tiny_tokenizer

EVIL = '<script src="https://x.org/a.js">alert(1)</script><img src=x onerror=alert(2)> "\' &lt; ]]> \u202e \x1b[31m'


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text, self.marked, self.inside = [], [], "", "", False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = self.inside or tag == "mark"
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data", "poster")]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "mark"

    def handle_data(self, text):
        self.text += text
        self.marked += text if self.inside else ""


@pytest.fixture(scope="module")
def summary():
    rows = [{"prompt": f"{EVIL} the rain?", "completions": [f" {EVIL} yes", " no"], "scores": [1.0, 0.0], "id": EVIL}]
    return larpo.describe(rows, tiny_tokenizer("byte-level"), LarPOConfig(report_to=[], use_cpu=True))


@pytest.fixture(scope="module")
def text(summary):
    return page({f"train {EVIL}": summary})


def test_text_of_the_data_is_text_on_the_page(text):
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags and reader.tags.count("img") == 1
    plain = EVIL.replace("\u202e", "\\u202e").replace("\x1b", "\\u001b")
    assert reader.text.count(plain) >= 4  # title, heading, prompt, answer
    assert f"{plain} yes" in reader.marked and "the rain?" not in reader.marked


def test_nothing_is_loaded_from_elsewhere(text):
    reader = Reader()
    reader.feed(text)
    assert [link.split(",")[0] for link in reader.links] == ["data:image/svg+xml;base64"]
    assert "default-src 'none'" in text and not re.search(r"url\(|@import", text)
    picture = base64.b64decode(reader.links[0].split(",")[1]).decode()
    assert not re.search(r"<(script|image|foreignObject)|href=\"(?!#)|url\((?!#)", picture)


@pytest.mark.parametrize(
    "numbers",
    [
        ([3], [0, 1e9], [*range(99), 10**7], [-1e300, *range(30), 1e300]),
        ([1.7e308], [-1.7e308, 1.7e308], [-1.7e308, *range(30), 1.7e308], [*range(300), 1.7e308]),
    ],
)
def test_a_picture_of_any_data_can_be_drawn(summary, numbers):
    spreads = map(spread_of, numbers)
    names = ("sizes", "scores", "prompt_tokens", "completion_tokens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = histograms(dataclasses.replace(summary, **dict(zip(names, spreads, strict=True))), "png")
    assert picture.startswith(b"\x89PNG")
