"""What fp8, w8a8, gptq and awq have in common: a folder a level, rounded by llm-compressor, run by transformers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import DataError, Problem, RecipeError
from distft.core.registry import Params
from distft.export_formats import llm_compressor
from distft.export_formats.llm_compressor import Rounding
from distft.export_formats.spec import Comparison, Exported, ExportFormatSpec, FormatInputs, Proof

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distft.export_formats.llama_cpp import Generated
    from distft.export_formats.source import ModelSource

KL_BOUNDS: Mapping[str, float] = {"FP8": 0.1, "W8A8": 0.1, "W8A16": 0.05, "W4A16": 0.6}
"""Level -> the largest mean KL of it in nats: above what rounding does to small models, far below garbage."""
_KEPT = ("embed", "wte", "wpe", llm_compressor.HEAD)
"""Parts of the names of matrices that stay as they are."""

RoundingOf = Callable[[Any, str], Rounding]
"""(params, level) -> how layers are stored."""


_LOAD = (
    'python -c "from transformers import AutoModelForCausalLM as M, CompressedTensorsConfig as C; '
    "print(M.from_pretrained('PATH/{}', quantization_config=C(dequantize=True)))\""
)


def compressed_spec(
    *, name: str, title: str, levels: tuple[str, ...], rounding: RoundingOf, params: type[Params]
) -> ExportFormatSpec:
    """Return the spec of a format of this kind; levels are most exact first, the last one is the default."""

    def calibrates(level: str) -> bool:
        return rounding(params(), level).method != "nearest"

    def lacks(given: Any, inputs: FormatInputs, level: str) -> str:
        return _misfit(inputs, rounding(given, level)) or llm_compressor.missing()

    def write(given: Any, inputs: FormatInputs, folder: Path, level: str) -> Exported:
        how = rounding(given, level)
        if reason := _misfit(inputs, how):
            raise DataError(f"{name} {level}: {reason}")
        return _write(inputs, folder / level, level, how)

    return ExportFormatSpec(
        name=name,
        title=title,
        write=write,
        prove=lambda given, inputs, folder, level: _prove(inputs, folder / level, level, rounding(given, level)),
        params=params,
        levels=levels,
        default_level=levels[-1],
        refuses=_refuses,
        calibrates=calibrates,
        lacks=lacks,
    )


def _refuses(params: Any, source: ModelSource) -> str:
    if source.kind == "reward":
        return "a reward model gives a number that rounding shifts, and what loads these folders writes text"
    config = json.loads((source.folder / "config.json").read_text("utf-8")) if not source.is_adapter else {}
    return "its weights are quantised already, and would be rounded twice" if "quantization_config" in config else ""


def _misfit(inputs: FormatInputs, how: Rounding) -> str:
    """Return why rows of the model's matrices have no groups of this size; "" where they have."""
    from distft.model.tensor_files import TensorFiles

    if how.group_size is None:
        return ""
    for name, entry in sorted(TensorFiles(inputs.whole_model()).entries.items()):
        if len(entry.shape) != 2 or any(part in name for part in _KEPT):
            continue
        if (width := entry.shape[-1]) % how.group_size:
            fit = [size for size in (16, 32, 64, 128) if width % size == 0]
            allowed = f"--set group_size={fit[-1]}" if fit else "--as safetensors"
            return f"{name}: rows of {width} numbers are no multiple of groups of {how.group_size}  allowed: {allowed}"
    return ""


