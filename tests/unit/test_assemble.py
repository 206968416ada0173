"""Putting a run together: what is said while rows are prepared, and that a wish to stop is heard there."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from distft import assemble
from distft.assemble import batch_layout
from distft.assemble.evaluation import warn
from distft.assemble.training_data import agree
from distft.catalog import REGISTRIES
from distft.core.errors import DataError, MachineError, Preempted
from distft.core.phase import PHASE
from distft.core.stop import STOP
from distft.model.paths import ForwardPath
from distft.recipe import load_recipe
from distft.run_folder import RunFolder


def prepared(tmp_path: Path, said: list[str], *overrides: str) -> assemble.Data:
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n' * 40)
    (tmp_path / "recipe.toml").write_text(
        'name = "r"\n[model]\npath = "demo:tiny-llama"\ninit = "random"\n'
        '[data]\nloss_on = "completion"\npacking = false\n'
        f'cache_dir = "{tmp_path}/cache"\n[[data.train]]\npath = "{rows}"\n[train]\nglobal_batch_size = 2\n'
    )
    recipe = load_recipe(tmp_path / "recipe.toml", registries=REGISTRIES, overrides=overrides)
    return assemble.load_data(recipe, assemble.choose_layout(recipe, 1), 0, 1, said.append)


def test_preparing_says_that_it_has_begun(tmp_path: Path) -> None:
    said: list[str] = []
    prepared(tmp_path, said)
    assert said[0] == "preparing rows: 40"


def test_a_preempted_process_does_not_prepare_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PHASE.begin()
    monkeypatch.setattr(STOP, "reason", "SIGUSR1")
    with pytest.raises(Preempted, match=r"stopped by SIGUSR1 before training began \(rows\)"):
        prepared(tmp_path, [])
    monkeypatch.setattr(STOP, "reason", "")
    assert prepared(tmp_path, []).steps.num_steps > 0, "and leaves nothing behind that keeps the next start from it"


def test_a_run_ends_where_evaluation_rows_are_trained_on_and_the_recipe_minds(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n')
    shared = f'data.eval=[{{path="{tmp_path}/valid.jsonl"}}]'
    assert prepared(tmp_path, [], shared).eval_steps is not None
    with pytest.raises(DataError, match="1 of 1 evaluation rows are also trained on"):
        prepared(tmp_path, [], shared, "data.overlap=error")


def test_what_became_of_rows_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    rows = tmp_path / "bad.jsonl"
    rows.write_text(
        '{"prompt": "2 + 2 =", "completion": " 4", "id": 1}\n' * 4
        + '{"prompt": 3}\n{"prompt": "a", "completion": ""}\n'
    )
    prepared(tmp_path, said, f"data.train.0.path={rows}", "data.bad_rows=skip")
    assert f"[[data.train]] {rows}: dropped: 1 bad row, 1 empty; longest row 10 tokens" in said
    assert f'[[data.train]] {rows}: columns not read: "id" (4)' in said


def test_a_warning_is_said_and_kept_among_the_events(tmp_path: Path) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path, writes=True)
    folder.reach(7)
    warn("chosen answers fall", folder, said.append)
    warn("chosen answers fall", RunFolder(tmp_path, writes=False), said.append)  # another rank
    assert said == ["warning: chosen answers fall"] * 2
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert (event["event"], event["step"], event["why"]) == ("warned", 7, "chosen answers fall")


def test_a_run_that_goes_on_keeps_its_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The date that chat templates are given: the recipe's, else the run's, else today's."""
    from distft.data import fingerprint

    monkeypatch.setattr(fingerprint, "today", lambda: "2026-02-02")
    (tmp_path / "recipe.toml").write_text('name = "r"\n[model]\npath = "m"\n[[data.train]]\npath = "t.jsonl"\n')
    recipe = load_recipe(tmp_path / "recipe.toml", registries=REGISTRIES)
    run = tmp_path / "runs/r"
    checkpoint = run / "checkpoints/step-00000002"
    checkpoint.mkdir(parents=True)
    assert assemble.with_date(recipe, run).data.date == "2026-02-02"
    for noted, date in (
        ({"date": "2026-01-31", "started": "2026-02-01T10:00:00"}, "2026-01-31"),
        ({"started": "2026-02-01T10:00:00"}, "2026-02-01"),  # of a run from before the date was kept
        ({"date": "no day"}, "2026-02-02"),
        ([], "2026-02-02"),
    ):
        (run / "manifest.json").write_text(json.dumps(noted))
        assert assemble.with_date(recipe, run).data.date == date
        assert assemble.with_date(recipe, tmp_path / "other", checkpoint).data.date == date
        assert assemble.with_date(recipe, run, "never").data.date == "2026-02-02"
    (run / "manifest.json").write_text("{")
    assert assemble.with_date(recipe, run).data.date == "2026-02-02"
    (checkpoint / "state.json").write_text('{"date": "2026-01-30"}')  # a checkpoint knows it too
    for resume in ("auto", checkpoint):
        assert assemble.with_date(recipe, run, resume).data.date == "2026-01-30"
    own = load_recipe(tmp_path / "recipe.toml", registries=REGISTRIES, overrides=["data.date='2025-12-24'"])
    assert assemble.with_date(own, run).data.date == "2025-12-24"


