"""LoRA, rsLoRA and DoRA: low-rank products beside frozen weights (PEFT).

Sources: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2312.03732 (rsLoRA),
https://arxiv.org/abs/2402.09353 (DoRA)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distft.core.registry import Params
from distft.model.adapters import targets
from distft.model.adapters.spec import MethodSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ADAPTER = "default"
"""PEFT's name of the one adapter we train; it is part of parameter names."""


class LoraParams(Params):
    """PEFT's names."""

    r: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: every linear layer but the head, name endings such as ["q_proj"], embeddings and the
    head among them, or a regular expression that fits whole names."""
    rslora: bool = False
    """Scale by alpha / sqrt(r): higher ranks keep learning."""
    dora: bool = False
    """Learn the magnitude of each output apart from its direction."""
    modules_to_save: tuple[str, ...] = ()
    """Layers trained whole beside the adapter, such as "lm_head"."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type adapters compute in; auto = the model's. The optimizer keeps an fp32 master either way."""


def attach(lm: Any, params: LoraParams, dtype: torch.dtype) -> nn.Module:
    """Wrap a model on the meta device; only adapters (and modules_to_save) require gradients."""
    import torch
    from peft import LoraConfig, get_peft_model

    named = params.target_modules
    config = LoraConfig(
        r=params.r,
        lora_alpha=params.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=params.dropout,
        target_modules=named if isinstance(named, str) else list(named),
        use_rslora=params.rslora,
        use_dora=params.dora,
        modules_to_save=targets.exact(lm, params.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    lm.requires_grad_(False)
    wrapped = get_peft_model(lm, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    wanted = dtype if params.adapter_dtype == "auto" else getattr(torch, params.adapter_dtype)
    for name, param in wrapped.named_parameters():
        if param.requires_grad:
            param.data = torch.empty_like(param, device="meta", dtype=wanted)
        assert param.requires_grad == owns(name) or ".modules_to_save." in name
    return wrapped


def owns(name: str) -> bool:
    """LoRA's own matrices and magnitudes."""
    return ".lora_" in name


def fresh(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
    """PEFT's default: A uniform as torch initialises a linear layer, B zero, so the adapter starts as identity.

    DoRA's magnitude starts as the norm of each of the base weight's rows, as stored (after quantisation).
    """
    import torch

    layer, is_magnitude, _ = name.partition(".lora_magnitude_vector.")
    if is_magnitude:
        from peft.utils.integrations import dequantize_module_weight

        base = model.get_submodule(layer).get_base_layer()  # type: ignore[operator]
        return torch.linalg.norm(dequantize_module_weight(base).float(), dim=1)

    value = torch.empty(meta.shape, dtype=torch.float32)
    if ".lora_A." in name:
        bound = 1 / math.sqrt(meta.shape[1])  # kaiming_uniform_(a=sqrt(5)) over the inputs
        return value.uniform_(-bound, bound, generator=generator)
    if ".lora_embedding_B." in name:
        return value.normal_(generator=generator)
    return value.zero_()


def base_name(name: str) -> str:
    """Strips PEFT's wrapper, the `base_layer` it hides a weight behind, and the copies of modules_to_save."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(".original_module.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")


SPEC = MethodSpec(
    name="lora",
    params=LoraParams,
    attach=attach,
    owns=owns,
    fresh=fresh,
    base_name=base_name,
    adapter=True,
    library="peft",
)
