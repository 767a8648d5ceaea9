"""Every objective is the same whatever the parallelism: against its formula, computed by one plain process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dtrain.checkpoint import manifest
from dtrain.checkpoint.manifest import folder_name
from dtrain.checkpoint.verify import committed
from dtrain.data.store import RowStore
from dtrain.models.assets import files_digest
from dtrain.models.outputs import with_outputs
from tests.contract.preferences import (
    LABELS,
    OPTIONS,
    classes,
    classification,
    confusion,
    documents,
    formula,
    make_labelled,
    make_preferences,
    reward,
    scored,
)
from tests.contract.saved import Ran, run, whole
from tests.contract.small import Recipe, Trained, make_built, overrides, reference, settled, train
from tests.contract.test_equivalence import STRATEGIES, difference
from tests.contract.test_tuning import exported
from tests.processes import run_ranks

RECIPE = Recipe(6, steps=4)
HALF = 2


@pytest.fixture(scope="session")
def replies(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replies") / "data"
    make_preferences(folder, small / "model")
    return folder


@functools.lru_cache(maxsize=1)
def _start(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@functools.cache
def _expected(replies: Path, name: str) -> Trained:
    return reference(replies, RECIPE, mean_loss=formula(name, _start(replies / "model")))


def _typed(replies: Path, name: str, *more: str) -> list[str]:
    typed = [one for one in overrides(replies, RECIPE, *more) if not one.startswith("objective=")]
    return [*typed, *OPTIONS[name]]


CASES = [
    *(("sigmoid", strategy, 2, ()) for strategy in STRATEGIES),
    ("sigmoid", "ddp", 2, ("objective.reference=copy", "batch.micro_batch=1")),
    ("sigmoid", "ddp", 1, ("batch.micro_batch=6",)),
    ("smoothed", "ddp", 1, ()),
    ("ipo", "zero2", 2, ()),
    ("hinge", "fsdp2", 2, ("batch.micro_batch=1",)),
    ("simpo", "zero3", 2, ()),
    ("simpo", "ddp", 1, ("batch.micro_batch=4",)),
    ("orpo", "fsdp2", 2, ()),
    ("kto", "zero3", 2, ("batch.micro_batch=1",)),
    ("kto", "ddp", 2, ("objective.reference=copy",)),
    ("kto", "fsdp2", 1, ("batch.micro_batch=6",)),
]


@pytest.mark.parametrize(("name", "strategy", "size", "more"), CASES)
def test_every_objective_equals_its_formula(
    replies: Path, tmp_path: Path, name: str, strategy: str, size: int, more: tuple[str, ...]
) -> None:
    expected = _expected(replies, name)
    typed = _typed(replies, name, f"strategy={strategy}", *more)
    for got in run_ranks(train, replies, typed, tmp_path, size=size):
        assert got.losses == pytest.approx(expected.losses, rel=1e-5)
        assert got.norms == pytest.approx(expected.norms, rel=1e-5)
        assert got.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
        for key, weight in expected.weights.items():
            assert difference(got.weights[key], weight) < 1e-5, key


def _values(replies: Path, typed: list[str], cache: Path) -> list[float]:
    train(replies, typed, cache)
    (found,) = cache.glob("reference-*")
    assert not list(cache.glob(".tmp-*"))
    return [float(value) for value in load_file(found / "train.safetensors")["values"]]


def test_the_reference_is_computed_once_and_found_again(replies: Path, tmp_path: Path) -> None:
    typed = _typed(replies, "sigmoid", "strategy=ddp")
    (values, _) = run_ranks(_values, replies, typed, tmp_path, size=2)
    store = RowStore(replies / "train.arrow")
    with torch.no_grad():
        expected, _ = documents(_start(replies / "model"), [store.row(i) for i in range(len(store))])
    assert values == pytest.approx([float(one) for one in expected], rel=1e-5)
    (folder,) = tmp_path.glob("reference-*")
    kept = load_file(folder / "train.safetensors")
    save_file({**kept, "values": kept["values"] + 1}, folder / "train.safetensors")
    (again,) = run_ranks(_values, replies, typed, tmp_path, size=1)
    assert again == pytest.approx([value + 1 for value in values], rel=1e-5), "it was computed anew"


def _resumed(replies: Path, typed: list[str], cache: Path) -> str:
    from dtrain.engine.around import around
    from dtrain.errors import RunError
    from dtrain.objectives._reference import reference

    built = make_built(replies, typed, cache=cache)
    found = around(built.config, built.bundle, built.strategy, built.comm,
                   (built.engine._train_rows, built.engine._eval_rows), pad_id=0, cache=cache, resumed=True,
                   say=lambda line: None, at=lambda rows: None)  # fmt: skip
    try:
        reference("cached", found)
    except RunError as error:
        return str(error)
    return ""


def test_trained_weights_never_stand_for_the_reference(replies: Path, tmp_path: Path) -> None:
    typed = _typed(replies, "sigmoid", "strategy=ddp")
    for message in run_ranks(_resumed, replies, typed, tmp_path, size=2):
        assert "is not there" in message
        assert "objective.reference=copy" in message
    train_ranks = run_ranks(train, replies, typed, tmp_path, size=1)
    assert len(train_ranks[0].losses) == RECIPE.steps
    assert run_ranks(_resumed, replies, typed, tmp_path, size=2) == ["", ""]


def _continued(replies: Path, typed: list[str], folder: Path) -> list[tuple[Any, int]]:
    """Of an adapter that goes on from another, which is another one in the end: what its export says of where it
    started, and how many references there are by then.
    """
    import json

    from dtrain.engine.state import Progress

    first = folder / "first"
    exported(replies, typed, first)
    found = []
    for kind in ("adapters", "cached", "cached", "cached"):
        more = [f"tuning.init_from={first}", f"objective.reference={kind}"]
        built = make_built(replies, [*typed, *more], cache=folder)
        built.engine.run([], Progress())
        built.export(folder / "then")
        said = json.loads((folder / "then" / "base.json").read_text())
        found.append((said["start"], len(list(folder.glob("reference-*")))))
        if len(found) == 3:
            kept = load_file(first / "adapter_model.safetensors")
            save_file({name: value + 1 for name, value in kept.items()}, first / "adapter_model.safetensors")
    return found


def test_an_adapter_that_its_losses_compare_with_is_known_by_its_content(replies: Path, tmp_path: Path) -> None:
    typed = _typed(replies, "sigmoid", "strategy=ddp", "tuning=lora", "tuning.rank=2", "train.steps=2",
                   "export.dtype=fp32")  # fmt: skip
    ((none, no), before, again, after), *_ = run_ranks(_continued, replies, typed, tmp_path, size=1)
    assert (none, no) == (None, 0), "without its adapters it is the model alone"
    path = str((tmp_path / "first").resolve())
    assert before == again == ({"path": path, "xxh3": before[0]["xxh3"]}, 1)
    assert after == ({"path": path, "xxh3": files_digest(tmp_path / "first")}, 2)
    assert before[0]["xxh3"] != after[0]["xxh3"]


@pytest.fixture(scope="session")
def labelled(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "data"
    make_labelled(folder, small / "model")
    return folder


def _classify(labelled: Path, typed: list[str]) -> tuple[Trained, Any]:
    from dtrain.engine.state import Progress
    from tests.contract.small import Record

    built, record = make_built(labelled, typed), Record()
    built.engine.run([record], Progress())
    weights = {name: full.numpy() for name, full in built.strategy.full_state()}
    losses, norms = ([getattr(one, key) for one in record.reports] for key in ("loss", "grad_norm"))
    return Trained(losses, norms, weights, record.evals[-1].loss), record.evals[-1]


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 1), ("zero3", 2), ("fsdp2", 2)])
def test_labels_are_learned_and_chosen_alike(labelled: Path, strategy: str, size: int) -> None:
    counts: list[list[list[int]]] = []

    def after(done: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        if done == RECIPE.steps:
            store = RowStore(labelled / "eval.arrow")
            counts.append(confusion(model, [store.row(i) for i in range(len(store))]))

    expected = reference(labelled, RECIPE, after, mean_loss=classification)
    typed = [one for one in overrides(labelled, RECIPE, f"strategy={strategy}") if not one.startswith("objective=")]
    typed += ["objective=classify", f"objective.labels=[{','.join(LABELS)}]"]
    for got, report in run_ranks(_classify, labelled, typed, size=size):
        assert got.losses == pytest.approx(expected.losses, rel=1e-5)
        assert got.norms == pytest.approx(expected.norms, rel=1e-5)
        assert got.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
        assert [list(row) for row in report.confusion.counts] == counts[0]
        assert sum(map(sum, counts[0])) == report.num_targets
        for key, weight in expected.weights.items():
            assert difference(got.weights[key], weight) < 1e-5, key


def _measured(cases: list[tuple[Path, list[str]]]) -> list[tuple[set[str], set[str]]]:
    """What an eval of each measures, and what its spec says."""
    return [({*_classify(folder, typed)[1].extras}, {*settled(typed).objective.measured}) for folder, typed in cases]


def test_what_an_eval_measures_is_known_before(replies: Path, labelled: Path, tmp_path: Path) -> None:
    more = ["strategy=ddp", "train.steps=1"]
    cases = [(replies, [*_typed(replies, name), *more]) for name in ("sigmoid", "simpo", "orpo", "kto")]
    labels = [one for one in overrides(labelled, RECIPE, *more) if not one.startswith("objective=")]
    cases.append((labelled, [*labels, "objective=classify", f"objective.labels=[{','.join(LABELS)}]"]))
    (found,) = run_ranks(_measured, cases, size=1)
    assert all(told and told == said for told, said in found), found


def test_the_best_by_what_the_objective_measures_stays(labelled: Path, tmp_path: Path) -> None:
    folder = _with_outputs(labelled, [*LABELS], tmp_path)
    typed = _typed_outputs(
        folder, "classifier", "strategy=ddp", "train.steps=6", "eval.every_steps=1", "checkpoint.every_steps=1"
    )
    for keep in (9, 1):
        more = [f"checkpoint.keep_last={keep}", "checkpoint.best_by=accuracy", "checkpoint.best_mode=max"]
        run_ranks(
            functools.partial(run, noise=False, in_background=False), folder, settled([*typed, *more]),
            tmp_path / str(keep), None, size=1,
        )  # fmt: skip
    measured = {read.step: read.metrics["accuracy"] for read in map(manifest.read, committed(tmp_path / "9"))}
    best = max(measured, key=lambda step: (measured[step] or 0, -step))
    assert len(measured) == 6
    assert best != 6, "else nothing is shown"
    assert [path.name for path in committed(tmp_path / "1")] == [folder_name(6), folder_name(best)]


LORA = ["tuning=lora", "tuning.rank=4"]


@pytest.mark.parametrize(("strategy", "size"), [("zero3", 2), ("fsdp2", 2), ("ddp", 2)])
def test_adapters_that_are_switched_off_are_the_reference(
    replies: Path, tmp_path: Path, strategy: str, size: int
) -> None:
    # An adapter starts from nothing, so what was there before it is what training starts from.
    typed = _typed(replies, "sigmoid", *LORA)
    (expected,) = run_ranks(train, replies, [*typed, "strategy=ddp", "objective.reference=cached"], tmp_path, size=1)
    assert expected.losses[-1] != pytest.approx(expected.losses[0], rel=1e-3)
    for got in run_ranks(train, replies, [*typed, f"strategy={strategy}"], tmp_path / "none", size=size):
        assert got.losses == pytest.approx(expected.losses, rel=1e-5)
        assert got.norms == pytest.approx(expected.norms, rel=1e-5)
    assert not (tmp_path / "none").exists()


def _fresh_score(folder: Path) -> torch.Tensor:
    from dtrain.models._causal import build_causal

    bundle = build_causal(folder / "model", seed=RECIPE.seed)
    shape = bundle.module.get_parameter("score.weight").shape
    return bundle.weights.read("score.weight", 0, shape.numel()).view(shape)


def _with_outputs(data: Path, names: list[str], to: Path) -> Path:
    """The same rows, and the model with outputs of its own in place of the vocabulary."""
    folder = to / "data"
    folder.mkdir()
    (folder / "model").symlink_to(with_outputs(data / "model", names, 0, to / "cache"))
    for one in ("train", "eval"):
        (folder / f"{one}.arrow").symlink_to(data / f"{one}.arrow")
    return folder


def _typed_outputs(folder: Path, name: str, *more: str) -> list[str]:
    typed = [one for one in overrides(folder, RECIPE, *more) if not one.startswith("objective=")]
    return [*typed, f"objective={name}", *([f"objective.labels=[{','.join(LABELS)}]"] if name == "classifier" else [])]


@pytest.mark.parametrize(("name", "strategy", "size"), [
    ("reward", "zero3", 2), ("reward", "ddp", 1), ("classifier", "fsdp2", 2), ("classifier", "zero1", 2),
])  # fmt: skip
def test_models_with_outputs_of_their_own_are_trained_alike(
    replies: Path, labelled: Path, tmp_path: Path, name: str, strategy: str, size: int
) -> None:
    data, names, loss = (replies, ["reward"], reward) if name == "reward" else (labelled, [*LABELS], classes)
    folder = _with_outputs(data, names, tmp_path)
    score = _fresh_score(folder)
    assert 0.05 < float(score.std()) < 0.2, "drawn by the model's own rules, with initializer_range=0.1"
    expected = reference(folder, RECIPE, prepare=lambda _: scored(folder / "model", score), mean_loss=loss)
    for got in run_ranks(train, folder, _typed_outputs(folder, name, f"strategy={strategy}"), size=size):
        assert got.losses == pytest.approx(expected.losses, rel=1e-5)
        assert got.norms == pytest.approx(expected.norms, rel=1e-5)
        assert got.eval_loss == pytest.approx(expected.eval_loss, rel=1e-5)
        assert set(got.weights) == set(expected.weights)
        for key, weight in expected.weights.items():
            assert difference(got.weights[key], weight) < 1e-5, key


def _and_on(folder: Path, before: list[str], after: list[str], root: Path) -> tuple[Ran, Ran]:
    """Call it on every rank."""
    first = run(folder, settled(before), root / "a", None, noise=False)
    return first, run(folder, settled(after), root / "b", root / "a" / folder_name(HALF), noise=False)


@pytest.mark.parametrize(("name", "strategies", "more"), [
    ("reward", ("zero3", "fsdp2"), ()), ("classifier", ("fsdp2", "zero1"), ()),
    ("classifier", ("ddp", "zero3"), tuple(LORA)),
])  # fmt: skip
def test_models_with_outputs_of_their_own_go_on_elsewhere(
    replies: Path, labelled: Path, tmp_path: Path, name: str, strategies: tuple[str, str], more: tuple[str, ...]
) -> None:
    data, names = (replies, ["reward"]) if name == "reward" else (labelled, [*LABELS])
    folder = _with_outputs(data, names, tmp_path)
    before, after = (_typed_outputs(folder, name, *more, f"strategy={one}", f"checkpoint.every_steps={HALF}",
                                    "checkpoint.at_end=false") for one in strategies)  # fmt: skip
    ran = run_ranks(_and_on, folder, before, after, tmp_path, size=2)
    saved, loaded = whole(first.saved for first, _ in ran), whole(then.first for _, then in ran)
    assert "score.weight" in saved["exp_avg"]
    for state, tensors in saved.items():
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(loaded[state][key], tensor, err_msg=f"{state} of {key}")
    first, then = ran[0]
    assert len(then.losses) == RECIPE.steps - HALF
    assert then.losses == pytest.approx(first.losses[HALF:], rel=1e-5)
    assert then.norms == pytest.approx(first.norms[HALF:], rel=1e-5)


def test_new_outputs_are_trained_and_kept_with_an_adapter(labelled: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folder, to = _with_outputs(labelled, [*LABELS], tmp_path), tmp_path / "adapter"
    typed = _typed_outputs(folder, "classifier", "strategy=zero2", *LORA, "export.dtype=fp32")
    ran = run_ranks(exported, folder, typed, to, size=2)[0]
    assert ran.trained["score.weight"] == (len(LABELS), 32)
    base = AutoModelForSequenceClassification.from_pretrained(
        labelled / "model", num_labels=len(LABELS), pad_token_id=0
    )
    tuned = PeftModel.from_pretrained(base, to).eval()
    ids = torch.arange(1, 12)[None]
    merged = AutoModelForSequenceClassification.from_pretrained(
        labelled / "model", num_labels=len(LABELS), pad_token_id=0
    )
    merged.load_state_dict(torch.load(to / "merged.pt", weights_only=True))
    torch.testing.assert_close(tuned(input_ids=ids).logits, merged.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
