"""Text to token ids and back, from the files that a model folder has; without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from dtrain.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dtrain.data.chat import ChatTemplate, Messages, Span

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_digest(folder: Path) -> str:
    """Of the files that `TextTokenizer.load` reads; loads no tokenizer."""
    import xxhash

    state = xxhash.xxh3_128()
    for name in _FILES:
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        state.update(f"{name}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


@final
class TextTokenizer:
    """A tokenizer and its chat template. Threads may share one: it computes outside the interpreter's lock."""

    def __init__(
        self, tokenizer: Tokenizer, special: dict[str, str], template: ChatTemplate | None, folder: Path
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._template = template
        self._folder = folder
        self.digest = tokenizer_digest(folder)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """From `tokenizer.json`, `tokenizer_config.json` and, where there is one, `chat_template.jinja`.

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
        config = _read_config(folder / "tokenizer_config.json")
        special = {name: _text(config[name]) for name in _SPECIAL if config.get(name) is not None}
        return cls(tokenizer, special, _load_template(folder, config, special, tokenizer), folder)

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
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids, with no special token but those that stand in the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The batch calls free the interpreter's lock, and without offsets they take half the time.
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def chat(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them are targets: the assistant's, with the end of each turn.

        A token is a target when its first character is the assistant's. Raises BadRowError for a conversation that
        cannot be used, DataError for a tokenizer that cannot chat.
        """
        from dtrain.datasets.badrows import BadRowError

        if self._template is None:
            raise DataError(f"model.path: the tokenizer in {self._folder} has no chat template, and the rows are "
                            f"chats; choose an instruction-tuned model, or put the template in "
                            f"{self._folder / 'chat_template.jinja'}")  # fmt: skip
        text, spans = self._template.spans(messages)
        if not spans:
            raise BadRowError("no assistant turn, so nothing to learn")
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        targets = _inside(encoding.offsets, spans)
        if targets:
            targets[0] = False
        return encoding.ids, targets

    def _id(self, name: str) -> int | None:
        token = self._special.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether its first character lies in one of the ascending spans."""
    targets, at, reached = [], 0, 0
    for start, end in offsets:
        # Some tokenizers leave the space before a word out of the word's offsets: it is the word's all the same.
        first = min(start, reached)
        reached = max(reached, end)
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        targets.append(at < len(spans) and spans[at][0] <= first)
    return targets


def _load_template(
    folder: Path, config: dict[str, Any], special: dict[str, str], tokenizer: Tokenizer
) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    source, origin = config.get("chat_template"), folder / "tokenizer_config.json"
    if path.is_file():
        source, origin = path.read_text(encoding="utf-8"), path
    elif isinstance(source, list):
        source = {each["name"]: each["template"] for each in source}.get("default")
    if source is None:
        return None
    from dtrain.data.chat import ChatTemplate

    markers = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return ChatTemplate(source, special, markers, origin=str(origin))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"model.path: {path} is not JSON: {error}; fetch the file again") from error
    assert isinstance(config, dict), path
    return config


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
