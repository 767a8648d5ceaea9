"""Text to token ids and back, from the files that a model folder has; without torch or transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from dtrain.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dtrain.data.chat import Messages, Span, Tools
    from dtrain.data.turns import Turns

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARKER = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_\w+>|</?s>|\[/?[A-Z_]+\]")
"""What looks like a special token in what a template writes."""


def tokenizer_digest(folder: Path) -> str:
    """Of what `TextTokenizer.load` reads; loads no tokenizer."""
    import xxhash

    state = xxhash.xxh3_128()
    for name in FILES:
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        state.update(f"{name}\0{len(content)}\0".encode())
        state.update(content)
    state.update(f"stops {stop_ids(folder)}".encode())
    return state.hexdigest()


def stop_ids(folder: Path) -> list[int]:
    """The tokens at which generation stops, where a model's folder says so."""
    found = read_config(folder / "generation_config.json").get("eos_token_id")
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def read_config(path: Path) -> dict[str, Any]:
    """One of the JSON files of a model's folder; empty where it is not there. Raises DataError."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"model.path: {path} is not JSON: {error}; fetch the file again") from error
    assert isinstance(config, dict), path
    return config


@final
class TextTokenizer:
    """A tokenizer and its chat template. Threads may share one: it computes outside the interpreter's lock."""

    def __init__(
        self, tokenizer: Tokenizer, special: dict[str, str], templates: Mapping[str, Turns], folder: Path
    ) -> None:
        """`templates`: `default`, and `tool_use` where there is another one for conversations with tools."""
        self._tokenizer = tokenizer
        self._special = special
        self._templates = templates
        self._folder = folder
        self.digest = tokenizer_digest(folder)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """From `tokenizer.json`, `tokenizer_config.json` and, where they are there, `chat_template.jinja` and, for the
        tokens at which generation stops, `generation_config.json`.

        Raises DataError naming the file. Truncation and padding that the file asks for are not done: they would drop
        tokens unseen.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"model.path: no tokenizer.json in {folder}; choose a model with a fast tokenizer, or "
                            f"convert the tokenizer to one")  # fmt: skip
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"model.path: {path} cannot be read: {error}; fetch the file again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # It would add special tokens, which stand in the text already, and take white space out of the tokens' offsets.
        tokenizer.post_processor = None
        config = read_config(folder / "tokenizer_config.json")
        special = {name: _text(config[name]) for name in _SPECIAL if config.get(name) is not None}
        return cls(tokenizer, special, _load_templates(folder, config, special, tokenizer), folder)

    @property
    def eos_id(self) -> int:
        """Raises DataError where the tokenizer has none."""
        token_id = self._id("eos_token")
        if token_id is None:
            raise DataError(f"model.path: {self._folder / 'tokenizer_config.json'} names no `eos_token` of the "
                            f"vocabulary; add the token that ends a text")  # fmt: skip
        return token_id

    @property
    def bos_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def pad_id(self) -> int:
        """The padding token, else that which ends a text, else 0: padding is never a target, so any will do."""
        ids = [self._id("pad_token"), self._id("eos_token"), 0]
        return next(token_id for token_id in ids if token_id is not None)

    @property
    def has_chat(self) -> bool:
        return "default" in self._templates

    def encode(self, text: str) -> list[int]:
        """Token ids, with no special token but those that stand in the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The batch calls free the interpreter's lock, and without offsets they take half the time.
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in encoded]

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """`special`: with the special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))

    def decoding(self) -> Callable[[int], str]:
        """For tokens that come one after the other: gives what of their text is certain, without special tokens."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token_id: stream.step(self._tokenizer, token_id) or ""

    def prompt(self, messages: Messages, tools: Tools = None) -> str:
        """The text that the assistant's next turn follows on, as it was trained on.

        Raises BadRowError for a conversation that cannot be used, DataError for a tokenizer that cannot chat.
        """
        return self._turns(tools).template.render(messages, tools, add_generation_prompt=True)

    def masked(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Token ids of a text, and which of them are targets: those whose first character lies in a span.

        A token that begins before a span is none: where a prompt ends in its middle, it is never generated. The spans
        ascend.
        """
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        targets = _inside(encoding.offsets, spans)
        if targets:
            targets[0] = False
        return encoding.ids, targets

    def chat(
        self, messages: Messages, learned: Sequence[bool] | None = None, tools: Tools = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them are targets: those of the messages that are learned, the
        assistant's where it is not said, each with the token that ends its turn.

        Raises BadRowError for a conversation that cannot be used, DataError for a tokenizer that cannot chat.
        """
        if learned is None:
            learned = [message["role"] == "assistant" for message in messages]
        text, spans = self._turns(tools).spans(messages, learned, tools)
        return self.masked(text, spans)

    def chat_notes(self) -> list[str]:
        """What a user should know of how the chat template is learned. Raises DataError where there is none."""
        turns = self._turns(None)
        found = list(turns.notes())
        known = self._tokenizer.token_to_id
        markers = dict.fromkeys(each for text in turns.samples for each in _MARKER.findall(text))
        unknown = [each for each in markers if known(each) is None]
        if unknown:
            found.append(f"the tokenizer has no such tokens and takes them in pieces: {', '.join(unknown)}")
        return found

    def ends_of_turns(self) -> list[str]:
        """The special tokens that end a turn of the assistant, as far as small conversations show."""
        return list(dict.fromkeys(token for turns in self._templates.values() for token in turns.ends()))

    def token_id(self, token: str) -> int | None:
        """Of one token by its text, or of a special one by its name, such as `eos_token`."""
        return self._id(token) if token in _SPECIAL else self._tokenizer.token_to_id(token)

    def _turns(self, tools: Tools) -> Turns:
        turns = self._templates.get("tool_use") if tools else None
        turns = turns or self._templates.get("default")
        if turns is None:
            from dtrain.data.template import fitting

            raise DataError(f"model.path: the tokenizer in {self._folder} has no chat template, and the rows are "
                            f"chats; {fitting(self)}; or template.file=PATH for one of your own; or choose an "
                            f"instruction-tuned model")  # fmt: skip
        if "eos_token" in turns.template.variables and self._id("eos_token") is None:
            raise DataError(f"model.path: {self._folder / 'tokenizer_config.json'} names no `eos_token` of the "
                            f"vocabulary, which the chat template writes; add the token that ends a text")  # fmt: skip
        return turns

    def _id(self, name: str) -> int | None:
        token = self._special.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether its first character lies in one of the ascending spans."""
    targets, at = [], 0
    for first, _ in offsets:
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        targets.append(at < len(spans) and spans[at][0] <= first)
    return targets


def _load_templates(
    folder: Path, config: dict[str, Any], special: dict[str, str], tokenizer: Tokenizer
) -> dict[str, Turns]:
    sources = dict(_sources(folder, config))
    if not sources:
        return {}
    from dtrain.data.chat import ChatTemplate
    from dtrain.data.turns import Turns

    named = [special.get("eos_token"), *map(tokenizer.id_to_token, stop_ids(folder))]
    stops = [token for token in dict.fromkeys(named) if token and tokenizer.token_to_id(token) is not None]
    marks = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return {name: Turns(ChatTemplate(text, special, origin=str(origin)), [*marks, *stops], stops)
            for name, (text, origin) in sources.items()}  # fmt: skip


def _sources(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, tuple[str, Path]]]:
    """Templates by name, each with the file that has it."""
    path, source = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(source, str):
        yield "default", (source, path)
    elif source is not None:
        yield from ((each["name"], (each["template"], path)) for each in source)
    path = folder / "chat_template.jinja"
    if path.is_file():
        yield "default", (path.read_text(encoding="utf-8"), path)


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
