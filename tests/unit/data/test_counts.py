"""What is told of the sources of many documents."""

from __future__ import annotations

from dtrain.data.counts import READ, Counts


def made(num_sources: int, lost: dict[str, int]) -> list[str]:
    counts = Counts()
    for i in range(num_sources):
        counts.add(READ, f"{i}.txt:1")
        counts.add("split at 64 tokens", f"{i}.txt:1")
    for source, num in lost.items():
        for line in range(num):
            counts.add("skipped: too odd", f"{source}:{line}")
    return counts.lines()


def test_a_few_sources_are_all_told_of() -> None:
    assert made(2, {"1.txt": 1}) == [
        "documents: 2 read, 2 split at 64 tokens, 1 skipped: too odd", "  0.txt: 1 read, 1 split at 64 tokens",
        "  1.txt: 1 read, 1 split at 64 tokens, 1 skipped: too odd",
        "  split at 64 tokens: at 0.txt:1, 1.txt:1", "  skipped: too odd: at 1.txt:0",
    ]  # fmt: skip


def test_of_many_those_that_lost_more_than_the_places_name() -> None:
    assert [line for line in made(20, {}) if ".txt: " in line] == []
    assert [line for line in made(20, {"3.txt": 2, "4.txt": 3}) if ".txt: " in line] == []
    assert [line for line in made(20, {"3.txt": 2, "4.txt": 4}) if ".txt: " in line] == [
        "  4.txt: 1 read, 1 split at 64 tokens, 4 skipped: too odd",
        "  3.txt: 1 read, 1 split at 64 tokens, 2 skipped: too odd",
    ]  # fmt: skip


def test_of_placeholders_so_many_are_told_by_name() -> None:
    """Whoever counted them first."""
    first, later = Counts(), Counts()
    for i in range(12):
        first.add(f"with {{{{a{i}}}}}", f"a.txt:{i}")
        later.add(f"with {{{{b{i}}}}}", f"b.txt:{i}")
    first.update(later)
    assert first.reasons == {**{f"with {{{{a{i}}}}}": 1 for i in range(8)}, "with {{...}}": 16}
    assert first.places["with {{...}}"] == [f"a.txt:{i}" for i in range(8, 12)] + ["b.txt:0"]
    assert sum(num for reasons in first.sources.values() for num in reasons.values()) == 24
    assert first.lines()[-1].startswith("  names in double braces are taken as they stand: ")