def test_a_run_on_gpus_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `distft plan --json` has it; on a CPU there is none to keep."""
    from distft.assemble import batch_layout
    from distft.plan.machine import read_machine

    (tmp_path / "recipe.toml").write_text(
        'name = "r"\n[model]\npath = "demo:tiny-llama"\ninit = "random"\n'
        '[data]\nloss_on = "completion"\nmax_length = 64\n'
        '[[data.train]]\npath = "demo:incidents/train"\n[train]\nglobal_batch_size = 4\n'
    )
    recipe = load_recipe(tmp_path / "recipe.toml", registries=REGISTRIES)
    cut = assemble.Layout(micro_batch_size=1, micros_per_step=2)
    assert assemble.plan_of_run(recipe, 2, cut, 32) is None
    monkeypatch.setattr(batch_layout, "_accelerators", lambda world: read_machine("80", world, 1))
    plan = assemble.plan_of_run(recipe, 2, cut, 32)
    assert plan is not None
    assert (plan["method"], plan["world"], plan["fits"]) == ("full", 2, True)
    assert plan["per_rank"]["peak_bytes"] > 2**30, "the CUDA context alone is half of that"
    alone = replace(cut, path=ForwardPath(documents="single", attention="distft_single"))
    plan = assemble.plan_of_run(recipe, 2, alone, 32)
    assert plan is not None
    assert (plan["path"]["documents"], plan["tokens_per_forward"], plan["micros_per_step"]) == ("single", 32, 4)
    monkeypatch.setattr(batch_layout, "_accelerators", lambda world: read_machine("80", 3, 1))
    refused = assemble.plan_of_run(recipe, 3, cut, 32)
    assert refused is not None
    assert "global_batch_size" in refused["why"], "4 sequences do not split over 3; that is no reason not to run"


def test_ranks_with_other_rows_stop_all_ranks_and_are_named(tmp_path: Path) -> None:
    """Each node may have prepared its own: from a copy of the file that is a day older, say."""
    rows = prepared(tmp_path, [])
    ours, other = rows.fingerprint, {"train": "0" * 64}
    agree(rows, lambda mine: [("node1", ours), mine, ("node2", ours)])
    with pytest.raises(DataError, match=r"^the rows on node2, node3 are not those on node1: "):
        agree(rows, lambda mine: [("node1", ours), ("node3", other), ("node2", {}), ("node2", other)])


class Others:
    """The ranks of a run on several kinds of cards: what each of them has chosen, this one's last."""

    rank, world = 1, 2

    def __init__(self, *said: tuple[int, str, assemble.Layout]) -> None:
        self.said = said

    def gather(self, mine):
        return [*self.said, mine] if isinstance(mine[-1], assemble.Layout) else [mine, mine]


