"""What the reference reads from the source beyond plain docstrings; nothing of the package is imported.

- Comments behind a field, as in a NamedTuple, are its docstring.
- Examples: doctests become code.
"""

import ast
import re
import textwrap

import griffe

DOCTEST = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.M | re.S)


class Comments(griffe.Extension):
    def on_attribute_instance(self, *, node, attr: griffe.Attribute, agent, **others) -> None:
        if not (isinstance(node, ast.AnnAssign) and attr.parent.is_class and attr.docstring is None):
            return
        line = agent.code.splitlines()[node.end_lineno - 1].encode()
        comment = line[node.end_col_offset :].decode().strip()
        if comment.startswith("# "):
            attr.docstring = griffe.Docstring(comment[2:], parent=attr)


class Examples(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **others) -> None:
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(_as_section, obj.docstring.value)


def _as_section(example: re.Match) -> str:
    return "Examples:\n" + textwrap.indent(example[0], "    ")
