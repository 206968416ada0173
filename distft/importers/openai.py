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
_EPOCHS, _BATCH, _RATE, _DPO_RATE, _BETA = 3, 16, 2e-4, 5e-6, 0.1

JOB_KEYS = {
    **table(
        model=carried("[model] path", "OpenAI's models cannot be had: --set model.path=... names an open one"),
        training_file=carried(
            "[[data.train]] path", "an id of a file: --set data.train.0.path=... names the file here"
        ),
        validation_file=carried(
            "[[data.eval]] path", "an id of a file: --set data.eval.0.path=... names the file here"
        ),
        method=carried("[objective] name", "supervised is sft; dpo is dpo; reinforcement is refused"),
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
        "[optim] learning_rate", f"of {_RATE:g} for sft and {_DPO_RATE:g} for dpo, LoRA's usual rates"
    ),
    beta=carried("[objective] beta", f"auto is {_BETA}"),
)
METHOD_KEYS = table(
    type=carried("[objective] name"),
    supervised=carried("[objective]"),
    dpo=carried("[objective]"),
    reinforcement=refused("training on a grader's judgement is not here: supervised and dpo are"),
)


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
    work.set("objective.name", "dpo" if kind == "dpo" else "sft", (top, "method") if top.has("method") else None)
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
    if kind == "reinforcement":
        method.problem("type", METHOD_KEYS["reinforcement"].text)
    inner = method.section(kind) if kind != "reinforcement" else method
    for name in ("supervised", "dpo"):
        if name != kind and method.has(name):
            method.problem(name, f"belongs to another method than type = {kind}")
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
    format = "preference" if kind == "dpo" else "messages"
    for key, part in (("training_file", "train"), ("validation_file", "eval")):
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
    work.draft.set(
        "data.max_length",
        2 * _LENGTH if kind == "dpo" else _LENGTH,
        note="the context of OpenAI's model there; raise it until no row is refused",
    )
    work.draft.set("data.packing", False, note="batch_size counts rows")
    work.draft.set("data.long_rows", "error")
    if kind != "dpo":
        work.draft.set("data.loss_on", "assistant", note="every answer but those of weight 0")


def _set_hyperparameters(work: Conversion, sections: list[Section], kind: str) -> None:
    epochs, origin = _value(sections, "n_epochs")
    work.set("train.epochs", float(epochs or _EPOCHS), origin, _auto(epochs))
    batch, origin = _value(sections, "batch_size")
    note = "rows per optimizer step, over all GPUs"
    work.set("train.global_batch_size", int(batch or _BATCH), origin, "; ".join(filter(None, (note, _auto(batch)))))
    times, origin = _value(sections, "learning_rate_multiplier")
    rate = _DPO_RATE if kind == "dpo" else _RATE
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
