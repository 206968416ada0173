"""The verdict on a recipe's model: from the cache, or proven now; torch is imported only in order to prove."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from distft.core.errors import Problem, RecipeError
from distft.model.attention_shape import head_size
from distft.model.heads import HEADS
from distft.model.paths import ForwardPath
from distft.model.proof_verdict import ProofVerdict, cache_key, kept
from distft.recipe.schema import ModelTable


def verdict_on(
    table: ModelTable,
    folder: Path,
    *,
    max_length: int,
    device: str = "cpu",
    compiled: bool = False,
    head: str = "lm",
    waiting: Callable[[], None] = lambda: None,
) -> ProofVerdict:
    """Return the kept verdict on the model in `folder`, or reach one, which takes seconds and needs no weights.

    Args:
        table: of the recipe.
        folder: with its config.json.
        max_length: tokens in the run's longest document.
        device: "cpu", or the product name of this process's accelerator.
        compiled: try it with compiled blocks as well.
        head: name of what stands on the hidden states; another than "lm" is compared under the path of the model's own.
        waiting: called now and then while another process finds it out.

    Raises:
        RecipeError: transformers does not know the architecture.
        MachineError: a kernel that was asked for cannot run here.
        FileSystemError: the cache cannot be written.
    """

    def find() -> ProofVerdict:
        import torch

        from distft.core.log import quiet_libraries
        from distft.model import attention, load, proof

        quiet_libraries()
        attention.register()
        where, dtype = torch.device("cpu" if device == "cpu" else "cuda"), getattr(torch, table.dtype)
        config = load.read_config(folder)
        names = proof.attentions(table.attention, where, dtype, head_size=head_size(config))
        given = {"device": where, "dtype": dtype, "max_length": max_length, "compiled": compiled}
        verdict = proof.prove(config, load.untrained, attentions=names, **given)
        path = verdict.path
        if path is not None and (hold := HEADS[head].hold) is not None:
            gap = proof.difference_of(lambda: hold(config, path, where, max_length))
            return replace(verdict, path=None, reason=f"under a {head} head: {gap}") if gap else verdict
        return verdict

    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    key = cache_key(
        json.dumps(content, sort_keys=True),
        attentions=[table.attention],
        device=device,
        dtype=table.dtype,
        max_length=max_length,
        compiled=compiled,
        head=head,
    )
    return kept(key, find, waiting=waiting)


def path_of(verdict: ProofVerdict, *, source: str, line: int | None, attention: str) -> ForwardPath:
    """Return the path that a verdict allows.

    Args:
        verdict: see `verdict_on`.
        source: the recipe's name, for the message.
        line: of [model] path in it.
        attention: what the recipe asks for.

    Raises:
        RecipeError: none gives transformers' numbers; says what differs and by how much.
    """
    if verdict.path is not None:
        return verdict.path
    tried = "".join(f"\n    {attempt.path}: {attempt.difference}" for attempt in verdict.attempts)
    fix = "use another architecture, or a version of transformers in which it runs"
    if attention != "auto":
        fix = f'set [model] attention = "auto": "{attention}" alone was tried'
    problem = Problem(
        message=f"[model] {verdict.architecture} would not be trained on its own loss: {verdict.reason}{tried}",
        line=line,
        fix=fix,
    )
    raise RecipeError(source, [problem])
