"""Every key of a recipe says whether it may change between the starts of a run, and says what it always said."""

from typing import get_type_hints

import pytest

from distft.recipe.resume_policy import ResumePolicy
from distft.recipe.schema import Recipe, RunKeys, chosen_tables, fixed_tables
from distft.resume import resume_policy

FREE = (
    *("name", "output_dir", "log.", "eval.", "checkpoint.", "guard.", "engine.", "export."),
    *("train.micro_batch_size", "train.activation_checkpointing", "train.compile", "train.rehearse"),
    *("train.deterministic", "train.load_best", "train.optimizer_in_backward"),
    *("model.path", "model.revision", "model.tokenizer", "model.attention", "model.cross_entropy"),
    *("data.cache_dir", "data.num_workers", "data.train", "data.eval", "data.overlap"),
    *("data.special_tokens_in_content", "data.merge_turns", "data.date"),
    "rollout.generator",
)
ASK = (
    *("optim.learning_rate", "optim.weight_decay", "schedule."),
    *("train.max_grad_norm", "train.epochs", "train.max_steps"),
)
"""Prefixes of keys, as `distft.resume` listed them before the keys said it themselves."""
PART_KEYS = (
    *("method.name", "method.r", "method.quant.type", "objective.name", "objective.beta"),
    *("optim.name", "optim.learning_rate", "optim.weight_decay", "optim.betas", "optim.eps"),
    *("schedule.name", "schedule.warmup_ratio", "engine.name", "engine.offload", "engine.shard_within"),
)


def keys() -> list[str]:
    own = [f"{table}.{key}" for table, kind in fixed_tables().items() for key in kind.model_fields]
    return [*RunKeys.model_fields, *own, *PART_KEYS]


@pytest.mark.parametrize("key", keys())
def test_a_key_says_what_the_list_of_prefixes_said(key: str) -> None:
    expected = "free" if key.startswith(FREE) else "ask" if key.startswith(ASK) else "fixed"
    assert resume_policy(key) == expected


def test_every_key_has_a_mark_of_its_own_or_its_tables() -> None:
    hints = get_type_hints(Recipe, include_extras=True)

    def marked(metadata: object) -> bool:
        return any(isinstance(item, ResumePolicy) for item in metadata)  # type: ignore[attr-defined]

    tables = {name for name, hint in hints.items() if marked(getattr(hint, "__metadata__", ()))}
    assert set(chosen_tables()) <= tables
    of_tables = [(name, kind) for name, kind in fixed_tables().items() if name not in tables]
    unmarked = [
        f"{name}.{key}"
        for name, kind in [("", RunKeys), *of_tables]
        for key, field in kind.model_fields.items()
        if not marked(field.metadata)
    ]
    assert unmarked == []


def test_what_nobody_knows_is_fixed() -> None:
    """A key that this version no longer has, or a table of a newer one, may have changed what was computed."""
    assert [resume_policy(key) for key in ("model.nothing", "nothing", "nothing.at_all")] == ["fixed"] * 3


def test_a_table_that_comes_or_goes_is_judged_by_its_strictest_key() -> None:
    """[eval] is not written out where a recipe has no rows for it; to add some changes no weight."""
    found = {table: resume_policy(table) for table in ("eval", "export", "log", "train", "data", "schedule", "optim")}
    assert found == {
        **dict.fromkeys(("eval", "export", "log"), "free"),
        **{"train": "fixed", "data": "fixed", "schedule": "ask", "optim": "fixed"},
    }


def test_what_lies_within_a_key_is_judged_with_it() -> None:
    assert resume_policy("guard.loss_spike.factor") == "free"
    assert resume_policy("model.dtype.what") == "fixed"
