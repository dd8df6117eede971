"""What is in data that is trained on: facts of it, computed once (facts.py), said in words (words.py) on the terminal
(terminal.py) and on a page of HTML (page.py), and kept in a file of JSON (files.py)."""

from .facts import DataSummary, summarise
from .files import FILE, as_json, read_summaries, write_summaries

__all__ = ["FILE", "DataSummary", "as_json", "read_summaries", "summarise", "write_summaries"]
