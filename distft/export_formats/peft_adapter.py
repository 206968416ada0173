"""`peft`: a LoRA as servers read it: one rank, the plain scale alpha / r, names and files as PEFT has them.

Servers and converters read less of adapter_config.json than PEFT does. llama.cpp's converter takes alpha and leaves
use_rslora, rank_pattern and alpha_pattern unread, without a word; vLLM reads use_rslora and no pattern. So the adapter
is written such that the least reader is right: rsLoRA's alpha becomes alpha * sqrt(r), ranks are filled up with zeros,
and scales of single layers go into B.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distft.core.errors import Problem, RecipeError
from distft.core.registry import Params
from distft.export_formats.rewards import REWARD_BOUND, compare_rewards
from distft.export_formats.spec import Comparison, Exported, ExportFormatSpec, FormatInputs, Proof

if TYPE_CHECKING:
    from torch import Tensor

    from distft.export_formats.source import ModelSource

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""
HEADS = {"score", "classifier"}
"""Modules of a reward model that PEFT saves whole beside the adapter; a model has one of them."""
VLLM_RULES = "vllm/lora/peft_helper.py; names and ranks from memory"
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
}
"""Keys of adapter_config.json -> values with which the adapter is nothing but B @ A on linear layers of its base."""
_LOAD_REWARDS = (
    'python -c "from peft import AutoPeftModelForSequenceClassification as M; '
    "print(M.from_pretrained('PATH', num_labels=1))\""
)
_INERT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type"),
        *("peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "lora_alpha", "revision"),
        *("target_modules", "task_type", "use_rslora", "runtime_config"),
    }
)
"""Keys that say how it was trained, or that this format rewrites."""


class PeftParams(Params):
    """How the adapter is stored."""

    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Type of A and B; servers convert it to the model's."""


def _refuses(params: PeftParams, source: ModelSource) -> str:
    if not source.is_adapter:
        return "it is a whole model, and this format holds adapters"
    config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        return f"peft_type {config.get('peft_type')}: servers read LORA alone; export it as safetensors"
    for key, allowed in _REFUSED.items():
        is_head = key == "modules_to_save" and source.kind == "reward" and set(config.get(key) or ()) <= HEADS
        if key in config and config[key] not in allowed and not is_head:
            return f"{key} = {config[key]!r}: servers read no such adapter; merge it: --as safetensors"
    unknown = sorted(key for key in config if key not in _INERT and key not in _REFUSED and config[key])
    if unknown:
        return f"{unknown[0]} = {config[unknown[0]]!r} in {CONFIG} is a key that this project does not know"
    return ""


def _write(params: PeftParams, inputs: FormatInputs, folder: Path, level: str) -> Exported:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from distft.model.adapters.whole import low_rank_parts

    source, reference = inputs.source, inputs.reference()
    parts = low_rank_parts(reference.model)
    named = _tensor_names(source.folder)
    others = sorted(set(named) - {f"{PREFIX}{name}.lora_{side}.weight" for name in parts for side in "AB"})
    heads = [name for name in others if source.kind == "reward" and name.rpartition(".")[0] in _head_names()]
    if others != heads:
        others = [name for name in others if name not in heads]
        problem = f"{others[0]} is no LoRA of a linear layer, which is all that servers read"
        raise RecipeError(source.given, [Problem(message=problem, fix="merge it: --as safetensors")])
    rank = max(down.shape[0] for _, down, _ in parts.values())
    if rank > VLLM_RANKS[-1]:
        problem = f"rank {rank} is more than servers take ({VLLM_RANKS[-1]})"
        raise RecipeError(source.given, [Problem(message=problem, fix="merge it: --as safetensors")])
    scale = max((scale for scale, _, _ in parts.values()), key=abs)
    stored = named[f"{PREFIX}{next(iter(parts))}.lora_A.weight"] if params.dtype == "source" else params.dtype
    tensors: dict[str, Tensor] = {}
    for name, (own, down, up) in parts.items():
        down_RI, up_OR = torch.zeros(rank, down.shape[1]), torch.zeros(up.shape[0], rank)
        down_RI[: down.shape[0]] = down.cpu()
        up_OR[:, : up.shape[1]] = up.cpu() * (own / scale)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down_RI.to(getattr(torch, stored)).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up_OR.to(getattr(torch, stored)).contiguous()
    with safe_open(source.folder / WEIGHTS, framework="pt") as file:
        tensors |= {name: file.get_tensor(name).to(getattr(torch, stored)).contiguous() for name in heads}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
    alpha = scale * rank
    config |= {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": False}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True, "exclude_modules": None}
    config |= {"layers_to_transform": None, "layers_pattern": None, "init_lora_weights": True}
    config["target_modules"] = _targets(reference.model, parts)
    if heads:
        config["modules_to_save"] = sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in heads})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    from distft.export_formats.safetensors_folder import write_beside

    write_beside(reference, folder)
    if heads:
        return Exported(files=(CONFIG, WEIGHTS), commands=(_LOAD_REWARDS,))
    largest = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    serve = f"vllm serve {config['base_model_name_or_path']} --enable-lora --max-lora-rank {largest}"
    return Exported(files=(CONFIG, WEIGHTS), commands=(f"{serve} --lora-modules {source.name}=PATH",))


