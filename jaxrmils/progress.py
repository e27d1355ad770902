"""How long work tells that it is alive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""`progress(items, description, total) -> items`, drawing a bar while they are read."""


def silent(items: Iterable[Any], description: str, total: int | None) -> Iterable[Any]:
    """Draws nothing.

    >>> list(silent([1, 2], "work", 2))
    [1, 2]
    """
    return items


def bars(items: Iterable[Any], description: str, total: int | None) -> Iterator[Any]:
    """Draws a bar on stderr with rich; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(
        items,
        description=f"{description:<28}",
        total=total,
        console=console,
        disable=not console.is_terminal,
    )
