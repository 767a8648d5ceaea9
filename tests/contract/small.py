"""A small causal model on disk, ragged rows with masked targets, and one plain process that trains on them.

The plain loop uses transformers and torch alone: each document by itself, whole logits, `cross_entropy`, one backward
pass over the whole global batch's sum. What dtrain does in any parallel form is compared to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain.config.schema import Config
from dtrain.data.order import global_batch_ids
from dtrain.data.rows import Row
from dtrain.data.store import RowStore, write_rows

VOCAB, LENGTH, ROWS, EVAL_ROWS = 97, 24, 26, 5


@dataclasses.dataclass(frozen=True)
class Recipe:
    global_batch: int
    steps: int = 10
    lr: float = 1e-2
    grad_clip: float = 0.5
    weight_decay: float = 0.1
    eps: float = 1e-4
    """Above rounding: the true gradient of a key's bias is all but zero (softmax ignores what is added to every key),
    and with the usual 1e-8 Adam would turn its rounding into steps of full size."""
    warmup_steps: int = 3
    seed: int = 5


def make(folder: Path, *, dropout: float = 0.0, vocab: int = VOCAB) -> None:
    """`folder/model` and `folder/{train,eval}.arrow`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=56, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.1, attention_dropout=dropout,
    )  # fmt: skip
    Qwen2ForCausalLM(config).float().save_pretrained(folder / "model", max_shard_size="20KB")
    draw = np.random.default_rng(0)
    for name, num in (("train", ROWS), ("eval", EVAL_ROWS)):
        write_rows(folder / f"{name}.arrow", [_row(draw) for _ in range(num)])


