"""A chat template: text in Jinja that makes one text of a conversation, and the tokens that end its turns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dtrain.config.spec import TemplateSpec, spec
from dtrain.errors import ConfigError


@spec
class Jinja(TemplateSpec):
    name: str = "auto"
    """What messages call it."""
    file: str | None = None
    """A file of your own with the template, as transformers reads it."""
    text: str = ""
    """The template itself, in a choice of your own; empty is the tokenizer's, or that of `file`."""
    ends: tuple[str, ...] = ()
    """The tokens that end a turn, or `eos_token` for the tokenizer's; when not given, any of its special tokens."""

    def problems(self) -> list[str]:
        if self.file is None:
            return []
        if self.text:
            return [f"template.file={self.file}: template={self.name} is one already; leave one of them out"]
        return [] if Path(self.file).is_file() else [f"template.file={self.file}: no such file; give a Jinja template"]

    def settled(self) -> TemplateSpec:
        if self.file is None:
            return self
        try:
            text = Path(self.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"template.file={self.file}: cannot be read: {error}") from error
        if not text.strip():
            raise ConfigError(f"template.file={self.file}: empty; give a Jinja template")
        return dataclasses.replace(self, name=self.file, file=None, text=text)
