"""Facts of data as tables of rich."""

from __future__ import annotations

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..visible import visible
from .facts import Answer, DataSummary, Example
from .spread import Spread, number
from .words import sections

BAR = 24  # cells of the longest
MOST_BARS = 16
SHOWN = 400  # characters of a text
COUNTED, READ = "black on green", "dim"


def show(summary: DataSummary, console: Console, name: str) -> None:
    """Prints tables of all facts, the histograms and three lists with the tokens marked that count."""
    for title, rows in sections(summary).items():
        table = _table(title)
        table.add_column(min_width=26)
        table.add_column(min_width=44)
        for row in rows:
            value = Text(visible(row.value), "yellow" if row.warns else "")
            table.add_row(Text(visible(row.label)), value, Text(visible(row.note), "dim"))
        console.print(table, "")
    grid = Table.grid(padding=(0, 4, 1, 0))
    bars = [_histogram(title, spread) for title, spread in summary.spreads().items()]
    beside = 2 if console.width >= 2 * (BAR + 30) else 1
    for i in range(0, len(bars), beside):
        grid.add_row(*bars[i : i + beside])
    console.print(grid)
    coloured = console.color_system is not None
    so = ("so", COUNTED) if coloured else "[[so]]"
    console.print(Text.assemble("Lists as they are trained on; the loss is of the tokens marked ", so))
    console.print(Group(*(_example(one, name, coloured) for one in summary.examples)))


def _table(title: str) -> Table:
    style = {"box": None, "show_header": False, "pad_edge": False, "padding": (0, 2, 0, 0)}
    return Table(title=title, title_justify="left", title_style="bold", **style)


def _histogram(title: str, spread: Spread) -> RenderableType:
    table = _table(title)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    bars = together(spread.bars, MOST_BARS)
    most = max(n for _, _, n in bars)
    for low, high, n in bars:
        eighths = max(round(8 * BAR * n / most), n > 0)
        bar = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
        label = number(low) if low == high else f"{number(low)} – {number(high)}"
        table.add_row(label, Text(bar, "cyan"), f"{n:,}")
    return table


def together(bars: tuple[tuple[float, float, int], ...], most: int) -> list[tuple[float, float, int]]:
    """Neighbours as one bar, so that there are at most so many.

    >>> together(((1, 1, 5), (2, 2, 6), (3, 3, 7)), 2)
    [(1, 2, 11), (3, 3, 7)]
    """
    size = -(-len(bars) // most)
    groups = (bars[i : i + size] for i in range(0, len(bars), size))
    return [(group[0][0], group[-1][1], sum(n for _, _, n in group)) for group in groups]


def _example(example: Example, name: str, coloured: bool) -> RenderableType:
    cut = f", {example.prompt_cut:,} more cut" if example.prompt_cut else ""
    texts = [Text(_shown(example.prompt, end=True)), *(_answer(answer, coloured) for answer in example.answers)]
    if example.answers_not_shown:
        texts.append(Text(f"and {example.answers_not_shown:,} more answers", "dim"))
    title = f"{name} {example.row}: prompt of {example.prompt_tokens:,} tokens{cut}"
    return Panel(Group(*texts), title=Text(title), title_align="left", box=box.ROUNDED)


def _answer(answer: Answer, coloured: bool) -> Text:
    cut = f", {answer.cut:,} more cut" if answer.cut else ""
    text = Text.assemble((f"\nscore {answer.score:g}, {answer.tokens:,} tokens{cut}\n", "bold"))
    room = SHOWN
    for counted, part in answer.parts:
        shown = _shown(part, most=max(room, 0))
        if coloured:
            text.append(shown, COUNTED if counted else READ)
        else:
            text.append(f"[[{shown}]]" if counted else shown)
        room -= len(part)
    return text


def _shown(text: str, *, most: int = SHOWN, end: bool = False) -> str:
    text = visible(text)
    if len(text) <= most:
        return text
    return "…" + text[-most:] if end else text[:most] + "…"
