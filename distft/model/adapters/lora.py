"""LoRA, rsLoRA and DoRA: low-rank products beside frozen weights (PEFT).

Sources: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2312.03732 (rsLoRA),
https://arxiv.org/abs/2402.09353 (DoRA)
"""

from __future__ import annotations

import contextlib
import math
import re
import types
import warnings
from typing import TYPE_CHECKING, Any

from distft.core.errors import MachineError, Problem, RecipeError
from distft.model.adapters import products, targets, token_rows
from distft.model.adapters.dora_on_4bit import magnitudes_later
from distft.model.adapters.lora_params import LoraParams, blocks_differ
from distft.model.adapters.spec import MethodSpec
from distft.model.heads.spec import head_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from torch import Tensor, nn

ADAPTER = "default"
"""PEFT's name of the one adapter we train; it is part of parameter names."""


def attach(lm: Any, params: LoraParams, dtype: torch.dtype) -> nn.Module:
    """Wrap a model on the meta device; only adapters (and modules_to_save) require gradients."""
    import torch
    from peft import LoraConfig, get_peft_model

    named, tensors, head = params.target_modules, _expert_targets(lm, params), head_of(lm)
    whole = list(dict.fromkeys([*targets.exact(lm, params.modules_to_save), *(head.trained_whole if head else ())]))
    if not isinstance(named, str):
        named = [name for name in named if not any(_matches(tensor, name) for tensor in tensors)]
    if params.layers_to_transform:
        named = targets.in_blocks(lm, named, params.layers_to_transform, without=not_adapted(lm) or [])
    config = LoraConfig(
        r=params.r,
        lora_alpha=params.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=params.dropout,
        target_modules=named,
        target_parameters=sorted(tensors) or None,
        exclude_modules=not_adapted(lm) if named == "all-linear" else None,
        rank_pattern=dict(params.rank_pattern),
        alpha_pattern=dict(params.alpha_pattern),
        use_rslora=params.rslora,
        use_dora=params.dora,
        modules_to_save=whole or None,
        trainable_token_indices=token_rows.indices(lm, params),
        task_type=head.task_type if head else "CAUSAL_LM",
    )
    lm.requires_grad_(False)
    _refuse_on_experts(lm, params, tensors)
    in_4bit = params.dora and bool(getattr(params, "quant", None))
    with warnings.catch_warnings(), magnitudes_later() if in_4bit else contextlib.nullcontext():
        # PEFT doubles the rank where it knows that two matrices were fused, and then does not find its own pattern.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        try:
            wrapped = get_peft_model(lm, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        except ValueError as error:
            fix = "give target_modules that PEFT can adapt in this architecture"
            raise RecipeError("recipe", [Problem(message=f"[method] {error}", fix=fix)]) from error
    wanted = dtype if params.adapter_dtype == "auto" else getattr(torch, params.adapter_dtype)
    for name, param in wrapped.named_parameters():
        if param.requires_grad:
            param.data = torch.empty_like(param, device="meta", dtype=wanted)
        assert param.requires_grad == owns(name) or ".modules_to_save." in name
    _refuse_misfits(wrapped, params)
    setattr(wrapped, _INIT, params.init)
    if params.init == "loftq":
        from distft.model.adapters import lora_inits

        lora_inits.keep_residuals(wrapped)
    _compute_in_experts(wrapped)
    token_rows.install(wrapped)
    products.fuse(wrapped, ADAPTER)
    if params.deploy is not None:
        from distft.model.adapters import deploy

        if tensors:
            raise RecipeError("recipe", [Problem(message="[method] deploy: experts in one tensor are not rounded here",
                                                 fix="leave deploy out")])  # fmt: skip
        deploy.refuse_rows_of_tokens(params, config.trainable_token_indices)
        deploy.install(wrapped, lm, params, ADAPTER)
    return wrapped


_INIT = "distft_init"


def _refuse_misfits(wrapped: nn.Module, params: LoraParams) -> None:
    """Refuse patterns that fit no adapted layer, ranks above a layer's, and starts that a layer cannot have.

    Raises:
        RecipeError: there is one.
    """
    from peft.tuners.lora.layer import LoraLayer

    layers: dict[str, Any] = {name: part for name, part in wrapped.named_modules() if isinstance(part, LoraLayer)}
    problem = None
    for key, pattern in (("rank_pattern", params.rank_pattern), ("alpha_pattern", params.alpha_pattern)):
        for entry in pattern:
            if not any(re.match(rf"(.*\.)?({entry})$", base_name(name)) for name in layers):
                names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
                problem = Problem(message=f'[method] {key}: "{entry}" fits no layer that gets an adapter',
                                  fix=f"they are {names}")  # fmt: skip
    for name, layer in layers.items():
        from_weight = params.init != "default"
        if from_weight and not ("default" in layer.lora_A and isinstance(layer.lora_A["default"], _linear())):
            problem = Problem(message=f'[method] init = "{params.init}": {base_name(name)} is no linear layer',
                              fix="leave it out of target_modules")  # fmt: skip
        least = min(layer.in_features, layer.out_features)
        if params.init in ("pissa", "olora", "loftq") and layer.r["default"] > least:
            problem = Problem(message=f"[method] r = {layer.r['default']}: {base_name(name)} has a rank of {least}",
                              fix=f"set r = {least} or less")  # fmt: skip
        if params.init in ("pissa", "olora") and name.endswith("lm_head"):
            problem = Problem(message=f'[method] init = "{params.init}" would change the head, which may be tied',
                              fix="leave it out of target_modules")  # fmt: skip
    if problem is not None:
        raise RecipeError("recipe", [problem])


def _linear() -> type:
    from torch import nn

    return nn.Linear


def save(lm: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Save as PEFT does, as an adapter that fits the base of the files (see `distft.model.adapters.lora_inits`)."""
    from distft.model.adapters import lora_inits

    lora_inits.save(lm, folder, tensors)


def saved_params(params: LoraParams) -> LoraParams:
    """Return the settings of what is saved: of twice the rank where a part of the base was taken out."""
    if params.init not in ("pissa", "olora"):
        return params
    more = math.sqrt(2) if params.rslora else 2
    changes = {
        "init": "default",
        "r": 2 * params.r,
        "alpha": more * params.alpha,
        "rank_pattern": {name: 2 * rank for name, rank in params.rank_pattern.items()},
        "alpha_pattern": {name: more * alpha for name, alpha in params.alpha_pattern.items()},
    }
    return params.model_copy(update=changes)


def not_adapted(lm: Any) -> list[str] | None:
    """Return the names of linear layers that `all-linear` leaves out; None where there are none.

    These are layers that no text passes through; routers and other layers of a model's own class whose forward is no
    plain product; and layers whose weights fused state-space kernels read directly, which PEFT refuses.
    """
    from torch import nn

    from distft.model.towers import other_modules

    left_out = set(other_modules(lm))
    for name, module in lm.named_modules():
        is_custom = type(module).__module__.startswith("transformers.") and isinstance(module, nn.Linear)
        fused = lm.config.model_type in _STATE_SPACE and name.rpartition(".")[2] == "out_proj"
        if fused or (is_custom and not _is_product(module)):
            left_out.add(name)
    return sorted(left_out) or None


def _is_product(module: Any) -> bool:
    """Return whether a linear layer of a model's own class gives one product: Falcon's does, Llama 4's router not."""
    import torch

    given = torch.empty(1, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        output = module(given)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


_STATE_SPACE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Source: peft.tuners.tuners_utils._check_lora_target_modules_mamba"""


def _expert_targets(lm: Any, params: LoraParams) -> set[str]:
    """Return names of the expert tensors that get an adapter, which PEFT matches against the ends of whole names.

    All of them by default; else those that a name in `target_modules` ends in, such as "experts.down_proj".
    """
    from distft.model import experts

    whole = {f"{name}.{short}" for name, _, short in experts.all_expert_tensors(lm)}
    suffixes = {".".join(name.rsplit(".", 3)[-3:]) for name in whole}
    if params.target_modules == "all-linear":
        return suffixes
    wanted = {tensor for tensor in suffixes if any(_matches(tensor, name) for name in params.target_parameters)}
    if isinstance(params.target_modules, str):  # a regular expression, which fits whole names
        fits = {name for name in whole if re.fullmatch(params.target_modules, name)}
        return wanted | {tensor for tensor in suffixes if any(name.endswith(tensor) for name in fits)}
    return wanted | {tensor for tensor in suffixes if any(_matches(tensor, name) for name in params.target_modules)}


def _matches(tensor: str, name: str) -> bool:
    return tensor == name or tensor.endswith(f".{name}") or name.endswith(f".{tensor}")


def _refuse_on_experts(lm: Any, params: LoraParams, tensors: set[str]) -> None:
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


def _compute_in_experts(wrapped: nn.Module) -> None:
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
        lora_a, lora_b, scale = wrapper.lora_A[ADAPTER], wrapper.lora_B[ADAPTER], wrapper.scaling[ADAPTER]
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
            for part in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]):
                part.forward = types.MethodType(weight, part)
                if module.num_experts > 1:
                    part.__dict__["beside_experts"] = inner  # not a submodule


def adapted_layers(model: nn.Module) -> tuple[int, int]:
    """Return (layers, expert tensors) that have an adapter."""
    counts = [getattr(module, "num_experts", 1) for module in model.modules() if hasattr(module, "lora_A")]
    tensors = sum(count > 1 for count in counts)
    return len(counts) - tensors, tensors


def owns(name: str) -> bool:
    """Return whether a name is one of LoRA's own matrices, magnitudes and rows of tokens."""
    return ".lora_" in name or token_rows.owns(name)


def starts_at_zero(name: str) -> bool:
    """Return whether a parameter is a B, with which an adapter begins as zero."""
    return ".lora_B." in name


def lr_ratio(params: LoraParams) -> float:
    """Return how many times the learning rate of the rest B has.

    Source: https://arxiv.org/abs/2402.12354
    """
    return params.lora_plus_ratio


def fresh(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
    """Draw PEFT's default: A uniform as torch initialises a linear layer, B zero, so it starts as identity.

    DoRA's magnitude starts as the norm of each of the base weight's rows, as stored (after quantisation).
    """
    import torch

    if token_rows.owns(name):
        return token_rows.fresh(name, model)
    init: Any = getattr(model, _INIT)
    if init != "default" and (".lora_A." in name or ".lora_B." in name):
        from distft.model.adapters import lora_inits

        return lora_inits.start(name, init, model, generator)
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
    """Strip PEFT's wrapper, the `base_layer` it hides a weight behind, and the copies of modules_to_save."""
    name = re.sub(r"(\.token_adapter)?(\.base_layer)+\.", ".", name.removeprefix("base_model.model."))
    return name.replace(".original_module.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")


@contextlib.contextmanager
def base_alone(module: nn.Module) -> Iterator[None]:
    """Leave the adapters out of forwards; parameters stay as they are, also where engines have sharded them.

    PEFT's own `disable_adapter` switches `requires_grad` as well, which engines have looked at by then.

    Raises:
        MachineError: something trained is read past PEFT's layers: an adapted head, layers trained whole, experts.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    lm: Any = module
    past = [layer for layer in layers if isinstance(layer, ParamWrapper)]
    past += [part for part in module.modules() if isinstance(part, ModulesToSaveWrapper)]
    past += [lm.head] if isinstance(lm.head, BaseTunerLayer) else []
    if past:
        raise MachineError(
            f"the base model alone cannot be computed beside {type(past[0]).__name__}: leave the head, experts and "
            "modules_to_save out of what is trained"
        )
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def refuses(params: LoraParams, engine: str) -> str:
    """Return why an engine cannot train with these settings; "" where it can."""
    return "deploy cannot be trained under zero3: layers read each other's weights" if (
        params.deploy is not None and engine == "zero3"
    ) else ""  # fmt: skip


SPEC = MethodSpec(
    name="lora",
    title="LoRA",
    params=LoraParams,
    attach=attach,
    owns=owns,
    fresh=fresh,
    starts_at_zero=starts_at_zero,
    base_name=base_name,
    adapted=adapted_layers,
    adapter=True,
    saves_memory=1,
    base_alone=base_alone,
    save_adapter=save,
    saved=saved_params,
    faster=starts_at_zero,
    lr_ratio=lr_ratio,
    refuses=refuses,
    blocks_differ=blocks_differ,
    library="peft",
)
