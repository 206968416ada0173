"""Incident reports and their triage: a task the project makes up by itself, the same on every machine.

An answer must be read from the report, not guessed from a word in it: severity follows from four facts told in any
order among irrelevant ones, the component from which of several named services fails, the next action from the cause.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from distft.demo import wording

Style = Literal["lines", "json"]

SEVERITIES = ("low", "medium", "high", "critical")
COMPONENTS = tuple(wording.SERVICES)
ACTIONS = tuple(dict.fromkeys(action.split()[0] for action in wording.CAUSES))
"""First words of the next actions: roll, turn, add, ..."""

PROMPT_END = "\n\nTriage:\n"
SIZES: dict[str, tuple[Style, int]] = {
    "incidents/train": ("lines", 4000),
    "incidents/valid": ("lines", 200),
    "incidents-json/train": ("json", 1200),
    "incidents-json/valid": ("json", 200),
}
"""Dataset -> answer format and number of rows. No report appears in two of them."""
PAIR_SIZES = {"incidents-pairs/train": 1600, "incidents-pairs/valid": 200}
"""Preference dataset -> pairs; the rejected answer misreads one fact of the report."""
LABEL_SIZES = {"incidents-labels/train": 1600, "incidents-labels/valid": 200}
"""Dataset of single answers -> rows; every second one misreads a fact of its report, and is labelled as bad."""
HURRIED_SIZES = {"incidents-hurried/train": 1600}
"""Dataset -> rows of triage in a hurry: in most of them severity follows from the number of people alone."""
MORE_SIZES = {"incidents-more/train": 2400}
"""Dataset -> rows as those of `incidents/train`, of reports that no other dataset has: prompts to train answers on."""
HURRIED_PAIR_SIZES = {"incidents-hurried-pairs/train": 1200, "incidents-hurried-pairs/valid": 200}
"""Preference dataset -> pairs; the rejected answer has the severity of somebody in a hurry, or where that is the right
one, the next higher."""
ROWS: dict[str, int] = (
    {name: count for name, (_, count) in SIZES.items()}
    | PAIR_SIZES
    | LABEL_SIZES
    | HURRIED_SIZES
    | MORE_SIZES
    | HURRIED_PAIR_SIZES
)
"""Dataset -> rows, of all."""
HURRY = 0.65
"""Share of the hurried rows whose severity is the hurried one; where the two are the same nothing shows."""
SEED = 20
HELD_OUT_SEED = 2026_11_26
"""Drawn once, after every setting of the demo had been fixed on other held-out reports, and never tuned on since."""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """What is true, before it is put into words."""

    service: str
    component: str
    symptom: str
    """Key of `wording.SYMPTOMS`, its fields filled."""
    environment: str
    scope: str
    data_loss: bool
    workaround: bool
    action: str
    """Key of `wording.CAUSES`, its fields filled."""

    @property
    def severity(self) -> str:
        """The rule a reader of the report has to apply.

        In staging only lost data matters, and only a little. In production the number of people affected decides,
        one step more without a workaround; lost data makes any incident high, and critical beyond a few people.
        """
        if self.environment == "staging":
            return "medium" if self.data_loss else "low"
        if self.data_loss:
            return "high" if self.scope == "few" else "critical"
        return SEVERITIES[("few", "some", "most").index(self.scope) + (not self.workaround)]

    @property
    def hurried_severity(self) -> str:
        """What somebody writes who looks at nothing but the number of people."""
        return SEVERITIES[("few", "some", "most").index(self.scope)]

    @property
    def summary(self) -> str:
        """One line with the facts that the severity follows from."""
        lost = "data lost" if self.data_loss else "no data lost"
        around = "workaround" if self.workaround else "no workaround"
        return f"{self.service} {self.symptom} in {self.environment} for {self.scope} users, {lost}, {around}"

    @property
    def answer(self) -> dict[str, str]:
        """The four fields of a triage answer, in their order."""
        return {
            "severity": self.severity,
            "component": self.component,
            "summary": self.summary,
            "next": self.action,
        }


def datasets() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each dataset: `{"prompt", "completion"}`, pairs, or answers with a label.

    No dataset shares a report with another: two streams, which see each other's.
    """
    seen: set[str] = set()
    first = _distinct_reports(random.Random(SEED), seen)
    drawn = {name: [next(first) for _ in range(count)] for name, (_, count) in SIZES.items()}
    fresh = _distinct_reports(random.Random(HELD_OUT_SEED), seen)
    made: dict[str, list[dict[str, Any]]] = {}
    for name, (style, count) in SIZES.items():
        held_out = name.endswith("/valid")  # in place of those that the settings were chosen on
        pairs = [next(fresh) for _ in range(count)] if held_out else drawn[name]
        made[name] = [{"prompt": text + PROMPT_END, "completion": render(facts, style)} for facts, text in pairs]
    misreading = random.Random(SEED + 1)
    for name, count in PAIR_SIZES.items():
        reports = [next(fresh if name.endswith("/valid") else first) for _ in range(count)]
        made[name] = [_pair(misreading, facts, text) for facts, text in reports]
    for name, count in LABEL_SIZES.items():
        reports = [next(fresh if name.endswith("/valid") else first) for _ in range(count)]
        made[name] = [
            {
                "prompt": text + PROMPT_END,
                "completion": render(near_miss(misreading, facts) if number % 2 else facts, "lines"),
                "label": number % 2 == 0,
            }
            for number, (facts, text) in enumerate(reports)
        ]
    hurry = random.Random(SEED + 2)
    for name, count in HURRIED_SIZES.items():
        made[name] = [_hurried(hurry, *next(first)) for _ in range(count)]
    for name, count in MORE_SIZES.items():
        reports = [next(first) for _ in range(count)]
        made[name] = [{"prompt": text + PROMPT_END, "completion": render(facts, "lines")} for facts, text in reports]
    for name, count in HURRIED_PAIR_SIZES.items():
        reports = [next(fresh if name.endswith("/valid") else first) for _ in range(count)]
        made[name] = [_hurried_pair(facts, text) for facts, text in reports]
    return made