def _head_names() -> set[str]:
    return {f"{PREFIX}{name}" for name in HEADS}


def _tensor_names(folder: Path) -> dict[str, str]:
    """Return the name of every tensor and torch's name of its type."""
    from safetensors import safe_open

    types = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: types.get(file.get_slice(name).get_dtype(), "float32") for name in file.keys()}  # noqa: SIM118


def _targets(beside: Any, parts: dict[str, Any]) -> list[str]:
    """Return the last parts of the names where they mean these layers and no other, else whole names."""
    lasts = {name.rpartition(".")[2] for name in parts}
    meant = {name for name, _ in beside.get_base_model().named_modules() if name.rpartition(".")[2] in lasts}
    inside = {name for name in meant if any(name.startswith(f"{part}.") for part in parts)}
    return sorted(lasts) if meant - inside == set(parts) else sorted(parts)


def _prove(params: PeftParams, inputs: FormatInputs, folder: Path, level: str) -> Proof:
    import importlib.metadata

    import torch

    from distft.export_formats import comparing
    from distft.export_formats import reference as models
    from distft.model.adapters.whole import load_beside

    reference, rows = inputs.reference(), inputs.rows()
    loaded = load_beside(folder, dtype=torch.float32).to(reference.model.device)
    prompts = comparing.prompts_of(reference, rows, reference.model.config.max_position_embeddings)
    exact = params.dtype in ("source", "float32")
    if inputs.source.kind == "reward":
        rewards = compare_rewards(inputs, loaded, prompts, REWARD_BOUND["float32" if exact else params.dtype])
        checks = [_products(inputs, folder, 1e-5 if exact else 2e-2), rewards]
        return Proof(runtime=f"peft {importlib.metadata.version('peft')}", checks=checks)
    wanted = [reference.greedy(prompt, comparing.GREEDY_TOKENS) for prompt in prompts]
    check, figures = comparing.divergence(
        reference,
        comparing.passages(prompts, wanted),
        lambda ids: models.logprobs(loaded, ids)[-1],
        bound=1e-6 if exact else 5e-3,
    )

    def write(ids: Any, most: int) -> list[int]:
        return list(models.greedy(loaded, ids, most, reference.stop_ids).ids)

    checks = [
        _products(inputs, folder, 1e-5 if exact else 2e-2),
        _reader_rules(folder),
        comparing.answer_end(reference, rows),
        comparing.greedy_tokens(prompts, wanted, write, tie=1e-3 if exact else None),
        check,
    ]
    runtime = f"peft {importlib.metadata.version('peft')}; the rules of vLLM's reader ({VLLM_RULES}), not vLLM itself"
    return Proof(runtime=runtime, checks=checks, figures=figures)


def _products(inputs: FormatInputs, folder: Path, bound: float) -> Comparison:
    """Compare alpha / r * B @ A of the files, as the least reader computes it, with PEFT's for the source."""
    from safetensors import safe_open

    from distft.model.adapters.whole import low_rank_parts

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    scale, worst, detail = config["lora_alpha"] / config["r"], 0.0, ""
    parts = low_rank_parts(inputs.reference().model)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name, (own, down, up) in parts.items():
            want = own * (up.double().cpu() @ down.double().cpu())
            a, b = (file.get_tensor(f"{PREFIX}{name}.lora_{side}.weight").double() for side in "AB")
            error = float((scale * (b @ a) - want).norm() / want.norm().clamp(min=1e-30))
            if error > worst:
                worst, detail = error, name
    return Comparison(
        name="products", compared="alpha / r * B @ A of the files against PEFT's for the source, relative",
        count=len(parts), value=worst, bound=f"at most {bound:g}", ok=worst <= bound, detail=detail,
    )  # fmt: skip


def _reader_rules(folder: Path) -> Comparison:
    broken = list(broken_rules(folder))
    return Comparison(
        name="rules of vLLM's reader", compared=f"the files against {VLLM_RULES}", count=6, value=len(broken),
        bound="0 broken", ok=not broken, detail=broken[0] if broken else "",
    )  # fmt: skip


def broken_rules(folder: Path) -> Iterator[str]:
    """Yield what vLLM would refuse, or read otherwise than PEFT."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in config:
            yield f"{key} is required"
    if config.get("modules_to_save"):
        yield "modules_to_save is not read"
    if config.get("use_dora"):
        yield "use_dora is not read"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield "rank_pattern and alpha_pattern are not read: one scale goes for all layers"
    if config.get("r", 0) > VLLM_RANKS[-1]:
        yield f"r = {config['r']} is more than {VLLM_RANKS[-1]}"
    for name in _tensor_names(folder):
        if not name.startswith(PREFIX) or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            yield f"{name} is no name of a LoRA tensor"


SPEC = ExportFormatSpec(
    name="peft",
    title="a LoRA that servers load beside their base (vLLM, TGI, llama.cpp's converter)",
    write=_write,
    prove=_prove,
    params=PeftParams,
    refuses=_refuses,
)
