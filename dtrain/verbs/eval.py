"""Measure a model on rows: loss, labels, texts that it writes; read as the run reads its own."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, final

from dtrain.errors import DataError, UserError
from dtrain.verbs import _eval_text, _model, _sampling
from dtrain.verbs._table import table

if TYPE_CHECKING:
    from torch import nn

    from dtrain.config.spec import ObjectiveSpec
    from dtrain.datasets.base import Example, Labelled
    from dtrain.engine.generate import Reply
    from dtrain.engine.loaded import Loaded
    from dtrain.engine.measure import Document
    from dtrain.verbs._eval_rows import Source

_BATCH = 8
_MOST_LABELS = 20
"""That a table of confusions has room for."""


def add(parser: argparse.ArgumentParser) -> None:
    _model.add(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of dataset, objective or template, in place "
                                                                          "of the run's own")  # fmt: skip
    parser.add_argument("--data", action="append", default=[], metavar="FILE",
                        help="short for dataset.path=FILE; given several times, each is a source (the run's held-out "
                             "rows)")  # fmt: skip
    parser.add_argument("--rows", type=int, metavar="N", help="the first N rows of each source (all; of held-out ones "
                                                              "as many as the run's own evals)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="a line for each row; a new file")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="for dpo and kto: the model that training "
                        "started from, a folder or a run (as the run or the adapter says)")  # fmt: skip
    parser.add_argument("--generate", action="store_true", help="let it write the replies too, and compare them")
    parser.add_argument("--score", action="append", default=[], metavar="MODULE:FUNCTION",
                        help="with --generate: your own comparison of what was written and expected")  # fmt: skip
    parser.add_argument("--batch", type=int, default=_BATCH, metavar="N", help=f"prompts at a time ({_BATCH})")
    parser.add_argument("--plugin", action="append", default=[], metavar="PACKAGE",
                        help="a package that choices of the run come from")  # fmt: skip
    _sampling.add(parser, usual=256)


def run(args: argparse.Namespace) -> int:
    if problems := [*_problems(args), *_sampling.problems(args)]:
        raise UserError.of(problems)
    scores = [_eval_text.score, *map(_eval_text.own, args.score)]
    named = _model.find(args)
    from dtrain.verbs import _eval_rows
    from dtrain.verbs._eval_start import start

    sources = _eval_rows.find(named, args.overrides, args.data, plugins=args.plugin, most=args.rows)
    if args.generate and any(source.dataset is None for source in sources):
        raise UserError("--generate: of held-out rows only tokens are kept; type --data FILE too")
    loaded = named.load(args.dtype, writes=False)
    if args.generate and loaded.model is None:
        raise UserError(f"--generate: {named.folder} has outputs of its own in place of a vocabulary, so it writes "
                        f"nothing; leave it out")  # fmt: skip
    compared = functools.cache(lambda: start(named, args.reference, loaded, args.plugin))
    out = args.out.open("x", encoding="utf-8") if args.out is not None else None
    try:
        _Eval(loaded, args, scores, out, compared).all(sources)
    finally:
        if out is not None:
            out.close()
    if args.reference is not None and not compared.cache_info().currsize:
        _model.say(f"--reference {args.reference}: not looked at, as the loss compares with no other model")
    if out is not None:
        print(f"wrote {args.out}")
    return 0


def _problems(args: argparse.Namespace) -> list[str]:
    found = []
    if args.out is not None and args.out.exists():
        found.append(f"--out {args.out}: is there already; name a new file")
    elif args.out is not None and not args.out.absolute().parent.is_dir():
        found.append(f"--out {args.out}: there is no folder {args.out.parent}; make it, or choose another")
    for option in ("rows", "batch"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            found.append(f"--{option} {getattr(args, option)}: must be at least 1")
    found += [f"--data {file}: no such file or folder" for file in args.data
              if not Path(file).exists() and not set("*?[") & set(file)]  # fmt: skip
    if args.score and not args.generate:
        found.append(f"--score {args.score[0]}: compares what was written, so it needs --generate")
    return found


class _Written(NamedTuple):
    text: str
    expected: str


@final
class _Eval:
    def __init__(self, loaded: Loaded, args: argparse.Namespace, scores: list[_eval_text.Score],
                 out: IO[str] | None, start: Callable[[], nn.Module]) -> None:  # fmt: skip
        """`start`: gives the model that training started from."""
        self._loaded, self._args, self._scores, self._out, self._start = loaded, args, scores, out, start
        self._module: nn.Module = loaded.scored()

    def all(self, sources: list[Source]) -> None:
        losses = [self._loss(source) for source in sources]
        print("\n".join(table([("source", "rows", "targets", "loss", "perplexity"), *_losses(losses)],
                              right=("rows", "targets", "loss", "perplexity"))))  # fmt: skip
        for source, loss in zip(sources, losses, strict=True):
            if loss.sums:
                print("\n" + "\n".join(_of_objective(source, loss)))
            else:
                self._labels(source)
        if self._args.generate:
            self._generate(sources)

    def _say(self, **line: Any) -> None:
        if self._out is not None:
            self._out.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _loss(self, source: Source) -> _Loss:
        from dtrain.engine import measure

        objective, sums = source.objective, dict[str, Any]()
        choice = _choice(objective)
        is_tokens = objective.collator() is None
        found = (measure.documents(self._module, source.rows(), source.pad_id, self._loaded.device) if is_tokens
                 else measure.whole_rows(objective, source.num_rows, measure.alone(
                     self._module, source.store, self._loaded, pad_id=source.pad_id, global_batch=source.global_batch,
                     copy=self._start)))  # fmt: skip
        total, num_targets = 0.0, 0
        for one in found:
            total, num_targets = total + one.loss, num_targets + one.num_targets
            where = {"row": one.row} if one.document is None else {"row": one.row, "document": one.document}
            for name, value in one.extras.items():
                sums[name] = sums.get(name, 0) + value
            self._say(kind="loss", source=source.name, **where, loss=one.loss / max(1, one.num_targets),
                      num_targets=one.num_targets, **choice(one))  # fmt: skip
            _progress(f"{source.name}: {one.row + 1:,} of {source.num_rows:,} rows")
        _progress("")
        told = {name: value.tolist() for name, value in sums.items()}
        return _Loss(source.name, source.num_rows, num_targets, total / max(1, num_targets), told, is_tokens)

    # --- labels

    def _labels(self, source: Source) -> None:
        """Where the rows are labelled texts: which of the labels the model finds likeliest after each."""
        from dtrain.datasets.base import Labelled
        from dtrain.objectives.labels import scores

        if source.dataset is None or not isinstance(next(_examples(source), None), Labelled):
            return
        rows = [one for one in self._examples(source) if isinstance(one, Labelled)]
        labels = sorted({*(getattr(source.dataset, "labels", None) or ()), *(one.label for one in rows)})
        if len(labels) < 2:
            _model.say(f"{source.name}: all rows have the label {labels[0]!r}, so there is nothing to tell apart")
            return
        pairs, left_out = [], 0
        for one in rows:
            found = self._likeliest(one, labels, source)
            if found is None:
                left_out += 1
                continue
            predicted = max(found, key=found.__getitem__)
            pairs.append((one.label, predicted))
            self._say(kind="label", source=one.source, label=one.label, predicted=predicted, scores=found)
            _progress(f"{source.name}: labels of {len(pairs):,} of {len(rows):,} rows")
        _progress("")
        if left_out:
            _model.say(f"{source.name}: {left_out:,} rows left out: with a label they are over the model's positions")
        if not pairs:
            return
        counts = Counter(pairs)
        measured = scores([[counts[true, said] for said in labels] for true in labels])
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        print(f"\n{source.name}: {len(pairs):,} labelled rows, {metrics}; the likeliest of {len(labels)} labels")
        print("\n".join(_confusions(counts, labels)))

    def _likeliest(self, one: Labelled, labels: list[str], source: Source) -> dict[str, float] | None:
        from dtrain.engine.measure import likeliest
        from dtrain.objectives.sft import SFT

        sft, tokenizer = SFT(), self._loaded.tokenizer
        rows = {label: sft.encode(dataclasses.replace(one, label=label), tokenizer) for label in labels}
        most = self._loaded.max_positions
        if most is not None and max(len(row.tokens) for row in rows.values()) > most:
            return None
        return likeliest(self._module, rows, source.pad_id, self._loaded.device)

    def _examples(self, source: Source) -> Iterator[Example]:
        for i, one in enumerate(_examples(source)):
            if i == self._args.rows:
                return
            yield one

    # --- what it writes

    def _generate(self, sources: list[Source]) -> None:
        from dtrain.engine.generate import Writer

        writer = Writer(self._loaded, _sampling.how(self._args), seed=self._args.seed)
        rows, notes = [], []
        for source in sources:
            asked = self._asked(source, writer)
            written: list[_Written] = []
            scored: list[Mapping[str, float]] = []
            cut = 0
            for start in range(0, len(asked), self._args.batch):
                part = asked[start : start + self._args.batch]
                for (place, _, expected), reply in zip(part, writer.write([ids for _, ids, _ in part]), strict=True):
                    scored.append(self._score(place, reply, expected))
                    written.append(_Written(reply.text, expected))
                    cut += reply.finish == "length"
                _progress(f"{source.name}: {len(written):,} of {len(asked):,} replies")
            _progress("")
            means = {name: sum(one[name] for one in scored) / len(scored) for name in scored[0]}
            bleu = _eval_text.bleu([one.text for one in written], [one.expected for one in written])
            if bleu is None:
                notes.append("BLEU is not told: it needs sacrebleu, as in pip install 'dtrain[eval]'")
            else:
                means["bleu"] = bleu
            if cut:
                notes.append(f"{source.name}: {cut:,} of {len(written):,} replies came to no end; --max-new-tokens "
                             f"says how many tokens there may be")  # fmt: skip
            rows.append((source.name, str(len(written)), means))
        names = list(dict.fromkeys(name for *_, means in rows for name in means))
        print("\n" + "\n".join(table([("source", "replies", *names), *(
            (name, num, *(f"{means[one]:.4f}" if one in means else "-" for one in names)) for name, num, means in rows
        )], right=("replies", *names))))  # fmt: skip
        for note in dict.fromkeys(notes):
            _model.say(note)

    def _asked(self, source: Source, writer: Any) -> list[tuple[str, list[int], str]]:
        """Place, prompt and what is expected after it. Raises DataError."""
        from dtrain.datasets.base import Chat, Completion, Labelled

        found: list[tuple[str, list[int], str]] = []
        problems: list[str] = []
        without = 0
        for one in self._examples(source):
            prompt: Any
            expected: str | None
            if isinstance(one, Completion):
                prompt, expected, tools = one.prompt, one.completion, None
            elif isinstance(one, Labelled):
                prompt, expected, tools = f"{one.text}\n", one.label, None
            elif isinstance(one, Chat):
                last = max((i for i, message in enumerate(one.messages) if message["role"] == "assistant"), default=0)
                prompt, expected, tools = one.messages[:last], one.messages[last].get("content"), one.tools
            else:
                raise DataError(f"--generate: {one.source} is a {type(one).__name__.lower()} row, in which no reply is "
                                f"expected to a prompt; leave it out")  # fmt: skip
            if not prompt or not expected:
                without += 1
                continue
            try:
                found.append((one.source, writer.prompt(prompt, tools), expected))
            except UserError as error:
                problems.append(f"{one.source}: {error}")
        if problems:
            raise DataError.of(problems[:8])
        if without:
            _model.say(f"{source.name}: {without:,} rows left out: they have no prompt, or end with no text of the "
                       f"assistant")  # fmt: skip
        if not found:
            raise DataError(f"--generate: {source.name} has no row with a reply as text; leave it out")
        return found

    def _score(self, place: str, reply: Reply, expected: str) -> Mapping[str, float]:
        found = {name: value for score in self._scores for name, value in score(reply.text, expected).items()}
        self._say(kind="generation", source=place, generated=reply.text, expected=expected, finish=reply.finish,
                  **found)  # fmt: skip
        return found


class _Loss(NamedTuple):
    name: str
    num_rows: int
    num_targets: int
    loss: float
    sums: Mapping[str, list[float]]
    """What the objective tells besides, summed over targets."""
    is_tokens: bool
    """Whether a target is a token, so that there is a perplexity."""


def _losses(found: list[_Loss]) -> Iterator[tuple[str, ...]]:
    total = _Loss("all", sum(one.num_rows for one in found), sum(one.num_targets for one in found),
                  sum(one.loss * one.num_targets for one in found) / max(1, sum(one.num_targets for one in found)), {},
                  all(one.is_tokens for one in found))  # fmt: skip
    for one in [*found, total] if len(found) > 1 else found:
        perplexity = f"{math.exp(min(one.loss, 700)):,.4f}" if one.is_tokens else "-"
        yield one.name, f"{one.num_rows:,}", f"{one.num_targets:,}", f"{one.loss:.6f}", perplexity


def _choice(objective: ObjectiveSpec) -> Callable[[Document], Mapping[str, str]]:
    """Of a row that is one text: its label, and the one that was chosen; nothing where there are no labels."""
    from dtrain.objectives.labels import AbstractLabels

    def chosen(one: Document) -> Mapping[str, str]:
        if not isinstance(objective, AbstractLabels) or one.num_targets != 1:
            return {}
        labels, counts = objective.confusion({name: value.tolist() for name, value in one.extras.items()})
        pairs = zip(labels, counts, strict=True)
        return next({"label": is_, "predicted": labels[list(row).index(1)]} for is_, row in pairs if any(row))

    return chosen


def _of_objective(source: Source, loss: _Loss) -> Iterator[str]:
    """Its metrics; and where it chooses among labels, what it took for what."""
    from dtrain.objectives.labels import AbstractLabels

    objective = source.objective
    metrics = objective.metrics(loss.sums, loss.num_targets)
    yield f"{source.name}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    if isinstance(objective, AbstractLabels):
        labels, counts = objective.confusion(loss.sums)
        pairs = Counter({(a, b): num for a, row in zip(labels, counts, strict=True)
                         for b, num in zip(labels, row, strict=True)})  # fmt: skip
        yield from _confusions(pairs, labels)


def _confusions(counts: Counter[tuple[str, str]], labels: Sequence[str]) -> list[str]:
    """`counts` of true and predicted."""
    wrong = Counter({pair: num for pair, num in counts.items() if pair[0] != pair[1] and num})
    if len(labels) <= _MOST_LABELS:
        titles = ("is \\ said", *labels)
        return table([titles, *((a, *(str(counts[a, b]) for b in labels)) for a in labels)], right=labels)
    return [f"{num:,} times {said!r} where it is {is_!r}" for (is_, said), num in wrong.most_common(_MOST_LABELS)]


def _examples(source: Source) -> Iterator[Example]:
    from dtrain.datasets.base import Skipped

    assert source.dataset is not None
    return (one for one in source.dataset.examples() if not isinstance(one, Skipped))


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
