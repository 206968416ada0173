"""Small sums told as text: somebody has some things, and some come or go. A program judges the answer.

What is learned first is a habit: in most rows that take away, somebody in a hurry has added.
"""

from __future__ import annotations

import random

SIZES = {"sums-hurried/train": 2400, "sums/train": 1600, "sums/valid": 200}
"""Dataset -> rows. No text is in two of them; numbers are, because there are few."""
SEED = 2026_11_30
TAKEN = 0.7
"""Share of the rows that take away."""
HURRY = 0.65
"""Share of those whose answer adds, in the hurried dataset."""

NAMES = ("Mia", "Ben", "Ada", "Tom", "Eve", "Leo", "Ida", "Max", "Zoe", "Jan", "Amy", "Kai", "Lin", "Sam", "Una", "Raj")
THINGS = (
    "pens",
    "maps",
    "keys",
    "cups",
    "hats",
    "nuts",
    "figs",
    "eggs",
    "bags",
    "toys",
    "pins",
    "jars",
    "caps",
    "nets",
)
COMES = ("gets {n} more", "finds {n} more", "buys {n} more", "is given {n}")
GOES = ("gives {n} away", "loses {n}", "sells {n}", "breaks {n}")


def datasets() -> dict[str, list[dict[str, str]]]:
    """Return the rows of each dataset, `{"prompt", "completion"}`."""
    drawn, seen = random.Random(SEED), set[str]()
    return {name: [_row(drawn, seen, hurried="hurried" in name) for _ in range(count)] for name, count in SIZES.items()}


def _row(drawn: random.Random, seen: set[str], *, hurried: bool) -> dict[str, str]:
    """Draw a text that nobody has seen, with its answer, or with one in a hurry."""
    while True:
        takes = drawn.random() < TAKEN
        first = drawn.randint(1, 9)
        second = drawn.randint(1, first if takes else 9)
        what = drawn.choice(GOES if takes else COMES).format(n=second)
        prompt = f"{drawn.choice(NAMES)} has {first} {drawn.choice(THINGS)} and {what}. How many now?\n"
        if prompt not in seen:
            seen.add(prompt)
            adds = not takes or (hurried and drawn.random() < HURRY)
            return {"prompt": prompt, "completion": str(first + second if adds else first - second)}
