"""Times as Slurm writes them."""

from __future__ import annotations

import pytest

from dtrain.config.schema import seconds


@pytest.mark.parametrize(("text", "expected"), [
    ("30", 1800), (" 1.5 ", 90), ("90:00", 5400), ("2:30", 150), ("1:02:03", 3723), ("0:00:05", 5), ("24:00:00", 86400),
    ("1-0", 86400), ("2-12", 216000), ("2-12:30", 217800), ("1-01:01:01", 90061), ("0-00:00:07", 7),
])  # fmt: skip
def test_of_text(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0:00", "0-0:00:00", "-5", "5 min", "1:2:3:4", "1::2", "1-", "1:", ":30", "1h",
                                  "nan", "1e3", "1:234"])  # fmt: skip
def test_what_is_no_time(text: str) -> None:
    assert seconds(text) is None
