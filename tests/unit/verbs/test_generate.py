"""What `dtrain generate` and `dtrain chat` write, beside transformers' own greedy search, and what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.cli import run as dtrain
from dtrain.data.tokenizer import TextTokenizer
from dtrain.models.assets import weights_digest
from tests.unit.verbs.say import PLACES, POSITIONS, write_adapter, write_model

PROMPTS = ["the cat", "hello there, grüße to the house and the dog; ran", "m", "user user the mat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("say") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    digest = weights_digest(model, model.parent, lambda line: None)
    return write_adapter(model.parent / "adapter", model, path=str(model), digest=digest)


def _ok(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, str]:
    assert dtrain([str(one) for one in argv]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    return said.out, said.err


def _refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert dtrain([str(one) for one in argv]) == 2
    return capsys.readouterr().err


def _greedy(folder: Path, text: str, num: int, adapter: Path | None = None) -> str:
    """The likeliest token after all before it, by whole forwards of the prompt alone; up to one that ends."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = TextTokenizer.load(folder)
    ids = tokenizer.encode(text)
    start = len(ids)
    with torch.no_grad():
        for _ in range(num):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (0, 3, 7):
                break
    return tokenizer.decode(ids[start:], special=False)


def _rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Any:
    if rows is None:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_prompt_and_many_at_a_time_are_what_each_is_alone(model: Path, tmp_path: Path, capsys) -> None:
    alone = [_greedy(model, text, 20) for text in PROMPTS]
    assert len(set(alone)) == len(alone)
    for text, expected in zip(PROMPTS, alone, strict=True):
        assert _ok(capsys, "generate", model, "--prompt", text, "--max-new-tokens", 20)[0] == f"{text}{expected}\n"
    source = _rows(tmp_path / "in.jsonl", [{"prompt": text, "id": i} for i, text in enumerate(PROMPTS)])
    for batch in (4, 3):
        out = tmp_path / f"out{batch}.jsonl"
        said, _ = _ok(capsys, "generate", model, "--in", source, "--out", out, "--batch", batch, "--max-new-tokens", 20)
        assert said == f"wrote {out}: 4 rows\n"
        rows = _rows(out)
        assert [(row["generated"], row["id"], row["prompt"]) for row in rows] == [
            (text, i, PROMPTS[i]) for i, text in enumerate(alone)
        ]
        assert all(row["num_tokens"] == 20 for row in rows if row["finish"] == "length")
    flags = [one for text in PROMPTS[:2] for one in ("--prompt", text)]
    said, _ = _ok(capsys, "generate", model, *flags, "--max-new-tokens", 20)
    assert said == "".join(f"{text}{reply}\n\n" for text, reply in zip(PROMPTS, alone[:2], strict=False))


def test_texts_and_turns_end_a_reply(model: Path, tmp_path: Path, capsys) -> None:
    whole = _greedy(model, PROMPTS[0], 30)
    for stop in (whole[7:10], whole[4:5], whole[11:19]):
        for more in ([], ["--prompt", PROMPTS[1]]):
            said, _ = _ok(capsys, "generate", model, "--prompt", PROMPTS[0], *more, "--max-new-tokens", 30, "--stop", stop,
                          "--stop", "nowhere in it")  # fmt: skip
            assert said.startswith(f"{PROMPTS[0]}{whole[: whole.index(stop)]}\n"), (stop, said)
    source = _rows(tmp_path / "in.jsonl", [{"prompt": PROMPTS[0]}])
    _ok(capsys, "generate", model, "--in", source, "--out", tmp_path / "out", "--stop", whole[4:5])
    (row,) = _rows(tmp_path / "out")
    assert (row["generated"], row["finish"]) == (whole[: whole.index(whole[4:5])], "stop")
    _, told = _ok(capsys, "generate", model, "--prompt", PROMPTS[0], "--max-new-tokens", 2)
    assert told == "[the reply came to no end after 2 tokens; --max-new-tokens says how many there may be]\n"


def test_a_turn_ends_where_the_template_or_the_files_say(model: Path, tmp_path: Path) -> None:
    from dtrain.engine.loaded import load

    assert load(model, None, dtype="auto", writes=True).stops == {0, 3, 7}
    (tmp_path / "other").mkdir()
    for file in model.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / "other" / file.name).symlink_to(file)
    assert load(tmp_path / "other", None, dtype="auto", writes=True).stops == {
        0,
        3,
    }  # <|im_end|> of its template, and eos