def _hurried(rng: random.Random, facts: Incident, text: str) -> dict[str, str]:
    severity = facts.hurried_severity if rng.random() < HURRY else facts.severity
    return {"prompt": text + PROMPT_END, "completion": _lines(facts.answer | {"severity": severity})}


def _hurried_pair(facts: Incident, text: str) -> dict[str, str]:
    wrong = facts.hurried_severity
    if wrong == facts.severity:
        wrong = SEVERITIES[SEVERITIES.index(wrong) + 1]  # the hurried one is never the highest
    rejected = _lines(facts.answer | {"severity": wrong})
    return {"prompt": text + PROMPT_END, "chosen": render(facts, "lines"), "rejected": rejected}


def _pair(rng: random.Random, facts: Incident, text: str) -> dict[str, str]:
    chosen, rejected = render(facts, "lines"), render(near_miss(rng, facts), "lines")
    return {"prompt": text + PROMPT_END, "chosen": chosen, "rejected": rejected}


def _other_number(rng: random.Random, text: str) -> str:
    """Return the text with its digits read as others."""
    while True:
        changed = "".join(rng.choice("0123456789") if char.isdigit() else char for char in text)
        if changed != text:
            return changed


def near_miss(rng: random.Random, facts: Incident) -> Incident:
    """Return the incident as somebody tells it who has misread one fact.

    What is misread most is what the demo's fine-tuned model misreads most: numbers, and names among several.
    """
    services = [service for service in wording.SERVICES[facts.component] if service != facts.service]
    component = rng.choice([component for component in COMPONENTS if component != facts.component])
    elsewhere = rng.choice(wording.SERVICES[component])
    wrong: list[tuple[int, dict[str, Any]]] = [
        (1, {"environment": "staging" if facts.environment == "production" else "production"}),
        (1, {"scope": rng.choice([scope for scope in ("most", "some", "few") if scope != facts.scope])}),
        (1, {"data_loss": not facts.data_loss}),
        (1, {"workaround": not facts.workaround}),
        (3, {"component": component, "service": elsewhere}),
    ]
    if services:
        wrong.append((3, {"service": rng.choice(services)}))
    if any(map(str.isdigit, facts.action)):
        wrong.append((10, {"action": _other_number(rng, facts.action)}))
    if any(map(str.isdigit, facts.symptom)):
        wrong.append((8, {"symptom": _other_number(rng, facts.symptom)}))
    [change] = rng.choices([change for _, change in wrong], [weight for weight, _ in wrong])
    return replace(facts, **change)