def _row(draw: np.random.Generator) -> Row:
    """One to three documents, about half of the tokens targets; now and then a row with hardly any."""
    lengths = np.array([draw.integers(3, LENGTH // 3 + 1) for _ in range(draw.integers(1, 4))], np.int32)
    total = int(lengths.sum())
    targets = draw.random(total) < draw.choice([0.1, 0.5, 0.9])
    targets[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = False
    targets[1] = True
    return Row(draw.integers(0, VOCAB, total).astype(np.int32), targets, lengths)


@dataclasses.dataclass
class Trained:
    """What a run came to."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    eval_loss: float
    moments: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    """Of the reference: by state, then by parameter."""
    ids: list[list[int]] = dataclasses.field(default_factory=list)
    """Of the reference: the rows of each step."""


def reference(
    folder: Path,
    recipe: Recipe,
    after: Callable[[int, Any, torch.optim.Optimizer], None] = lambda done, model, optimizer: None,
    prepare: Callable[[Any], Any] = lambda model: model,
    mean_loss: Callable[[Any, list[Row]], torch.Tensor] | None = None,
    *,
    updated: Callable[[int], None] = lambda done: None,
    rows: Sequence[Row] = (),
    leave_out: Sequence[int] = (),
) -> Trained:
    """What the plain loop makes of it. `after` each step is shown how many are done, the model and the optimizer;
    `updated` hears it while the gradients are still there.
    `prepare`: chooses what of the model is trained, and may give another in its place. `mean_loss` of a model and rows
    is the cross-entropy of their targets where it is not given. `rows`: those to train on in this order; where there
    are none, `folder/train.arrow` in the order of its epochs. `leave_out`: steps, from 1, that learn nothing.
    """
    mean_loss = mean_loss or _mean_loss
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = (prepare(model) or model).train()
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=recipe.eps,
    )  # fmt: skip
    store, losses, norms, ids = RowStore(folder / "train.arrow"), [], [], []
    for step in range(recipe.steps):
        if rows:
            ids.append(list(range(step * recipe.global_batch, (step + 1) * recipe.global_batch)))
        else:
            ids.append([int(i) for i in global_batch_ids(recipe.seed, step, recipe.global_batch, len(store))])
        if step + 1 in leave_out:
            continue
        loss = mean_loss(model, [rows[i] if rows else store.row(i) for i in ids[-1]])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _cosine(step, recipe)
        optimizer.step()
        updated(step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
        after(step + 1, model, optimizer)
    held_out = RowStore(folder / "eval.arrow")
    with torch.no_grad():
        eval_loss = float(mean_loss(model, [held_out.row(i) for i in range(len(held_out))]))
    named = dict(model.named_parameters())
    moments = {key: {name: optimizer.state[p][key].numpy() for name, p in named.items() if p.requires_grad}
               for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    weights = {name: p.detach().numpy() for name, p in named.items()}
    return Trained(losses, norms, weights, eval_loss, moments, ids)


def _mean_loss(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    total, num_targets = torch.zeros(()), 0
    for row in rows:
        start = 0
        for length in row.lengths.tolist():
            ids = torch.from_numpy(row.tokens[start : start + length].astype(np.int64))
            learned = torch.from_numpy(row.targets[start : start + length].copy())[1:]
            logits = model(input_ids=ids[None]).logits[0, -length:-1]  # prompt methods have more before these
            total = total + torch.nn.functional.cross_entropy(logits[learned], ids[1:][learned], reduction="sum")
            num_targets += int(learned.sum())
            start += length
    return total / num_targets


def _cosine(step: int, recipe: Recipe) -> float:
    """Warm-up over 3 steps, then half a cosine to zero at the end."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def overrides(folder: Path, recipe: Recipe, *more: str) -> list[str]:
    """The same run for dtrain, as a user would type it."""
    return [
        "model=hf", f"model.path={folder / 'model'}", "dataset=stdlib", f"dataset.max_length={LENGTH}",
        "objective=pretrain", "schedule=cosine", "schedule.min_factor=0",
        f"schedule.warmup_steps={recipe.warmup_steps}", f"train.steps={recipe.steps}",
        f"optim.lr={recipe.lr}", f"optim.weight_decay={recipe.weight_decay}", f"optim.eps={recipe.eps}",
        f"train.grad_clip={recipe.grad_clip}", f"batch.global_batch={recipe.global_batch}", "batch.micro_batch=2",
        f"run.seed={recipe.seed}", "train.precision=fp32", "device=cpu", "eval.max_rows=null", *more,
    ]  # fmt: skip


class Record:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[Any] = []
        self.evals: list[Any] = []
        self.notes: list[str] = []

    def step(self, report: Any) -> None:
        self.reports.append(report)

    def eval(self, report: Any) -> None:
        self.evals.append(report)

    def note(self, line: str) -> None:
        self.notes.append(line)


def stream_in(folder: Path) -> Any:
    """Of `folder/texts.jsonl`, in few shards of few documents; None where there is no such file."""
    from dtrain.data.prepare import prepare
    from dtrain.datasets.files import Files
    from dtrain.objectives.pretrain import Pretrain
    from dtrain.templates.jinja import Jinja
    from tests.unit.data.fakes import FakeModel

    path = folder / "texts.jsonl"
    if not path.exists():
        return None
    dataset = Files(path=str(path), max_length=LENGTH, streaming=True, stream_shards=4, stream_buffer=8)
    prepared = prepare(dataset, Pretrain(), FakeModel(), Jinja(), eval_fraction=0.0, seed=Recipe.seed,
                       cache=folder / "cache", say=lambda line: None)  # fmt: skip
    return prepared.train_rows(dataset, Recipe.seed)


def settled(typed: list[str]) -> Config:
    """The configuration; nothing in it is left to settle."""
    from dtrain.config.compose import compose
    from dtrain.config.validate import validate

    return validate(compose(typed).values)


def make_built(folder: Path, typed: list[str] | Config, *, resume: Sequence[Path] = (), cache: Path | None = None,
               note: Callable[[str], None] = print) -> Any:  # fmt: skip
    """dtrain's own engine for what was typed; call it on every rank. `resume`: checkpoints, and `note` hears which were
    passed over; `cache`: for what an objective keeps.
    """
    from dtrain.comm import TorchComm
    from dtrain.engine.build import build
    from dtrain.plan.world import World

    config = settled(typed) if isinstance(typed, list) else typed
    world = World.from_env("cpu")
    rows = (stream_in(folder) or RowStore(folder / "train.arrow"), RowStore(folder / "eval.arrow"))
    return build(config, world, TorchComm(world), assets=folder / "model", rows=rows, pad_id=0, resume=resume,
                 note=note, cache=cache)  # fmt: skip


def train(folder: Path, typed: list[str], cache: Path | None = None) -> Trained:
    """What dtrain makes of it; call it on every rank."""
    from dtrain.engine.state import Progress

    built, record = make_built(folder, typed, cache=cache), Record()
    built.engine.run([record], Progress())
    weights = {name: full.numpy() for name, full in built.strategy.full_state()}
    return Trained([r.loss for r in record.reports], [r.grad_norm for r in record.reports], weights,
                   record.evals[-1].loss)  # fmt: skip