def test_conversations_are_rendered_as_they_are_trained_on(model: Path, tmp_path: Path, capsys) -> None:
    asked = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    reply = _greedy(model, asked, 12)
    assert _ok(capsys, "generate", model, "--chat", "--prompt", "the cat", "--max-new-tokens", 12)[0] == f"{reply}\n"
    source = _rows(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "the cat"}]}])
    _ok(capsys, "generate", model, "--in", source, "--out", tmp_path / "out", "--max-new-tokens", 12)
    assert _rows(tmp_path / "out")[0]["generated"] == reply


@pytest.mark.parametrize("kind", ["prompt", "ptuning", "prefix"])
def test_what_comes_before_a_prompt_comes_before_each(
    model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    digest = weights_digest(model, tmp_path, lambda line: None)
    adapter = write_adapter(tmp_path / kind, model, path=str(model), digest=digest, kind=kind)
    alone = [_greedy(model, text, 12, adapter) for text in PROMPTS]
    assert alone != [_greedy(model, text, 12) for text in PROMPTS]
    said, _ = _ok(capsys, "generate", adapter, "--prompt", PROMPTS[0], "--max-new-tokens", 12)
    assert said == f"{PROMPTS[0]}{alone[0]}\n"
    flags = [one for text in PROMPTS for one in ("--prompt", text)]
    said, _ = _ok(capsys, "generate", adapter, *flags, "--max-new-tokens", 12)
    assert said == "".join(f"{text}{reply}\n\n" for text, reply in zip(PROMPTS, alone, strict=True))
    text = _refused(capsys, "generate", adapter, "--prompt", PROMPTS[0], "--max-new-tokens", POSITIONS)
    assert f"the model {POSITIONS - PLACES} positions" in text
    # Two of one length, which are written together, and one of another.
    same = [PROMPTS[2], "cat", PROMPTS[0]]
    assert [len(TextTokenizer.load(model).encode(text)) for text in same] == [1, 1, 2]
    source = _rows(tmp_path / "in.jsonl", [{"prompt": text} for text in same])
    _ok(capsys, "generate", adapter, "--in", source, "--out", tmp_path / "out", "--batch", 2, "--max-new-tokens", 12)
    expected = [alone[2], _greedy(model, same[1], 12, adapter), alone[0]]
    assert [row["generated"] for row in _rows(tmp_path / "out")] == expected
    asked = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    reply = _greedy(model, asked, 8, adapter)
    second = f"{asked}{reply}<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    said = _talk(monkeypatch, capsys, adapter, ["the cat", "hello"], "--debug")
    given = [part.split("\n--- ")[0] for part in said.split("--- the model is given\n")[1:]]
    assert given == [asked, second]
    assert _greedy(model, second, 8, adapter) in said


def test_an_adapter_finds_its_model(model: Path, adapter: Path, tmp_path: Path, capsys) -> None:
    expected = _greedy(model, "the cat", 12, adapter)
    assert expected != _greedy(model, "the cat", 12)
    asked = ("--prompt", "the cat", "--max-new-tokens", 12)
    assert _ok(capsys, "generate", adapter, *asked)[0] == f"the cat{expected}\n"
    moved = model.rename(tmp_path / "moved")
    try:
        text = _refused(capsys, "generate", adapter, *asked)
        assert f"{adapter}: was trained on {model}, which cannot be had" in text
        assert "say with --base where it is" in text
        assert _ok(capsys, "generate", adapter, "--base", moved, *asked)[0] == f"the cat{expected}\n"
    finally:
        moved.rename(model)
    other = write_model(tmp_path / "other", seed=5)
    assert f"{other}: not the model that was tuned" in _refused(capsys, "generate", adapter, "--base", other, *asked)
    seeded = write_adapter(tmp_path / "seeded", model, path=None, digest=None)
    assert "names no model that it goes with" in _refused(capsys, "generate", seeded, *asked)
    _, told = _ok(capsys, "generate", seeded, "--base", model, *asked)
    assert "does not say by a digest" in told
    assert "is a whole model; leave it out" in _refused(capsys, "generate", model, "--base", other, *asked)


def test_what_is_drawn_hangs_on_the_seed_alone(model: Path, capsys) -> None:
    def drawn(*how: object) -> str:
        return _ok(capsys, "generate", model, "--prompt", "the", "--max-new-tokens", 16, *how)[0]

    first = drawn("--temperature", 3, "--seed", 1)
    assert drawn("--temperature", 3, "--seed", 1) == first
    assert drawn("--temperature", 3, "--seed", 2) != first
    assert drawn("--temperature", 3, "--seed", 1, "--top-k", 1) == drawn()
    assert drawn("--temperature", 3, "--seed", 1, "--top-p", 1e-6) == drawn()


def test_what_is_refused(model: Path, tmp_path: Path, capsys) -> None:
    text = _refused(capsys, "generate", model, "--prompt", "", "--temperature", -1, "--top-p", 0, "--max-new-tokens", 0,
                    "--out", tmp_path / "no" / "x", "--batch", 0, "--stop", "")  # fmt: skip
    assert text.startswith("8 problems:\n"), text
    assert "--prompt '': is empty" in text
    assert "give one of the two" in _refused(capsys, "generate", model)
    long = "the cat " * POSITIONS
    assert f"and the model {POSITIONS} positions: shorten it" in _refused(capsys, "generate", model, "--prompt", long)
    text = _refused(capsys, "generate", model, "--prompt", "the", "--max-new-tokens", POSITIONS)
    assert f"the prompt has 1 tokens and {POSITIONS} more, and the model {POSITIONS} positions" in text
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": ""}\n[1]\n{"text": "b"}\nnot\n{"prompt": "a", "finish": 1}\n'
                      '{"messages": [{"role": "assistant", "content": "a"}]}\n')  # fmt: skip
    text = _refused(capsys, "generate", model, "--in", source, "--out", tmp_path / "out")
    assert [line.split(": ")[1] for line in text.splitlines()[1:]] == [f"{source}:{i}" for i in (2, 3, 4, 5, 6, 7)]
    assert not (tmp_path / "out").exists()
    assert "cannot be read: No such file" in _refused(
        capsys, "generate", model, "--in", "gone", "--out", tmp_path / "out"
    )
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").write_text("{}")
    assert "a checkpoint, which holds no model's files; `dtrain export" in _refused(
        capsys, "generate", tmp_path / "step-00000001", "--prompt", "a"
    )


