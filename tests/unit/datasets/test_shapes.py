"""The shapes that rows have: each small file beside this one, what is said of it and what its rows become."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dtrain.datasets.base import Chat, Completion, Judged, Labelled, Preference, Text
from dtrain.datasets.files import Files
from dtrain.errors import DataError

HERE = Path(__file__).parent / "files"
WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


BIRD = {"prompt": [user("Name a bird.")], "chosen": [assistant("A robin.")], "rejected": [assistant("A trout.")]}
EXPECTED = {
    "text.jsonl": (
        ["text rows (text) as texts; columns not used: url"],
        [Text("1", "The lamp is on."), Text("2", "Die Tür ist zu.")],
    ),
    "completion.jsonl": (
        ["completion rows (prompt, completion) as prompts and completions"],
        [Completion("1", "2 + 2 = ", "4"), Completion("2", "The sky is", " blue.")],
    ),
    "completion_messages.jsonl": (
        ["completion rows (prompt, completion) as conversations"],
        [Chat("1", [user("Hi"), assistant("Hello!", train=False), user("Bye"), assistant("See you.")])],
    ),
    "alpaca.json": (
        ["alpaca rows (instruction, input, output, history, system) as conversations"],
        [
            Chat("2", [user("Translate into German.\ngood morning"), assistant("Guten Morgen")]),
            Chat(
                "7", [system("Be brief."), user("Hi"), assistant("Hello."), user("Name a colour."), assistant("Red.")]
            ),
        ],
    ),
    "sharegpt.json": (
        [
            "sharegpt rows (system, messages=conversations, tools) as conversations",
            "roles: human as user, gpt as assistant, observation as tool",
        ],
        [
            Chat(
                "2",
                [
                    system("Help with the weather."),
                    user("Is it warm in Oslo?"),
                    assistant("I will look.", tool_calls=[call("weather", city="Oslo")]),  # one turn, though two rows
                    {"role": "tool", "content": '{"celsius": 3}'},
                    assistant("No, 3 degrees."),
                ],
                [{"type": "function", "function": {"description": "Of a city", **WEATHER}}],
            ),
            Chat("31", [system("Be kind."), user("Thanks"), assistant("You are welcome.")]),
        ],
    ),
    "messages.jsonl": (
        ["messages rows (messages, tools) as conversations"],
        [
            Chat(
                "1",
                [
                    user("Is it warm in Oslo?"),
                    assistant(None, tool_calls=[{"id": "c1", **call("weather", city="Oslo")}]),
                    {"role": "tool", "content": "3", "tool_call_id": "c1"},
                    assistant("No."),
                ],
                [{"type": "function", "function": WEATHER}],
            ),
            Chat(
                "2",
                [
                    system("Be brief."),
                    user("Hello there"),
                    assistant("Hi", train=False),
                    user("Bye"),
                    assistant("Bye", train=True),
                ],
            ),
        ],
    ),
    "qa_gb18030.csv": (
        ["qa rows (question=ask, answer) as conversations; columns not used: 科室, 标题"],
        [
            Chat("2", [user("头疼怎么办？"), assistant("多休息，多喝水。")]),
            Chat("3", [user("手指割伤了，\n要缝针吗？"), assistant("先止血，再看医生。")]),
        ],
    ),
    "qa_chinese.csv": (
        ["qa rows (question=问题, answer=回答) as conversations"],
        [Chat("2", [user("一加一等于几？"), assistant("二")])],
    ),
    "columns.json": (
        ["qa rows (question, answer=response) as conversations"],
        [Chat("row 1", [user("Why?"), assistant("Because.")]), Chat("row 2", [user("How?"), assistant("So.")])],
    ),
    "classification.tsv": (
        ["classification rows (text, label) as labelled texts"],
        [Labelled("2", "A fine film", "pos"), Labelled("3", "Too long", "neg")],
    ),
    "preference.json": (
        ["preference rows (prompt, chosen, rejected) as pairs of replies"],
        [Preference("2", **BIRD)],
    ),
    "preference_sharegpt.json": (
        [
            "preference rows (messages=conversations, chosen, rejected) as pairs of replies",
            "roles: human as user, gpt as assistant",
        ],
        [Preference("2", **BIRD)],
    ),
    "preference_messages.jsonl": (
        ["preference rows (prompt, chosen, rejected) as pairs of replies"],
        [Preference("1", **BIRD)],
    ),
    "kto.jsonl": (
        ["kto rows (prompt, completion, label) as replies with a verdict"],
        [
            Judged("1", BIRD["prompt"], BIRD["chosen"], good=True),
            Judged("2", BIRD["prompt"], BIRD["rejected"], good=False),
        ],
    ),
    "kto_messages.jsonl": (
        ["kto rows (messages, label) as replies with a verdict"],
        [Judged("1", BIRD["prompt"], BIRD["chosen"], good=True)],
    ),
    "plain.txt": (
        [
            "plain text, a document for each paragraph, since blank lines divide it; dataset.text_unit=file, paragraph "
            "or line says otherwise",
            "text rows (text) as texts",
        ],
        [Text("1", "The first paragraph\nhas two lines."), Text("5", "The second one has one.")],
    ),
}


def read(path, **values):
    """Notes but for the first, which names the file, and examples with their place only."""
    files = Files(path=str(path), **values)
    assert files.problems() == []
    notes, examples = files.notes(), list(files.examples())
    for example in examples:
        object.__setattr__(example, "source", example.source.removeprefix(f"{path}:"))
    return notes, examples


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_shape(name):
    notes, examples = read(HERE / name)
    assert notes[0].startswith(f"{HERE / name}: ")
    assert (notes[1:], examples) == EXPECTED[name]


def test_every_small_file_is_tried():
    assert {path.name for path in HERE.iterdir()} == {*EXPECTED, "booking.jsonl"}


def test_roles_and_keys_by_mapping():
    """A booking bot: its clerk searches, and something is returned."""
    columns = {"role": "speaker", "content": "utterance"}
    roles = {"user": "guest", "assistant": ["clerk", "店员"], "function_call": "search", "tool": "return"}
    notes, examples = read(HERE / "booking.jsonl", columns=columns, roles=roles)
    assert notes[1:] == [
        "messages rows (messages=dialog) as conversations",
        "roles: guest as user, search as function_call, return as tool, clerk as assistant",
    ]
    assert examples == [
        Chat(
            "1",
            [
                user("A room for two, please."),
                assistant(None, tool_calls=[call("rooms", beds=2)]),
                {"role": "tool", "content": "room 12"},
                assistant("Room 12 is free."),
            ],
        )
    ]
    _, (example,) = read(
        HERE / "booking.jsonl", columns=columns, roles={**roles, "function_call": [], "search": "search"}
    )
    assert example.messages[1]["role"] == "search"  # of a template of one's own
    (said,) = Files(path="a.jsonl", format="jsonl", roles={**roles, "judge": ["search", "clerk"]}).problems()[:1]
    assert said == "dataset.roles: `clerk`, `search` under two roles; leave each under one"
    del roles["function_call"]
    with pytest.raises(
        DataError, match=r"a role that is not known: `search`; say what it is, as in dataset.roles.tool=search "
    ):
        read(HERE / "booking.jsonl", columns=columns, roles=roles)
    with pytest.raises(
        DataError, match="message 1 has no role: it has `speaker`, `utterance`; name the key by dataset.columns.role"
    ):
        read(HERE / "booking.jsonl")


ROLES = [("human", "user"), ("User", "user"), ("gpt", "assistant"), ("bot", "assistant"), ("observation", "tool"),
         ("function", "tool"), ("tool", "tool")]  # fmt: skip


@pytest.mark.parametrize(("role", "expected"), ROLES)
def test_usual_names_of_roles(tmp_path, role, expected):
    turns = [{"from": "user", "value": "a"}, {"from": role, "value": "b"}, {"from": "gpt", "value": "c"}]
    _, (example,) = read(write(tmp_path, {"conversations": turns}))
    assert [message["role"] for message in example.messages] == ["user", expected, "assistant"]


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


NAMES = [("ask", "answer"), ("question", "response"), ("instruction", "response"), ("query", "reply"), ("问", "答"),
         ("提问", "回复"), ("Question", "Answer"), ("prompt", "response"), ("input", "output"), ("problem", "solution")]  # fmt: skip


@pytest.mark.parametrize(("question", "answer"), NAMES)
def test_names_of_questions_and_answers(tmp_path, question, answer):
    _, examples = read(write(tmp_path, {"id": 3, question: "a", "source": "x", answer: "b"}))
    assert examples == [Chat("1", [user("a"), assistant("b")])]


def test_what_a_question_is_about_stands_under_it(tmp_path):
    row = {"instruction": "Sum it up.", "context": "Long ago.", "response": "Once.", "category": "x"}
    notes, examples = read(write(tmp_path, row))
    assert (
        notes[1]
        == "alpaca rows (instruction, input=context, output=response) as conversations; columns not used: category"
    )
    assert examples == [Chat("1", [user("Sum it up.\nLong ago."), assistant("Once.")])]


def test_columns_by_mapping(tmp_path):
    path = write(tmp_path, {"q1": "a", "r": "b", "text": "c", "bad": "d"})
    notes, examples = read(path, columns={"question": "q1", "answer": "r"})
    assert notes[1] == "qa rows (question=q1, answer=r) as conversations; columns not used: text, bad"
    assert examples == [Chat("1", [user("a"), assistant("b")])]
    _, examples = read(path, columns={"prompt": "q1", "completion": "r"})
    assert examples == [Completion("1", "a", "b")]
    _, examples = read(path, columns={"prompt": "q1", "chosen": "r", "rejected": "bad"})
    assert examples == [Preference("1", [user("a")], [assistant("b")], [assistant("d")])]
    _, examples = read(path, columns={"text": "bad"})
    assert examples == [Text("1", "d")]


def test_a_shape_by_name(tmp_path):
    path = write(tmp_path, {"prompt": "a", "completion": "b"})
    assert read(path)[1] == [Completion("1", "a", "b")]
    assert read(path, shape="qa")[1] == [Chat("1", [user("a"), assistant("b")])]
    path = write(tmp_path, {"review": "fine", "label": 1, "stars": 5})
    assert read(path, shape="classification", columns={"text": "review"})[1] == [Labelled("1", "fine", "1")]


def test_labels(tmp_path):
    path = write(tmp_path, {"text": "a", "label": "pos"}, {"text": "b", "label": "neutral"})
    assert [example.label for example in read(path)[1]] == ["pos", "neutral"]
    with pytest.raises(
        DataError, match=r"rows.jsonl:2: a label that is not in dataset.labels: `neutral`; there are `pos`, `neg`"
    ):
        read(path, labels=["pos", "neg"])


def test_the_only_column_is_text(tmp_path):
    notes, examples = read(write(tmp_path, {"story": "Once."}))
    assert (notes[1], examples) == ("text rows (text=story) as texts", [Text("1", "Once.")])


def test_a_row_that_comes_late_is_looked_at(tmp_path):
    """Not the first row alone says which columns there are."""
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "c", "output": "b"}]
    notes, examples = read(write(tmp_path, *rows))
    assert notes[1] == "alpaca rows (instruction, input, output) as conversations"
    assert [example.messages[0]["content"] for example in examples] == ["a", "a\nc"]


def test_whole_conversations_are_divided_where_they_differ(tmp_path):
    same = [user("a"), assistant("b"), user("c")]
    chosen, rejected = [*same, assistant("d")], [*same, assistant("e"), user("f"), assistant("g")]
    _, (example,) = read(write(tmp_path, {"chosen": chosen, "rejected": rejected}))
    assert (example.prompt, example.chosen, example.rejected) == (same, chosen[3:], rejected[3:])


def test_keys_of_messages_that_are_not_used_are_told(tmp_path):
    turns = [
        {"role": "user", "content": "a", "time": 3},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
    ]
    notes, (example,) = read(write(tmp_path, {"messages": turns}))
    assert notes[-1] == "keys of messages that are not used: `time`"
    assert example.messages == [user("a"), assistant("b", reasoning_content="c")]


WRONG = [
    ({"columns": {"question": "asked"}}, "dataset.columns.question=asked: no such column; did you mean `ask`?; there are: `ask`, `x`"),
    ({"shape": "alpaca"}, "dataset.shape=alpaca: no column for `instruction` and for `output`; there are: `ask`, `x`; name it, as in dataset.columns.instruction=COLUMN"),
    ({"shape": "text", "columns": {"answer": "x"}}, "dataset.shape=text: no column for `text`"),
    ({"shape": "qa", "columns": {"answer": "x", "label": "x"}}, "dataset.columns: `label` is no part of dataset.shape=qa, whose parts are question, answer, input,"),
    ({}, "dataset: no known columns: the rows have `ask`, `x`; say which column is what, as in dataset.columns.question=COLUMN dataset.columns.answer=COLUMN;"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_what_cannot_be_found_is_named(tmp_path, values, said):
    files = Files(path=str(write(tmp_path, {"ask": "a", "x": "b"})), **values)
    for method in (files.notes, lambda: list(files.examples())):
        with pytest.raises(DataError) as caught:
            method()
        assert said in str(caught.value)


OTHER_TYPES = [
    ({"text": 3}, "`text` is a number instead of a string, and none of the 2 rows looked at has a string there; they look like text rows (text): convert that column, or say which is what, as in dataset.columns.text=COLUMN; there are `text`"),
    ({"messages": True}, "`messages` is a boolean instead of a list or a string, "),
    ({"question": "a", "answer": {"b": 1}}, "`answer` is an object instead of a string, "),
    ({"text": "a", "label": None, "x": 1}, None),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), OTHER_TYPES)
def test_a_column_that_holds_something_else(tmp_path, row, said):
    path = write(tmp_path, row, row)
    if said is None:
        assert read(path)[0][1] == "text rows (text) as texts; columns not used: label, x"
        return
    with pytest.raises(DataError) as caught:
        Files(path=str(path)).notes()
    assert str(caught.value).startswith(f"dataset: {path}:1: {said}")


INSTEAD = [
    ({"prompt": "a", "completion": "b", "label": 1}, "no kto rows, since `label` is a whole number instead of a boolean; dataset.shape=kto where it is meant so"),
    ({"text": "a", "label": 0.5}, "no classification rows, since `label` is a decimal number instead of a string or a whole number or a boolean; dataset.shape=classification where it is meant so"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), INSTEAD)
def test_a_label_that_is_left_unused_is_told(tmp_path, row, said):
    """Replies judged by 1 and 0 are all learned else, the bad ones too."""
    assert read(write(tmp_path, row, row))[0][-1] == said


def test_columns_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(DataError, match=r"the rows have `text`, `x`; null in all 2 rows looked at: `text`; say which"):
        Files(path=str(write(tmp_path, {"text": None, "x": 1}, {"text": None, "x": 1}))).notes()


def test_a_part_that_there_is_not_is_told_before_anything_is_read():
    (said,) = Files(path=str(HERE / "text.jsonl"), columns={"txt": "text"}).problems()
    assert said.startswith("dataset.columns.txt: no part of a row; there are: text, ")


def test_two_files_that_write_one_shape_differently(tmp_path):
    for name in ("preference.json", "preference_messages.jsonl"):
        shutil.copy(HERE / name, tmp_path / name)
    _, examples = read(tmp_path)
    assert [type(example) for example in examples] == [Preference, Preference]


def test_all_text_is_in_the_texts():
    """What a tokenizer learns from, and what equal rows are known by."""
    for name in EXPECTED:
        for example in read(HERE / name)[1]:
            texts = list(example.texts())
            assert texts
            assert all(isinstance(text, str) and text for text in texts)
    (example, *_) = read(HERE / "messages.jsonl")[1]
    assert '"city": "Oslo"' in "".join(example.texts())
    assert '"weather"' in list(example.texts())[-1]
