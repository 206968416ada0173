"""A checkpoint against the run that wants to continue it: refused, asked about, or none of its business."""

from collections.abc import Callable
from pathlib import Path

import pytest

from distft import load_recipe
from distft.catalog import REGISTRIES
from distft.core.errors import CheckpointError, DataError
from distft.resume import about, check_fits

WHERE = Path("runs/run/checkpoints/step-00000004")
ROWS = {"train": "ab" * 32}
Says = Callable[..., dict]


@pytest.fixture
def says(tmp_path: Path) -> Says:
    """What a checkpoint of a small recipe, with these keys set, says of its run."""
    path = tmp_path / "run.toml"
    sources = "".join(f'[[data.train]]\npath = "{name}.jsonl"\n' for name in ("train", "more"))
    path.write_text(f'name = "run"\n[model]\npath = "base"\n{sources}')

    def of(*overrides: str, rows: dict[str, str] = ROWS, base: str = "") -> dict:
        recipe = load_recipe(path, overrides=overrides)
        return about(recipe, rows, base, 10)

    return of


def fits(saved: dict, now: dict, *, allow_changes: bool = False) -> list[str]:
    return check_fits(saved, now, WHERE, registries=REGISTRIES, allow_changes=allow_changes)


@pytest.mark.row(18)
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("seed=7", "seed: 42 -> 7"),
        ("data.max_length=512", "data.max_length: 2048 -> 512"),
        ("train.global_batch_size=32", "train.global_batch_size: 64 -> 32"),
        ("optim.betas=[0.9, 0.95]", "optim.betas: "),
        ("data.train.1.weight=2.0", r"weight and share of [[data.train]]: "),
    ],
)
def test_what_would_break_the_run_is_refused_even_when_asked_for(says: Says, change: str, line: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        fits(says(), says(change), allow_changes=True)
    assert "the recipe has changed in a way that this checkpoint cannot continue" in str(refused.value)
    assert f"\n  {line}" in str(refused.value)
    assert "--resume never" in str(refused.value)
    assert refused.value.exit_code == 4


@pytest.mark.row(18)
def test_what_may_change_needs_a_flag_and_is_then_told(says: Says) -> None:
    changed = says("optim.learning_rate=1e-5", "train.max_grad_norm=0.5", "schedule.warmup_steps=3")
    with pytest.raises(CheckpointError, match="if that is meant, say --allow-changes") as asked:
        fits(says(), changed, allow_changes=False)
    for key in ("optim.learning_rate", "train.max_grad_norm", "schedule.warmup_steps"):
        assert f"\n  {key}: " in str(asked.value)
    told = fits(says(), changed, allow_changes=True)
    assert [line.partition(":")[0] for line in told if "learning_rate" in line] == ["optim.learning_rate"]


@pytest.mark.row(18)
def test_what_changes_no_number_is_let_through(says: Says) -> None:
    changed = says('engine.name="zero3"', "train.micro_batch_size=2", "log.every_steps=5", "checkpoint.keep=5")
    told = fits(says(), changed, allow_changes=False)
    assert {line.partition(":")[0] for line in told} >= {"engine.name", "train.micro_batch_size", "log.every_steps"}
    assert fits(says(), says(), allow_changes=False) == []


@pytest.mark.row(19)
def test_other_rows_are_a_fault_of_the_data(says: Says) -> None:
    with pytest.raises(
        DataError, match=r"was trained on other rows \(sha256 abababababab…, now cdcdcdcdcdcd…\)"
    ) as said:
        fits(says(), says(rows={"train": "cd" * 32}), allow_changes=True)
    assert said.value.exit_code == 3


def test_an_adapter_belongs_to_its_base(says: Says) -> None:
    with pytest.raises(CheckpointError, match="belongs to other base weights"):
        fits(says(base="one"), says(base="another"), allow_changes=True)


def test_a_checkpoint_from_before_a_key_is_continued(says: Says) -> None:
    """It means the key's default: a key that decides about numbers is refused with another value alone."""
    old, now = says(), says("data.date='2026-01-31'", "data.merge_turns=true")
    for key in ("special_tokens_in_content", "merge_turns", "packing"):
        del old["recipe"]["data"][key]
    del old["recipe"]["data"]["train"][0]["weight"]
    told = fits(old, now, allow_changes=False)
    assert [line.partition(":")[0] for line in told] == ["data.date", "data.merge_turns"]
    now["recipe"]["data"]["packing"] = False
    with pytest.raises(CheckpointError, match=r"data\.packing: True -> False"):
        fits(old, now, allow_changes=True)


def test_one_from_before_a_key_was_removed_is_continued_where_it_says_what_happens_now(says: Says) -> None:
    old, now = says(), says()
    old["recipe"]["data"]["prefix_sharing"] = False
    assert fits(old, now) == []
    old["recipe"]["data"]["prefix_sharing"] = True
    with pytest.raises(CheckpointError, match=r"(?s)does not read.*prefix_sharing = true.*is gone, and means false"):
        fits(old, now, allow_changes=True)


def test_so_is_one_from_before_a_key_of_its_method(says: Says) -> None:
    lora = 'method={name="lora", r=8}'
    old, now = says(lora), says(lora)
    for key in ("trainable_tokens", "rank_pattern", "rslora", "init"):
        del old["recipe"]["method"][key]
    assert fits(old, now) == []
    with pytest.raises(CheckpointError, match=r"method\.rslora: False -> True"):
        fits(old, says('method={name="lora", r=8, rslora=true}'), allow_changes=True)
