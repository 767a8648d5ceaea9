"""Rows, pairs and sizes on the screen."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> list[str]:
    """Lines in which columns are aligned; the first row is their titles. `right`: titles of columns of numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    found = []
    for row in rows:
        cells = [cell.rjust(width) if title in right else cell.ljust(width)
                 for title, cell, width in zip(rows[0], row, widths, strict=True)]  # fmt: skip
        found.append("  ".join(cells).rstrip())
    return found


def lines(pairs: Sequence[tuple[str, object]]) -> list[str]:
    """One for each name and its value."""
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{name:<{width}}  {value}" for name, value in pairs]


def size(num_bytes: float) -> str:
    """1234567 -> 1.23 MB; in powers of ten, as disks are sold."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.2f} {unit}"
    return f"{num_bytes:.0f} B"
