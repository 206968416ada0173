"""The run page: what it says, that it is well formed and accessible, and that no row can do anything in it."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_kit import Made, Page, at, made

from distft.report.command import main
from distft.report.html import h, join

HOSTILE = '</pre><script>alert("x")</script><img src=x onerror=alert(1)>\x1b\u202e'


def page(folder: Made, *options: str) -> Page:
    """Made by the command itself."""
    assert main([str(folder.folder), "--no-data", *options]) == 0
    return Page((folder.folder / "report.html").read_text())


@pytest.fixture
def whole(tmp_path: Path) -> Page:
    return page(made(tmp_path).whole(), "--price", "2.5")


# -- what it says ----------------------------------------------------------------------------------------------------


def test_a_reader_with_ten_seconds(whole: Page) -> None:
    assert whole.texts("h1") == ["run"]
    assert "complete after 40 steps and 40,000 tokens." in whole.words
    assert "On valid, exact_match went from 50.0 % to 83.3 %: no clear change." in whole.words


def test_the_table_of_the_run(whole: Page) -> None:
    for told in (
        "sft on owner/base", "LoRA, 100 of 1,000 parameters trained", "ddp on 2 × NVIDIA H100 80GB HBM3", "40 of 40",
        "2.500 before, 1.650 after", "2.350 at first, 1.630 at the end", "20.5 GiB", "planned 22.0 GiB",
    ):  # fmt: skip
        assert told in whole.words, told


def test_scores_with_intervals_test_and_regressions(whole: Page) -> None:
    assert "50.0 % [18.8, 81.2]" in whole.words, "Wilson's interval of 3 in 6"
    assert "+33.3 points" in whole.words
    assert "3 gained, 1 lost, p = 0.625" in whole.words
    assert "valid, exact_match: 1 row, worst first." in whole.words
    assert "valid.jsonl row 2 right → wrong" in whole.words
    assert "before answer to valid.jsonl row 2" in whole.words
    assert "after answer to valid.jsonl row 2" in whole.words
    assert "question valid.jsonl row 1" not in whole.words, "that row is as right as before"


def test_memory_has_its_plan(whole: Page) -> None:
    told = [" ".join(str(one["aria-label"]).split()) for one in whole.all("div") if one.get("role") == "img"]
    assert any(label.startswith("Memory") and "planned peak 22.0 GiB" in label for label in told)
    assert {"Loss", "Learning rate", "Gradient norm", "Speed", "MFU", "Memory"} <= {
        label.partition(":")[0] for label in told
    }


def test_cost_is_hours_times_price(whole: Page) -> None:
    assert "GPU hours 0.0333" in whole.words
    assert "cost at 2.5 per GPU hour 0.08" in whole.words


def test_data_recipe_environment_and_the_way_back(whole: Page) -> None:
    for told in (
        "80 training rows: few", "email", "a…@b", "evaluation rows that are also trained on 1 (1 by row)",
        "learning_rate = 1e-4", "uncommitted.diff", "A Processor", "580.1", "model.disable_adapter()",
        "train.max_steps=40",
    ):  # fmt: skip
        assert told in whole.words, told


def test_restarts_and_faults(tmp_path: Path) -> None:
    events = [
        {"time": at(0), "event": "started", "engine": "ddp", "world": 2, "step": 0},
        {"time": at(30), "event": "left_out", "step": 12, "why": "loss nan is not finite", "samples": "row 7"},
        {"time": at(90), "event": "started", "engine": "ddp", "world": 2, "step": 10},
        {"time": at(100), "event": "warned", "step": 12, "why": "chosen answers fall"},
        {"time": at(120), "event": "rolled_back", "step": 10, "spike": 14},
        {"time": at(150), "event": "ended", "code": 5, "reason": "numeric: step 15"},
    ]
    told = page(made(tmp_path).recipe().metrics(15).events(events).ended(5, "numeric: step 15", 15, 150)).words
    for words in (
        "✕ failed", "Why: numeric: step 15", "2 starts", "1 restart, 1 after a start without a last word",
        "✕ step left out", "loss nan is not finite", "◀ rolled back", "because of step 14",
        "! warning chosen answers fall",
        "ended with a failure, code 5",
    ):  # fmt: skip
        assert words in told, words


# -- rows that judge answers -----------------------------------------------------------------------------------------


def pairs(right: int, of: int = 20, *, longer: int = 0, logprob: float = -1.0) -> list[dict[str, float]]:
    """Pairs of which some are right; chosen answers of 4 tokens and `longer`."""
    gaps = [1.0] * right + [-1.0] * (of - right)
    return [
        {"reward_chosen": gap, "reward_rejected": 0.0, "tokens_chosen": 4.0 + longer, "tokens_rejected": 4.0,
         "logprob_chosen": logprob * (4 + longer), "logprob_rejected": -9.0}
        for gap in gaps
    ]  # fmt: skip


def labelled(right: int, of: int = 20) -> list[dict[str, float]]:
    return [
        {"ahead": 1.0 if n < right else -1.0, "desirable": float(n % 2), "reward": 0.5, "logprob": -2.0, "tokens": 4.0}
        for n in range(of)
    ]


def names_of_charts(told: Page) -> set[str]:
    images = [one for one in told.all("div") if one.get("role") == "img"]
    return {str(one["aria-label"]).partition(":")[0] for one in images}


OWN_CHARTS = {"Reward of an answer", "Reward margin", "Reward accuracy", "Log-probability of an answer"}


def test_a_preference_run_says_what_it_did(tmp_path: Path) -> None:
    told = page(made(tmp_path).whole().judged(pairs(10), pairs(17, longer=2), answer_tokens=(60, 90)))
    assert "On held-out pairs, accuracy went from 50.0 % to 85.0 %." in told.words
    assert "Accuracy, held-out pairs 85.0 %before 50.0 %" in " ".join(told.texts("dl"))
    for said in (
        "Preferences", "all 20 50.0 % [29.9, 70.1] 85.0 % [64.0, 94.8]",
        "chosen answer as long 20 50.0 % [29.9, 70.1] –", "chosen answer longer 20 – 85.0 % [64.0, 94.8]",
        "reward margin (chosen less rejected) 0 [", "calibration error 0.231 0.119",
        "log-probability per token, chosen answers −1.000 −1.000", "log-probability per token, rejected answers",
        "valid 10.00 15.00 +50.0 %", "mean loss of dpo", "6.000 in chosen ones and 4.000 in rejected ones",
    ):  # fmt: skip
        assert said in told.words, said
    assert "Calibration: before error 0.231; after error 0.119" in [one.get("aria-label") for one in told.all("div")]
    assert names_of_charts(told) >= OWN_CHARTS
    assert "reward accuracy" in told.texts("th"), "and in the tables behind the curves"
    assert "perplexity" not in told.words, "a loss of pairs is no cross-entropy"
    assert "#preferences" in {one["href"] for one in told.all("a")}
    assert "Warning" not in told.words
    assert not told.unclosed


def test_a_run_on_its_own_answers_shows_them(tmp_path: Path) -> None:
    told = page(made(tmp_path).whole().rolled_out(hostile="<script>bad()</script>"))
    for said in (
        "Its own answers", "answers 20 20", "mean reward 0.450 0.975", "mean tokens 10.50 30.50", "ended 95.0 % 95.0 %",
        "no reward: took longer than 1 s 4 0", "21 to 25 5 0.600 80.0 %", "36 to 40 5 1.350 100.0 %",
        "The best of the last answers", "train.jsonl row 5, answer 4: reward 1.450, 40 tokens",
        "answer 20 19 <script>bad()</script>", "The worst of the first answers",
    ):  # fmt: skip
        assert said in told.words, said
    compared = "Log-probabilities, sampler against trainer"
    assert names_of_charts(told) >= {"Reward", "Shares of the answers", "Time of a step", compared}
    labels = [one.get("aria-label") or "" for one in told.all("div")]
    assert any(label.startswith(compared) and "largest 2" in label for label in labels)
    assert any(label.startswith("Reward: total from") and "exact_match from" in label for label in labels)
    assert "script" not in {tag for tag, _, _ in told.elements}
    assert not told.unclosed


def test_what_is_wrong_with_a_gain_is_said(tmp_path: Path) -> None:
    told = page(made(tmp_path).whole().judged(pairs(10, logprob=-1.0), pairs(17, logprob=-3.0)))
    assert "Warning: chosen answers have become unlikelier: -1.000 to -3.000 nats per token. What helps:" in told.words
    was = pairs(10, longer=1) + pairs(10, longer=-1)
    length = pairs(19, longer=1) + pairs(9, longer=-1)
    told = page(made(tmp_path, "length").whole().judged(was, length))
    assert "Warning: all of the gain in accuracy is length: +0.450 where" in told.words


def test_labelled_answers_and_reward_models(tmp_path: Path) -> None:
    told = page(made(tmp_path).whole().judged(labelled(10), labelled(15), objective="kto"))
    assert "On held-out labelled answers, accuracy went from 50.0 % to 75.0 %." in told.words
    assert "good answers 10" in told.words
    reward = [{key: value for key, value in row.items() if "logprob" not in key} for row in pairs(12)]
    run = made(tmp_path, "reward").recipe().metrics().judged(reward, reward, objective="reward")
    told = page(run)
    assert "what its held-out rows tell is below" in told.words
    assert "log-probability per token" not in told.words
    assert "Log-probability of an answer" not in names_of_charts(told), "its head gives none"


def test_before_training_ends_and_other_rows(tmp_path: Path) -> None:
    run = made(tmp_path).whole().judged(pairs(10), pairs(17))
    (run.folder / "eval/after/held_out.json").unlink()
    told = page(run)
    assert "all 20 50.0 % [29.9, 70.1] –" in told.words
    assert "accuracy went" not in told.words
    run.judged(pairs(10), pairs(17))
    run.write("eval/before/held_out.json", {"loss": 1.0, "rows_sha256": "other", "judged": {"kind": "pairs"}})
    assert "On held-out pairs, accuracy is 85.0 %." in page(run).words, "other rows are no base to hold against"


def test_a_supervised_run_has_none_of_it(whole: Page) -> None:
    assert "Preferences" not in whole.words
    assert "perplexity" in whole.words
    assert not OWN_CHARTS & names_of_charts(whole)
    assert "ccuracy" not in whole.words


# -- any part may be missing -----------------------------------------------------------------------------------------

PARTS = ("recipe.toml", "metrics.jsonl", "events.jsonl", "exit.json", "manifest.json", "eval/summary.json",
         "eval/before/valid.jsonl", "data-card.json", "plan.json")  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_without_a_part_the_page_says_so(tmp_path: Path, part: str) -> None:
    folder = made(tmp_path).whole()
    (folder.folder / part).unlink()
    told = page(folder)
    assert not told.unclosed
    expected = {
        "recipe.toml": "The run folder has no recipe.toml",
        "metrics.jsonl": "metrics.jsonl has no step yet",
        "events.jsonl": "events.jsonl names no start",
        "manifest.json": "no manifest.json",
        "eval/summary.json": "No answers were generated",
        "data-card.json": "No data card: it was not asked for",
        "plan.json": "the run folder has no plan.json",
    }
    assert expected.get(part, "") in told.words


def test_an_unfinished_run(tmp_path: Path) -> None:
    folder = made(tmp_path).recipe().metrics(7)
    folder.events([{"time": at(0), "event": "started", "engine": "ddp", "world": 2, "step": 0}])
    assert "after step 7 of 40" in page(folder).words


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 8
    assert "not a run folder" in capsys.readouterr().err
    assert main([str(made(tmp_path).whole().folder), "--no-data", "--out", "/proc/none/r.html"]) == 8
    assert "cannot be written" in capsys.readouterr().err


def test_rows_that_nobody_looked_at_are_looked_at(tmp_path: Path) -> None:
    folder = made(tmp_path).recipe(base="demo:tiny-llama").metrics().events().ended()
    for split, rows in (("train", 3), ("valid", 2)):
        lines = "".join(f'{{"prompt": "{n} + 1 =", "completion": " {n + 1}"}}\n' for n in range(rows))
        (tmp_path / f"{split}.jsonl").write_text(lines)
    text = (folder.folder / "recipe.toml").read_text()
    text = text.replace('"train.jsonl"', f'"{tmp_path}/train.jsonl"').replace(
        '"valid.jsonl"', f'"{tmp_path}/valid.jsonl"'
    )
    folder.write("recipe.toml", text.replace("[data]", f'[data]\ncache_dir = "{tmp_path}/cache"'))
    assert main([str(folder.folder)]) == 0
    told = Page((folder.folder / "report.html").read_text())
    assert "evaluation rows that are also trained on 2" in told.words
    assert "3 training rows: below 100" in told.words
    assert (folder.folder / "data-card.md").read_text().startswith("# Data card: run")


# -- nothing in it acts ----------------------------------------------------------------------------------------------


def test_a_row_with_a_script_is_text(tmp_path: Path) -> None:
    folder = made(tmp_path).whole().evaluated([1, 1], [0, 0], name="valid", hostile=HOSTILE)
    folder.care(f"a note {HOSTILE}")
    told = page(folder)
    assert "script" not in {tag for tag, _, _ in told.elements}
    assert not told.all("img")
    assert '<script>alert("x")</script><img src=x onerror=alert(1)>' in told.words, "it is shown, as text"
    assert not [name for _, attributes, _ in told.elements for name in attributes if name.startswith("on")]
    assert "\x1b" not in told.words
    assert "\u202e" not in told.words


def test_names_and_recipes_are_text_too(tmp_path: Path) -> None:
    folder = made(tmp_path).whole()
    text = (folder.folder / "recipe.toml").read_text().replace('name = "run"', "name = '<b>x</b>\" onload=\"y'")
    folder.write("recipe.toml", text)
    told = page(folder)
    assert told.texts("h1") == ['<b>x</b>" onload="y']
    assert not told.all("b")


def test_the_page_asks_for_nothing(whole: Page) -> None:
    links = [one.get("href") for one in whole.all("a")]
    assert links
    assert all(str(link).startswith("#") for link in links)
    assert [one.get("href") for one in whole.all("link")] == ["data:,"]
    policy = next(one["content"] for one in whole.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)
    assert not re.search(r"url\(|@import|https?:", " ".join(whole.texts("style")))


def test_escaping_of_the_builder() -> None:
    assert h("p", "<&>", title='"<') == '<p title="&quot;&lt;">&lt;&amp;&gt;</p>'
    assert join(["a", None, 3, [h("b", "x")]]) == "a3<b>x</b>"
    assert h("details", open=True) == "<details open></details>"
    assert h("p", hidden=False, title=None) == "<p></p>"


# -- everybody can read it -------------------------------------------------------------------------------------------


def test_it_is_well_formed(whole: Page) -> None:
    assert not whole.unclosed
    ids = [one["id"] for _, one, _ in whole.elements if "id" in one]
    assert len(ids) == len(set(ids))
    assert {str(one["href"])[1:] for one in whole.all("a")} <= set(ids)
    assert {one["aria-labelledby"] for one in whole.all("section")} <= set(ids)


def test_landmarks_and_headings(whole: Page) -> None:
    for tag in ("header", "nav", "main", "footer", "h1"):
        assert len(whole.all(tag)) == 1, tag
    assert whole.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _, _ in whole.elements if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    first = next((tag, one) for tag, one, _ in whole.elements if tag == "a")
    assert first[1] == {"href": "#main", "class": "skip"}


def test_tables_have_captions_and_scopes(whole: Page) -> None:
    tables = len(whole.all("table"))
    assert tables > 8
    assert len(whole.all("caption")) == tables
    assert all(one.get("scope") in ("col", "row") for one in whole.all("th"))
    assert all(whole.texts("th"))
    scrolled = [one for one in whole.all("div") if one.get("class") == "scroll"]
    assert all((one["tabindex"], one["role"]) == ("0", "region") and one["aria-label"] for one in scrolled)


def test_pictures_are_told_or_hidden(whole: Page) -> None:
    told = [one for one in whole.all("div") if one.get("role") == "img"]
    assert len(told) >= 7
    assert all(len(str(one["aria-label"])) > 15 for one in told)
    assert all(one.get("aria-hidden") == "true" for one in whole.all("svg"))


def test_lines_differ_by_more_than_colour() -> None:
    css = (Path(__file__).resolve().parents[3] / "distft/report/style.css").read_text()
    dashes = re.findall(r"\.d\d \{ stroke-dasharray: ([\d ]+);", css)
    assert len(set(dashes)) == 5, "and the first is solid"
    for mode in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", ":focus-visible"):
        assert mode in css


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_colours_have_contrast(ground: str) -> None:
    """WCAG 2: text 4.5, lines of charts 3."""
    css = (Path(__file__).resolve().parents[3] / "distft/report/style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    known = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", blocks[0 if ground == "light" else 1]))

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        dark, light = sorted((luminance(known[one]), luminance(known[other])))
        return (light + 0.05) / (dark + 0.05)

    for text in ("ink", "soft", "link", "good", "bad"):
        assert contrast(text, "paper") >= 4.5, text
    assert contrast("ink", "panel") >= 4.5
    assert contrast("ink", "warn-back") >= 4.5
    for line in ("s1", "s2", "s3", "s4", "s5", "s6"):
        assert contrast(line, "paper") >= 3, line


# -- light on its feet -----------------------------------------------------------------------------------------------


def test_neither_torch_nor_numpy_is_imported(tmp_path: Path) -> None:
    folder = made(tmp_path).whole().folder
    code = (
        "import sys; from distft.report.command import main; from distft.compare import main as compare; "
        f"main([{str(folder)!r}]); compare([{str(folder)!r}, '--out', {str(tmp_path / 'c.html')!r}]); "
        "print([name for name in ('torch', 'transformers', 'numpy', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    folder = made(tmp_path).recipe(steps=20_000).metrics(20_000, slope=1e-5).events().ended(step=20_000)
    page(folder)
    assert (folder.folder / "report.html").stat().st_size < 200_000


def test_scores_asked_during_training_are_a_curve(tmp_path: Path) -> None:
    """Shares together, others for themselves; before and after alone are no curve."""
    run = made(tmp_path).whole()
    figures = {"valid.exact_match": (0.1, 0.4, 0.7), "text.bits_per_byte": (2.0, 1.5, 1.1)}
    records = json.loads("[" + ",".join((run.folder / "metrics.jsonl").read_text().splitlines()) + "]")
    looked = [one for one in records if "loss" not in one][:3]
    summary = json.loads((run.folder / "eval/summary.json").read_text())
    first = summary["sets"][0]
    summary["sets"] = [
        first | {"name": name.split(".")[0], "score": name.split(".")[1], "figure": name.split(".")[1]}
        for name in figures
    ]
    run.write("eval/summary.json", summary)
    for number, record in enumerate(looked):
        record |= {name: values[number] for name, values in figures.items()}
    run.lines("metrics.jsonl", records)
    labels = [one.get("aria-label") or "" for one in page(run).all("div")]
    assert "Scores: valid.exact_match from 0.100 to 0.700" in labels
    assert "text.bits_per_byte: text.bits_per_byte from 2.000 to 1.100" in labels
    for record in looked[1:2]:
        del record["valid.exact_match"]
    run.lines("metrics.jsonl", records)
    assert not any((one.get("aria-label") or "").startswith("Scores:") for one in page(run).all("div"))
