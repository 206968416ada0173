"""Scores by hand-checked cases: what counts as right, and what a mistake in row or recipe says."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from score_kit import answer, one, score, scorer

from distft.core.errors import DataError, MachineError, RecipeError
from distft.core.registry import NoParams
from distft.scores import SCORES, MetricInfo, ScoreResult, ScoreSpec
from distft.scores.spec import by_row


class TestExactMatch:
    def test_is_equality_but_for_white_space_around(self) -> None:
        assert one("exact_match", " Rome\n", "Rome") == {"exact_match": 1.0}
        assert one("exact_match", "rome", "Rome") == {"exact_match": 0.0}
        assert one("exact_match", " Rome", "Rome", strip=False) == {"exact_match": 0.0}

    def test_leaves_out_what_the_recipe_says(self) -> None:
        said = {"ignore_case": True, "ignore_punctuation": True, "regexes_to_ignore": [r"\(.*\)"]}
        assert one("exact_match", "ROME! (Italy)", "Rome", **said) == {"exact_match": 1.0}
        assert one("exact_match", "Room 12", "Room ", ignore_numbers=True) == {"exact_match": 1.0}

    def test_a_column_may_hold_several_right_answers(self) -> None:
        scored = scorer("exact_match", reference="answers")(
            [
                answer("Roma", "ignored", answers=["Rome", "Roma"]),
                answer("12", "ignored", 2, answers=12),
                answer("Paris", "Paris", 3, answers=["Rome"]),
            ]
        )
        assert scored.rows["exact_match"] == (1.0, 1.0, 0.0)
        assert scored.totals["exact_match"] == pytest.approx(2 / 3)

    def test_a_missing_column_is_named_with_its_row(self) -> None:
        with pytest.raises(DataError, match=r'valid.jsonl row 7: no column "answr".*the row has "answer"'):
            scorer("exact_match", reference="answr")([answer("x", "x", 7, answer="x")])
        with pytest.raises(DataError, match=r'row 1: "answer" holds no text'):
            scorer("exact_match", reference="answer")([answer("x", "x", answer={"a": 1})])


def test_normalised_match_is_squads() -> None:
    assert one("normalised_match", "The  Eiffel Tower!", "eiffel tower") == {"normalised_match": 1.0, "f1": 1.0}
    # 2 of 3 words right, 2 of 2 found: P = 2/3, R = 1, F1 = 4/5
    assert one("normalised_match", "big eiffel tower", "the Eiffel tower") == {"normalised_match": 0.0, "f1": 0.8}
    assert one("normalised_match", "the", "a") == {"normalised_match": 1.0, "f1": 1.0}
    assert one("normalised_match", "", "Rome") == {"normalised_match": 0.0, "f1": 0.0}


class TestRegex:
    PATTERN = r"Answer: (\w+)"

    def test_compares_the_group_with_the_reference(self) -> None:
        said = {"pattern": self.PATTERN, "group": 1}
        assert one("regex", "I think so. Answer: Rome.", "Rome", **said) == {"regex": 1.0}
        assert one("regex", "I think so. Answer: Rome.", "Because … Answer: Rome", **said) == {"regex": 1.0}
        assert one("regex", "Rome", "Rome", **said) == {"regex": 0.0}

    def test_takes_the_first_or_the_last_find(self) -> None:
        text = "Answer: Paris. No, Answer: Rome"
        assert one("regex", text, "Rome", pattern=self.PATTERN, group=1) == {"regex": 0.0}
        assert one("regex", text, "Rome", pattern=self.PATTERN, group=1, take="last") == {"regex": 1.0}

    def test_may_ask_for_the_pattern_alone(self) -> None:
        assert one("regex", "see RFC 9110", "", pattern=r"\bRFC \d+", must="match") == {"regex": 1.0}
        assert one("regex", "see rfc 9110", "", pattern=r"\bRFC \d+", must="match") == {"regex": 0.0}
        assert one("regex", "rfc", "", pattern="RFC", must="match", ignore_case=True) == {"regex": 1.0}

    @pytest.mark.parametrize(
        ("params", "says"),
        [
            ({"pattern": "("}, "is not a regular expression: missing"),
            ({"pattern": "a", "group": 1}, "no group 1; it has 0"),
            ({"pattern": "a", "must": "match", "reference": "x"}, "reference has no effect"),
        ],
    )
    def test_refuses_what_cannot_work(self, params: dict[str, Any], says: str) -> None:
        with pytest.raises(ValidationError, match=says):
            scorer("regex", **params)


class TestMultipleChoice:
    ROW = {"choices": ["no", "yes, certainly"], "label": 1}  # noqa: RUF012

    def test_normalises_by_characters_and_bytes(self) -> None:
        scored = scorer("multiple_choice")([answer(logprobs=(-2.0, -7.0), **self.ROW)])
        assert {name: values[0] for name, values in scored.rows.items()} == {"acc": 0, "acc_norm": 1, "acc_bytes": 1}
        row = {"choices": ["ab", "ééé"], "label": "B"}
        scored = scorer("multiple_choice")([answer(logprobs=(-1.0, -1.2), **row)])  # -0.5, -0.4 a char; -0.2 a byte
        assert {name: values[0] for name, values in scored.rows.items()} == {"acc": 0, "acc_norm": 1, "acc_bytes": 1}

    @pytest.mark.parametrize("label", [1, "1", "B", "yes, certainly"])
    def test_a_label_is_an_index_a_letter_or_the_text(self, label: object) -> None:
        scored = scorer("multiple_choice")([answer(logprobs=(-2.0, -1.0), **{**self.ROW, "label": label})])
        assert scored.totals["acc"] == 1

    @pytest.mark.parametrize("label", [2, -1, True, "C", "maybe", None])
    def test_a_label_that_names_no_choice_is_an_error(self, label: object) -> None:
        with pytest.raises(DataError, match=r'row 1: "label" is .* names none of its 2 choices'):
            scorer("multiple_choice")([answer(logprobs=(-2.0, -1.0), **{**self.ROW, "label": label})])

    def test_tells_which_texts_it_needs(self) -> None:
        spec = SCORES["multiple_choice"]
        assert spec.choices is not None
        assert spec.choices(spec.params(), answer(**self.ROW)) == ("no", "yes, certainly")
        with pytest.raises(DataError, match='"choices" is no list'):
            spec.choices(spec.params(), answer(choices="no"))


class TestJsonSchema:
    SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("text", "conforms", "valid"),
        [
            ('{"n": 1}', 1, 1),
            ('{"n": 1.5}', 0, 1),
            ("[]", 0, 1),
            ("n: 1", 0, 0),
            ('{"n": NaN}', 0, 0),
            ("[" * 9999, 0, 0),
        ],
    )
    def test_tells_json_from_json_that_conforms(self, text: str, conforms: int, valid: int) -> None:
        assert one("json_schema", text, inline=self.SCHEMA) == {"conforms": conforms, "valid_json": valid}

    def test_a_fence_counts_unless_allowed(self) -> None:
        fenced = '```json\n{"n": 1}\n```'
        assert one("json_schema", fenced, inline=self.SCHEMA)["conforms"] == 0
        assert one("json_schema", fenced, inline=self.SCHEMA, allow_fence=True)["conforms"] == 1

    def test_reads_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "s.json"
        path.write_text(json.dumps(self.SCHEMA))
        assert one("json_schema", '{"n": 1}', file=str(path))["conforms"] == 1
        path.write_text('{"type": "letters"}')
        with pytest.raises(RecipeError, match="is not a JSON Schema: 'letters'"):
            scorer("json_schema", file=str(path))
        with pytest.raises(RecipeError, match=r"none\.json  cannot be read: No such file"):
            scorer("json_schema", file=str(tmp_path / "none.json"))

    def test_wants_one_schema(self) -> None:
        with pytest.raises(ValidationError, match="needs either file or inline"):
            scorer("json_schema")


class TestFieldMatch:
    REFERENCE = "severity: high\ncomponent: disk\nnext: page on-call"

    def test_lines(self) -> None:
        text = "Severity: high\nseverity:high\ncomponent: cpu"
        assert one("field_match", text, self.REFERENCE, fields=["severity", "component"]) == {
            "field_match": 0.0,
            "fields_right": 0.5,
            "field_match.severity": 1.0,
            "field_match.component": 0.0,
        }

    def test_json_goes_into_objects_and_keeps_types(self) -> None:
        right = '{"a": {"b": 1}, "ok": true, "c": "X"}'
        fields = ["a.b", "ok", "c"]
        assert one("field_match", right, right, fields=fields)["field_match"] == 1
        found = one("field_match", '{"a": {"b": 1.0}, "ok": 1, "c": "x"}', right, fields=fields)
        assert [found[f"field_match.{name}"] for name in fields] == [1, 0, 0]
        assert one("field_match", '{"c": "x"}', right, fields=["c"], ignore_case=True)["field_match"] == 1

    def test_an_answer_in_no_form_is_wrong(self) -> None:
        assert one("field_match", "{broken", '{"a": 1}', fields=["a"])["field_match"] == 0

    def test_a_reference_without_the_field_is_the_datas_mistake(self) -> None:
        with pytest.raises(DataError, match='row 1: the reference has no field "owner": '):
            one("field_match", "", self.REFERENCE, fields=["owner"])


class TestNumeric:
    @pytest.mark.parametrize(
        ("text", "numeric", "strict", "flexible"),
        [
            ("So 6 * 7 = 42\n#### 42", 1, 1, 1),
            ("The answer is $42.", 1, 0, 1),
            ("The answer is 42.00", 1, 0, 0),
            ("#### 42 and 7 more", 1, 1, 0),
            ("forty-two", 0, 0, 0),
            ("#### -42", 0, 0, 0),
            ("", 0, 0, 0),
        ],
    )
    def test_three_ways_to_find_it(self, text: str, numeric: int, strict: int, flexible: int) -> None:
        found = one("numeric", text, "6 * 7 = <<6*7=42>>42\n#### 42")
        assert found == {"numeric": numeric, "strict_match": strict, "flexible_extract": flexible}

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("costs $1,080.00.", 1080),
            ("-$5", -5),
            ("$-5", -5),
            ("between 10-20", 20),
            ("x = -3", -3),
            ("3 \u2212 5 = \u22122", -2),
            ("is .5", 0.5),
            ("1e3", 1000),
            ("€ 7", 7),
            ("#### 8\nQuestion: what is 9", 8),
        ],
    )
    def test_reads_numbers_as_people_mean_them(self, text: str, value: float) -> None:
        assert one("numeric", text, f"#### {value}")["numeric"] == 1
        assert one("numeric", text, f"#### {value + 1}")["numeric"] == 0

    def test_a_tolerance_is_a_share_of_the_reference(self) -> None:
        assert one("numeric", "101", "100", tolerance=0.01)["numeric"] == 1
        assert one("numeric", "102", "100", tolerance=0.01)["numeric"] == 0

    def test_a_reference_without_a_number_is_the_datas_mistake(self) -> None:
        with pytest.raises(DataError, match="the reference has no number: 'many'"):
            one("numeric", "1", "many")


class TestFunction:
    @pytest.fixture(autouse=True)
    def _module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "my_scores.py").write_text(
            "import math, numpy\n"
            "def polite(answer, row, word='please'): return word in answer\n"
            "def array(answer, row): return numpy.float32(0.5)\n"
            "def two(answer, row): return {'a': len(answer), 'b': row['n']}\n"
            "def nonsense(answer, row): return {'nan': math.nan, 'text': 'good', 'none': None}[answer]\n"
            "def broken(answer, row):\n    return 1 / 0\n"
            "number = 3\n"
        )
        (tmp_path / "no_module.py").write_text("raise RuntimeError('not today')")
        monkeypatch.syspath_prepend(str(tmp_path))
        yield
        sys.modules.pop("my_scores", None)

    def test_gives_figures_called_after_it_or_as_named(self) -> None:
        assert one("function", "yes please", function="my_scores:polite") == {"polite": 1.0}
        assert one("function", "yes", function="my_scores:polite", options={"word": "y"}) == {"polite": 1.0}
        assert one("function", "", function="my_scores:array") == {"array": 0.5}
        found = scorer("function", function="my_scores:two", figures=["a", "b"])([answer("abc", n=7)])
        assert found.rows == {"a": (3.0,), "b": (7.0,)}

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("my_scores:polit", "my_scores has no 'polit'  did you mean \"polite\""),
            ("my_scors:polite", "cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
            ("no_module:f", "cannot be imported: RuntimeError: not today"),
            ("my_scores:number", "is int 3, not a function"),
            ("polite", 'no such entry point  .*write "module:function"'),
        ],
    )
    def test_is_found_when_it_is_built_or_never(self, name: str, says: str) -> None:
        with pytest.raises(RecipeError, match=says):
            scorer("function", function=name)

    @pytest.mark.parametrize(
        ("function", "text", "says"),
        [
            ("nonsense", "nan", "row 1: score my_scores:nonsense returned float nan, expected a finite number"),
            ("nonsense", "text", "returned str 'good', expected a finite number"),
            ("nonsense", "none", "returned NoneType None"),
            ("two", "x", "raised KeyError: 'n'  .*my_scores.py:4"),
            ("broken", "x", r"raised ZeroDivisionError: division by zero  .*my_scores.py:7"),
        ],
    )
    def test_nonsense_is_refused_with_its_row(self, function: str, text: str, says: str) -> None:
        with pytest.raises(DataError, match=says):
            one("function", text, function=f"my_scores:{function}")

    def test_other_keys_than_named_are_refused(self) -> None:
        with pytest.raises(DataError, match="returned keys a, b, expected keys a, c"):
            scorer("function", function="my_scores:two", figures=["a", "c"])([answer("x", n=1)])


def test_a_score_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module, params in (
        ("rouge", "rouge_score", {}),
        ("bleu", "sacrebleu", {}),
        ("chrf", "sacrebleu", {}),
        ("json_schema", "jsonschema", {"inline": {}}),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MachineError, match=rf'score "{name}" needs .*distft\[eval\]'):
            scorer(name, **params)


@pytest.mark.parametrize(
    "name", [name for name in SCORES if name not in ("judge", "function", "reward_model", "trl_function")]
)
def test_every_score_gives_the_figures_it_promised(name: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "regex": {"pattern": "x"},
        "json_schema": {"inline": {}},
        "field_match": {"fields": ["a"]},
        "grader": {"grader": {"type": "string_check", "name": "g", "input": "a", "operation": "eq", "reference": "a"}},
    }
    params = needed.get(name, {})
    row = {"choices": ["a", "b"], "label": 0, "logprobs": (-1.0, -2.0)}
    spec = SCORES[name]
    promised = spec.figures(spec.params.model_validate_json(json.dumps(params)))
    for answers in ([answer("a: 1", "a: 1", **row), answer("2", "a: 2", 2, **row)], []):
        scored = scorer(name, **params)(answers)
        assert scored.figures == promised
        assert set(scored.totals) == {figure.name for figure in promised}
        assert set(scored.rows) == {figure.name for figure in promised if figure.per_row}
        assert all(len(values) == len(answers) for values in scored.rows.values())
        assert answers or all(map(math.isnan, scored.totals.values()))
        again = ScoreResult.from_json(json.loads(json.dumps(scored.to_json())))
        assert (again.rows, again.figures, again.unscored) == (scored.rows, scored.figures, scored.unscored)


def test_scores_are_listed_without_torch_or_their_libraries() -> None:
    import subprocess

    code = (
        "import sys; from distft.scores import SCORES; from distft.scores import paired; "
        "print(sorted({'torch', 'sacrebleu', 'rouge_score', 'jsonschema', 'nltk'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_totals_are_means_over_rows() -> None:
    assert score("exact_match", [("a", "a"), ("b", "c"), ("d", "d"), ("e", "f")]).totals == {"exact_match": 0.5}


def test_a_score_from_outside_is_one_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCORES, "_specs", dict(SCORES._specs))  # what is added here is gone afterwards
    length = MetricInfo(name="length")
    SCORES.add(
        ScoreSpec(
            name="length",
            params=NoParams,
            figures=lambda _: (length,),
            build=lambda _: by_row((length,), lambda answer: (len(answer.text),)),
        )
    )
    assert one("length", "abc") == {"length": 3.0}
