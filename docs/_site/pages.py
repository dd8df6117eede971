"""Pages and pictures of the repository outside docs/, for the site: links stay those that work on GitHub."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
AT_ROOT = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")  # pages of the site that stand beside README.md
HOME = {ROOT / "README.md": DOCS / "index.md"}  # the site has a first page of its own
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
COMMANDS = "<!-- commands -->"


def on_files(files: Files, config) -> Files:
    for name in AT_ROOT:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(text: str, page, config, files: Files) -> str:
    if COMMANDS in text:
        text = text.replace(COMMANDS, _commands())
    source = Path(page.file.abs_src_path)
    return LINK.sub(lambda link: _link(link[1], source, page.file, config, files), text)


def _link(target: str, source: Path, page: File, config, files: Files) -> str:
    """A link of a file in the repository, as a link between files of the site."""
    path = Path(os.path.normpath(source.parent / target))
    path = HOME.get(path, path)
    name = str(path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT))
    if path.is_file() and files.get_file_from_path(name) is None:
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return os.path.relpath(name, Path(page.src_uri).parent) + ("/" if target.endswith("/") else "")


def _commands() -> str:
    """The help of every command of `larpo`, as Markdown."""
    import typer
    from typer.cli import get_docs_for_click

    from larpo.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="larpo")
    return text.partition("\n")[2]  # the page has a title
