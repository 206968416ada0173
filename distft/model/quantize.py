"""4-bit base weights (bitsandbytes): matrices marked on the meta device, quantised one by one when they are filled.

Source: Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distft.core.errors import Problem, RecipeError
from distft.model import experts
from distft.model.quant_params import QuantName, QuantParams

REST_SHARE = 0.05
"""Most of the blocks' weights that a 4-bit base may leave as they are, without a refusal."""


def store_in_4bit(lm: Any, params: QuantParams, dtype: torch.dtype) -> None:
    """Have the blocks' matrices stored in 4 bits: linear layers, GPT-2's Conv1D, experts in fused form.

    The output projection and embeddings stay; weights stay meta until filled.

    Raises:
        RecipeError: the architecture keeps matrices in another form, which would stay in 16 bits.
    """
    _swap_linears(lm, params, dtype)
    for name, module, short in experts.all_expert_tensors(lm):
        if params.compute_dtype != "auto" and getattr(torch, params.compute_dtype) is not dtype:
            raise RecipeError(
                "recipe",
                [
                    Problem(
                        message=f"[method] quant.compute_dtype: {name}.{short} holds experts, which compute in the "
                        "model's dtype",
                        fix='leave it out, or set "auto"',
                    )
                ],
            )
        _mark_expert(module, short, params, dtype)
    _refuse_rest(lm, dtype)
    lm.is_loaded_in_4bit = True  # what PEFT and transformers look for


def _swap_linears(lm: Any, params: QuantParams, dtype: torch.dtype) -> None:
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.pytorch_utils import Conv1D

    head = lm.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    targets = [(name, mod) for name, mod in lm.named_modules() if type(mod) in kinds and mod is not head]
    for name, linear in targets:
        parent_name, _, leaf = name.rpartition(".")
        rows, columns = linear.weight.shape
        columns, rows = (rows, columns) if type(linear) is Conv1D else (columns, rows)
        swapped: Any = Linear4bit(
            columns,
            rows,
            bias=linear.bias is not None,
            compute_dtype=_resolved(params.compute_dtype, dtype),
            compress_statistics=params.double,
            quant_type=params.type,
            quant_storage=_resolved(params.storage_dtype, dtype),
            device="meta",
        )
        # bitsandbytes 0.50 repacks the weights for AVX-512 at the first forward in eval mode, rounding their constants
        # to bf16: an evaluation would change what is trained. Drop this when repacking leaves the constants alone.
        swapped.support_avx512bf16_for_cpu = False
        swapped.plain_class = type(linear)
        if swapped.bias is not None:
            swapped.bias = nn.Parameter(swapped.bias.to(dtype), requires_grad=False)
        setattr(lm.get_submodule(parent_name), leaf, swapped)


def _resolved(name: QuantName, dtype: torch.dtype) -> torch.dtype:
    return dtype if name == "auto" else getattr(torch, name)


def _refuse_rest(lm: Any, dtype: torch.dtype) -> None:
    """Refuse an architecture most of whose matrices are in a form that is not known here."""
    outside = {id(param) for part in (lm.get_input_embeddings(), lm.get_output_embeddings()) if part is not None
               for param in part.parameters()}  # fmt: skip
    whole = rest = 0
    left = []
    for module_name, module in lm.named_modules():
        for short, param in module._parameters.items():
            if param is None or param.ndim < 2 or id(param) in outside or isinstance(module, nn.Embedding):
                continue
            whole += param.numel()
            if not is_4bit(module) and not is_4bit_expert(module, short):
                rest += param.numel()
                left.append(f"{module_name}.{short}")
    if rest > REST_SHARE * whole:
        raise RecipeError(
            "recipe",
            [
                Problem(
                    message=f"[method] qlora: {rest:,} of {whole:,} weights of {type(lm).__name__}'s blocks would stay "
                    f"in 16 bits ({rest * dtype.itemsize / 2**30:.2f} GiB), first {left[0]}",
                    fix='use [method] name = "lora"',
                )
            ],
        )


@dataclass(frozen=True, kw_only=True)
class In4bit:
    """How one parameter is stored."""

    type: Literal["nf4", "fp4"]
    double: bool
    storage: torch.dtype
    shape: tuple[int, ...]
    """Shape of the values."""


def _mark_expert(module: Any, short: str, params: QuantParams, dtype: torch.dtype) -> None:
    """Mark an expert to be packed when it is filled; the forward dequantises it."""
    stored = In4bit(
        type=params.type,
        double=params.double,
        storage=_resolved(params.storage_dtype, dtype),
        shape=tuple(module._parameters[short].shape),
    )
    module.__dict__.setdefault("four_bit", {})[short] = stored
    module._parameters[short].requires_grad_(False)

    def dequantised(param: Tensor) -> Tensor:
        state = module.__dict__.get("quant_states", {}).get(short)
        return param if state is None else _dequantised(param, state)  # on meta nothing is packed

    experts.compute_with(module, short, dequantised)


