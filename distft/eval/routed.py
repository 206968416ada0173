"""A router under evaluation: each question is answered by the adapter that it chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from distft.core.errors import Preempted, Problem, RecipeError
from distft.core.stop import STOP
from distft.eval.subject import Subject, trained_rows


def evaluate_router(subject: Subject, world: int, say: Any) -> dict[str, Any]:
    """Ask the recipe's sets and return the figures; held-out loss is not measured: it belongs to one model.

    Raises:
        RecipeError: several processes, no set that writes, or a router that is not whole.
    """
    import torch

    from distft import assemble
    from distft.assemble.evaluation import base_key
    from distft.core.tokenizer_files import load_tokenizer
    from distft.core.types import TrainState
    from distft.evaluation.answer_records import AnswerRecords
    from distft.evaluator import EvalSchedule, Evaluator
    from distft.export_formats.source import stop_ids
    from distft.generation.local import LocalEngine
    from distft.routing.routed_generator import RoutedGenerator
    from distft.routing.router import RoutedPool
    from distft.run_folder import RunFolder

    assert subject.router is not None
    recipe = subject.eval_recipe
    if world > 1:
        raise _mistake("a router is evaluated by one process", "leave --nproc out")
    if not recipe.eval.answers:
        raise _mistake("a router answers questions, and the recipe asks none", "add [[eval.answers]]")
    noted = trained_rows(subject)
    if noted is not None:
        how = {"ask_as": "chat" if noted["chats"] else "text"}
        answers = tuple(table.model_copy(update=how if table.ask_as == "auto" else {}) for table in recipe.eval.answers)
        recipe = replace(recipe, eval=recipe.eval.model_copy(update={"answers": answers}))
    eval_sets = assemble.build_eval_sets(recipe, say)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    routed = RoutedPool(subject.router, dtype=getattr(torch, recipe.model.dtype), device=device)
    tokenizer: Any = load_tokenizer(subject.router)
    ends = tuple(noted["stop_ids"]) if noted is not None else stop_ids(subject.router, tokenizer)
    generator: Any = RoutedGenerator(routed, tokenizer, ends, stop=STOP.requested)
    engine: Any = LocalEngine(routed.pool.model)
    no_objective: Any = None  # there are no held-out rows that one would measure
    folder = RunFolder(subject.folder, writes=True)
    looks = Evaluator(
        engine=engine,
        objective=no_objective,
        held_out=(),
        held_out_sha256="",
        eval_sets=eval_sets,
        generator=generator,
        records=AnswerRecords(folder.path / "eval"),
        base=base_key(recipe),
        schedule=EvalSchedule(every_steps=None, at_end=True, num_steps=0),
        stop=STOP.requested,
        say=say,
        warn=say,
    )
    figures = looks.under(subject.label, TrainState(step=0))
    if figures is None:
        raise Preempted(f"stopped by {STOP.reason}; sets that were finished are kept")
    summary = folder.path / "eval" / "summary.json"
    return {
        "label": subject.label,
        "step": 0,
        "folder": str(folder.path / "eval" / subject.label),
        "figures": figures,
        "chosen": generator.chosen,
        "summary": json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
    }


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("distft eval", [Problem(message=message, fix=fix)])
