"""Files of rows, as users have them."""

import gzip
import json


def write_jsonl(path, rows):
    """A line for each row, compressed if the name says so; a row that is text already stays as it is. Returns the path."""
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path
