"""`gguf`: one file for llama.cpp and what is built on it, at one level of rounding or several."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from distft.core.errors import MachineError
from distft.core.optional import why_not
from distft.export_formats.gguf_levels import LEVELS
from distft.export_formats.spec import Exported, ExportFormatSpec, FormatInputs, Proof

if TYPE_CHECKING:
    from distft.core.registry import NoParams
    from distft.export_formats.llama_cpp import LlamaCpp
    from distft.export_formats.source import ModelSource

KL_BOUNDS: Mapping[str, float] = {
    "F32": 1e-5, "F16": 1e-4, "BF16": 5e-3, "Q8_0": 5e-2, "Q6_K": 0.1, "Q5_1": 0.15, "Q5_K_M": 0.15, "Q4_K_M": 0.4,
    "Q4_0": 0.6, "Q3_K_M": 1.0, "Q2_K": 2.0,
}  # fmt: skip
"""Every level, most exact first -> the largest mean KL of it in nats: above what rounding does."""
TIES: Mapping[str, float] = {"F32": 1e-3, "F16": 2e-2}
"""Levels at which greedy tokens have to be equal, with the difference of logits that rounding may turn around."""
MAX_CONTEXT = 2048
"""Positions the proof gives to the runtime; prompts are cut to it."""


def _refuses(params: NoParams, source: ModelSource) -> str:
    if source.kind == "reward":
        return "a reward model gives a number, and llama.cpp would load it as a model that writes text"
    return ""


def _file(inputs: FormatInputs, level: str) -> str:
    return f"{inputs.source.name}-{level}.gguf"


def _write(params: NoParams, inputs: FormatInputs, folder: Path, level: str) -> Exported:
    if reason := why_not("gguf"):
        raise MachineError(f"{reason}  pip install 'distft[export]' brings gguf, which writes these files")
    name = _file(inputs, level)
    write_level(inputs, folder / name, level)
    used = inputs.calibration() if LEVELS[level].is_mixed else None
    return Exported(
        files=(name,),
        commands=(
            f"llama-server -m PATH/{name} --jinja      # an OpenAI-like server on port 8080",
            f"llama-cli -m PATH/{name} --jinja         # a chat in the terminal",
        ),
        calibrated_on={} if used is None else used.to_json(),
    )


def write_level(inputs: FormatInputs, file: Path, level: str) -> None:
    """Write the model at one level.

    Raises:
        DataError: llama.cpp does not know such a model or tokenizer, or the level does not fit its shapes.
        MachineError: the level's quantiser is not installed.
    """
    from distft.export_formats.gguf_writer import write_gguf

    reference = inputs.reference()
    calibration = inputs.calibration() if LEVELS[level].is_mixed else None
    write_gguf(
        inputs.whole_model(),
        file,
        LEVELS[level],
        name=inputs.source.name,
        tokenizer=reference.tokenizer,
        stop_ids=reference.stop_ids,
        importance=None if calibration is None else reference.importance(calibration),
    )


def _prove(params: NoParams, inputs: FormatInputs, folder: Path, level: str) -> Proof:
    return prove_file(inputs, folder / _file(inputs, level), level)


def prove_file(inputs: FormatInputs, file: Path, level: str) -> Proof:
    """Load the file in llama.cpp and compare it with the source."""
    from distft.export_formats import comparing, llama_cpp
    from distft.export_formats.task_score import task_figures

    if reason := llama_cpp.missing():
        return Proof(runtime="", unproven=f"{reason}: nothing has loaded the file")
    reference, rows = inputs.reference(), inputs.rows()
    context = min(MAX_CONTEXT, reference.model.config.max_position_embeddings)
    with llama_cpp.loaded(file, context=context) as runtime:
        checks = [
            comparing.tokenization(
                reference, rows, lambda text, special: runtime.tokenize(text, special=special), served=True
            ),
            comparing.answer_end(reference, rows),
            comparing.stops(reference, lambda token: _ends_at(runtime, token, reference.stop_ids)),
        ]
        if rows.chats:
            checks.append(
                comparing.rendering(reference, rows, lambda chat: runtime.tokenize(runtime.render(chat), special=True))
            )
        prompts = comparing.prompts_of(reference, rows, context)
        wanted = [reference.greedy(prompt, comparing.GREEDY_TOKENS) for prompt in prompts]
        began, written = time.monotonic(), 0

        def write(ids: object, most: int) -> list[int]:
            nonlocal written
            made = runtime.greedy(ids, most).ids  # pyright: ignore[reportArgumentType]
            written += len(made)
            return list(made)

        checks.append(comparing.greedy_tokens(prompts, wanted, write, tie=TIES.get(level)))
        seconds = time.monotonic() - began
        vocabulary = reference.model.config.vocab_size
        check, figures = comparing.divergence(
            reference,
            comparing.passages(prompts, wanted),
            lambda ids: runtime.next_logprobs(ids, vocabulary),
            bound=KL_BOUNDS[level],
        )
        task = []
        if inputs.source.run is not None and inputs.ask_task:
            task = task_figures(inputs.source.run, runtime, reference.tokenizer, context)
    figures["tokens_per_s"] = written / seconds if seconds else 0.0
    figured = [asdict(figure) | {"lost": figure.lost} for figure in task]
    return Proof(runtime=llama_cpp.version(), checks=[*checks, check], figures=figures, task=figured)


def _ends_at(runtime: LlamaCpp, token: int, stop_ids: tuple[int, ...]) -> bool:
    """Have the runtime write the token: only one that ends an answer makes it end by itself."""
    return runtime.greedy([stop_ids[0]], 2, forced=token).ended


def level_lacks(inputs: FormatInputs, level: str) -> str:
    """Return why a level cannot be written here; "" where it can."""
    from distft.export_formats import llama_cpp_quantizer
    from distft.export_formats.gguf_writer import misfit

    reason = misfit(inputs.whole_model(), LEVELS[level])
    return reason or (llama_cpp_quantizer.missing() if LEVELS[level].is_mixed else "")


SPEC = ExportFormatSpec(
    name="gguf",
    title="one file for llama.cpp, Ollama and LM Studio",
    write=_write,
    prove=_prove,
    levels=tuple(KL_BOUNDS),
    default_level="F16",
    refuses=_refuses,
    calibrates=lambda level: LEVELS[level].is_mixed,
    lacks=lambda params, inputs, level: level_lacks(inputs, level),
)