def _write(inputs: FormatInputs, folder: Path, level: str, how: Rounding) -> Exported:
    from distft.export_formats.safetensors_folder import write_beside

    rows = inputs.calibration() if how.method != "nearest" else None
    if rows is None and how.method != "nearest":
        problem = f"{how.method} fits its rounding to rows, and {inputs.source.given} belongs to no run that has some"
        raise RecipeError(
            f"distft export {inputs.source.given}", [Problem(message=problem, fix="--calibration FILE with rows")]
        )
    folder.mkdir()
    llm_compressor.round_model(inputs.whole_model(), folder, how, () if rows is None else rows.rows)
    write_beside(inputs.reference(), folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes it private; other people's servers read it
    names = sorted(f"{level}/{path.name}" for path in folder.iterdir())
    return Exported(
        files=tuple(names),
        commands=(f"vllm serve PATH/{level}",) if how.symmetric else (f"vllm serve PATH/{level}", _LOAD.format(level)),
        calibrated_on={} if rows is None else rows.to_json(),
    )


def _prove(inputs: FormatInputs, folder: Path, level: str, how: Rounding) -> Proof:
    import transformers

    from distft.export_formats import comparing
    from distft.export_formats import reference as models
    from distft.export_formats.task_score import task_figures

    reference, rows = inputs.reference(), inputs.rows()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Its layers of packed weights take packed zero points for whole ones (compressed-tensors 0.20.1, on meta tensors).
    given: Any = {} if how.symmetric else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    model = models.load_model(folder, transformers, **given).to(reference.model.device)

    def encode(text: str, special: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    checks = [_all_rounded(folder), comparing.tokenization(reference, rows, encode)]
    if rows.chats:
        checks.append(comparing.rendering(reference, rows, lambda chat: encode(models.render(tokenizer, chat), False)))
    stops = model.generation_config.eos_token_id
    ends = {stops} if isinstance(stops, int) else set(stops or ())
    checks += [comparing.answer_end(reference, rows), comparing.stops(reference, lambda token: token in ends)]
    runtime = _Transformers(model, sorted(ends))
    context = reference.model.config.max_position_embeddings
    prompts = comparing.prompts_of(reference, rows, context)
    wanted = [reference.greedy(prompt, comparing.GREEDY_TOKENS) for prompt in prompts]
    began = time.monotonic()
    checks.append(
        comparing.greedy_tokens(prompts, wanted, lambda ids, most: runtime.greedy(ids, most).ids, tie=None)
    )  # fmt: skip
    seconds = time.monotonic() - began
    check, figures = comparing.divergence(
        reference,
        comparing.passages(prompts, wanted),
        lambda ids: models.logprobs(model, ids)[-1],
        bound=KL_BOUNDS[level],
    )
    figures["tokens_per_s"] = runtime.num_tokens / seconds if seconds else 0.0
    task = []
    if inputs.source.run is not None and inputs.ask_task:
        task = task_figures(inputs.source.run, runtime, reference.tokenizer, context)
    return Proof(
        runtime=f"transformers {transformers.__version__}, {llm_compressor.version()}",
        checks=[*checks, check],
        figures=figures,
        task=[asdict(figure) | {"lost": figure.lost} for figure in task],
    )


class _Transformers:
    """Writes greedily with a model in this process."""

    def __init__(self, model: Any, stops: Sequence[int]) -> None:
        self._model, self._stops = model, stops
        self.num_tokens = 0

    def greedy(self, ids: Sequence[int], most: int) -> Generated:
        """Return the likeliest continuation."""
        from distft.export_formats import reference as models
        from distft.export_formats.llama_cpp import Generated

        written = models.greedy(self._model, ids, most, self._stops)
        self.num_tokens += len(written.ids)
        return Generated(ids=written.ids, ended=written.ended)


def _all_rounded(folder: Path) -> Comparison:
    """Look for matrices that were left as they were: where no layer matches, the library saves all the same."""
    from distft.model.tensor_files import TensorFiles

    matrices = [
        (name, entry)
        for name, entry in TensorFiles(folder).entries.items()
        if name.endswith((".weight", ".weight_packed")) and len(entry.shape) > 1 and not any(k in name for k in _KEPT)
    ]
    left = [name for name, entry in matrices if entry.dtype in ("F32", "F16", "BF16")]
    return Comparison(
        name="rounded matrices", compared="types of the matrices in the files", count=len(matrices),
        value=len(left), bound="0 that were left as they were, of one or more", ok=bool(matrices) and not left,
        detail=left[0] if left else "",
    )  # fmt: skip
