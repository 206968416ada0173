"""LoRA on experts that a model holds as one tensor: which of them get an adapter, and how they compute with it."""

from __future__ import annotations

import re
import types
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from distft.model.adapters.lora_params import LoraParams


def expert_targets(lm: Any, params: LoraParams) -> set[str]:
    """Return names of the expert tensors that get an adapter, which PEFT matches against the ends of whole names.

    All of them by default; else those that a name in `target_modules` ends in, such as "experts.down_proj".
    """
    from distft.model import experts

    whole = {f"{name}.{short}" for name, _, short in experts.all_expert_tensors(lm)}
    suffixes = {".".join(name.rsplit(".", 3)[-3:]) for name in whole}
    if params.target_modules == "all-linear":
        return suffixes
    wanted = {tensor for tensor in suffixes if any(matches(tensor, name) for name in params.target_parameters)}
    if isinstance(params.target_modules, str):  # a regular expression, which fits whole names
        fits = {name for name in whole if re.fullmatch(params.target_modules, name)}
        return wanted | {tensor for tensor in suffixes if any(name.endswith(tensor) for name in fits)}
    return wanted | {tensor for tensor in suffixes if any(matches(tensor, name) for name in params.target_modules)}


def matches(tensor: str, name: str) -> bool:
    """Return whether one of two names of a tensor is the end of the other."""
    return tensor == name or tensor.endswith(f".{name}") or name.endswith(f".{tensor}")


def refuse_on_experts(lm: Any, params: LoraParams, tensors: set[str]) -> None:
    """Refuse dropout and DoRA for parameters that hold several experts: PEFT has neither.

    Raises:
        RecipeError: the recipe asks for one of them.
    """
    wanted = "dropout" if params.dropout else "dora" if params.dora else None
    if wanted is None or not tensors:
        return
    problem = Problem(
        message=f"[method] {wanted}: {type(lm).__name__} holds its experts as tensors ({', '.join(sorted(tensors))}), "
        f"whose adapters have no {wanted}",
        fix=f'leave {wanted} out, or give target_modules without experts, such as ["q_proj", "v_proj"]',
    )
    raise RecipeError("recipe", [problem])


def compute_in_experts(wrapped: nn.Module, adapter: str) -> None:
    """Compute adapters of expert tensors here; PEFT's wrappers hold the adapters and take part in names.

    PEFT turns the wrapped parameter into a parametrization and back in every forward, which engines that gather
    parameters around forwards lose sight of. Here the expert module computes with `W + scale * A B`, the sum that PEFT
    computes, and each adapter matrix is read inside a forward of its own module, where engines look for it.
    """
    import torch
    from peft.tuners.lora.layer import ParamWrapper

    from distft.model import experts

    def passed_on(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs)

    def weight(self: Any) -> Tensor:
        return self.weight.clone()  # the module's own is given back to its engine at the end of this call

    def adapted(wrapper: Any) -> Callable[[Tensor], Tensor]:
        lora_a, lora_b, scale = wrapper.lora_A[adapter], wrapper.lora_B[adapter], wrapper.scaling[adapter]
        count, swapped = wrapper.num_experts, wrapper._did_swap_in_out_features

        def added(base: Tensor) -> Tensor:
            if wrapper.disable_adapters:
                return base
            a, b = lora_a(), lora_b()
            if count == 1:  # a plain matrix, such as a router's
                return base + (scale * (b @ a)).to(base.dtype)
            a = a.reshape(count, -1, a.shape[-1])  # [experts, rank, in]
            b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)  # [experts, out, rank]
            left, right = (b, a) if swapped else (a.transpose(-2, -1), b.transpose(-2, -1))
            return torch.baddbmm(base, left.to(base.dtype), right.to(base.dtype), alpha=scale)

        return added

    for module in list(wrapped.modules()):
        if isinstance(module, ParamWrapper):
            inner: Any = module.get_base_layer()
            experts.compute_with(inner, module.parameter_name, adapted(module))
            module.forward = types.MethodType(passed_on, module)
            for part in (module.lora_A[adapter], module.lora_B[adapter]):
                part.forward = types.MethodType(weight, part)
                if module.num_experts > 1:
                    part.__dict__["beside_experts"] = inner  # not a submodule
