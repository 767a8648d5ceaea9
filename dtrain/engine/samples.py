"""What a model goes on with in the middle of its training: written by the module that is trained, so under every
strategy, by all ranks together.

Each rank answers some of the prompts. A strategy that divides the weights gathers them at every forward, which all
ranks have to run: one that is done, or has no prompt, runs along. No state is kept between tokens: a forward sees the
whole text again, as in training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch

from dtrain.engine import rng
from dtrain.engine.generate import How, Reply, Writer
from dtrain.engine.loaded import Loaded, stops_of
from dtrain.errors import ModelError
from dtrain.models._causal import CausalLM
from dtrain.models._head import Head
from dtrain.trackers.base import Sample

if TYPE_CHECKING:
    from dtrain.comm import AbstractComm
    from dtrain.config.asked import Asked
    from dtrain.config.schema import Config
    from dtrain.models.base import ModelBundle
    from dtrain.strategies.base import AbstractStrategy

GoOn = Callable[[int], bool]
"""Asked before each token with the number of texts that this rank has not ended: whether any rank has some. Raises
ToldToStop on all of them. Collective.
"""


class ToldToStop(Exception):  # noqa: N818 - nothing is wrong
    """The run is to stop: what is not written is written when it goes on."""


@final
class Sampler:
    def __init__(self, config: Config, bundle: ModelBundle, strategy: AbstractStrategy, comm: AbstractComm) -> None:
        """Of a settled configuration with prompts. Raises ModelError, DataError."""
        module = bundle.module
        if not isinstance(module, CausalLM) or not isinstance(module.get_submodule(module.head_name), Head):
            raise ModelError(f"eval.prompts: {type(module).__name__} writes no text; leave them out")
        from dtrain.data.tokenizer import TextTokenizer

        assert isinstance(config.batch.micro_batch, int)
        decoder = module.decoder_module.config.get_text_config()
        tokenizer = TextTokenizer.load(bundle.assets)
        self._strategy, self._comm = strategy, comm
        positions = positions_of(module)
        self._model = _Together(strategy, comm.device, positions)
        loaded = Loaded(bundle.assets, self._model, tokenizer, stops_of(decoder, tokenizer, [bundle.assets]),
                        positions, comm.device, "")  # fmt: skip
        drawn = rng.save(comm.device)
        self._writer = Writer(loaded, How(usual=config.eval.max_new_tokens), seed=0)
        rng.load(drawn, comm.device)
        self._asked = config.eval.asked()
        self._prompts = [self._writer.prompt(one.prompt, one.tools) for one in self._asked]
        width = max(map(len, self._prompts)) + config.eval.max_new_tokens
        room = config.batch.micro_batch * config.dataset.max_length // width
        each = max(1, min(room, -(-len(self._prompts) // comm.size)))
        self._groups = [range(i, min(i + each, len(self._prompts))) for i in range(0, len(self._prompts), each)]
        """What is answered together: no more tokens than a micro-batch of training has."""

    def write(self, go_on: GoOn) -> list[Sample] | None:
        """A sample for each prompt; None where the run is to stop. The state of the training, that of the random
        generators included, stays as it is. Collective.
        """
        comm = self._comm
        self._model.go_on = go_on
        self._strategy.module.eval()
        try:
            found: dict[int, Reply] = {}
            for first in range(0, len(self._groups), comm.size):
                at = first + comm.rank
                group = self._groups[at if at < len(self._groups) else 0]  # with nothing to do: some prompts once more
                replies = self._writer.write([self._prompts[k] for k in group])
                if at < len(self._groups):
                    found.update(zip(group, replies, strict=True))
        except ToldToStop:
            return None
        finally:
            self._strategy.module.train()
        told = {k: reply for one in comm.gather(json.dumps(found)) for k, reply in json.loads(one).items()}
        return [Sample(_shown(one), *told[str(k)]) for k, one in enumerate(self._asked)]


def positions_of(module: CausalLM) -> int | None:
    """Of the tokens of a text; None where there is no limit."""
    most: int | None = getattr(module.decoder_module.config.get_text_config(), "max_position_embeddings", None)
    return most if most is None or module.virtual is None else most - module.virtual.num


def _shown(one: Asked) -> str:
    if isinstance(one.prompt, str):
        return one.prompt
    return str(one.row["prompt"]) if "prompt" in one.row else json.dumps(one.row["messages"], ensure_ascii=False)


@final
@dataclasses.dataclass(slots=True)
class _Together:
    """Takes the place of a model of transformers, whose `generate` a `Writer` calls."""

    strategy: AbstractStrategy
    device: torch.device
    max_positions: int | None
    """Of the tokens of a text, with what follows on it; None where there is no limit."""
    go_on: GoOn = lambda left: bool(left)

    def generate(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any,
                 stopping_criteria: Callable[..., torch.Tensor], streamer: None) -> torch.Tensor:  # fmt: skip
        """The prompts, padded on the left, and what follows on each. Collective: as many forwards as the longest text
        of any rank takes.
        """
        most, pad_id = generation_config.max_new_tokens, generation_config.pad_token_id
        ends = torch.tensor(generation_config.eos_token_id or [], device=self.device, dtype=torch.int64)
        num, width = input_ids.shape
        lengths = attention_mask.sum(1)
        # As training lays rows out, padded at the end, and as wide from the beginning as they may become: what is made
        # for a shape, such as a compiled kernel, is made once. No wider than the positions: a long prompt may be
        # followed by less than a short one, whose padding would count beyond them.
        widest = width + most if self.max_positions is None else min(width + most, self.max_positions)
        tokens = torch.full((num, widest), pad_id, device=self.device)
        for row, length in enumerate(lengths.tolist()):
            tokens[row, :length] = input_ids[row, width - length :]
        rows = torch.arange(num, device=self.device)
        columns = torch.arange(widest, device=self.device).expand_as(tokens)
        ended = torch.zeros(num, dtype=torch.bool, device=self.device)
        out = input_ids
        while self.go_on(int((~ended).sum())):
            # Padding counts from 0, as a text of its own that no other sees.
            positions = torch.where(columns < lengths[:, None], columns, columns - lengths[:, None])
            with torch.no_grad():
                found = self.strategy.module(
                    tokens=tokens, positions=positions, target_index=rows * tokens.shape[1] + lengths - 1
                )
            if ended.all():
                continue
            found = torch.where(ended, pad_id, found)
            tokens[rows[~ended], lengths[~ended]] = found[~ended]
            lengths = lengths + ~ended
            out = torch.cat([out, found[:, None]], dim=1)
            ended = ended | torch.isin(found, ends) | stopping_criteria(out, None)
        return out
