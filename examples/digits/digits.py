r"""A network and an objective of your own: images of handwritten digits, under every strategy.

In this folder, with scikit-learn for its images:

    PYTHONPATH=. python digits.py > digits.csv
    PYTHONPATH=. dtrain launch --config-dir conf plugins=[digits] model=digits objective=digits dataset=files \
        dataset.path=digits.csv dataset.packing=false dataset.max_length=64 optim.lr=0.01 strategy=zero3 \
        launcher.procs=2
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dtrain.config.spec import ModelSpec, ObjectiveSpec, spec
from dtrain.datasets.base import Example, Labelled
from dtrain.folders import whole_folder
from dtrain.plan.figures import Figures

if TYPE_CHECKING:
    from torch import nn

    from dtrain.data.batch import Batch
    from dtrain.data.rows import Row
    from dtrain.data.tokenizer import TextTokenizer
    from dtrain.models.base import ModelBundle
    from dtrain.objectives.base import Loss

PIXELS, CLASSES = 64, 10


@spec
class Digits(ObjectiveSpec):
    """A text is the 64 pixels of an image, a label its digit; an image is one target."""

    learns_tokens: ClassVar[bool] = False

    def encode(self, example: Example, tokenizer: TextTokenizer) -> Row:
        import numpy as np

        from dtrain.data.rows import Row

        assert isinstance(example, Labelled)
        pixels = np.array(example.text.split(), np.int32)
        return Row(
            pixels, np.zeros(PIXELS, np.bool_), np.array([PIXELS], np.int32), np.array([example.label], np.int32)
        )

    def collator(self) -> Callable[[Sequence[Row], Sequence[int], int], Batch]:
        from live import images

        return images

    def build(self) -> Callable[[nn.Module, Batch], Loss]:
        from live import cross_entropy

        return cross_entropy


@spec
class Network(ModelSpec):
    hidden: int = 32

    def trained(self) -> bool:
        return False

    def figures(self) -> Figures:
        num = self.hidden * (PIXELS + CLASSES + 1) + CLASSES
        return Figures(
            hidden=self.hidden, layers=1, heads=1, kv_heads=1, head_dim=self.hidden, intermediate=self.hidden,
            vocab=CLASSES, tied=False, max_positions=PIXELS, num_params=num, num_block_params=num,
        )  # fmt: skip

    def assets(self, texts: Callable[[], Iterable[str]], cache: Path) -> Path:
        from tokenizers import Tokenizer, models

        with whole_folder(cache / "digits") as folder:
            Tokenizer(models.WordLevel({"": 0}, unk_token="")).save(str(folder / "tokenizer.json"))
            for name in ("config.json", "tokenizer_config.json"):
                (folder / name).write_text(json.dumps({}))
        return cache / "digits"

    def build(self, assets: Path, *, seed: int) -> ModelBundle:
        from live import bundle

        return bundle(assets, PIXELS, self.hidden, CLASSES, seed=seed)


if __name__ == "__main__":
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = [f"{' '.join(str(int(pixel)) for pixel in pixels)},{label}"
            for pixels, label in zip(data.data, data.target, strict=True)]  # fmt: skip
    sys.stdout.write("\n".join(["text,label", *rows]) + "\n")
