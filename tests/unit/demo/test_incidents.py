"""The generated task: the same everywhere, split cleanly, and not solved by looking for a word."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable

import pytest

from distft.demo import tokenizer, wording
from distft.demo.incidents import (
    COMPONENTS,
    LABEL_SIZES,
    PAIR_SIZES,
    PROMPT_END,
    ROWS,
    SEVERITIES,
    SIZES,
    Incident,
    datasets,
)
from distft.demo.scoring import parse

Rows = list[dict[str, str]]
PAIR_DIGEST = "3196825fe697ccc86f73438dfe450b6d9f6a7003c3b99e375e30852ad40ebd2b"
LABEL_DIGEST = "c24a170d322cbf050430297534c775380b010c606ec60d69f3965198d56e54df"
DIGEST = "23ac7fc03c4f7b610f116a028ce9afca51783e84c10c01ea9986dfb9d2a00876"


@pytest.fixture(scope="module")
def made() -> dict[str, Rows]:
    return datasets()


def test_the_bytes_are_the_same_on_every_machine(made: dict[str, Rows]) -> None:
    taught = {name: made[name] for name in SIZES}
    assert hashlib.sha256(json.dumps(taught).encode()).hexdigest() == DIGEST
    pairs = {name: made[name] for name in PAIR_SIZES}
    assert hashlib.sha256(json.dumps(pairs).encode()).hexdigest() == PAIR_DIGEST
    labels = {name: made[name] for name in LABEL_SIZES}
    assert hashlib.sha256(json.dumps(labels).encode()).hexdigest() == LABEL_DIGEST


def test_a_rejected_answer_keeps_the_format_and_misreads_one_fact(made: dict[str, Rows]) -> None:
    for row in (row for name in PAIR_SIZES for row in made[name]):
        chosen, rejected = parse(row["chosen"], "lines"), parse(row["rejected"], "lines")
        assert chosen is not None
        assert rejected is not None
        assert chosen != rejected
        misread = chosen["next"] != rejected["next"]
        assert not misread or chosen["summary"] == rejected["summary"], "one fact"


def test_every_second_labelled_answer_is_right(made: dict[str, Rows]) -> None:
    rows = made["incidents-labels/train"]
    assert [row["label"] for row in rows] == [True, False] * (len(rows) // 2)
    assert all(parse(row["completion"], "lines") is not None for row in rows)


def test_hurried_rows_are_wrong_about_severity_alone(made: dict[str, Rows]) -> None:
    rows = [parse(row["completion"], "lines") or {} for row in made["incidents-hurried/train"]]
    by_scope = {"few": "low", "some": "medium", "most": "high"}
    scopes = [re.search(r"for (few|some|most) users", row["summary"]) for row in rows]
    hurried = [by_scope[scope[1]] == row["severity"] for scope, row in zip(scopes, rows, strict=True) if scope]
    assert len(hurried) == len(rows)
    assert 0.7 < sum(hurried) / len(rows) < 0.85, "65 % in a hurry, and the rows where it makes no difference"


def test_pairs_reject_a_severity_alone_and_the_hurried_one_where_it_is_wrong(made: dict[str, Rows]) -> None:
    by_scope = {"few": "low", "some": "medium", "most": "high"}
    hurried = 0
    for row in made["incidents-hurried-pairs/train"]:
        chosen, rejected = (parse(row[side], "lines") or {} for side in ("chosen", "rejected"))
        assert {name for name in chosen if chosen[name] != rejected[name]} == {"severity"}
        scope = re.search(r"for (few|some|most) users", chosen["summary"])
        assert scope is not None
        hurried += rejected["severity"] == by_scope[scope[1]]
        assert by_scope[scope[1]] in (chosen["severity"], rejected["severity"]), "it is right, or rejected"
    assert 0.5 < hurried / len(made["incidents-hurried-pairs/train"]) < 0.8, "it is not always wrong"


def test_sizes(made: dict[str, Rows]) -> None:
    assert {name: len(rows) for name, rows in made.items()} == ROWS
    assert len(made["incidents/train"]) >= 2000
    assert len(made["incidents/valid"]) == len(made["incidents-json/valid"]) == 200


def test_no_report_is_told_twice_even_with_other_numbers(made: dict[str, Rows]) -> None:
    told = [re.sub(r"\d", "#", row["prompt"]) for rows in made.values() for row in rows]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("name", SIZES)
def test_every_reference_answer_keeps_its_format(made: dict[str, Rows], name: str) -> None:
    for row in made[name]:
        assert row["prompt"].endswith(PROMPT_END)
        assert parse(row["completion"], SIZES[name][0]) is not None


@pytest.mark.parametrize("name", SIZES)
def test_every_severity_and_component_is_common(made: dict[str, Rows], name: str) -> None:
    style, size = SIZES[name]
    answers = [parse(row["completion"], style) or {} for row in made[name]]
    severities = Counter(answer["severity"] for answer in answers)
    components = Counter(answer["component"] for answer in answers)
    assert all(severities[word] > 0.1 * size for word in SEVERITIES)
    assert all(components[word] > 0.03 * size for word in COMPONENTS)


def test_training_uses_every_service_and_symptom(made: dict[str, Rows]) -> None:
    told = "\n".join(row["completion"] for row in made["incidents/train"])
    assert all(service in told for services in wording.SERVICES.values() for service in services)
    assert all(symptom.partition("{")[0] in told for symptom in wording.SYMPTOMS)


@pytest.mark.parametrize(
    ("facts", "severity"),
    [
        (("staging", "most", False, False), "low"),
        (("staging", "most", True, False), "medium"),
        (("production", "few", False, True), "low"),
        (("production", "few", False, False), "medium"),
        (("production", "some", False, True), "medium"),
        (("production", "some", False, False), "high"),
        (("production", "most", False, True), "high"),
        (("production", "most", False, False), "critical"),
        (("production", "few", True, True), "high"),
        (("production", "some", True, True), "critical"),
    ],
)
def test_severity_rule(facts: tuple[str, str, bool, bool], severity: str) -> None:
    environment, scope, data_loss, workaround = facts
    incident = Incident(
        service="edge proxy",
        component="network",
        symptom="times out",
        environment=environment,
        scope=scope,
        data_loss=data_loss,
        workaround=workaround,
        action="page the owner",
    )
    assert incident.severity == severity


def test_no_single_word_gives_the_severity_away(made: dict[str, Rows]) -> None:
    """The best word, or pair of neighbouring words, chosen with hindsight stays far from the rule."""
    examples = [(_grams(row["prompt"]), row["completion"].partition("\n")[0]) for row in made["incidents/train"]]
    totals = Counter(severity for _, severity in examples)
    with_gram: dict[str, Counter[str]] = {}
    for grams, severity in examples:
        for gram in grams:
            with_gram.setdefault(gram, Counter())[severity] += 1
    best = max(
        max(present.values()) + max((totals - present).values(), default=0) for present in with_gram.values()
    ) / len(examples)
    assert max(totals.values()) / len(examples) < 0.35
    assert best < 0.5


def _grams(text: str) -> set[str]:
    words = text.lower().split()
    return {*words, *(f"{one} {two}" for one, two in itertools.pairwise(words))}


def test_words_somebody_else_chose_do_not_count(made: dict[str, Rows]) -> None:
    """Reports name severities that are not the answer about as often as chance does."""
    asked = [
        (match[1], row["completion"].splitlines()[0].removeprefix("severity: "))
        for row in made["incidents/train"]
        if (match := re.search(r"asks for (\w+) priority", row["prompt"]))
    ]
    assert 0.15 < sum(said == true for said, true in asked) / len(asked) < 0.35


def _texts(made: dict[str, Rows], splits: Iterable[str]) -> list[str]:
    return [row["prompt"] + row["completion"] for name in splits for row in made[name]]


def test_a_prompt_ends_at_a_token(made: dict[str, Rows]) -> None:
    """Tokenised jointly, prompt and completion give the tokens they give apart."""
    bpe = tokenizer.train(_texts(made, ("incidents/train", "incidents-json/train")))
    for row in made["incidents/valid"] + made["incidents-json/valid"]:
        apart = bpe.encode(row["prompt"]).ids + bpe.encode(row["completion"]).ids
        assert bpe.encode(row["prompt"] + row["completion"]).ids == apart


def test_the_tokenizer_is_small_deterministic_and_lossless(made: dict[str, Rows]) -> None:
    texts = _texts(made, ("incidents/train", "incidents-json/train"))
    bpe = tokenizer.train(texts)
    assert bpe.to_str() == tokenizer.train(texts).to_str()
    assert bpe.get_vocab_size() <= tokenizer.VOCAB_SIZE
    assert bpe.token_to_id(tokenizer.PAD) == tokenizer.PAD_ID
    assert bpe.token_to_id(tokenizer.EOS) == tokenizer.EOS_ID
    for text in ("a\r\n\tb  c", "naïve 日本 🚒", *_texts(made, ("incidents/valid",))[:20]):
        assert bpe.decode(bpe.encode(text).ids) == text
