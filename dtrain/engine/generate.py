"""Text from a model: to one prompt, piece by piece, or to many at a time."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import torch

from dtrain.errors import ModelError

if TYPE_CHECKING:
    from dtrain.data.chat import Messages, Tools
    from dtrain.engine.loaded import Loaded

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, slots=True)
class How:
    max_new_tokens: int | None = None
    """None: `usual`, or what is left of the model's positions where that is less."""
    usual: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: of all tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply, and are not part of it."""


class Reply(NamedTuple):
    text: str
    finish: Finish
    """Whether it came to an end, or to the most tokens that it might have."""
    num_tokens: int


@final
class Writer:
    """What a model goes on with."""

    def __init__(self, loaded: Loaded, how: How, *, seed: int) -> None:
        """`seed`: of all that is drawn from now on."""
        torch.manual_seed(seed)
        self._loaded, self._how = loaded, how

    def prompt(self, what: str | Messages, tools: Tools = None) -> list[int]:
        """Tokens of a text as it is, or of a conversation by the chat template, up to where the assistant begins.
        Raises ModelError, BadRowError, DataError.
        """
        tokenizer = self._loaded.tokenizer
        if not isinstance(what, str) and not tokenizer.has_chat:
            raise ModelError(f"{self._loaded.folder}: its tokenizer has no chat template; give the prompt as plain "
                             f"text, or take a model that has one")  # fmt: skip
        ids = tokenizer.encode(what if isinstance(what, str) else tokenizer.prompt(what, tools))
        if not ids:
            raise ModelError("the prompt has no tokens; give at least one character")
        self._room(len(ids))
        return ids

    def _room(self, num_tokens: int) -> int:
        """The most tokens that may follow so many. Raises ModelError: nothing of a prompt is cut."""
        most, asked = self._loaded.max_positions, self._how.max_new_tokens
        if most is None:
            return asked or self._how.usual
        if num_tokens + (asked or 1) > most:
            more = f" and {asked:,} more" if asked else ""
            raise ModelError(f"the prompt has {num_tokens:,} tokens{more}, and the model {most:,} positions: shorten "
                             f"it" + ", or lower --max-new-tokens" * bool(asked))  # fmt: skip
        return asked or min(self._how.usual, most - num_tokens)

    def write(self, prompts: Sequence[Sequence[int]], say: Callable[[str], None] | None = None) -> list[Reply]:
        """What follows on each. `say`: hears the reply to a single prompt, as it comes. At temperature 0 each is what
        it would be alone.
        """
        from transformers import GenerationConfig, StoppingCriteriaList

        assert say is None or len(prompts) == 1, len(prompts)
        loaded, how = self._loaded, self._how
        width = max(map(len, prompts))
        if loaded.num_virtual and width > min(map(len, prompts)):
            # Peft would put them before the padding, further away than from a prompt alone.
            return [self.write([prompt])[0] for prompt in prompts]
        ids = torch.full((len(prompts), width), loaded.tokenizer.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        rooms = [self._room(len(prompt)) for prompt in prompts]
        sampling: Mapping[str, Any] = {"do_sample": False}
        if how.temperature:
            sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
        settings = GenerationConfig(**sampling, max_new_tokens=max(rooms), eos_token_id=sorted(loaded.stops) or None,
                                    pad_token_id=loaded.tokenizer.pad_id)  # fmt: skip
        ended = _Ended(loaded, how.stop, width, rooms)
        stream = None if say is None else _Stream(loaded, how.stop, say)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")  # there is no padding to tell of
            out = loaded.model.generate(
                input_ids=ids.to(loaded.device), attention_mask=mask.to(loaded.device), generation_config=settings,
                stopping_criteria=StoppingCriteriaList([ended]), streamer=stream,
            )  # fmt: skip
        replies = [self._reply(row, ended.after[i], rooms[i]) for i, row in enumerate(out[:, width:].tolist())]
        if stream is not None:
            stream.rest(replies[0].text)
        return replies

    def _reply(self, ids: list[int], ended_after: int | None, room: int) -> Reply:
        end = next((i for i, one in enumerate(ids) if one in self._loaded.stops), None)
        num = min(len(ids) if end is None else end + 1, room, ended_after or room)
        text = self._loaded.tokenizer.decode(ids[:num], special=False)
        cut = _first(text, self._how.stop)
        stopped = cut is not None or ended_after is not None or (end is not None and end < num)
        return Reply(text if cut is None else text[:cut], "stop" if stopped else "length", num)


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stops begins."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


@final
class _Ended:
    """Which rows have written one of the texts, or all that they may; transformers asks after each token."""

    def __init__(self, loaded: Loaded, stops: Sequence[str], width: int, rooms: Sequence[int]) -> None:
        self._tokenizer, self._stops, self._width, self._rooms = loaded.tokenizer, stops, width, rooms
        self.after: list[int | None] = [None] * len(rooms)
        """Tokens of each reply up to where a text ended it."""
        # A character may be several tokens; what is longer than this cannot have begun in what was looked at before.
        self._tail = max((4 * len(stop) + 4 for stop in stops), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        num = input_ids.shape[1] - self._width
        if self._stops:
            for row, ids in enumerate(input_ids[:, max(self._width, input_ids.shape[1] - self._tail) :].tolist()):
                if self.after[row] is None and _first(self._tokenizer.decode(ids), self._stops) is not None:
                    self.after[row] = num
        done = [after is not None or num >= room for after, room in zip(self.after, self._rooms, strict=True)]
        return torch.tensor(done, device=input_ids.device)


@final
class _Stream:
    """Passes on what of a reply is certain: what may be the beginning of a stop waits."""

    def __init__(self, loaded: Loaded, stops: Sequence[str], say: Callable[[str], None]) -> None:
        self._next, self._ends, self._stops, self._say = loaded.tokenizer.decoding(), loaded.stops, stops, say
        self._prompt, self._text, self._said = True, "", 0

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first, then each token."""
        if self._prompt:
            self._prompt = False
            return
        token_id = int(value.reshape(-1)[0])
        if token_id in self._ends:
            return
        self._text += self._next(token_id)
        cut = _first(self._text, self._stops)
        self._upto(len(self._text) - self._begun() if cut is None else cut)

    def end(self) -> None:
        """What waits is told by `rest`, which knows the whole reply."""

    def rest(self, text: str) -> None:
        if text.startswith(self._text[: self._said]):
            self._say(text[self._said :])

    def _begun(self) -> int:
        """Characters at the end of the text that one of the stops may begin with."""
        return max((num for stop in self._stops for num in range(1, len(stop)) if self._text.endswith(stop[:num])),
                   default=0)  # fmt: skip

    def _upto(self, end: int) -> None:
        if end > self._said:
            self._say(self._text[self._said : end])
            self._said = end
