"""LoRA, rsLoRA and DoRA: low-rank products beside frozen weights (PEFT).

Sources: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2312.03732 (rsLoRA),
https://arxiv.org/abs/2402.09353 (DoRA)
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from typing import TYPE_CHECKING, Any

from distft.core.errors import MachineError, Problem, RecipeError
from distft.model.adapters import lora_experts, products, targets, token_rows
from distft.model.adapters.dora_on_4bit import magnitudes_later
from distft.model.adapters.lora_params import LoraParams, blocks_differ, reads_rows, settled, unplanned
from distft.model.adapters.spec import MethodSpec
from distft.model.heads.spec import head_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from distft.core.engine_traits import EngineTraits

ADAPTER = "default"
"""PEFT's name of the one adapter we train; it is part of parameter names."""


def attach(lm: Any, params: LoraParams, dtype: torch.dtype) -> nn.Module:
    """Wrap a model on the meta device; only adapters (and modules_to_save) require gradients."""
    import torch
    from peft import LoraConfig, get_peft_model

    named, tensors, head = params.target_modules, lora_experts.expert_targets(lm, params), head_of(lm)
    whole = list(dict.fromkeys([*targets.exact(lm, params.modules_to_save), *(head.trained_whole if head else ())]))
    if not isinstance(named, str):
        named = [name for name in named if not any(lora_experts.matches(tensor, name) for tensor in tensors)]
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
    lora_experts.refuse_on_experts(lm, params, tensors)
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
    lora_experts.compute_in_experts(wrapped, ADAPTER)
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
    if init == "eva":
        raise MachineError('[method] init = "eva" starts from rows that nobody has looked at here')
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


def refuses(params: LoraParams, engine: EngineTraits) -> str:
    """Return why an engine cannot train with these settings; "" where it can."""
    if params.deploy is None or engine.parameters != "cut by module":
        return ""
    return f"deploy cannot be trained under {engine.name}: layers read each other's weights"


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
    reads_rows=reads_rows,
    settled=settled,
    unplanned=unplanned,
    blocks_differ=blocks_differ,
    library="peft",
)
