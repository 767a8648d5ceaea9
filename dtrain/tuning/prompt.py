from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from dtrain.config.spec import TuningSpec, spec

if TYPE_CHECKING:
    import torch

    from dtrain.models.base import ModelBundle
    from dtrain.plan.figures import Figures


@spec
class Prompt(TuningSpec):
    """Embeddings that every document begins with are trained (arXiv 2104.08691), by peft; the model stays as it is."""

    lr_scale: ClassVar[float] = 100.0

    num_virtual_tokens: Annotated[int, Field(ge=1)] = 20
    """How many there are. They are no tokens of the text: none is a target, and each document has them to itself."""
    init: Literal["vocabulary", "text", "normal"] = "vocabulary"
    """What they start as: embeddings of tokens drawn from the vocabulary, or of those of `text`, over and over until
    there are enough; or normal numbers, which are far from any token."""
    text: str = ""
    """For init=text."""
    init_from: str = ""
    """A folder with an adapter of the same kind, to start from instead."""

    def problems(self) -> list[str]:
        if self.init_from and self.init != "vocabulary":
            return [f"tuning.init_from={self.init_from}: the adapter says what is started from, tuning.init="
                    f"{self.init} another start; leave one of them out"]  # fmt: skip
        if (self.init == "text") == bool(self.text):
            return []
        said = f"tuning.text={self.text}" if self.text else "tuning.text is empty"
        return [f"tuning.init={self.init}: {said}; give both init=text and a text, or neither"]

    def apply(self, bundle: ModelBundle, *, seed: int) -> ModelBundle:
        from peft import PromptTuningConfig

        from dtrain.tuning import _prompts

        config = PromptTuningConfig(num_virtual_tokens=self.num_virtual_tokens, task_type="CAUSAL_LM")
        what = _prompts.Prompt(kind="prompt", config=config, init_from=self.init_from,
                               first=None if self.init == "normal" else self._of_tokens)  # fmt: skip
        return _prompts.add(bundle, what, seed=seed)

    def _of_tokens(self, bundle: ModelBundle) -> torch.Tensor:
        import torch

        from dtrain.data.tokenizer import TextTokenizer

        assert bundle.embedding is not None
        vocab, hidden = bundle.embedding.shape
        num = self.num_virtual_tokens
        ids = torch.randint(0, vocab, (num,)).tolist()
        if self.init == "text":
            said = TextTokenizer.load(bundle.assets).encode(self.text)
            ids = (said * -(-num // len(said)))[:num]
        name = next(name for name, param in bundle.module.named_parameters() if param is bundle.embedding)
        # What the layers get of a token: Gemma's embedding multiplies what it looks up, which what is trained is not.
        looked_up = cast(Any, bundle.module).decoder_module.get_input_embeddings()
        scale = float(getattr(looked_up, "embed_scale", 1.0))
        return torch.stack([bundle.weights.read(name, i * hidden, hidden).float() * scale for i in ids])

    def num_trainable(self, figures: Figures) -> int:
        return self.num_virtual_tokens * figures.hidden

    def num_frozen(self, figures: Figures) -> int:
        return figures.num_params

    def num_virtual(self) -> int:
        return self.num_virtual_tokens
