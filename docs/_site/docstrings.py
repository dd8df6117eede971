"""What the reference reads from the source beyond plain docstrings; nothing of the package is imported.

- Settings: `beta: float = _arg(0.1, "Scale of ...")` and `field(default=0.1, metadata={"help": "..."})` are attributes with a
  default and a docstring.
- Comments behind a field, as in a NamedTuple, are its docstring.
- Examples: doctests become code.
"""

import ast
import re
import textwrap

import griffe

DOCTEST = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.M | re.S)


class Settings(griffe.Extension):
    def on_attribute_instance(self, *, node, attr: griffe.Attribute, agent, **others) -> None:
        call = getattr(node, "value", None)
        if not (isinstance(node, ast.AnnAssign) and isinstance(call, ast.Call) and attr.docstring is None):
            return
        given = {one.arg: one.value for one in call.keywords}
        if ast.unparse(call.func) == "_arg":
            given |= dict(zip(("default", "text", "factory"), call.args, strict=False))
        elif ast.unparse(call.func) != "field":
            return
        attr.value = ast.unparse(given["default"]) if "default" in given else None
        text = given.get("text") or _help(given.get("metadata"))
        if isinstance(text, ast.Name):  # a constant of the module
            text = ast.parse(str(agent.current.module[text.id].value), mode="eval").body
        if isinstance(text, ast.Constant):
            attr.docstring = griffe.Docstring(text.value, parent=attr)


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


def _help(metadata: ast.expr | None) -> ast.expr | None:
    if not isinstance(metadata, ast.Dict):
        return None
    texts = {ast.literal_eval(key): value for key, value in zip(metadata.keys, metadata.values, strict=True)}
    return texts.get("help")
