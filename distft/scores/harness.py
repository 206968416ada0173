"""Tasks of lm-eval, run by the library itself on a model of ours: its prompts, its filters, its figures.

A task is more than a score: it brings rows, few-shot prompts and requests. So the library is given a model, and what
it says of the rows comes back as `ScoreResult`, to be compared and shown like every other score.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distft.core import hub
from distft.core.errors import DataError, MachineError, Problem, RecipeError
from distft.core.registry import nearest
from distft.scores.spec import Answer, MetricInfo, ScoreResult, mean

MAX_NEW_TOKENS = 256
"""Tokens of an answer where a task sets no limit."""
_TWO_VALUES = {0.0, 1.0}

Chat = Callable[[list[dict[str, str]], bool], str]
"""(messages, whether the assistant's turn is opened) -> the text that the model reads."""


class TextGenerator(Protocol):
    """A model that can be asked. Collective where the model is sharded: every rank runs the same tasks, brings the
    same requests in the same order, and gets the same answers."""  # noqa: D205, D209

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood after its context, and whether greedy decoding would give it.

        In nats, summed over tokens. The two are tokenised together; an empty context starts with the start-of-text
        token.
        """
        ...

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of each text from its first token on, in windows where it is long."""
        ...

    def generate(
        self, prompts: Sequence[str], *, stop: tuple[str, ...], max_new_tokens: int, temperature: float
    ) -> list[str]:
        """Return what the model writes after each prompt, up to the first of `stop` (left out) or its end of text."""
        ...


class LmEvalTasks:
    """A task, or a group or tag of them whose rows are taken together: loaded, its rows read, its prompts written."""

    def __init__(
        self,
        name: str | dict[str, Any],
        *,
        limit: int | None = None,
        num_fewshot: int | None = None,
        seed: int = 0,
        chat: Chat | None = None,
    ) -> None:
        """Rows come from where the task says, mostly the hub.

        Args:
            name: one that the library knows, a YAML file as it reads them, or a task's content of such a file.
            limit: rows of each task, the first ones; None: all.
            num_fewshot: rows shown in the prompt; None: as the task says. A task that says 0 stays at 0.
            seed: of the draw of rows shown.
            chat: draws a prompt as a chat; None: raw text.

        Raises:
            MachineError: lm-eval is not installed.
            RecipeError: a task that it does not know, or that cannot be run on a text model.
            DataError: its rows cannot be had.
        """
        self.name = _name(name)
        self._limit, self._seed, self._chat = limit, seed, chat
        with _seeded(seed):
            self._loaded = _load(name, self.name)
            self._tasks: dict[str, Any] = self._loaded["tasks"]
            for task in self._tasks.values():
                if num_fewshot is not None and task.get_config("num_fewshot") != 0:
                    task.set_config(key="num_fewshot", value=num_fewshot)
                elif task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
            requests_by_task = [list(self._requests(task)) for task in self._tasks.values()]
        self.rows = sum(len({doc_id for doc_id, _ in requests}) for requests in requests_by_task)
        """Rows of all its tasks."""
        self.sha256 = hashlib.sha256(json.dumps(requests_by_task, default=str).encode()).hexdigest()
        """Hash of every request that is made of the model, prompts in full."""
        self.prompts = [args[0] for requests in requests_by_task for _, args in requests]
        """Prompts of every request."""
        self.planned = self._planned()
        """Figures it will give, as its configuration says."""

    def run(self, model: TextGenerator) -> tuple[list[Answer], ScoreResult]:
        """Return each row with its prompt, the right answer and the model's, and the library's scores of them."""
        library: Any = importlib.import_module("lm_eval")
        with _seeded(self._seed):
            for task in self._tasks.values():
                task.set_fewshot_seed(seed=self._seed)  # or a second run would show other rows
            output: Any = library.evaluate(
                lm=_wrapped(model, self._drawn),
                task_dict=self._loaded,
                limit=self._limit,
                bootstrap_iters=0,  # intervals are ours
                log_samples=True,
                apply_chat_template=self._chat is not None,
                fewshot_as_multiturn=self._chat is not None,
            )
        better: dict[str, bool] = {}
        parts: list[ScoreResult] = []
        answers: list[Answer] = []
        for leaf in self._tasks:
            better |= output["higher_is_better"].get(leaf, {})
            samples = output["samples"][leaf]
            parts.append(_scored(output["results"][leaf], samples, better))
            answers += _answers(leaf, samples)
        if len(parts) == 1:
            return answers, parts[0]
        group = next(iter(self._loaded["groups"]), "")  # the outermost; a tag is none
        return answers, _together(parts, output["results"].get(group, {}))

    def _requests(self, task: Any) -> Iterator[tuple[int, Any]]:
        task.set_fewshot_seed(seed=self._seed)
        try:
            task.build_all_requests(
                limit=self._limit,
                rank=0,
                world_size=1,
                apply_chat_template=self._chat is not None,
                fewshot_as_multiturn=self._chat is not None,
                chat_template=self._drawn,
                tokenizer_name="",
            )
        except ValueError as error:
            raise DataError(f"lm-eval task {self.name}: {error}") from None
        for instance in task.instances:
            yield instance.doc_id, instance.args

    def _drawn(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render the chat from the library's names."""
        assert self._chat is not None
        return self._chat(chat_history, add_generation_prompt)

    def _planned(self) -> tuple[MetricInfo, ...]:
        shared: dict[str, MetricInfo] | None = None
        for task in self._tasks.values():
            better = task.higher_is_better()
            task_figures = {
                name: MetricInfo(name=name, higher_is_better=better.get(metric, True))
                for metric in task.aggregation()
                for task_filter in task._filters
                for name in [_figure(metric, task_filter.name)]
            }
            shared = (
                task_figures
                if shared is None
                else {name: info for name, info in shared.items() if name in task_figures}
            )
        if not shared:
            names = ", ".join(list(self._tasks)[:5])
            problem = Problem(
                message=f'task "{self.name}"  is a group whose tasks have no figure in common',
                fix=f"ask them one by one: {names}, ...",
            )
            raise RecipeError("lm-eval", [problem])
        return tuple(shared.values())


def _name(spec: str | dict[str, Any]) -> str:
    if isinstance(spec, dict):
        return str(spec["task"])
    return Path(spec).stem if _is_file(spec) else spec


def _is_file(spec: str | dict[str, Any]) -> bool:
    return isinstance(spec, str) and spec.endswith((".yaml", ".yml"))


def _load(spec: str | dict[str, Any], name: str) -> dict[str, Any]:
    try:
        importlib.import_module("lm_eval")
        manager_of = importlib.import_module("lm_eval.tasks").TaskManager
        drawing: Any = importlib.import_module("lm_eval.api.task")
    except ImportError as error:
        raise MachineError(f'lm-eval tasks need lm-eval: pip install "distft[lm-eval]" ({error})') from None
    drawing.tqdm = _no_bar  # each rank would draw a bar for each task
    for logger in ("lm_eval", "lm-eval"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if isinstance(spec, str) and _is_file(spec):
        manager, spec = _of_file(manager_of, Path(spec))
    else:
        manager = manager_of()
        if isinstance(spec, str) and spec not in manager.all_tasks:
            raise RecipeError("lm-eval", [_unknown(spec, list(manager.all_tasks))])
    results: list[Any] = []

    def load() -> str:
        results.append(manager.load([spec]))
        return "read"

    cache = Path(importlib.import_module("datasets.config").HF_DATASETS_CACHE)
    try:
        hub.once(cache, f"lm-eval {spec}", load, good=bool, lasting=False)
        loaded = results[0] if results else manager.load([spec])
    except Exception as error:  # whatever a task's file or its rows make the library raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"lm-eval task {name}: cannot be loaded: {type(error).__name__}: {reason}") from None
    for leaf, task in loaded["tasks"].items():
        for flag, why in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "shows pictures")):
            if getattr(task, flag, False):
                raise RecipeError("lm-eval", [Problem(message=f'task "{leaf}"  {why}, which is not done here')])
    return loaded


def _of_file(manager_of: Any, path: Path) -> tuple[Any, str]:
    """Return what loads it, and the name to ask it for: a group is known by its own, with the files beside it."""
    if not path.is_file():
        raise RecipeError("lm-eval", [Problem(message=f'task "{path}"  no such file')])
    group = re.search(r"^group\s*:\s*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    if group is not None:
        return manager_of(include_path=str(path.parent)), group[1].strip("\"'")
    return manager_of(include_defaults=False), str(path)  # looking through all of its own takes seconds


def _no_bar(rows: Iterable[Any], *, total: int | None = None) -> Iterable[Any]:
    """Stand for tqdm as `lm_eval.api.task` calls it."""
    return rows


def _unknown(task: str, tasks: list[str]) -> Problem:
    meant = nearest(task, tasks)
    return Problem(message=f'task "{task}"  is not one of lm-eval\'s', fix=f'did you mean "{meant}"?' if meant else "")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which tasks draw from, and restore them: training must not notice."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def _wrapped(model: TextGenerator, drawn: Callable[..., str]) -> Any:
    """Return `model` as the library's abstract class, which can be named only once the library is there."""
    base: Any = importlib.import_module("lm_eval.api.model").LM

    class Model(base):
        tokenizer_name = ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return drawn(chat_history, add_generation_prompt)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return model.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return model.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Answer requests of equal settings together; answers are in the order of requests."""
            groups: dict[tuple[Any, ...], list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(_settings(request.args[1]), []).append(index)
            answers = [""] * len(requests)
            for (stop, max_new_tokens, temperature), rows in groups.items():
                prompts = [requests[row].args[0] for row in rows]
                written = model.generate(prompts, stop=stop, max_new_tokens=max_new_tokens, temperature=temperature)
                for row, text in zip(rows, written, strict=True):
                    answers[row] = text
            return answers

    return Model()


def _settings(gen_kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], int, float]:
    until = gen_kwargs.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    most = gen_kwargs.get("max_gen_toks") or gen_kwargs.get("max_new_tokens") or MAX_NEW_TOKENS
    sampled = gen_kwargs.get("do_sample") is not False
    return stop, int(most), float(gen_kwargs.get("temperature") or 0.0) if sampled else 0.0


def _figure(metric: str, filter_name: str) -> str:
    """Return `acc`, or `exact_match,strict-match` where a task's filter has a name."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _scored(result: Mapping[str, Any], samples: list[Mapping[str, Any]], better: Mapping[str, bool]) -> ScoreResult:
    figures: list[MetricInfo] = []
    rows: dict[str, tuple[float, ...]] = {}
    totals: dict[str, float] = {}
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = _figure(metric, filter_name)
        filtered = sorted(
            (sample for sample in samples if sample["filter"] == filter_name), key=lambda sample: sample["doc_id"]
        )
        values = [float(sample[metric]) for sample in filtered if isinstance(sample.get(metric), int | float)]
        per_row = len(values) == len(filtered)  # else: counts that only the total makes sense of
        binary = per_row and set(values) <= _TWO_VALUES
        totals[name] = float(value) if math.isfinite(value) else math.nan
        if per_row:
            rows[name] = tuple(values)
        figures.append(MetricInfo(name=name, higher_is_better=better.get(metric, True), binary=binary, per_row=per_row))
    return ScoreResult(figures=tuple(figures), rows=rows, totals=totals)


def _together(parts: Sequence[ScoreResult], of_group: Mapping[str, Any]) -> ScoreResult:
    """Join the rows of all tasks.

    The total is the library's own where it has one for the group; where that is another mean than that of the rows,
    because each task counts alike, the figure has no interval.
    """
    shared = [figure for figure in parts[0].figures if all(figure.name in part.totals for part in parts)]
    figures: list[MetricInfo] = []
    rows: dict[str, tuple[float, ...]] = {}
    totals: dict[str, float] = {}
    for figure in shared:
        metric, _, filter_name = figure.name.partition(",")
        total = of_group.get(f"{metric},{filter_name or 'none'}")
        per_row = all(figure.name in part.rows for part in parts)
        values = tuple(value for part in parts for value in part.rows[figure.name]) if per_row else ()
        if not isinstance(total, int | float):
            if not per_row:
                continue
            total = mean(values)
        per_row = per_row and math.isclose(total, mean(values), rel_tol=1e-9, abs_tol=1e-12)
        totals[figure.name] = float(total)
        if per_row:
            rows[figure.name] = values
        binary = per_row and set(values) <= _TWO_VALUES
        figures.append(
            MetricInfo(name=figure.name, higher_is_better=figure.higher_is_better, binary=binary, per_row=per_row)
        )
    return ScoreResult(figures=tuple(figures), rows=rows, totals=totals)


def _answers(task: str, samples: list[Mapping[str, Any]]) -> list[Answer]:
    """Return each row's answer once, however many filters were applied to it."""
    rows = {sample["doc_id"]: sample for sample in reversed(samples)}
    return [_answer(task, rows[doc]) for doc in sorted(rows)]


def _answer(task: str, row: Mapping[str, Any]) -> Answer:
    arguments, responses, target = row["arguments"], row["resps"], row["target"]
    about: dict[str, Any] = {"id": f"{task} row {row['doc_id'] + 1}", "row": {"task": task, **dict(row["doc"])}}
    weighed = len(arguments[0]) == 2 and isinstance(arguments[0][1], str)
    if not weighed:  # written, or the likelihood of a whole text
        text = responses[0][0] if isinstance(responses[0][0], str) else ""
        return Answer(**about, prompt=arguments[0][0], reference=str(target), text=text)
    # A task that looks at the gain over no context asks everything twice.
    options = [index for index, argument in enumerate(arguments) if argument[0] or not arguments[0][0]]
    logprobs = tuple(float(responses[index][0][0]) for index in options)
    likeliest = arguments[options[max(range(len(logprobs)), key=logprobs.__getitem__)]][1]
    right = arguments[target][1] if isinstance(target, int) and target < len(arguments) else str(target)
    return Answer(**about, prompt=arguments[0][0], reference=right.strip(), text=likeliest.strip(), logprobs=logprobs)
