"""Rewards of an exported model against those of its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distft.export_formats.spec import Comparison, FormatInputs

if TYPE_CHECKING:
    from distft.export_formats.reference import SourceReference

REWARD_BOUND = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Largest difference, by the type that weights are stored in."""
MAX_ROWS = 64
MAX_TOKENS = 512
"""Of a row; longer ones lose their end, on both sides."""


def compare_rewards(inputs: FormatInputs, model: Any, prompts: Sequence[Sequence[int]], bound: float) -> Comparison:
    """Compare rewards of the run's held-out rows, as training read them, or of prompts where there is no run.

    Args:
        inputs: the source.
        model: what was exported, loaded.
        prompts: token ids; each gets the end of an answer behind it.
        bound: largest difference of a reward.

    Raises:
        DataError: the run's rows cannot be read.
    """
    from distft.export_formats import reference as models

    reference = inputs.reference()
    rows, origin = _held_out(reference), "the run's held-out rows"
    if not rows:
        rows, origin = [[*ids, reference.stop_ids[0]] for ids in prompts], "prompts"
    wanted = [models.reward(reference.model, ids) for ids in rows]
    gaps = [abs(want - models.reward(model, ids)) for want, ids in zip(wanted, rows, strict=True)]
    worst = max(gaps)
    return Comparison(
        name="rewards", compared=f"largest difference of a reward of {origin}", count=len(gaps), value=worst,
        bound=f"at most {bound:g}", ok=all(gap <= bound for gap in gaps),  # false where one is no number
        detail=f"the source's are {min(wanted):.4g} to {max(wanted):.4g}",
    )  # fmt: skip


def _held_out(reference: SourceReference) -> list[list[int]]:
    """Return the run's held-out rows; none where there is no run, or the run has none."""
    source = reference.source
    if source.run is None:
        return []
    from distft import assemble
    from distft.adapter_sources import documents
    from distft.catalog import REGISTRIES
    from distft.data.prepare import prepare
    from distft.data.prepared_folder import cache_folder
    from distft.recipe import load_recipe

    recipe = assemble.with_date(load_recipe(source.run / "recipe.toml", registries=REGISTRIES), source.run)
    if not recipe.data.eval:
        return []
    table = recipe.data.model_copy(update={"eval": ()})
    limited = tuple(
        each.model_copy(update={"max_rows": min(each.max_rows or MAX_ROWS, MAX_ROWS)}) for each in recipe.data.eval
    )
    prepared = prepare(table, limited, split="eval", tokenizer=str(source.folder), cache_dir=cache_folder(table))
    return [ids[:MAX_TOKENS] for ids in documents(prepared)[:MAX_ROWS] if ids]
