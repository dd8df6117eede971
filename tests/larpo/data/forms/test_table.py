"""The table of forms in docs/data.md is that of the code."""

import re
from pathlib import Path

from larpo.data.forms.table import table

PAGE = Path(__file__).resolve().parents[4] / "docs" / "data.md"


def test_the_table_of_forms_in_the_docs_is_that_of_the_code():
    found = re.search(
        r"<!-- forms: python -m larpo\.data\.forms\.table -->\n(.*?)\n<!-- /forms -->", PAGE.read_text(encoding="utf-8"), re.S
    )
    assert found and found[1] == table()
