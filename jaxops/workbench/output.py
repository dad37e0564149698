"""What every command prints with: tables and progress bars by rich, JSON without it."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxops.workbench.call import Problem

_WIDE = 160


def _rich() -> Any:
    try:
        import rich.box
        import rich.console
        import rich.progress
        import rich.table
    except ImportError as error:
        raise Problem("tables need rich: pip install 'jaxops[cli]', or ask for --json") from error
    return rich


def table(title: str, columns: Sequence[str], *, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Any:
    """An empty table; the columns in `right` are numbers, those in `whole` are not wrapped. Raises `Problem` without
    rich."""
    rich = _rich()
    made = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in whole)
    return made


def show(made: Any) -> None:
    """Prints a table: as wide as the terminal, or as COLUMNS says, or wide enough for every table in a file or pipe."""
    console = _rich().console.Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    console.print(made)


def as_json(value: Any) -> None:
    """Prints `value` for machines."""
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """`advance(what was done)`, shown as a bar on the error stream while it is a terminal; silent where `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    rich = _rich()
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, advance=1, description=f"{title}: {done}")
