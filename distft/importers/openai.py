"""A job of OpenAI's fine-tuning API as JSON: what is sent to make one, or what is answered."""

from __future__ import annotations

import re
from typing import Any

from distft.importers.config_file import ConfigFile
from distft.importers.conversion import Conversion
from distft.importers.keys import carried, group, left, refused, table
from distft.importers.section import Section, dotted
from distft.importers.sources import Source, add_source
from distft.importers.spec import ImporterSpec
from distft.importers.trainer import DEFAULT_SEED, set_name

_THEIR_MODEL = re.compile(r"(?:ft:)?(?:gpt-|o\d|davinci|babbage|curie|ada\b|chatgpt)")
_FILE_ID = re.compile(r"file-[\w-]+")
_ANSWERED = "an answer of the API, not a setting"
_LENGTH = 4096
_EPOCHS, _BATCH, _BETA = 3, 16, 0.1
_RATES = {"supervised": 2e-4, "dpo": 5e-6, "reinforcement": 1e-5}
_OBJECTIVES = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
_FORMATS = {"supervised": "messages", "dpo": "preference", "reinforcement": "prompt"}
_ANSWERS, _ANSWER_TOKENS = 8, 1024
_VALIDATION = "validation"
"""What the set of answers to the validation file is called."""

JOB_KEYS = {
    **table(
        model=carried("[model] path", "OpenAI's models cannot be had: --set model.path=... names an open one"),
        training_file=carried(
            "[[data.train]] path", "an id of a file: --set data.train.0.path=... names the file here"
        ),
        validation_file=carried(
            "[[data.eval]] path",
            "an id of a file: --set data.eval.0.path=... names the file here; of reinforcement, [[eval.answers]] path",
        ),
        method=carried("[objective] name", "supervised is sft; dpo is dpo; reinforcement is grpo"),
        hyperparameters=carried("[train]", "auto becomes a value that is said"),
        suffix=carried("name"),
        seed=carried("seed"),
        integrations=carried("[log] wandb"),
        metadata=left("put it into the run's name, or beside the recipe"),
    ),
    **group(
        "id object created_at finished_at fine_tuned_model organization_id status result_files trained_tokens error "
        "estimated_finish user_provided_suffix",
        left(_ANSWERED, off=(None, [], {})),
    ),
}
HYPERPARAMETER_KEYS = table(
    n_epochs=carried("[train] epochs", f"auto is {_EPOCHS}"),
    batch_size=carried("[train] global_batch_size", f"auto is {_BATCH}"),
    learning_rate_multiplier=carried(
        "[optim] learning_rate",
        "of "
        + ", ".join(f"{rate:g} for {_OBJECTIVES[kind]}" for kind, rate in _RATES.items())
        + ", LoRA's usual rates",
    ),
    beta=carried("[objective] beta", f"auto is {_BETA}"),
    compute_multiplier=carried(
        "[rollout] answers_per_prompt", f"times {_ANSWERS}, at least 2: OpenAI does not say what it multiplies"
    ),
    eval_interval=carried("[eval] answers", "every_steps of the set; auto: before and after training alone"),
    eval_samples=carried("[eval] answers", "max_rows of the set: the first rows of the validation file; auto: all"),
    reasoning_effort=refused("no model here is told how long to think", off=(None, "default")),
)
METHOD_KEYS = table(
    type=carried("[objective] name"),
    supervised=carried("[objective]"),
    dpo=carried("[objective]"),
    reinforcement=carried("[objective], [rollout]"),
    grader=carried("[rollout] rewards", "the score `grader`; graders that run code or ask a model are refused"),
)


def answers_per_prompt(compute_multiplier: float) -> int:
    """Return how many answers to a prompt are compared."""
    return max(2, round(_ANSWERS * compute_multiplier))


def _detects(file: ConfigFile) -> bool:
    content = file.content
    is_job = content.get("object") == "fine_tuning.job" or {"model", "training_file"} <= content.keys()
    return is_job and "base_model" not in content