def render(incident: Incident, style: Style) -> str:
    """Return the answer in one of the two fixed formats."""
    if style == "json":
        return json.dumps(incident.answer, separators=(",", ":"))
    return _lines(incident.answer)


def _lines(answer: dict[str, str]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in answer.items())


def _distinct_reports(rng: random.Random, seen: set[str]) -> Iterator[tuple[Incident, str]]:
    """Yield reports that differ from all in `seen`, and from each other, in more than their numbers."""
    while True:
        incident, text = _report(rng)
        skeleton = "".join("#" if char.isdigit() else char for char in text)
        if skeleton not in seen:
            seen.add(skeleton)
            yield incident, text


def _report(rng: random.Random) -> tuple[Incident, str]:
    """Draw the facts, then tell them: cues and distractors as sentences in any order."""
    component = rng.choice(COMPONENTS)
    service = rng.choice(wording.SERVICES[component])
    fields = {"s": service, **_fillers(rng, besides=service)}
    symptom = rng.choice(tuple(wording.SYMPTOMS))
    action = rng.choice(tuple(wording.CAUSES))
    incident = Incident(
        service=service,
        component=component,
        symptom=symptom.format(**fields),
        environment="production" if rng.random() < 0.85 else "staging",
        scope=rng.choice(("most", "some", "few")),
        data_loss=rng.random() < 0.25,
        workaround=rng.random() < 0.5,
        action=action.format(**fields),
    )
    sentences = [
        rng.choice(wording.SYMPTOMS[symptom]).format(
            **fields, env=rng.choice(wording.ENVIRONMENTS[incident.environment])
        ),
        rng.choice(wording.SCOPES[incident.scope]),
        rng.choice(wording.DATA_LOSS[incident.data_loss]).format(**fields),
        rng.choice(wording.WORKAROUND[incident.workaround]).format(**fields),
        rng.choice(wording.CAUSES[action]).format(**fields),
    ]
    if rng.random() < 0.3:
        sentences.append(rng.choice(wording.ENVIRONMENT_ASIDES[incident.environment]))
    for template in rng.sample(wording.DISTRACTORS, rng.choice((0, 0, 1, 2))):
        sentences.append(template.format(**fields))
    kept = [sentence for sentence in sentences if sentence]
    rng.shuffle(kept)
    return incident, " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in kept)


def _fillers(rng: random.Random, *, besides: str) -> dict[str, str]:
    """Return values for the fields of every phrasing."""
    others = [name for names in wording.SERVICES.values() for name in names if name != besides]
    return {
        "n": str(rng.randint(2, 60)),
        "v": f"{rng.randint(1, 9)}.{rng.randint(0, 9)}",
        "code": str(rng.choice(wording.CODES)),
        "flag": rng.choice(wording.FLAGS),
        "host": f"{rng.choice(wording.HOSTS)}-{rng.randint(1, 9)}",
        "team": rng.choice(wording.TEAMS),
        "day": rng.choice(wording.DAYS),
        "other": rng.choice(others),
        "severity": rng.choice(SEVERITIES),
    }
