"""Pairs and judged replies on disk, and their losses by the formulas of the papers: each document by itself, whole
logits, plain torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.data.rows import Row
from dtrain.data.store import write_rows
from tests.contract.small import EVAL_ROWS, ROWS, VOCAB

BETA, GAMMA, WEIGHT = 0.3, 0.5, 0.25


def make_preferences(folder: Path, model: Path) -> None:
    """`folder/{train,eval}.arrow`: rows of one or two examples of two documents each, and a label for every example."""
    folder.mkdir()
    (folder / "model").symlink_to(model)
    draw = np.random.default_rng(1)
    for name, num in (("train", ROWS), ("eval", EVAL_ROWS)):
        write_rows(folder / f"{name}.arrow", [_row(draw) for _ in range(num)])


def _row(draw: np.random.Generator) -> Row:
    parts: list[tuple[np.ndarray, int]] = []
    num = int(draw.integers(1, 3))
    for _ in range(num):
        prompt = draw.integers(0, VOCAB, draw.integers(1, 4))
        parts += [(np.concatenate([prompt, draw.integers(0, VOCAB, draw.integers(1, 7))]), len(prompt)) for _ in (0, 1)]
    targets = [np.arange(len(tokens)) >= read for tokens, read in parts]
    return Row(
        np.concatenate([tokens for tokens, _ in parts]).astype(np.int32),
        np.concatenate(targets),
        np.array([len(tokens) for tokens, _ in parts], np.int32),
        draw.integers(0, 2, num).astype(np.int32),
    )


def documents(model: Any, rows: list[Row]) -> tuple[list[torch.Tensor], list[int]]:
    """Of each document the log-probability of what is learned of it, and of how many tokens that is."""
    found, nums = [], []
    for row in rows:
        start = 0
        for length in row.lengths.tolist():
            ids = torch.from_numpy(row.tokens[start : start + length].astype(np.int64))
            learned = torch.from_numpy(row.targets[start : start + length].copy())[1:]
            each = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            found.append(each[learned].gather(1, ids[1:][learned][:, None]).sum())
            nums.append(int(learned.sum()))
            start += length
    return found, nums


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def formula(name: str, start: Any) -> Callable[[Any, list[Row]], torch.Tensor]:
    """The mean loss over the examples of some rows; `start` is the model that training begins with."""
    start = copy.deepcopy(start).eval()

    def mean(model: Any, rows: list[Row]) -> torch.Tensor:
        found, nums = documents(model, rows)
        with torch.no_grad():
            before, _ = documents(start, rows)
        pairs = range(0, len(found), 2)
        if name == "kto":
            labels = [int(label) for row in rows for label in row.labels]
            kl = max(0.0, sum((found[i + 1] - before[i + 1]).item() for i in pairs) / len(pairs))
            losses = []
            for i, label in zip(pairs, labels, strict=True):
                r = found[i] - before[i]
                value = _sigmoid(BETA * (r - kl)) if label else _sigmoid(BETA * (kl - r))
                losses.append((1.5 if label else 0.5) * (1 - value))
            return torch.stack(losses).mean()
        return torch.stack([_pair(name, found[i : i + 2], before[i : i + 2], nums[i : i + 2]) for i in pairs]).mean()

    return mean


def _pair(name: str, found: list[torch.Tensor], before: list[torch.Tensor], nums: list[int]) -> torch.Tensor:
    (w, v), (w0, v0), (len_w, len_v) = found, before, nums
    h = (w - w0) - (v - v0)
    if name == "simpo":
        return -torch.log(_sigmoid(BETA / len_w * w - BETA / len_v * v - GAMMA))
    if name == "orpo":
        p, q = torch.exp(w / len_w), torch.exp(v / len_v)
        return -w / len_w - WEIGHT * torch.log(_sigmoid(torch.log(p / (1 - p) / (q / (1 - q)))))
    if name == "hinge":
        return torch.clamp(1 - BETA * h, min=0)
    if name == "ipo":
        return ((w - w0) / len_w - (v - v0) / len_v - 1 / (2 * BETA)) ** 2
    smooth = 0.2 if name == "smoothed" else 0.0
    return -(1 - smooth) * torch.log(_sigmoid(BETA * h)) - smooth * torch.log(_sigmoid(-BETA * h))


OPTIONS = {
    "sigmoid": ["objective=dpo", f"objective.beta={BETA}"],
    "smoothed": ["objective=dpo", f"objective.beta={BETA}", "objective.label_smoothing=0.2"],
    "ipo": ["objective=dpo", f"objective.beta={BETA}", "objective.loss=ipo"],
    "hinge": ["objective=dpo", f"objective.beta={BETA}", "objective.loss=hinge"],
    "simpo": ["objective=simpo", f"objective.beta={BETA}", f"objective.gamma={GAMMA}"],
    "orpo": ["objective=orpo", f"objective.weight={WEIGHT}"],
    "kto": ["objective=kto", f"objective.beta={BETA}", "objective.good_weight=1.5", "objective.bad_weight=0.5"],
}
"""As they are typed."""


LABELS = {"a": [74, 0], "b": [75, 0], "cc": [76, 76, 0]}
"""Labels, and what the tokenizer of `write_tokenizer` makes of them, with the token that ends a text: the last of these
is two letters.
"""


def make_labelled(folder: Path, model: Path) -> None:
    """`folder/{train,eval}.arrow`: rows of one to three texts, each with one of `LABELS` after it."""
    from tests.unit.data.fakes import write_tokenizer

    write_tokenizer(folder / "model")
    for path in model.iterdir():
        (folder / "model" / path.name).unlink(missing_ok=True)
        (folder / "model" / path.name).symlink_to(path)
    draw = np.random.default_rng(2)
    for name, num in (("train", ROWS), ("eval", EVAL_ROWS)):
        write_rows(folder / f"{name}.arrow", [_texts(draw) for _ in range(num)])


def _texts(draw: np.random.Generator) -> Row:
    chosen = draw.integers(0, len(LABELS), draw.integers(1, 4)).astype(np.int32)
    prompts = [draw.integers(0, VOCAB, draw.integers(1, 5)) for _ in chosen]
    return with_labels(prompts, chosen)


def with_labels(prompts: list[np.ndarray], chosen: np.ndarray) -> Row:
    ids = [list(LABELS.values())[label] for label in chosen]
    tokens = [np.concatenate([prompt, one]) for prompt, one in zip(prompts, ids, strict=True)]
    targets = [np.arange(len(one)) >= len(prompt) for one, prompt in zip(tokens, prompts, strict=True)]
    return Row(
        np.concatenate(tokens).astype(np.int32),
        np.concatenate(targets),
        np.array([len(one) for one in tokens], np.int32),
        chosen,
    )


def classification(model: Any, rows: list[Row]) -> torch.Tensor:
    """Minus the mean over texts of the log-probability of the label."""
    found, _ = documents(model, rows)
    return -torch.stack(found).mean()


def confusion(model: Any, rows: list[Row]) -> list[list[int]]:
    """How often each label was taken for each, by the likeliest."""
    counts = [[0] * len(LABELS) for _ in LABELS]
    for row in rows:
        edges = np.cumsum(row.lengths)[:-1]
        parts = zip(np.split(row.tokens, edges), np.split(row.targets, edges), row.labels.tolist(), strict=True)
        for tokens, targets, label in parts:
            tried = [with_labels([tokens[~targets]], np.array([k], np.int32)) for k in range(len(LABELS))]
            with torch.no_grad():
                found, _ = documents(model, tried)
            counts[label][int(torch.stack(found).argmax())] += 1
    return counts


def scored(assets: Path, score: torch.Tensor) -> Any:
    """transformers' model for sequence classification, with these outputs."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(assets, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(score)
    return model


def outputs(model: Any, rows: list[Row]) -> torch.Tensor:
    """[documents, outputs], read at the last token of each."""
    found = []
    for row in rows:
        for tokens in np.split(row.tokens, np.cumsum(row.lengths)[:-1]):
            hidden = model.model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).last_hidden_state
            found.append(model.score(hidden[0, -1]))
    return torch.stack(found)


def reward(model: Any, rows: list[Row]) -> torch.Tensor:
    """Minus the mean over pairs of log sigmoid(chosen - rejected)."""
    found = outputs(model, rows)[:, 0]
    return -torch.log(_sigmoid(found[0::2] - found[1::2])).mean()


def classes(model: Any, rows: list[Row]) -> torch.Tensor:
    """The mean over texts of minus the logarithm of the label's softmax."""
    found = torch.log(torch.softmax(outputs(model, rows), dim=-1))
    labels = torch.tensor([int(label) for row in rows for label in row.labels])
    return -found.gather(1, labels[:, None]).mean()
