"""What a look at the rows finds: planted repeats, overlap, secrets and imbalance, by file and row, and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.core.errors import DataError
from distft.data_quality import DataQualityReport, card, examine, refuse_overlap, similar, summary
from distft.data_quality.shingles import WORDS, boilerplate, shingle, signatures, similarity
from distft.recipe import AnswersTable, DataTable

DRAW = random.Random(7)
VOCABULARY = ["".join(DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(3000)]


def text(length: int, draw: random.Random = DRAW) -> str:
    return " ".join(draw.choices(VOCABULARY, k=length))


def pair(prompt: str | None = None, completion: str | None = None) -> dict[str, str]:
    return {"prompt": prompt or text(40), "completion": completion or text(60)}


def look(folder: Path, train: list[Any], held_out: list[Any] | None = None, **settings: Any) -> DataQualityReport:
    splits = {"train": train} | ({} if held_out is None else {"eval": held_out})
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return examine(table(folder, *splits, **settings), cache_dir=folder / "cache")


def table(folder: Path, *splits: str, **settings: Any) -> DataTable:
    sources = {split: [{"path": str(folder / f"{split}.jsonl")}] for split in splits}
    return DataTable.model_validate_json(json.dumps(sources | settings))


class TestRepeats:
    def test_are_named_with_the_row_they_repeat(self, tmp_path: Path) -> None:
        rows = [pair() for _ in range(120)]
        rows[30] = {name: f"  {value.replace(' ', '  ', 3)}\n" for name, value in rows[4].items()}  # white space only
        words = rows[9]["completion"].split()
        rows[60] = pair(rows[9]["prompt"], " ".join([*words[:30], "another", *words[31:]]))
        report = look(tmp_path, rows)
        assert (report.num_same, report.num_near) == (1, 1)
        assert [(one.row, one.like) for one in report.repeats] == [
            ("train.jsonl row 31", "train.jsonl row 5"),
            ("train.jsonl row 61", "train.jsonl row 10"),
        ]
        assert report.repeats[0].similarity == 1.0
        assert 0.8 <= report.repeats[1].similarity < 1
        assert report.num_conflicting == 1  # row 61 has row 10's prompt

    def test_another_system_message_or_tool_makes_another_question(self, tmp_path: Path) -> None:
        def chat(system: str, tool: str) -> dict[str, Any]:
            turns = (("system", system), ("user", "What is the weather?"), ("assistant", text(20)))
            messages = [{"role": role, "content": content} for role, content in turns]
            return {"messages": messages, "tools": [{"type": "function", "function": {"name": tool}}]}

        rows = [chat("You are A.", "one"), chat("You are B.", "one"), chat("You are A.", "two")]
        assert look(tmp_path, rows).num_conflicting == 0
        assert look(tmp_path, [*rows, chat("You are A.", "two")]).num_conflicting == 1

    def test_an_instruction_that_all_share_makes_no_rows_alike(self, tmp_path: Path) -> None:
        told = text(200)
        rows = [pair(f"{told} {text(8)}", text(6)) for _ in range(100)]
        report = look(tmp_path, rows)
        assert report.num_near == 0
        rows[70] = pair(rows[3]["prompt"], rows[3]["completion"] + " indeed")
        assert look(tmp_path, rows).num_near == 1

    def test_hundreds_of_rows_that_are_alike_are_all_found(self, tmp_path: Path) -> None:
        base = text(100).split()
        rows = [pair(" ".join([*base[:90], f"n{at}"]), "yes, that is the one") for at in range(150)]
        assert look(tmp_path, [pair() for _ in range(900)] + rows).num_near == 149


class TestOverlap:
    def test_each_evaluation_row_counts_once_by_its_nearest_kind(self, tmp_path: Path) -> None:
        train, held_out = [pair() for _ in range(150)], [pair() for _ in range(100)]
        held_out[3] = train[10]
        held_out[5] = pair(train[20]["prompt"], "something else altogether")
        words = train[30]["completion"].split()
        held_out[8] = pair(train[30]["prompt"] + "?!", " ".join([*words[:-1], "end"]).upper())
        held_out[9] = pair(train[31]["prompt"].replace(" ", " very ", 1), train[31]["completion"])
        report = look(tmp_path, train, held_out)
        assert report.num_shared == {"row": 1, "prompt": 1, "near": 2}
        assert [(one.kind, one.eval_row, one.train_row) for one in report.shared] == [
            ("row", "eval.jsonl row 4", "train.jsonl row 11"),
            ("prompt", "eval.jsonl row 6", "train.jsonl row 21"),
            ("near", "eval.jsonl row 9", "train.jsonl row 31"),
            ("near", "eval.jsonl row 10", "train.jsonl row 32"),
        ]
        assert "4 of 100 evaluation rows are also trained on" in "\n".join(report.notes)

    def test_is_refused_where_the_recipe_says_so(self, tmp_path: Path) -> None:
        train, held_out = [pair() for _ in range(120)], [pair() for _ in range(100)]
        report = look(tmp_path, train, held_out)
        refuse_overlap(report, table(tmp_path, "train", "eval", overlap="error"))  # there is none
        held_out[:7] = train[:7]
        report = look(tmp_path, train, held_out)
        refuse_overlap(report, table(tmp_path, "train", "eval"))
        with pytest.raises(DataError) as refused:
            refuse_overlap(report, table(tmp_path, "train", "eval", overlap="error"))
        assert "7 of 100 evaluation rows are also trained on" in str(refused.value)
        assert "eval.jsonl row 1 is train.jsonl row 1\n" in str(refused.value)
        assert "and 2 more" in str(refused.value)

    def test_questions_with_files_of_their_own_are_evaluation_rows(self, tmp_path: Path) -> None:
        """By columns or by format; a file that is held out anyway, a spot set and a task of lm-eval are not read."""
        train = [pair() for _ in range(120)]
        exam = [{"q": text(30), "gold": text(20)} for _ in range(100)]
        exam[4] = {"q": train[7]["prompt"], "gold": "something else"}
        exam[6] = {"q": train[9]["prompt"], "gold": train[9]["completion"]}
        (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in exam))
        path, scores = str(tmp_path / "exam.jsonl"), ({"name": "exact_match"},)
        look(tmp_path, train, [pair() for _ in range(100)])
        own = [
            AnswersTable(name="a", path=path, prompt="q", reference="gold", scores=scores),
            AnswersTable(name="again", path=str(tmp_path / "eval.jsonl"), scores=scores),
            AnswersTable(name="spot", path="spot:general"),
            AnswersTable(name="task", path="lm-eval:gsm8k"),
        ]
        found = table(tmp_path, "train", "eval", overlap="error")
        report = examine(found, answers=own, cache_dir=tmp_path / "cache")
        assert report.splits["eval"].num_rows == 200
        assert [(one.kind, one.eval_row, one.train_row) for one in report.shared] == [
            ("row", "exam.jsonl row 7", "train.jsonl row 10"),
            ("prompt", "exam.jsonl row 5", "train.jsonl row 8"),
        ]
        with pytest.raises(DataError, match="2 of 200 evaluation rows are also trained on"):
            refuse_overlap(report, found)
        few = [own[0].model_copy(update={"max_rows": 5})]
        alone = examine(table(tmp_path, "train"), answers=few, cache_dir=tmp_path / "cache")
        assert (alone.splits["eval"].num_rows, alone.num_overlap) == (5, 1)

    def test_chats_are_compared_without_their_system_message(self, tmp_path: Path) -> None:
        def chat(system: str, asked: str, answered: str) -> dict[str, Any]:
            turns = (("system", system), ("user", asked), ("assistant", answered))
            return {"messages": [{"role": role, "content": content} for role, content in turns]}

        asked, answered = text(30), text(30)
        report = look(tmp_path, [chat("You are A.", asked, answered)], [chat("You are B.", asked, answered)])
        assert report.num_shared["row"] == 1


class TestFinds:
    SECRETS = {  # noqa: RUF012  # assembled, so that no scanner takes this file for a leak
        "AWS access key": "AKIA" + "IOSFODNN7ABCDEFG",
        "GitHub token": "ghp_" + "aB3" * 12,
        "Hugging Face token": "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH",
        "API key (sk-…)": "sk-" + "proj-abcdEFGH12345678_abcd",
        "Google API key": "AIza" + "SyA-1234567890abcdefghijklmnopqrstu",
        "Slack token": "xoxb-" + "123456789012-abcdefABCDEF",
        "JSON web token": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
        "private key": "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEpAIBAAKCAQEA7",
        "e-mail address": "jane.doe+x@mail.corp-site.co.uk",
        "IBAN": "DE89 3704 0044 0532 0130 00",
        "card number": "4111-1111-1111-1111".replace("1111-1111-1111", "5263-7785-9214"),
        "phone number": "+49 30 1234567",
    }

    @pytest.fixture(autouse=True)
    def _a_valid_card(self) -> None:
        digits = [int(char) for char in "411152637785921"]
        total = sum(d if at % 2 else sum(divmod(2 * d, 10)) for at, d in enumerate(reversed(digits)))
        self.SECRETS["card number"] = "4111 5263 7785 921" + str(-total % 10)

    def test_every_kind_is_found_masked_and_nowhere_repeated(self, tmp_path: Path) -> None:
        rows = [pair(completion=f"please note {secret} and go on") for secret in self.SECRETS.values()]
        rows += [pair() for _ in range(100)]
        report = look(tmp_path, rows)
        assert {one.row: one.kind for one in report.found} == {
            f"train.jsonl row {at}": kind for at, kind in enumerate(self.SECRETS, 1)
        }
        assert report.num_found == dict.fromkeys(self.SECRETS, 1)
        page = card(report, name="x", sources=[("train", "train.jsonl")])
        told = "\n".join([json.dumps(report.to_json()), page, *summary(report)])
        assert "AKIA… (20 characters)" in told
        kept = [path.read_text() for path in (tmp_path / "cache").rglob("*.json")]
        for secret in self.SECRETS.values():
            for written in (told, *kept):
                assert secret not in written
                assert secret[-8:] not in written
        assert "revoke them" in report.notes[0]

    @pytest.mark.parametrize(
        "text",
        [
            "write to jane@example.com or bob@mail.example.org",
            "total 4111 1111 1111 1112",  # check digit
            "pi is 3.14159265358979323846",
            "DE89 3704 0044 0532 0130 01",  # check digit
            "call 555-0123 or (212) 555-0199",
            "order 1234567890123456789012",
            "ticket AKIA123 and sk-short and hf_model and eyJhbGci",
            "10000000000000 and 5000000000000000",
            "2024-01-15 10:30:00, version 10.0.19045.3803, 192.168.100.100",
            "1,234,567,890,123,456",
            "def f(x): return x@y",
        ],
    )
    def test_what_is_none_is_left_alone(self, tmp_path: Path, text: str) -> None:
        assert look(tmp_path, [pair(completion=text)]).num_found == {}

    def test_a_secret_in_a_system_message_is_found(self, tmp_path: Path) -> None:
        key = self.SECRETS["AWS access key"]
        turns = (("system", f"Use {key}."), ("user", "Hi"), ("assistant", "Hello"))
        report = look(tmp_path, [{"messages": [{"role": role, "content": said} for role, said in turns]}])
        assert report.num_found == {"AWS access key": 1}


class TestBalance:
    def test_few_rows_and_why(self, tmp_path: Path) -> None:
        report = look(tmp_path, [pair() for _ in range(99)], [pair() for _ in range(50)])
        assert "99 training rows: below 100" in report.notes[0]
        assert "50 evaluation rows: a share of one half is known to ± 13 points" in report.notes[1]
        assert look(tmp_path, [pair() for _ in range(100)], [pair() for _ in range(100)]).notes == ()

    def test_labels_are_counted_and_a_lopsided_one_is_told(self, tmp_path: Path) -> None:
        labels = ["ok"] * 170 + ["broken"] * 27 + ["odd"] * 3
        report = look(tmp_path, [pair(completion=label) for label in labels])
        assert report.splits["train"].labels == {"ok": 170, "broken": 27, "odd": 3}
        said = "\n".join(report.notes)
        assert "85% of the training answers are 'ok'" in said
        assert "fewer than 10 training rows for 'odd'" in said
        assert "| broken | 27 | 13.5% |" in card(report, name="x", sources=[])

    def test_free_answers_are_no_labels(self, tmp_path: Path) -> None:
        assert look(tmp_path, [pair() for _ in range(200)]).splits["train"].labels == {}

    def test_lengths_are_percentiles_of_characters(self, tmp_path: Path) -> None:
        report = look(tmp_path, [pair("p", "x" * length) for length in range(1, 101)])
        assert report.splits["train"].answer_chars == {"p10": 10, "p50": 50, "p90": 90, "max": 100}


def test_rows_of_no_format_are_counted(tmp_path: Path) -> None:
    rows = [pair() for _ in range(3)]
    report = look(tmp_path, [*rows, {"prompt": 3, "completion": "x"}, []])
    assert (report.splits["train"].num_rows, report.splits["train"].num_unread) == (3, 2)


def test_max_rows_and_renamed_columns_are_the_recipes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": text(9), "a": text(9)}) + "\n" for _ in range(20)))
    source = {"path": str(path), "columns": {"q": "prompt", "a": "completion"}, "max_rows": 5}
    made = DataTable.model_validate_json(json.dumps({"train": [source]}))
    assert examine(made, cache_dir=tmp_path / "cache").splits["train"].num_rows == 5


def test_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = look(tmp_path, [pair() for _ in range(5)])
    monkeypatch.setattr("distft.data_quality.gather.gather", None)  # whoever works now fails
    again = examine(table(tmp_path, "train"), cache_dir=tmp_path / "cache")
    assert again == first
    monkeypatch.undo()
    assert look(tmp_path, [pair() for _ in range(6)]).splits["train"].num_rows == 6
    for note in (tmp_path / "cache" / "care").glob("*.json"):
        note.write_text("{torn")
    assert examine(table(tmp_path, "train"), cache_dir=tmp_path / "cache").splits["train"].num_rows == 6


def test_is_done_without_torch(tmp_path: Path) -> None:
    look(tmp_path, [pair()])
    code = (
        "import sys; from pathlib import Path; from distft.data_quality import examine; "
        "from distft.recipe import DataTable; "
        f't = DataTable.model_validate_json(\'{{"train": [{{"path": "{(tmp_path / "train.jsonl").as_posix()}"}}]}}\'); '
        f"print(examine(t, cache_dir=Path('{(tmp_path / 'other').as_posix()}')).splits['train'].num_rows, "
        "sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 []"


class TestMinHash:
    """Against the similarity itself, of sets of shingles as Python's sets see them."""

    @staticmethod
    def sets(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[at : at + WORDS]) for at in range(max(1, len(words) - WORDS + 1))}

    @settings(max_examples=30, deadline=None)
    @given(st.randoms(use_true_random=False), st.floats(0, 0.3))
    def test_estimates_the_similarity(self, draw: random.Random, changed: float) -> None:
        words = text(150, draw).split()
        other = [draw.choice(VOCABULARY) if draw.random() < changed else word for word in words]
        one, two = self.sets(words), self.sets(other)
        true = len(one & two) / len(one | two)
        minima = signatures([" ".join(words), " ".join(other)], np.zeros(0, np.uint64))
        assert similarity(minima[:1], minima[1:])[0] == pytest.approx(true, abs=0.2)  # 4.5 standard errors

    def test_has_no_bias(self) -> None:
        draw, errors = random.Random(0), []
        for _ in range(300):
            words = text(120, draw).split()
            other = [draw.choice(VOCABULARY) if draw.random() < 0.05 else word for word in words]
            one, two = self.sets(words), self.sets(other)
            minima = signatures([" ".join(words), " ".join(other)], np.zeros(0, np.uint64))
            errors.append(similarity(minima[:1], minima[1:])[0] - len(one & two) / len(one | two))
        assert abs(np.mean(errors)) < 0.01
        assert np.std(errors) < 0.05

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.lists(st.sampled_from(["ab", "c", "Dé", "猫"]), max_size=12), min_size=1, max_size=8))
    def test_shingles_are_equal_where_the_words_are(self, rows: list[list[str]]) -> None:
        made = shingle([" ,".join(row) for row in rows])
        ends = np.cumsum(made.counts_N)
        seen: dict[int, tuple[str, ...]] = {}
        for row, count, end in zip(rows, made.counts_N, ends, strict=True):
            words = [word.lower() for word in row]
            expected = [tuple(words[at : at + WORDS]) for at in range(max(1, len(words) - WORDS + 1))] if words else []
            assert count == len(expected)
            for hashed, words_of in zip(made.hashes_S[end - count : end].tolist(), expected, strict=True):
                assert seen.setdefault(hashed, words_of) == words_of
        assert len(set(seen.values())) == len(seen)

    def test_scripts_without_spaces_have_words(self) -> None:
        one = "今日はとても天気がいいので散歩に行きましょうと彼は言いました"
        minima = signatures(
            [one, one[:-2] + "った", "全く別の文章がここに書かれているだけです"], np.zeros(0, np.uint64)
        )
        assert similarity(minima[:1], minima[1:2])[0] > 0.6
        assert similarity(minima[:1], minima[2:])[0] < 0.1

    def test_texts_without_words_are_like_nothing(self) -> None:
        minima = signatures(["", "…!?", "", text(9)], np.zeros(0, np.uint64))
        assert len(similar.near_repeats(minima).row_P) == 0

    def test_finds_nearly_all_pairs_that_are_near(self) -> None:
        draw, rows = random.Random(1), []
        for _ in range(200):
            words = text(150, draw).split()
            other = list(words)
            for at in draw.sample(range(150), 2):  # two words changed: at least 132 of 156 shingles shared, 0.85
                other[at] = draw.choice(VOCABULARY)
            rows += [" ".join(words), " ".join(other)]
        found = similar.near_repeats(signatures(rows, np.zeros(0, np.uint64)))
        assert len(found.row_P) >= 180  # an estimate below 0.8 leaves some out
        assert (found.like_P == found.row_P - 1).all()

    def test_boilerplate_is_what_a_fifth_of_the_rows_share(self) -> None:
        told = text(20)
        rows = [f"{told if at % 3 == 0 else ''} {text(20)}" for at in range(90)]
        assert len(boilerplate(rows)) == 16
        assert len(boilerplate(rows[:40])) == 0


def _ask(folder: str, answers: Any) -> None:
    report = examine(table(Path(folder), "train"), cache_dir=Path(folder) / "cache")
    answers.put(report.splits["train"].num_rows)


def test_processes_that_ask_together_work_once(tmp_path: Path) -> None:
    rows = [pair() for _ in range(300)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    asking = [context.Process(target=_ask, args=(str(tmp_path), answers)) for _ in range(3)]
    for process in asking:
        process.start()
    assert [answers.get(timeout=60) for _ in asking] == [300, 300, 300]
    for process in asking:
        process.join(60)
    assert len(list((tmp_path / "cache" / "care").glob("*.json"))) == 1
    assert not list((tmp_path / "cache" / "care").glob("*.tmp"))
