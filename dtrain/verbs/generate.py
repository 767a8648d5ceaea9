"""Let a trained model write: from a run's export, or any folder that transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from dtrain.errors import ModelError, RunError


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a run's folder or its name in runs/, or a model's folder")
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    parser.add_argument("--chat", action="store_true", help="the prompt is what a user says; use the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    folder = _folder(args.model)
    if args.max_new_tokens < 1:
        raise ModelError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if args.temperature < 0:
        raise ModelError(f"--temperature {args.temperature:g}: must be at least 0")
    from dtrain.engine.generate import generate

    for piece in generate(folder, args.prompt, chat=args.chat, max_new_tokens=args.max_new_tokens,
                          temperature=args.temperature, seed=args.seed):  # fmt: skip
        print(piece, end="", flush=True)
    print()
    return 0


def _folder(model: Path) -> Path:
    from dtrain.verbs.runs import find

    if (model / "config.json").is_file():
        return model
    try:
        export = find(model).export
    except RunError as error:
        raise ModelError(f"{model}: neither a run nor a folder with config.json") from error
    if not export.is_dir():
        raise ModelError(f"{export}: not there; the run has not exported its weights, see `dtrain runs show {model}`")
    return export