def _convert(work: Conversion) -> None:
    top = work.top()
    kind, settings = _method(work, top)
    suffix = top.text("suffix") or top.text("user_provided_suffix")
    set_name(work, None, (top, "suffix"))
    if suffix:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", suffix).strip(".-") or "imported"
        work.draft.comments.pop(("name",), None)
        work.draft.set("name", name, origin=top.path("suffix"))
    _set_model(work, top)
    work.draft.set(
        "method.name", "lora", note="OpenAI does not say which weights it trains; LoRA is what such rates are for"
    )
    work.set("objective.name", _OBJECTIVES[kind], (top, "method") if top.has("method") else None)
    if kind == "reinforcement":
        _set_rollout(work, top, settings)
    _set_rows(work, top, kind)
    _set_hyperparameters(work, settings, kind)
    seed = top.whole("seed", DEFAULT_SEED, least=0)
    if top.has("seed"):
        work.set("seed", seed, (top, "seed"))
    for section in top.sections("integrations"):
        wandb = section.section("wandb")
        if section.text("type") == "wandb" and wandb.has("project"):
            work.set("log.wandb", wandb.text("project"), (wandb, "project"))
        for key in wandb.values:
            if key != "project":
                work.leave(wandb, key, "the project alone is named here")


def _method(work: Conversion, top: Section) -> tuple[str, list[Section]]:
    """Return the kind of training, and where its hyper-parameters are; those at the top are an older form."""
    method = top.section("method")
    kind = method.text("type", "supervised", allowed=("supervised", "dpo", "reinforcement")) or "supervised"
    inner = method.section(kind)
    for name in _OBJECTIVES:
        if name != kind and method.has(name):
            method.problem(name, f"belongs to another method than type = {kind}")
    if kind == "reinforcement":
        inner.section("grader")
    sections = [inner.section("hyperparameters"), top.section("hyperparameters")]
    work.settle(method, METHOD_KEYS)
    work.settle(inner, {"hyperparameters": JOB_KEYS["hyperparameters"], **METHOD_KEYS})
    return kind, sections


def _set_model(work: Conversion, top: Section) -> None:
    model = top.text("model")
    if model is None or _THEIR_MODEL.match(model):
        fix = "name an open model: --set model.path=Qwen/Qwen2.5-7B-Instruct"
        why = "is OpenAI's, and cannot be had" if model else "the job names no model"
        work.require("model.path", top, "model", why, fix)
    work.draft.set("model.path", model or "none", origin=top.path("model"))


def _set_rows(work: Conversion, top: Section, kind: str) -> None:
    format, asked = _FORMATS[kind], kind == "reinforcement"
    for key, part in (("training_file", "train"), ("validation_file", "eval")):
        if part == "eval" and asked:
            continue
        name = top.text(key)
        if name is None and part == "train":
            work.require(
                "data.train.0.path", top, key, "the job names no training_file", "--set data.train.0.path=FILE"
            )
        if name is None and part == "eval":
            continue
        if name is not None and _FILE_ID.fullmatch(name):
            home = f"data.{part}.0.path"
            fix = f"download it, and name it: --set {home}=FILE"
            work.require(home, top, key, "is an id of a file of OpenAI's", fix)
        add_source(work, part, Source(path=name or "none", format=format), (top, key))  # type: ignore[arg-type]
    if asked:
        length, note = 4 * _LENGTH, "all answers to a prompt, each behind it; raise it until no prompt is refused"
    else:
        length = 2 * _LENGTH if kind == "dpo" else _LENGTH
        note = "the context of OpenAI's model there; raise it until no row is refused"
    work.draft.set("data.max_length", length, note=note)
    work.draft.set("data.packing", False, note="batch_size counts prompts" if asked else "batch_size counts rows")
    work.draft.set("data.long_rows", "error")
    if kind == "supervised":
        work.draft.set("data.loss_on", "assistant", note="every answer but those of weight 0")


