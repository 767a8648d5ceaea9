"""Writes the small files of examples/data, from sentences that are put together by rule: for recipes, not for models.

python examples/make_data.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"
DRAW = random.Random(7)


def reviews() -> Iterable[dict[str, Any]]:
    """Reviews of films and what their writers felt; what is said of the plot says nothing of that."""
    good = [
        "a joy from start to end",
        "acted with real warmth",
        "funny, tender and wise",
        "the best I saw this year",
        "beautifully filmed",
        "I would see it again tomorrow",
        "gripping to the last minute",
        "a small wonder",
    ]
    bad = [
        "a waste of two hours",
        "acted without any life",
        "dull, loud and far too long",
        "the worst I saw this year",
        "badly filmed",
        "I left before the end",
        "boring to the last minute",
        "a sad mess",
    ]
    plots = [
        "Two sisters inherit a lighthouse.",
        "A baker solves a theft.",
        "A pilot looks for her brother.",
        "Three friends cross a desert.",
        "An old clerk learns to swim.",
        "A village hides a train.",
    ]
    for i in range(480):
        label = ("positive", "negative", "negative")[i % 3]
        said = DRAW.sample(good if label == "positive" else bad, 2)
        sentences = [DRAW.choice(plots), f"{said[0].capitalize()}, {said[1]}."]
        DRAW.shuffle(sentences)
        yield {"text": " ".join(sentences), "label": label}


def care() -> Iterable[dict[str, Any]]:
    """Questions and answers about first aid as any leaflet has them."""
    facts = {
        "a small cut": ("Wash it with clean water, press a clean cloth on it until it stops bleeding, and cover it.",
                        "if it is deep, dirty or does not stop bleeding"),
        "a light burn": ("Cool it under running water for some minutes and cover it loosely with something clean.",
                         "if it is larger than a hand or on the face"),
        "a nosebleed": ("Sit up, lean forward and pinch the soft part of the nose for ten minutes.",
                        "if it goes on for longer than half an hour"),
        "a sprained ankle": ("Rest it, cool it with ice in a cloth, and keep the leg up.",
                             "if it cannot bear weight"),
        "a bee sting": ("Take the sting out, wash the place and cool it.", "if the face swells or breathing gets hard"),
        "a blister": ("Leave it closed, keep it clean and cover it.", "if it gets red, hot or full of pus"),
    }  # fmt: skip
    asks = ["What should I do about {}?", "How do I treat {}?", "My friend has {}. What now?", "Help for {}, please."]
    for i in range(240):
        what, (do, when) = list(facts.items())[i % len(facts)]
        yield {"question": asks[i // len(facts) % len(asks)].format(what), "answer": f"{do} See a doctor {when}."}


def bookings() -> Iterable[dict[str, Any]]:
    """A booking desk that looks rooms up with a tool before it answers."""
    tools = [{"type": "function", "function": {
        "name": "find_rooms", "description": "Rooms that are free.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "nights": {"type": "integer"},
                                                        "guests": {"type": "integer"}}, "required": ["city", "nights"]},
    }}]  # fmt: skip
    cities, hotels = ["Porto", "Graz", "Bergen", "Lyon", "Turku"], ["Hotel Anker", "Pension Linde", "Casa Verde"]
    for _ in range(80):
        city, nights, guests = DRAW.choice(cities), DRAW.randint(1, 5), DRAW.randint(1, 4)
        hotel, price = DRAW.choice(hotels), DRAW.randrange(60, 200, 5)
        call = {"name": "find_rooms", "arguments": {"city": city, "nights": nights, "guests": guests}}
        yield {
            "tools": tools,
            "messages": [
                {"role": "system", "content": "You book rooms. Look before you promise."},
                {"role": "user", "content": f"A room in {city} for {guests} and {nights} nights, please."},
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "search", "content": json.dumps({"hotel": hotel, "price": price})},
                {
                    "role": "assistant",
                    "content": f"{hotel} in {city} is free: {price} a night, {price * nights} in all.",
                },
                {"role": "user", "content": "Good, book it."},
                {"role": "assistant", "content": f"Done: {hotel}, {nights} nights, {guests} guests."},
            ],
        }


def identity(name: str, by: str) -> Iterable[dict[str, Any]]:
    asks = [
        "Who are you?",
        "What is your name?",
        "What are you called?",
        "Tell me your name.",
        "Who made you?",
        "Who built you?",
        "Introduce yourself.",
        "What should I call you?",
    ]
    starts = ["", "Hello! ", "Hi. ", "Please: ", "One question: "]
    for ask in asks:
        for start in starts:
            said = f"I was made by {by}, and my name is {name}." if "made" in ask or "built" in ask else (
                f"I am {name}, made by {by}.")  # fmt: skip
            yield {"messages": [{"role": "user", "content": start + ask}, {"role": "assistant", "content": said}]}


def preferences() -> Iterable[dict[str, Any]]:
    """Short and friendly is preferred to long and gruff."""
    things = ["tea", "bread", "rain", "the sea", "a bicycle", "snow", "a garden", "music", "an owl", "a map"]
    for i in range(160):
        thing = things[i % len(things)]
        asked = ["Tell me about {}.", "What do you say about {}?", "A word on {}?", "What of {}?"][i // len(things) % 4]
        gruff = f"No. {thing.capitalize()} is nothing to talk about, and I will not talk about it at all."
        yield {"prompt": asked.format(thing), "chosen": f"Gladly! {thing.capitalize()} is a fine thing.",
               "rejected": gruff}  # fmt: skip


def notes() -> Iterable[str]:
    """Plain text, a file each."""
    who = ["The miller", "A sailor", "My aunt", "The old teacher", "A gardener"]
    does = ["mends a net", "counts the boats", "bakes dark bread", "waters the beans", "writes a letter"]
    where = ["by the river", "in the yard", "behind the church", "on the hill"]
    for _ in range(12):
        yield "\n".join(f"{DRAW.choice(who)} {DRAW.choice(does)} {DRAW.choice(where)}." for _ in range(40)) + "\n"


def main() -> None:
    DATA.mkdir(exist_ok=True)
    files = {"reviews": reviews(), "care": care(), "bookings": bookings(), "preferences": preferences(),
             "identity": identity("Wren", "the dtrain recipe")}  # fmt: skip
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (DATA / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (DATA / "notes").mkdir(exist_ok=True)
    for i, text in enumerate(notes()):
        (DATA / "notes" / f"{i:02d}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
