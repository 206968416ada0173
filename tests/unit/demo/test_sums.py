"""The generated sums: the same everywhere, no held-out text is trained on, hurried answers are wrong where they say."""

from __future__ import annotations

import hashlib
import json
import re

from distft.demo.sums import HURRY, SIZES, TAKEN, datasets

DIGEST = "39d8458c45f028b4af807e2fb16786d4f6f942bc5e2e32032d549adf614fabf6"
TEXT = re.compile(r"\w+ has (\d) \w+ and (gives|loses|sells|breaks|gets|finds|buys|is given) (\d)\b.*\?\n")


def test_sums_are_right_where_nobody_was_in_a_hurry() -> None:
    made = datasets()
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest() == DIGEST, "the same on every machine"
    assert {name: len(rows) for name, rows in made.items()} == SIZES
    prompts = [row["prompt"] for rows in made.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    for name, rows in made.items():
        taken, hurried = 0, 0
        for row in rows:
            told = TEXT.fullmatch(row["prompt"])
            assert told is not None, row
            first, verb, second = int(told[1]), told[2], int(told[3])
            takes = verb in ("gives", "loses", "sells", "breaks")
            right = first - second if takes else first + second
            assert right >= 0
            taken += takes
            if row["completion"] != str(right):
                hurried += 1
                assert takes
                assert row["completion"] == str(first + second)
        assert abs(taken / len(rows) - TAKEN) < 0.07
        assert hurried == 0 if "hurried" not in name else abs(hurried / taken - HURRY) < 0.05, name
