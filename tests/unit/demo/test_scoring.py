"""An answer conforms to the letter or not at all."""

from __future__ import annotations

import pytest

from distft.demo.incidents import Style
from distft.demo.scoring import Score, score

LINES = "severity: high\ncomponent: payments\nsummary: refund worker times out\nnext: roll back release 4.12"
JSON = '{"severity":"high","component":"payments","summary":"refund worker times out","next":"roll back release 4.12"}'

GOOD = Score(conforms=True, severity_match=True, all_right=True)
OTHER = Score(conforms=True, severity_match=True, all_right=False)
WRONG = Score(conforms=True, severity_match=False, all_right=False)
BROKEN = Score(conforms=False, severity_match=False, all_right=False)


@pytest.mark.parametrize(
    ("style", "text", "expected"),
    [
        pytest.param("lines", LINES, GOOD, id="good"),
        pytest.param("lines", LINES.replace("high", "low"), WRONG, id="wrong severity"),
        pytest.param("lines", LINES.replace("payments", "search"), OTHER, id="wrong component keeps the format"),
        pytest.param("lines", LINES.replace("4.12", "4.13"), OTHER, id="wrong release"),
        pytest.param("lines", "", BROKEN, id="empty"),
        pytest.param("lines", LINES.replace("high", "urgent"), BROKEN, id="unknown severity"),
        pytest.param("lines", LINES.replace("high", "High"), BROKEN, id="capital"),
        pytest.param("lines", LINES.replace("payments", "kitchen"), BROKEN, id="unknown component"),
        pytest.param("lines", LINES.replace("component: payments\n", ""), BROKEN, id="missing key"),
        pytest.param("lines", "\n".join(reversed(LINES.split("\n"))), BROKEN, id="wrong order"),
        pytest.param("lines", LINES + "\n", BROKEN, id="trailing newline"),
        pytest.param("lines", LINES + "\nThank you", BROKEN, id="trailing text"),
        pytest.param("lines", "Sure!\n" + LINES, BROKEN, id="leading text"),
        pytest.param("lines", LINES.replace("refund worker times out", "it fails"), BROKEN, id="short summary"),
        pytest.param("lines", LINES.replace("roll back", "pray for"), BROKEN, id="unknown action"),
        pytest.param("lines", LINES.replace("roll back release 4.12", "roll"), BROKEN, id="action on nothing"),
        pytest.param("lines", LINES.replace("\n", "\n\n", 1), BROKEN, id="blank line"),
        pytest.param("lines", JSON, BROKEN, id="the other format"),
        pytest.param("json", JSON, GOOD, id="json good"),
        pytest.param("json", JSON.replace("high", "low"), WRONG, id="json wrong severity"),
        pytest.param("json", LINES, BROKEN, id="json the other format"),
        pytest.param("json", JSON.replace('":"', '": "'), BROKEN, id="json spaces"),
        pytest.param("json", JSON + " ok", BROKEN, id="json trailing text"),
        pytest.param("json", JSON + "\n", BROKEN, id="json trailing newline"),
        pytest.param("json", JSON[:-1], BROKEN, id="json cut off"),
        pytest.param("json", JSON.replace('"component":"payments",', ""), BROKEN, id="json missing key"),
        pytest.param("json", JSON.replace('"next"', '"severity":"low","next"'), BROKEN, id="json key twice"),
        pytest.param("json", JSON.replace("}", ',"why":"so"}'), BROKEN, id="json further key"),
        pytest.param("json", JSON.replace('"payments"', "7"), BROKEN, id="json number"),
        pytest.param("json", JSON.replace('"payments"', '{"a":"b"}'), BROKEN, id="json nested"),
        pytest.param("json", JSON.replace("payments", "kitchen"), BROKEN, id="json unknown component"),
        pytest.param("json", JSON.replace("times out", "times\\nout"), BROKEN, id="json summary of two lines"),
        pytest.param("json", "[" + JSON + "]", BROKEN, id="json in a list"),
        pytest.param("json", "[1,2]", BROKEN, id="json list"),
        pytest.param("json", "NaN", BROKEN, id="json scalar"),
        pytest.param("json", "[" * 5000, BROKEN, id="json too deep"),
    ],
)
def test_score(style: Style, text: str, expected: Score) -> None:
    assert score({"completion": LINES if style == "lines" else JSON}, text, style) == expected