def test_without_a_chat_template(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_model(tmp_path / "plain", template=None)
    assert "has no chat template" in _refused(capsys, "generate", plain, "--chat", "--prompt", "a")
    assert "has no chat template" in _refused(capsys, "chat", plain)
    assert _ok(capsys, "generate", plain, "--prompt", "a", "--max-new-tokens", 3)[0].startswith("a")


# --- chat


def _talk(monkeypatch: pytest.MonkeyPatch, capsys, model: Path, lines: list[str], *more: object) -> str:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return _ok(capsys, "chat", model, "--max-new-tokens", 8, *more)[0]


def test_a_chat_remembers_until_it_is_reset(model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(role: str, text: str) -> str:
        return f"<|im_start|>{role}\n{text}<|im_end|>\n"

    ask = "<|im_start|>assistant\n"
    first = turn("system", "the dog") + turn("user", "the cat") + ask
    reply = _greedy(model, first, 8)
    second = first.removesuffix(ask) + turn("assistant", reply) + turn("user", "hello") + ask
    said = _talk(monkeypatch, capsys, model, ["the cat", "", "hello", "/rset", "/reset", "the cat", "/exit", "never"],
                 "--system", "the dog", "--debug")  # fmt: skip
    given = [part.split("\n--- ")[0] for part in said.split("--- the model is given\n")[1:]]
    assert given == [first, second, first]
    assert f"{reply} (no end after 8 tokens)\n> \n> hello\n" in said
    ids = TextTokenizer.load(model).encode(first)
    assert f"--- {len(ids)} tokens: {' '.join(map(str, ids))}\n" in said
    assert "/rset: no such command; there are: /reset, /exit\n" in said
    assert "never" not in said


def test_a_prompt_that_is_too_long_is_not_said(model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    said = _talk(monkeypatch, capsys, model, ["the cat " * POSITIONS, "hello"], "--debug")
    assert "(not said: the prompt has" in said
    assert said.count("--- the model is given") == 1
    assert "user\nhello" in said.split("--- the model is given\n")[1]


def test_an_interrupt_stops_the_reply_and_not_the_chat(model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.engine.generate import Writer

    write, times = Writer.write, iter([True, False])

    def interrupted(self: Writer, prompts: Any, say: Any = None) -> Any:
        if not next(times):
            return write(self, prompts, say)
        say("half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", interrupted)
    said = _talk(monkeypatch, capsys, model, ["the cat", "hello"], "--debug")
    assert "half of (stopped)\n> hello\n" in said
    assert "<|im_start|>assistant\nhalf of<|im_end|>" in said
