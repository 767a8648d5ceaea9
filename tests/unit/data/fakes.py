"""A tokenizer and a model that cost nothing to make."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dtrain.config.spec import ModelSpec, spec

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim "
    "+ '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n"
    "{%- endif %}\n"
)
SPECIAL = ["<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]  # fmt: skip
WORDS = ["the cat sat on the mat and the dog ran to the house; user assistant system hello there, grüße"] * 4


def write_tokenizer(folder: Path, template: str | None = CHATML, *, trim_offsets: bool = True, **config: str) -> Path:
    """A byte-level BPE that knows a few words; the first ids are SPECIAL."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"eos_token": "<|eos|>", "pad_token": "<|pad|>", "bos_token": "<|begin_of_text|>", **config}
    if template is not None:
        values["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    stops = [SPECIAL.index(token) for token in ("<|eos|>", "<|im_end|>", "<|eot_id|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


@spec
class FakeModel(ModelSpec):
    template: str | None = CHATML

    def trained(self) -> bool:
        return False

    def figures(self):
        raise NotImplementedError

    def assets(self, texts: Callable[[], Iterable[str]], cache: Path) -> Path:
        folder = cache / "fake"
        if not (folder / "config.json").exists():
            write_tokenizer(folder, self.template)
            (folder / "config.json").write_text("{}")
        return folder

    def build(self, assets: Path, *, seed: int):
        raise NotImplementedError
