"""Which tuning works with which strategy: asked of the specs themselves, written into docs/tuning.md.

python -m tests.unit.tuning.table
"""

from __future__ import annotations

from pathlib import Path

from dtrain.plan.propose import configure

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tuning.md"
BEGIN, END = "<!-- table: python -m tests.unit.tuning.table -->\n", "<!-- end of table -->"
TUNINGS = {"full": [], "freeze": [], "lora": [], "lora, dora": ["tuning=lora", "tuning.dora=true"],
           "lora, pissa": ["tuning=lora", "tuning.init=pissa"], "qlora": [], "ia3": []}  # fmt: skip
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PRECISIONS = ("fp32", "bf16", "fp16")


def table() -> str:
    lines = ["|  | " + " | ".join(STRATEGIES) + " |", "| --- |" + " --- |" * len(STRATEGIES)]
    reasons: dict[str, None] = {}
    for title, typed in TUNINGS.items():
        cells = []
        for strategy in STRATEGIES:
            config, _ = configure(["train.steps=1", *(typed or [f"tuning={title}"]), f"strategy={strategy}"], None)
            found = {one: config.tuning.misfits(config.strategy, one, "cuda") for one in PRECISIONS}
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