@torch.no_grad()
def _dequantised(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes import functional

    return functional.dequantize_4bit(packed.detach(), state)


def is_4bit(module: nn.Module) -> bool:
    """Return whether this layer's weight is stored in 4 bits."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes")


def is_4bit_expert(module: nn.Module, short: str) -> bool:
    """Return whether this parameter holds experts that are stored in 4 bits."""
    return short in module.__dict__.get("four_bit", {})


def stored_in_4bit(module: Any) -> Iterator[tuple[nn.Parameter, In4bit]]:
    """Yield a module's own parameters that are stored in 4 bits, and how."""
    if is_4bit(module):
        weight = module.weight
        yield (
            weight,
            In4bit(
                type=weight.quant_type,
                double=weight.compress_statistics,
                storage=weight.quant_storage,
                shape=(module.out_features, module.in_features),
            ),
        )
    for short, how in module.__dict__.get("four_bit", {}).items():
        yield module._parameters[short], how


def plain_class(module: Any) -> type[nn.Module]:
    """Return the class that the architecture has in this place."""
    return module.plain_class if is_4bit(module) else type(module)


def whole_shape(module: Any, short: str, meta: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter in the base's files."""
    if short == "weight" and is_4bit(module):
        shape = (module.out_features, module.in_features)
        return shape if module.plain_class is nn.Linear else shape[::-1]
    return tuple(meta.shape)


def quantized(module: Any, whole: Tensor) -> Any:
    """Return the 4-bit parameter that holds `whole`, as the base's files have it, for this layer's device."""
    from bitsandbytes.nn import modules

    assert tuple(whole.shape) == whole_shape(module, "weight", whole)
    if module.plain_class is not nn.Linear:
        whole = whole.T.contiguous()
    params_4bit: Any = modules.Params4bit
    meta = module.weight
    weight = params_4bit(
        whole,
        requires_grad=False,
        compress_statistics=meta.compress_statistics,
        quant_type=meta.quant_type,
        quant_storage=meta.quant_storage,
        module=module,
    )
    return weight.to(whole.device)  # moving is what quantises


@torch.no_grad()
def lost(module: Any, packed: Any, whole: Tensor) -> Tensor:
    """Return fp32 [out, in], what `whole` is more than what its 4-bit parameter dequantises to."""
    from bitsandbytes import functional

    whole = whole if module.plain_class is nn.Linear else whole.T
    return whole.float() - functional.dequantize_4bit(packed.data, packed.quant_state).float()


def quantized_expert(module: Any, short: str, whole: Tensor) -> nn.Parameter:
    """Return the packed parameter that holds `whole` [experts, rows, columns]; the module keeps its constants."""
    from bitsandbytes import functional

    stored: In4bit = module.__dict__["four_bit"][short]
    packed, state = functional.quantize_4bit(
        whole, compress_statistics=stored.double, quant_type=stored.type, quant_storage=stored.storage
    )
    module.__dict__.setdefault("quant_states", {})[short] = state
    return nn.Parameter(packed, requires_grad=False)


def names_in_4bit(lm: Any) -> dict[str, tuple[nn.Module, str]]:
    """Return, by name, the parameters that `store_in_4bit` marked: the module that holds each, and its short name."""
    marked = {}
    for name, module in lm.named_modules():
        shorts = ["weight"] if is_4bit(module) else []
        shorts += module.__dict__.get("four_bit", {})
        marked |= {f"{name}.{short}": (module, short) for short in shorts}
    return marked


@torch.no_grad()
def round_trip(module: Any, short: str, whole: Tensor) -> Tensor:
    """Return what a forward computes with in place of `whole`: quantised as it is for training, and dequantised."""
    from bitsandbytes import functional

    if is_4bit_expert(module, short):
        packed = quantized_expert(module, short, whole)
        return _dequantised(packed, module.__dict__["quant_states"].pop(short))
    weight = quantized(module, whole)
    value = functional.dequantize_4bit(weight.data, weight.quant_state)
    return value if module.plain_class is nn.Linear else value.T.contiguous()


@torch.no_grad()
def value_of(layer: Any) -> Tensor:
    """Return the weight [O, I] that a filled layer in 4 bits computes with."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing a loaded model's weights anew for AVX-512, see `_swap_linears`.

    It also fails there for layers whose outputs are no multiple of its block.
    """
    layers: list[Any] = [module for module in model.modules() if is_4bit(module)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


@torch.no_grad()
def packed_4bit(whole: Tensor, params: QuantParams) -> dict[str, Tensor]:
    """Return the tensors in which bitsandbytes stores a matrix: the packed values as "", constants by their names."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(whole, compress_statistics=params.double, quant_type=params.type)
    return {"": packed, **state.as_dict(packed=True)}


def stored_4bit(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantise a weight as bitsandbytes saves it: `parts` by the names after the weight's, itself as ""."""
    from bitsandbytes import functional

    packed = parts[""]
    state = functional.QuantState.from_dict({k: v for k, v in parts.items() if k}, device=packed.device)
    return functional.dequantize_4bit(packed, state).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How many of a model's weights are stored in 4 bits."""

    four_bit: int
    whole: int

    def __str__(self) -> str:
        return f"{self.four_bit:,} of {self.whole:,} base weights are in 4 bits ({self.four_bit / self.whole:.1%})"


def count(module: nn.Module) -> Stored:
    """Return the weights that are not trained, by whole shape; call before an engine packs or shards them."""
    four_bit = whole = 0
    seen: set[int] = set()
    for part in module.modules():
        for short, param in part._parameters.items():
            if param is None or param.requires_grad or id(param) in seen:
                continue
            seen.add(id(param))
            whole += param.numel()
            if is_4bit_expert(part, short) or (is_4bit(part) and short == "weight"):
                four_bit += param.numel()
    return Stored(four_bit=four_bit, whole=whole)
