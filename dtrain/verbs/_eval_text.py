"""What a text that was written is worth beside the one that was expected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtrain.config.named import find
from dtrain.errors import UserError

Score = Callable[[str, str], Mapping[str, float]]
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
"""A run of letters and digits; of scripts without spaces, each character."""


def words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return _WORD.findall(text.lower())


def exact(written: str, expected: str) -> float:
    """1 where they are the same but for white space around them."""
    return float(written.strip() == expected.strip())


def f1(written: str, expected: str) -> float:
    """Harmonic mean of the shares of the words of each that the other has too, in any order."""
    a, b = Counter(words(written)), Counter(words(expected))
    return _harmonic((a & b).total(), a.total(), b.total())


def rouge_l(written: str, expected: str) -> float:
    """ROUGE-L: the same with the longest common subsequence of words (Lin 2004, section 3.2, with beta 1)."""
    a, b = words(written), words(expected)
    return _harmonic(_common(a, b), len(a), len(b))


def _harmonic(common: int, num_a: int, num_b: int) -> float:
    """1 where neither has a word."""
    return 2 * common / (num_a + num_b) if num_a + num_b else 1.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(b) + 1)
    for one in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if one == other else max(row[j], before[j + 1]))
        before = row
    return before[-1]


def score(written: str, expected: str) -> Mapping[str, float]:
    return {"exact": exact(written, expected), "f1": f1(written, expected), "rouge_l": rouge_l(written, expected)}


def bleu(written: Sequence[str], expected: Sequence[str]) -> float | None:
    """Of all together, 0 to 1; None where sacrebleu, which knows how, is not installed."""
    try:
        import sacrebleu
    except ImportError:
        return None
    chinese = any("\u4e00" <= char <= "\u9fff" for text in expected for char in text)
    found = sacrebleu.corpus_bleu(list(written), [list(expected)], tokenize="zh" if chinese else "13a")
    return float(found.score) / 100


def own(named: str) -> Score:
    """A function of the user's, `module:function`, of what was written and what was expected; it gives a number, or
    several by name. Raises UserError.
    """
    function, name = find("--score", named, UserError), named.partition(":")[2]

    def scored(written: str, expected: str) -> Mapping[str, float]:
        found: Any = function(written, expected)
        try:
            return ({str(key): float(value) for key, value in found.items()} if isinstance(found, Mapping)
                    else {name: float(found)})  # fmt: skip
        except (TypeError, ValueError):
            raise UserError(f"--score={named}: gave {found!r} instead of a number, or numbers by name") from None

    return scored
