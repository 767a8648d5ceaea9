"""What data must keep to, each a limit that can be typed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dtrain.verbs._data_stats import Stats, share

_LIMIT = re.compile(r"(?P<percent>\d+(\.\d+)?)%|(?P<num>\d+)")


class Limit(NamedTuple):
    """A share, `1%`, or a number, `12`."""

    text: str
    percent: float | None
    num: int

    def above(self, num: int, of: int) -> bool:
        """Whether `num` of `of` is more than this."""
        return num > self.num if self.percent is None else 100 * num > self.percent * of

    def below(self, num: int, of: int) -> bool:
        return num < self.num if self.percent is None else 100 * num < self.percent * of


def limit(text: str) -> Limit:
    """Raises argparse.ArgumentTypeError."""
    match = _LIMIT.fullmatch(text)
    if match is None or float(match["percent"] or 0) > 100:
        raise argparse.ArgumentTypeError(f"{text}: neither a share such as 1% nor a number such as 12")
    return Limit(text, float(match["percent"]) if match["percent"] else None, int(match["num"] or 0))


OPTIONS: Mapping[str, tuple[str, str]] = {
    "--max-truncated": ("1%", "rows that were cut off"),
    "--max-skipped": ("0", "rows that were lost: bad, too long, or without a token to learn"),
    "--min-trained": ("5%", "tokens that are trained"),
    "--max-duplicates": ("1%", "documents that repeat one before"),
    "--max-overlap": ("0", "documents held out that are trained on too"),
}
"""With what holds where nothing is typed, and of what."""


class Verdict(NamedTuple):
    broken: bool
    line: str


def judge(stats: Stats, limits: Mapping[str, Limit]) -> Iterator[Verdict]:
    """`limits` by the names of `OPTIONS`."""
    truncated, lost, train = stats.truncated, stats.lost, stats.train
    cases = {
        "--max-truncated": (sum(truncated.values()), stats.num_examples, "rows read were cut off", truncated),
        "--max-skipped": (sum(lost.values()), stats.num_examples, "rows read were lost", lost),
        "--min-trained": (train.num_targets, train.num_tokens, "tokens are trained", {}),
        "--max-duplicates": (train.num_duplicates, len(train.lengths), "documents repeat one before", {}),
        "--max-overlap": (stats.num_overlap, len(stats.held_out.lengths), "documents held out are trained on too", {}),
    }
    for option, (num, of, what, why) in cases.items():
        least = option.startswith("--min")
        bound = limits[option]
        broken = (bound.below if least else bound.above)(num, of)
        reasons = "".join(f"; {count:,} {reason}" for reason, count in why.items()) if broken else ""
        yield Verdict(broken, f"{'broken' if broken else 'kept':<6}  {option} {bound.text}: {share(num, of, what)}"
                              f"{reasons}")  # fmt: skip
