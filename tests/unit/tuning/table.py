"""Which tuning works with which strategy: asked of the specs themselves, written into docs/tuning.md.

python -m tests.unit.tuning.table
"""

from __future__ import annotations

import functools
from pathlib import Path

from dtrain.config.schema import Config
from dtrain.plan.propose import configure

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tuning.md"
BEGIN, END = "<!-- table: python -m tests.unit.tuning.table -->\n", "<!-- end of table -->"
TUNINGS: dict[str, list[str]] = {"full": [], "freeze": [], "lora": [], "lora, dora": ["tuning=lora", "tuning.dora=true"],
           "lora, pissa": ["tuning=lora", "tuning.init=pissa"], "adalora": [], "qlora": [], "ia3": [], "prompt": [], "ptuning": [],
           "prefix": []}  # fmt: skip
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PRECISIONS = ("fp32", "bf16", "fp16")


@functools.cache
def _config(*typed: str) -> Config:
    return configure(["train.steps=1", *typed], None)[0]


def asked(title: str, strategy: str) -> dict[str, list[str]]:
    """Why a cell is not supported, by precision; nothing where it is."""
    tuning = _config(*(TUNINGS[title] or [f"tuning={title}"])).tuning
    return {one: tuning.misfits(_config(f"strategy={strategy}").strategy, one, "cuda") for one in PRECISIONS}


def supported(title: str, strategy: str) -> list[str]:
    """The precisions in which a cell is."""
    return [one for one, found in asked(title, strategy).items() if not found]


def table() -> str:
    lines = ["|  | " + " | ".join(STRATEGIES) + " |", "| --- |" + " --- |" * len(STRATEGIES)]
    reasons: dict[str, None] = {}
    for title in TUNINGS:
        cells = []
        for strategy in STRATEGIES:
            found = asked(title, strategy)
            cells.append(", ".join(one for one in PRECISIONS if not found[one]) or "no")
            reasons |= dict.fromkeys(reason for several in found.values() for reason in several)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", *(f"- `{reason.partition(':')[0]}`:{reason.partition(':')[2]}" for reason in reasons)]
    )


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
