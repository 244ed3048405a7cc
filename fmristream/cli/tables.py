"""Tables on stdout: as wide as the terminal, or as wide as they need to be where nobody looks."""

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmristream.cli.words import on_one_line

# Where output goes to a file or a pipe, lines are not broken: names stay whole for whoever searches them.
PIPED_WIDTH = 10_000

MAX_ROWS = 50


def print_facts(title: str, facts: Iterable[tuple[str, str]]) -> None:
    """A heading and what is known, one fact a line; empty ones are left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        if value:
            grid.add_row(f"  {name}", Text(on_one_line(value)))
    _print(Text(on_one_line(title), style="bold"))
    _print(grid)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, max_rows: int = MAX_ROWS) -> None:
    """A table with a heading; nothing where there are no rows."""
    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for place, name in enumerate(columns):
        is_numeric = all(_is_number(row[place]) for row in rows)
        table.add_column(name, justify="right" if is_numeric else "left", overflow="fold")
    for row in rows[:max_rows]:
        table.add_row(*(Text(on_one_line(cell)) for cell in row))
    _print(Text(f"\n{title}", style="bold"))
    _print(table)
    if len(rows) > max_rows:
        _print(Text(f"… and {len(rows) - max_rows} more; --json lists all"))


def print_lines(title: str, lines: Sequence[str], *, style: str = "bold") -> None:
    """A heading and lines below it; nothing where there are none."""
    if not lines:
        return
    _print(Text(f"\n{title}", style=style))
    for line in lines:
        _print(Text(f"  {on_one_line(line)}"))


def _print(what: Text | Table) -> None:
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    with console.capture() as captured:
        console.print(what, soft_wrap=isinstance(what, Text))
    # Tables come padded to their width, which is a nuisance in files.
    sys.stdout.writelines(f"{line.rstrip(' ')}\n" for line in captured.get().splitlines())


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "", 1).isdecimal() or cell in ("", "–")
