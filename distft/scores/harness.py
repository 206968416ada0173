"""Tasks of lm-eval, run by the library itself on a model of ours: its prompts, its filters, its figures.

A task is more than a score: it brings rows, few-shot prompts and requests. So the library is given a model, and what
it says of the rows comes back as `Scored`, to be compared and shown like every other score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from distft.core.errors import MachineError, Problem, RecipeError
from distft.core.registry import nearest
from distft.scores.spec import Figure, Scored

_TWO_VALUES = {0.0, 1.0}


class Answerer(Protocol):
    """A model that can be asked. Collective where the model is sharded: every rank runs the same tasks, brings the
    same requests in the same order, and gets the same answers."""  # noqa: D205, D209

    def weigh(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood in nats, summed over tokens, and whether greedy
        decoding would give it. The two are tokenised together; an empty context starts with the start-of-text
        token."""  # noqa: D205, D209
        ...

    def weigh_whole(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each text from its first token on, in windows where it is longer than the model reads."""
        ...

    def write(
        self, prompts: Sequence[str], *, stop: tuple[str, ...], max_new_tokens: int, temperature: float
    ) -> list[str]:
        """What the model writes after each prompt, up to the first of `stop` (left out) or its end of text."""
        ...


MAX_NEW_TOKENS = 256
"""Where a task does not say."""


def run_tasks(
    model: Answerer,
    tasks: Sequence[str | dict[str, Any]],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Scored]:
    """Task -> what the library says of its rows; groups and tags are run as their tasks.

    Args:
        model: see `Answerer`.
        tasks: names the library knows, or task configurations as its YAML files hold them.
        num_fewshot: rows shown in the prompt; None: as the task says.
        limit: rows of each task; None: all.
        seed: of the few-shot rows.

    Raises:
        MachineError: lm-eval is not installed.
        RecipeError: a task that it does not know.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MachineError(f'lm-eval tasks need lm-eval: pip install "distft[lm-eval]" ({error})') from None
    manager: Any = TaskManager()
    known = list(manager.all_tasks)
    unknown = [task for task in tasks if isinstance(task, str) and task not in known]
    if unknown:
        raise RecipeError("lm-eval", [_unknown(task, known) for task in unknown])
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    found: Any = lm_eval.simple_evaluate(
        model=_wrapped(model),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,  # intervals are ours
        log_samples=True,
        **seeds,
    )
    better = found["higher_is_better"]
    return {
        name: _scored(found["results"][name], rows, better.get(name, {})) for name, rows in found["samples"].items()
    }


def _unknown(task: str, known: list[str]) -> Problem:
    meant = nearest(task, known)
    return Problem(message=f'task "{task}"  is not one of lm-eval\'s', fix=f'did you mean "{meant}"?' if meant else "")


def _wrapped(model: Answerer) -> Any:
    """`model` as the library's abstract class, which can be named only once the library is there."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class Model(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return model.weigh([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return model.weigh_whole([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Requests of equal settings together; answers in the order of requests."""
            groups: dict[tuple[Any, ...], list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(_settings(request.args[1]), []).append(index)
            answers = [""] * len(requests)
            for (stop, max_new_tokens, temperature), rows in groups.items():
                prompts = [requests[row].args[0] for row in rows]
                written = model.write(prompts, stop=stop, max_new_tokens=max_new_tokens, temperature=temperature)
                for row, text in zip(rows, written, strict=True):
                    answers[row] = text
            return answers

    return Model()


def _settings(asked: Mapping[str, Any]) -> tuple[tuple[str, ...], int, float]:
    until = asked.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    most = asked.get("max_gen_toks") or asked.get("max_new_tokens") or MAX_NEW_TOKENS
    sampled = asked.get("do_sample") is not False
    return stop, int(most), float(asked.get("temperature") or 0.0) if sampled else 0.0


def _scored(result: Mapping[str, Any], samples: list[Mapping[str, Any]], better: Mapping[str, bool]) -> Scored:
    """Figures are called `acc`, or `exact_match,strict-match` where a task's filter has a name."""
    figures: list[Figure] = []
    rows: dict[str, tuple[float, ...]] = {}
    totals: dict[str, float] = {}
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if filter_name == "none" else key
        own = sorted((one for one in samples if one["filter"] == filter_name), key=lambda one: one["doc_id"])
        values = [float(one[metric]) for one in own if isinstance(one.get(metric), int | float)]
        per_row = len(values) == len(own)  # else: counts that only the total makes sense of
        binary = per_row and set(values) <= _TWO_VALUES
        totals[name] = float(value)
        if per_row:
            rows[name] = tuple(values)
        figures.append(Figure(name=name, higher_is_better=better.get(metric, True), binary=binary, per_row=per_row))
    return Scored(figures=tuple(figures), rows=rows, totals={name: _known(value) for name, value in totals.items()})


def _known(value: float) -> float:
    return value if math.isfinite(value) else math.nan
