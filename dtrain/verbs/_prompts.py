"""Whether the model will be able to go on with `eval.prompts`: looked at before any rank is started."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dtrain.errors import DataError, UserError

if TYPE_CHECKING:
    from dtrain.config.schema import Config
    from dtrain.data.prepare import Prepared


def check(config: Config, prepared: Prepared) -> None:
    """Raises DataError with all that is wrong."""
    asked = config.eval.asked()
    if not asked:
        return
    if config.objective.outputs():
        name = type(config.objective).__name__.lower()
        raise DataError(f"eval.prompts: objective={name} gives the model outputs of its own in place of a vocabulary, "
                        f"so it writes nothing; leave them out")  # fmt: skip
    from dtrain.data.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.load(prepared.assets)
    read = json.loads((prepared.assets / "config.json").read_bytes())
    most = read.get("max_position_embeddings", (read.get("text_config") or {}).get("max_position_embeddings"))
    problems = []
    for one in asked:
        if not isinstance(one.prompt, str) and not tokenizer.has_chat:
            problems.append(f"{one.place}: a conversation, and the tokenizer has no chat template; choose one by "
                            f"template=, or leave eval.chat out")  # fmt: skip
            continue
        try:
            text = one.prompt if isinstance(one.prompt, str) else tokenizer.prompt(one.prompt, one.tools)
            num = len(tokenizer.encode(text))
        except UserError as error:
            problems.append(f"{one.place}: {error}")
            continue
        if not num or (most is not None and num >= most):
            problems.append(f"{one.place}: {num:,} tokens, and the model has {most:,} positions; shorten it" if num else
                            f"{one.place}: has no tokens; give at least one character")  # fmt: skip
    if problems:
        raise DataError.of(dict.fromkeys(problems))
