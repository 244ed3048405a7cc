"""Tables on stdout: as wide as the terminal, or as wide as they need to be where nobody looks."""

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmristream.cli.words import on_one_line

# Where output goes to a file or a pipe, lines are broken late.
PIPED_WIDTH = 240

MAX_ROWS = 50


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """A heading and what is known, one fact a line; empty ones are left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        if value:
            grid.add_row(f"  {name}", Text(on_one_line(value)))
    console = _console()
    console.print(Text(on_one_line(title), style="bold"), soft_wrap=True)
    console.print(grid)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, max_rows: int = MAX_ROWS) -> None:
    """A table with a heading; nothing where there are no rows."""
    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    numeric = [all(_is_number(row[place]) for row in rows) for place in range(len(columns))]
    for name, is_numeric in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if is_numeric else "left", overflow="fold")
    for row in rows[:max_rows]:
        table.add_row(*(Text(on_one_line(cell)) for cell in row))
    console = _console()
    console.print()
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    if len(rows) > max_rows:
        console.print(Text(f"… and {len(rows) - max_rows} more; --json lists all"), soft_wrap=True)


def print_lines(title: str, lines: Sequence[str], *, style: str = "") -> None:
    """A heading and lines below it."""
    if not lines:
        return
    console = _console()
    console.print()
    console.print(Text(title, style=style or "bold"), soft_wrap=True)
    for line in lines:
        console.print(Text(f"  {on_one_line(line)}"), soft_wrap=True)


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "", 1).isdecimal() or cell in ("", "–")
