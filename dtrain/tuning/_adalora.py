"""AdaLoRA (arXiv 2303.10512): how much each number matters, and which ranks are taken, under any strategy.

Peft's allocator needs whole gradients of whole parameters. Here what it keeps of each number, which depends on nothing
but that number and its gradient, is state of the optimizer: divided, saved and loaded as its moments are. What is taken
is chosen by sums of it over all ranks. A mask is no state, then: it follows from those numbers, which stay as they are
once the last choice is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from dtrain.models.base import AbstractAlongside, ModelBundle, Part

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.tuning.adalora import AdaLoRA

_MATTERS, _UNSURE = "exp_avg_ipt", "exp_avg_unc"
"""Peft's names."""
_A, _B, _E = ".lora_A.", ".lora_B.", ".lora_E."


def alongside(bundle: ModelBundle, how: AdaLoRA) -> ModelBundle:
    """The same with ranks being taken while it is trained."""
    from peft.tuners.adalora.layer import SVDLinear

    layers: dict[str, Any] = {name: one for name, one in bundle.module.named_modules() if isinstance(one, SVDLinear)}
    made = _Alongside(how, {name: (one.out_features, one.in_features) for name, one in layers.items()})
    if how.orthogonality:
        for name, layer in layers.items():
            made.look_at(name, layer)
    return dataclasses.replace(bundle, alongside=made)


class Course(NamedTuple):
    """Steps, counted from 1."""

    warmup: int
    """Up to this one nothing is taken."""
    last: int
    """At this one ranks are taken for the last time."""

    @classmethod
    def of(cls, how: AdaLoRA, steps: int) -> Course:
        return cls(int(how.warmup * steps), steps - int(how.final * steps))


def budget(step: int, course: Course, first: int, target: int) -> int:
    """Ranks that are left after a step; by the third power, as the paper has it."""
    if step <= course.warmup:
        return first
    if step >= course.last:
        return target
    rest = 1 - (step - course.warmup) / (course.last - course.warmup)
    return int((first - target) * rest**3 + target)


@final
class _Alongside(AbstractAlongside):
    state_names = (_MATTERS, _UNSURE)

    def __init__(self, how: AdaLoRA, shapes: Mapping[str, tuple[int, int]]) -> None:
        """`shapes`: outputs and inputs of each layer that something is added to."""
        self._how, self._shapes = how, shapes
        self._place = {name: how.rank * i for i, name in enumerate(shapes)}
        self._looking = True
        self._distances: dict[str, torch.Tensor] = {}
        self._taken: torch.Tensor | None = None

    def look_at(self, name: str, layer: Any) -> None:
        """Have its forward tell how far its directions are from being apart: there its parameters are whole."""
        forward: Callable[..., torch.Tensor] = layer.forward

        def looked_at(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if torch.is_grad_enabled():
                first, second = _sides(layer)
                self._distances[name] = _distance(first) + _distance(second)
            return forward(x, *args, **kwargs)

        layer.forward = looked_at

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(self._keep)

    def _keep(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After an update, where its gradients still are: of each number by itself, so that pieces will do."""
        if not self._looking:
            return
        how = self._how
        for param in (one for group in optimizer.param_groups for one in group["params"] if one.grad is not None):
            state = optimizer.state[param]
            for name in self.state_names:
                if name not in state:
                    state[name] = torch.zeros_like(param)
            now = (param.detach() * param.grad).abs_()
            matters, unsure = state[_MATTERS], state[_UNSURE]
            matters.mul_(how.beta1).add_(now, alpha=1 - how.beta1)
            unsure.mul_(how.beta2).add_(now.sub_(matters).abs_(), alpha=1 - how.beta2)

    def begin(self, step: int, steps: int) -> None:
        # A choice needs a step that was looked at, also where the first step is the last that takes any.
        self._looking = step < max(2, Course.of(self._how, steps).last)

    def term(self) -> tuple[str, torch.Tensor] | None:
        if not self._distances:
            return None
        mean = torch.stack(list(self._distances.values())).sum() / (2 * len(self._distances))
        return "orthogonality", self._how.orthogonality * mean

    def after(self, step: int, steps: int, parts: Callable[[], Iterable[Part]], comm: AbstractComm) -> bool:
        self._distances.clear()
        how, course = self._how, Course.of(self._how, steps)
        if step <= course.warmup or (step < course.last and step % how.every_steps):
            return False
        if step <= course.last or self._taken is None:
            first = how.rank * len(self._shapes)
            left = budget(step, course, first, how.target_rank * len(self._shapes))
            scores = torch.tensor(comm.sum(self._scores(parts())))
            if not scores.any():  # nothing was updated yet, as where fp16 overflowed: all would be lowest
                return False
            self._taken = lowest(scores, first - left)
        with torch.no_grad():
            for part in parts():
                layer, _, rest = part.name.partition(_E)
                if rest:
                    view = part.views["weight"]
                    start = self._place[layer] + part.start
                    view.masked_fill_(self._taken[start : start + len(view)].to(view.device), 0.0)
        return True

    def _scores(self, parts: Iterable[Part]) -> list[float]:
        """Of each rank of each layer, what this rank has of: how much its value matters, and on average a number of its
        two directions.
        """
        rank = self._how.rank
        found = torch.zeros(rank * len(self._shapes), dtype=torch.float64)
        for part in parts:
            side = next((one for one in (_A, _B, _E) if one in part.name), None)
            if side is None or part.replica or _MATTERS not in part.views:
                continue
            layer = part.name.partition(side)[0]
            rows, columns = self._shapes[layer]
            score = (part.views[_MATTERS] * part.views[_UNSURE]).double()
            place = torch.arange(part.start, part.start + len(score), device=score.device)
            place = place // columns if side == _A else place % rank
            each = torch.bincount(place, weights=score, minlength=rank)
            found[self._place[layer] :][:rank] += each.cpu() / {_A: columns, _B: rows, _E: 1}[side]
        return found.tolist()


def lowest(scores: torch.Tensor, num: int) -> torch.Tensor:
    """Which are no higher than the `num`-th from below."""
    if num == 0:
        return torch.zeros(len(scores), dtype=torch.bool)
    return scores <= scores.kthvalue(num)[0]


def _sides(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Its directions in rows, [rank, numbers]."""
    (name,) = layer.lora_A
    return layer.lora_A[name], layer.lora_B[name].T


def _distance(side: torch.Tensor) -> torch.Tensor:
    rows = side.float()
    products = rows @ rows.T
    return torch.linalg.matrix_norm(products - torch.eye(len(rows), device=rows.device))
