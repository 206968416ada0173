"""`safetensors`: a whole model as transformers and inference servers load it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.export_formats.rewards import REWARD_BOUND, compare_rewards
from distft.export_formats.spec import Comparison, Exported, ExportFormatSpec, FormatInputs, Proof

if TYPE_CHECKING:
    from torch import Tensor

    from distft.core.registry import NoParams
    from distft.export_formats.reference import SourceReference

MAX_FILE_BYTES = 4 * 2**30
KL_BOUND = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 1e-3}
"""By the type that weights are stored in: merged weights are rounded to it once."""


def _write(params: NoParams, inputs: FormatInputs, folder: Path, level: str) -> Exported:
    from safetensors.torch import save_file

    model, reference = inputs.whole_model(), inputs.reference()
    files = list(_shards(model))
    total, where = 0, {}
    for number, names in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = dict(_read(model, names))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it private; other people's servers read it
        where |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(model / "config.json", folder / "config.json")
    write_beside(reference, folder)
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja"))
    run = "vllm serve PATH" if inputs.source.kind == "text" else "vllm serve PATH --runner pooling"
    return Exported(
        files=tuple(names), commands=(run, "transformers chat PATH")[: 2 if inputs.source.kind == "text" else 1]
    )


def write_beside(reference: SourceReference, folder: Path) -> None:
    """Write the tokenizer with its chat template, and a generation_config.json with every stop token."""
    reference.tokenizer.save_pretrained(folder)
    if reference.source.kind == "reward":
        return
    from transformers import GenerationConfig

    given = reference.source.folder / "generation_config.json"
    config = GenerationConfig.from_pretrained(reference.source.folder) if given.is_file() else GenerationConfig()
    stops = list(reference.stop_ids)
    config.eos_token_id = stops[0] if len(stops) == 1 else stops
    config.bos_token_id = reference.tokenizer.bos_token_id
    config.pad_token_id = reference.tokenizer.pad_token_id
    config.save_pretrained(folder)


def _shards(model: Path) -> Iterator[list[str]]:
    """Yield the names of the tensors of each file; a head that is tied to the embedding is left out."""
    from distft.model.tensor_files import TensorFiles

    entries = TensorFiles(model).entries
    tied = bool(json.loads((model / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"))
    held, size = list[str](), 0
    for name in sorted(entries):
        if tied and name == "lm_head.weight":
            continue
        num_bytes = _num_bytes(entries[name])
        if held and size + num_bytes > MAX_FILE_BYTES:
            yield held
            held, size = [], 0
        held.append(name)
        size += num_bytes
    yield held


def _num_bytes(entry: Any) -> int:
    import math

    bits = int("".join(char for char in entry.dtype.split("_")[0] if char.isdigit()) or 8)
    return math.prod(entry.shape) * bits // 8


def _read(model: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    from distft.model.tensor_files import TensorFiles

    files = TensorFiles(model)
    for name in names:
        yield name, files.read(name).contiguous()


def _prove(params: NoParams, inputs: FormatInputs, folder: Path, level: str) -> Proof:
    import transformers

    from distft.export_formats import comparing
    from distft.export_formats import reference as models

    reference, rows = inputs.reference(), inputs.rows()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = models.load_model(folder, transformers, rewards=inputs.source.kind == "reward").to(reference.model.device)
    runtime = f"transformers {transformers.__version__}"

    def encode(text: str, special: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    checks = [comparing.tokenization(reference, rows, encode)]
    if rows.chats:
        checks.append(comparing.rendering(reference, rows, lambda chat: encode(models.render(tokenizer, chat), False)))
    stored = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype") or "float32")
    prompts = comparing.prompts_of(reference, rows, reference.model.config.max_position_embeddings)
    if inputs.source.kind == "reward":
        checks.append(compare_rewards(inputs, model, prompts, REWARD_BOUND.get(stored, 1e-3)))
        return Proof(runtime=runtime, checks=checks)
    stops = model.generation_config.eos_token_id
    ends = {stops} if isinstance(stops, int) else set(stops or ())
    checks += [comparing.answer_end(reference, rows), comparing.stops(reference, lambda token: token in ends)]
    wanted = [reference.greedy(prompt, comparing.GREEDY_TOKENS) for prompt in prompts]
    tie = 1e-3 if stored == "float32" or not inputs.source.is_adapter else None

    def write(ids: Any, most: int) -> list[int]:
        return list(models.greedy(model, ids, most, sorted(ends) or reference.stop_ids).ids)

    checks.append(comparing.greedy_tokens(prompts, wanted, write, tie=tie))
    read = comparing.passages(prompts, wanted)
    check, figures = comparing.divergence(
        reference, read, lambda ids: models.logprobs(model, ids)[-1], bound=KL_BOUND.get(stored, 1e-6)
    )
    return Proof(runtime=runtime, checks=[*checks, check, _logits(reference, model, read, stored)], figures=figures)


def _logits(reference: SourceReference, model: Any, read: list[tuple[list[int], int]], stored: str) -> Comparison:
    from distft.export_formats import reference as models

    largest = max(float((reference.logprobs(ids) - models.logprobs(model, ids)).abs().max()) for ids, _ in read)
    bound = 1e-3 if stored == "float32" else 2.0
    return Comparison(
        name="logits", compared=f"largest difference of a log-probability, stored in {stored}", count=len(read),
        value=largest, bound=f"at most {bound:g}", ok=largest <= bound,
    )  # fmt: skip


SPEC = ExportFormatSpec(
    name="safetensors",
    title="a whole model for transformers, vLLM, TGI and SGLang",
    write=_write,
    prove=_prove,
)
