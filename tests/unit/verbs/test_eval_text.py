"""What texts are worth beside others, worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dtrain.errors import UserError
from dtrain.objectives.labels import scores
from dtrain.verbs import _eval_text


def test_scores_of_a_text() -> None:
    written, expected = "The cat sat, on a mat.", "a cat sat on the mat"
    # Six words each, the same six: f1 1. In order: cat sat on _ mat, four of six.
    assert _eval_text.score(written, expected) == {"exact": 0.0, "f1": 1.0, "rouge_l": pytest.approx(4 / 6)}
    assert _eval_text.score(" yes\n", "yes") == {"exact": 1.0, "f1": 1.0, "rouge_l": 1.0}
    # Of three words and of two, one is common: 2 * 1 / 5.
    assert _eval_text.score("red red car", "red bus") == {"exact": 0.0, "f1": 0.4, "rouge_l": 0.4}
    assert _eval_text.score("", "word") == {"exact": 0.0, "f1": 0.0, "rouge_l": 0.0}
    # Chinese has no spaces: 我/爱/北/京 and 我/在/北/京 have three of four.
    assert _eval_text.words("我爱北京 GPT-4!") == ["我", "爱", "北", "京", "gpt", "4"]
    assert _eval_text.f1("我爱北京", "我在北京") == 0.75


def test_scores_of_labels() -> None:
    counts = [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # F1 of the first: 2*1/(2+2) = 1/2; of the second: 2*1/(1+2) = 2/3; of the third: 0; the fourth does not occur.
    assert scores(counts) == {"accuracy": 0.5, "macro_f1": pytest.approx((1 / 2 + 2 / 3) / 3)}
    assert scores([[0, 0], [0, 0]]) == {"accuracy": 0.0, "macro_f1": 0.0}


def test_bleu_is_sacrebleus_or_none() -> None:
    found = _eval_text.bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert found is None if "sacrebleu" not in sys.modules else found == pytest.approx(1)


def test_functions_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_scores.py").write_text(
        "def one(a, b): return len(a)\ndef two(a, b): return {'x': 1, 'y': len(b)}\ndef bad(a, b): return 'no'\nthing = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _eval_text.own("mine_of_scores:one")("abc", "") == {"one": 3.0}
    assert _eval_text.own("mine_of_scores:two")("", "ab") == {"x": 1.0, "y": 2.0}
    for named, said in (("mine_of_scores", "not module:function"), ("mine_of_scores:thing", "has no function thing"),
                        ("no_such_module:f", "put its folder into PYTHONPATH")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            _eval_text.own(named)
    with pytest.raises(UserError, match="gave 'no' instead of a number"):
        _eval_text.own("mine_of_scores:bad")("", "")
