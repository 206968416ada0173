"""Our figures are those of lm-eval, sacrebleu, rouge-score and SQuAD's script."""

from __future__ import annotations

import collections
import random
import re
import string
from types import SimpleNamespace

import pytest
from score_kit import answer, one, score, scorer

LINE = "the a cat sat on mat, Mat. dog; ran 3 42 1,080 $18 -7 #### .5 Über naïve 猫 The"


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(LINE.split(), k=draw.randint(0, 12))) for _ in range(count)]


PAIRS = [*zip(texts(60, 1), [text or "cat" for text in texts(60, 2)], strict=True)]
PAIRS += [(right, right) for _, right in PAIRS[:10]]


class TestSacrebleu:
    sacrebleu = pytest.importorskip("sacrebleu")

    def test_corpus_and_sentences(self) -> None:
        said, right = [one for one, _ in PAIRS], [one for _, one in PAIRS]
        bleu, chrf = score("bleu", PAIRS), score("chrf", PAIRS)
        assert bleu.totals["bleu"] == self.sacrebleu.corpus_bleu(said, [right]).score
        assert chrf.totals["chrf"] == self.sacrebleu.corpus_chrf(said, [right]).score
        assert score("chrf", PAIRS, word_order=2).totals["chrf"] == (
            self.sacrebleu.corpus_chrf(said, [right], word_order=2).score
        )
        assert list(bleu.rows["bleu_sentence"]) == [self.sacrebleu.sentence_bleu(s, [r]).score for s, r in PAIRS]
        assert list(chrf.rows["chrf_sentence"]) == [self.sacrebleu.sentence_chrf(s, [r]).score for s, r in PAIRS]

    def test_rows_with_more_or_fewer_references(self) -> None:
        answers = [
            answer("a cat sat on the mat", r=["the cat sat on the mat", "a cat sat there"]),
            answer("dogs ran", "", 2, r=["the dog ran"]),
        ]
        said = [one.text for one in answers]
        streams = [["the cat sat on the mat", "the dog ran"], ["a cat sat there", None]]
        found = scorer("bleu", reference="r")(answers).totals["bleu"]
        assert found == self.sacrebleu.corpus_bleu(said, streams).score


def test_rouge() -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    for stemmer in (False, True):
        library = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
        found = score("rouge", PAIRS, stemmer=stemmer)
        for kind in ("rouge1", "rouge2", "rougeL"):
            wanted = [library.score(target, said)[kind].fmeasure for said, target in PAIRS]
            assert list(found.rows[kind]) == wanted


def squad_tokens(text: str) -> list[str]:
    """`get_tokens` of evaluate-v2.0.py, step by step as it stands there."""
    kept = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", kept).split()


def squad_f1(right: str, said: str) -> float:
    """`compute_f1` of evaluate-v2.0.py."""
    gold, guess = squad_tokens(right), squad_tokens(said)
    same = sum((collections.Counter(gold) & collections.Counter(guess)).values())
    if len(gold) == 0 or len(guess) == 0:
        return int(gold == guess)
    if same == 0:
        return 0
    precision, recall = same / len(guess), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def test_squad() -> None:
    found = score("normalised_match", PAIRS)
    assert list(found.rows["normalised_match"]) == [squad_tokens(right) == squad_tokens(said) for said, right in PAIRS]
    assert list(found.rows["f1"]) == pytest.approx([squad_f1(right, said) for said, right in PAIRS], abs=1e-15)
    assert any(0 < value < 1 for value in found.rows["f1"])


class TestLmEval:
    """Needs the package lm-eval: its filters and metrics are called, no task is run."""

    extraction = pytest.importorskip("lm_eval.filters.extraction", reason="lm-eval is not installed")
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-eval is not installed")
    IGNORED = (",", "\\$", "(?s).*#### ", "\\.$")

    def test_gsm8k(self) -> None:
        """The two filters and the metric of lm_eval/tasks/gsm8k/gsm8k.yaml."""
        filters = {
            "strict_match": self.extraction.RegexFilter(regex_pattern="#### (\\-?[0-9\\.\\,]+)"),
            "flexible_extract": self.extraction.RegexFilter(
                regex_pattern="(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1
            ),
        }
        draw = random.Random(0)
        said = [*texts(300, 3), "", "$", "..", "#### ", "#### 1,080.", "so $18.", "#### -7 then 42", "#### $42", "x\n3"]
        answers = [f"Because {text}.\n#### {draw.choice(['42', '1,080', '-7', '18', '.5', '3'])}" for text in said]
        seen = set()
        for text, reference in zip(said, answers, strict=True):
            found = one("numeric", text, reference)
            for name, extract in filters.items():
                filtered = extract.apply([[text]], [{}])[0][0]
                wanted = self.metrics.exact_match_hf_evaluate(
                    predictions=[filtered], references=[reference], ignore_case=True, regexes_to_ignore=self.IGNORED
                )["exact_match"]
                assert found[name] == wanted, (name, text, reference)
                seen.add((name, found[name]))
        assert len(seen) == 4  # both figures were right and wrong somewhere

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"ignore_case": True},
            {"ignore_punctuation": True, "ignore_numbers": True},
            {"ignore_case": True, "regexes_to_ignore": [",", "the "]},
        ],
    )
    def test_exact_match(self, options: dict) -> None:
        shuffled = [(said, PAIRS[(at * 7) % 9][1]) for at, (said, _) in enumerate(PAIRS)]
        pairs = [*PAIRS, *shuffled, ("The cat", "the cat"), ("cat, 3", "cat "), ("cat 42", "cat "), ("the a", "a")]
        found = score("exact_match", pairs, strip=False, **options).rows["exact_match"]
        wanted = [
            self.metrics.exact_match_hf_evaluate(predictions=[said], references=[right], **options)["exact_match"]
            for said, right in pairs
        ]
        assert list(found) == wanted
        assert 0 < sum(found) < len(found)

    def test_multiple_choice(self) -> None:
        task_module = pytest.importorskip("lm_eval.api.task", reason="lm-eval's tasks need packages that are missing")

        class Task(task_module.ConfigurableTask):  # its scoring alone, on made-up results
            OUTPUT_TYPE = "multiple_choice"
            multiple_input = multiple_target = 0

            def __init__(self) -> None:
                self._config = SimpleNamespace(process_results=None)
                self._metric_fn_list = dict.fromkeys(("acc", "acc_norm", "acc_bytes"))

            def doc_to_choice(self, doc: dict, **_: object) -> list[str]:
                return doc["choices"]

            def doc_to_target(self, doc: dict, **_: object) -> int:
                return doc["label"]

        task, draw = Task(), random.Random(0)
        for _ in range(200):
            choices = [one or "x" for one in draw.sample(texts(40, 5), 4)]
            logprobs = tuple(-draw.choice([1.0, 2.0, len(text) * draw.random()]) for text in choices)
            doc = {"choices": choices, "label": draw.randrange(4)}
            wanted = task.process_results(doc, [(value, False) for value in logprobs])
            found = scorer("multiple_choice")([answer(logprobs=logprobs, **doc)]).totals
            assert found == {name: wanted[name] for name in ("acc", "acc_norm", "acc_bytes")}
