"""What the pages say that can be looked up: links, files, choices and keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtrain.config.compose import choices
from dtrain.config.explain import keys, of_choice
from dtrain.config.names import NAMES
from dtrain.config.schema import Config
from dtrain.config.spec import GROUPS
from dtrain.plan.propose import configure
from tests.golden.test_plan import HERE as PLANS
from tests.golden.test_plan import QWEN

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`((?:dtrain|tests|conf|examples|bench|docs|launch|docker)/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists(), name


def test_every_page_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"](docs/{page.name})" not in readme] == []


def test_the_plan_in_the_readme_is_what_is_printed() -> None:
    typed, shown = re.findall(
        r"```\n\$ dtrain plan (.*)\n((?:.*\n)*?)```", (ROOT / "README.md").read_text(encoding="utf-8")
    )[0]
    assert typed.split() == QWEN
    assert shown == (PLANS / "qwen7b.txt").read_text(encoding="utf-8")


def test_the_table_of_groups_has_every_choice() -> None:
    """But for the models, whose presets have a page."""
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, flags=re.MULTILINE))
    for group, names in choices().items():
        listed = {word.strip() for word in table[group].split(",")}
        assert listed == set(names) or group == "model", group
    models = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in choices()["model"] if f"`{name}`" not in models and f"## {name}" not in models] == []


@pytest.fixture(scope="module")
def there() -> set[str]:
    """Every key of every choice, every group, and every choice as `config explain` takes it."""
    config: Config = configure([], None)[0]
    found = {*keys(config), *GROUPS, "experiment"}
    for group in GROUPS:
        for choice in choices()[group]:
            found |= {f"{group}.{choice}", *of_choice(group, choice, None)}
    return found


def test_keys_that_the_pages_name(there: set[str]) -> None:
    sections = "|".join(sorted({key.partition(".")[0] for key in there if "." in key}))
    for page in PAGES:
        if page.name in ("decisions.md", "coming-from.md", "design.md"):  # what was; keys of others; code
            continue
        text = re.sub(r"```python.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for key in re.findall(rf"[`' ]((?:{sections})\.[a-z_0-9]+)(?==| |`)", text):
            assert key in there or key.endswith((".jsonl", ".png", ".json", ".log")), f"{page.name}: {key}"


@pytest.mark.parametrize("name", NAMES)
def test_names_of_others_lead_to_keys_that_there_are(name: str, there: set[str]) -> None:
    sections = {key.partition(".")[0] for key in there}
    for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)?(?=[=, ]|$)", NAMES[name]):
        if word.partition(".")[0] in sections and "." in word:
            assert word in there, word
    for group, choice in re.findall(r"\b([a-z]+)=([a-z0-9]+)", NAMES[name]):
        assert group not in choices() or choice in choices()[group]


def test_the_page_for_those_who_come_names_keys_that_there_are(there: set[str]) -> None:
    text = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    ours = [line.rsplit("|", 2)[1] for line in text.splitlines() if line.count("|") == 5]
    assert len(ours) > 15
    for key in re.findall(r"`([a-z_]+\.[a-z_.]+)", " ".join(ours)):
        assert key in there, key