def test_ranks_on_cards_of_several_sizes_take_the_smallest_ones_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prepared(tmp_path, [], "train.global_batch_size=4")
    large = assemble.Layout(micro_batch_size=2, micros_per_step=1, checkpointing="off")
    small = assemble.Layout(micro_batch_size=1, micros_per_step=2, checkpointing="full")
    recipe = load_recipe(tmp_path / "recipe.toml", registries=REGISTRIES, overrides=["train.global_batch_size=4"])
    monkeypatch.setattr(batch_layout, "_device", lambda: (80, "NVIDIA A100-SXM4-80GB"))
    cut, anew = assemble.agree_on_all_ranks(
        recipe, large, rows, Others((40, "NVIDIA A100-SXM4-40GB", small)), lambda line: None
    )
    assert cut == small
    assert anew is not rows
    assert [len(micro.sample_ids) for micro in next(anew.steps.from_step(0))] == [1, 1]
    assert assemble.agree_on_all_ranks(recipe, large, rows, Others((80, "A100", large)), lambda line: None) == (
        large,
        rows,
    )


def test_ranks_that_compute_by_other_kernels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = assemble.Layout(micro_batch_size=1, micros_per_step=1)
    other = replace(mine, path=ForwardPath(attention="sdpa"))
    monkeypatch.setattr(batch_layout, "_device", lambda: (80, "NVIDIA A100"))
    with pytest.raises(MachineError, match=r"NVIDIA V100 computes this model by .*sdpa.*, NVIDIA A100 by another path"):
        assemble.agree_on_layout(mine, Others((32, "NVIDIA V100", other)).gather)


def test_files_of_the_hubs_cache_are_taken_at_their_name(tmp_path: Path) -> None:
    """Its large files are called by their sha256: 140 GB are not read again to learn it."""
    from distft.assemble import input_hashes
    from distft.demo.files import locate_path

    source, snapshot, blobs = Path(locate_path("demo:tiny-llama")), tmp_path / "snapshots/c0ffee", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).write_bytes((source / name).read_bytes())
    (blobs / ("5a" * 32)).write_bytes(b"not what its name says")
    (snapshot / "model.safetensors").symlink_to(blobs / ("5a" * 32))
    (tmp_path / "recipe.toml").write_text(
        f'name = "r"\n[model]\npath = "{snapshot}"\n[data]\nloss_on = "completion"\ncache_dir = "{tmp_path}/cache"\n'
        '[[data.train]]\npath = "demo:incidents/train"\n'
    )
    recipe = load_recipe(tmp_path / "recipe.toml", registries=REGISTRIES)
    found = input_hashes.weights(recipe)
    assert found["files"]["model.safetensors"] == "5a" * 32
    assert found["files"]["config.json"] == hashlib.sha256((snapshot / "config.json").read_bytes()).hexdigest()
    assert set(found["tokenizer"]) == {"tokenizer.json", "tokenizer_config.json"}
    assert len(input_hashes.rows(recipe)["train"][0]["files"]["train.jsonl"]) == 64


@pytest.mark.parametrize(
    ("documents", "packing", "micros", "tokens"),
    [("packed", True, 1, 2 * 64), ("packed", False, 1, 2 * 48), ("single", True, 2, 48), ("single", False, 2, 48)],
)
def test_the_rehearsal_is_of_a_forward_that_comes(
    tmp_path: Path, documents: Literal["packed", "single"], packing: bool, micros: int, tokens: int
) -> None:
    """Two sequences a step: one micro-batch of both, or at least two forwards of a document each."""
    (tmp_path / "recipe.toml").write_text(
        'name = "r"\n[model]\npath = "demo:tiny-llama"\n[data]\nmax_length = 64\n'
        f'packing = {str(packing).lower()}\n[[data.train]]\npath = "demo:incidents/train"\n'
        "[train]\nglobal_batch_size = 2\n"
    )
    recipe = load_recipe(tmp_path / "recipe.toml", registries=REGISTRIES)
    cut = assemble.Layout(micro_batch_size=2, micros_per_step=1, path=ForwardPath(documents=documents))
    worst = assemble.largest_micro_batch(recipe, cut, replace(prepared(tmp_path, []), longest=48))
    assert worst.micros >= micros
    assert worst.sequences * worst.longest == worst.batch().num_tokens == tokens