def _set_rollout(work: Conversion, top: Section, sections: list[Section]) -> None:
    """Set how answers are written and graded, and the validation file's set of answers."""
    inner = top.section("method").section("reinforcement")
    grader = inner.section("grader")
    if not inner.has("grader"):
        inner.problem("grader", "is missing: it says what an answer is worth")
    score: dict[str, Any] = {"name": "grader", "grader": grader.values}
    times, origin = _value(sections, "compute_multiplier")
    note = f"{_ANSWERS} x compute_multiplier {times or 1:g}: OpenAI does not say what it multiplies"
    work.draft.set(
        "rollout.answers_per_prompt", answers_per_prompt(times or 1),
        origin=origin[0].path(origin[1]) if origin else (), note=note,
    )  # fmt: skip
    work.draft.set("rollout.max_new_tokens", _ANSWER_TOKENS, note="OpenAI does not say how long an answer may be")
    work.draft.set("rollout.updates", 1, note="optimizer steps on each step's answers: OpenAI does not say how many")
    work.draft.set("rollout.rewards", [score], origin=inner.path("grader"))
    every, origin = _value(sections, "eval_interval")
    rows, rows_origin = _value(sections, "eval_samples")
    path = top.text("validation_file")
    if path is None:
        for given in (origin, rows_origin):
            if given is not None and given[0].raw(given[1]) != "auto":
                work.leave(*given, "there is no validation_file to be asked about")
        return
    home = "eval.answers.0"
    if _FILE_ID.fullmatch(path):
        fix = f"download it, and name it: --set {home}.path=FILE"
        work.require(f"{home}.path", top, "validation_file", "is an id of a file of OpenAI's", fix)
    work.draft.set(f"{home}.name", _VALIDATION)
    work.set(f"{home}.path", path, (top, "validation_file"))
    work.set(f"{home}.format", _FORMATS["reinforcement"])
    work.draft.set(f"{home}.max_new_tokens", _ANSWER_TOKENS, note="one answer to each prompt, the likeliest tokens")
    if every is not None:
        work.set(f"{home}.every_steps", int(every), origin)
    if rows is not None:
        work.set(f"{home}.max_rows", int(rows), rows_origin, "the first rows of the validation file")
    work.draft.set(f"{home}.scores", [score])


def _set_hyperparameters(work: Conversion, sections: list[Section], kind: str) -> None:
    epochs, origin = _value(sections, "n_epochs")
    work.set("train.epochs", float(epochs or _EPOCHS), origin, _auto(epochs))
    batch, origin = _value(sections, "batch_size")
    counted = "prompts" if kind == "reinforcement" else "rows"
    note = f"{counted} per optimizer step, over all GPUs"
    work.set("train.global_batch_size", int(batch or _BATCH), origin, "; ".join(filter(None, (note, _auto(batch)))))
    times, origin = _value(sections, "learning_rate_multiplier")
    rate = _RATES[kind]
    note = (
        f"{rate:g}, a usual rate of LoRA, x learning_rate_multiplier {times or 1:g}: OpenAI does "
        "not say what it multiplies"
    )
    work.draft.set(
        "optim.learning_rate", rate * (times or 1), origin=origin[0].path(origin[1]) if origin else (), note=note
    )
    if kind == "dpo":
        beta, origin = _value(sections, "beta")
        work.set("objective.beta", float(beta or _BETA), origin, _auto(beta))
    for section in sections:
        work.settle(section, HYPERPARAMETER_KEYS)


def _value(sections: list[Section], key: str) -> tuple[float | None, tuple[Section, str] | None]:
    """Return a hyper-parameter, None for "auto", and where it stands."""
    holding = [section for section in sections if section.has(key)]
    if not holding:
        return None, None
    section = holding[0]
    value: Any = section.raw(key)
    for further in holding[1:]:
        if further.raw(key) != value:
            further.problem(key, f"says something else than {dotted(section.path(key))}", "keep one of them")
    return (None if value == "auto" else section.number(key)), (section, key)


def _auto(value: float | None) -> str:
    return "auto there: a value for small data sets" if value is None else ""


SPEC = ImporterSpec(
    name="openai",
    title="OpenAI's fine-tuning API",
    told_by="JSON with model and training_file",
    detects=_detects,
    convert=_convert,
    keys={"": JOB_KEYS, "method": METHOD_KEYS, "hyperparameters": HYPERPARAMETER_KEYS},
)
