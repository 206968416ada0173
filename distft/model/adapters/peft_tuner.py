"""One way to attach any of PEFT's tuners to a model without values, and to read what it starts from.

PEFT draws what an adapter starts from while it makes its layers, beside weights that must be there. Here the base has
no values yet, so while PEFT works every weight of the base is a stand-in: one NaN, seen as a whole matrix, which takes
no memory. What PEFT has drawn is kept and given to the engine when it fills the adapter's layer; what came out as NaN
follows from the base's weights, and is drawn again beside the layer that the engine has filled by then.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from distft.core.errors import DistftError, MachineError, Problem, RecipeError
from distft.core.registry import Params
from distft.model.adapters.lora import ADAPTER, base_alone, base_name, not_adapted
from distft.model.adapters.spec import MethodSpec
from distft.model.quant_params import QuantParams

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

_OWN = re.compile(rf"\.{ADAPTER}(\.|$)")
UNTRAINED = "the adapter is still its initial value: nothing was trained, so nothing is saved"
_STARTS = "distft_starts"
"""Attribute of an attached model: what PEFT drew, by parameter name."""


class TunerParams(Params):
    """What every method of PEFT's tuners is set by."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: every linear layer but the head, name endings such as ["q_proj"], or a regular
    expression that fits whole names."""
    modules_to_save: tuple[str, ...] = ()
    """Layers trained whole beside the adapter, such as "lm_head"."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type adapters compute in; auto = the model's. The optimizer keeps an fp32 master either way."""
    start: str | None = None
    """Go on from an adapter that was trained before, instead of from none: its folder, the folder of a run, or a hub
    id. Base, layers and sizes have to be the same."""


class TunerParamsOn4bit(TunerParams):
    """Of tuners that train rightly beside a base in 4 bits."""

    quant: QuantParams | None = Field(default=None)
    """How base weights are stored in 4 bits; without it they are stored as they are."""


ParamsT = TypeVar("ParamsT", bound=TunerParams)


def tuner_spec(
    *,
    name: str,
    title: str,
    params: type[ParamsT],
    config: Callable[[ParamsT, dict[str, Any]], Any],
    starts_at_zero: Callable[[str], bool] | None = None,
    blocks_differ: Callable[[ParamsT], bool] | None = None,
) -> MethodSpec:
    """Return the spec of a method that is one of PEFT's tuners.

    Args:
        name: of the method.
        title: in reports and model cards.
        params: its keys.
        config: (params, keywords that all configs take) -> PEFT's config.
        starts_at_zero: see `MethodSpec`; None: nothing does.
        blocks_differ: see `MethodSpec`; None: they never do.
    """

    def attach(lm: Any, chosen: ParamsT, dtype: torch.dtype) -> nn.Module:
        def made() -> Any:
            return config(chosen, common_settings(lm, chosen))

        return attach_tuner(lm, made, chosen, dtype)

    optional = {"starts_at_zero": starts_at_zero, "blocks_differ": blocks_differ}
    more: dict[str, Any] = {name: given for name, given in optional.items() if given is not None}
    return MethodSpec(
        name=name,
        title=title,
        params=params,
        attach=attach,
        owns=owns,
        fresh=fresh,
        base_name=base_name,
        adapted=adapted_layers,
        quant=_quant,
        adapter=True,
        base_alone=base_alone,
        save_adapter=save,
        library="peft",
        **more,
    )


def _quant(params: Any) -> QuantParams | None:
    return getattr(params, "quant", None)


def owns(name: str) -> bool:
    """Return whether a name is one of the adapter's own: PEFT names them all after the adapter."""
    return bool(_OWN.search(name)) and ".modules_to_save." not in name


def common_settings(lm: Any, params: TunerParams) -> dict[str, Any]:
    """Return the keywords that the configs of all tuners take."""
    from distft.model.adapters import targets
    from distft.model.heads.spec import head_of

    head = head_of(lm)
    whole = list(dict.fromkeys([*targets.exact(lm, params.modules_to_save), *(head.trained_whole if head else ())]))
    named = params.target_modules
    settings: dict[str, Any] = {
        "task_type": head.task_type if head else "CAUSAL_LM",
        "target_modules": named if isinstance(named, str) else list(named),
        "modules_to_save": whole or None,
    }
    if named == "all-linear" and (left_out := not_adapted(lm)):
        settings["exclude_modules"] = left_out
    return settings


# -- attaching ---------------------------------------------------------------------------------------------------------


def attach_tuner(lm: Any, config: Callable[[], Any], params: TunerParams, dtype: torch.dtype) -> nn.Module:
    """Wrap a model on the meta device by PEFT; the adapter and `modules_to_save` alone require gradients.

    Args:
        lm: a transformers model on the meta device.
        config: makes PEFT's config; what it raises is the recipe's mistake.
        params: of the method.
        dtype: of the model.

    Raises:
        RecipeError: PEFT refuses the settings or the model, or what would be trained is not the adapter.
    """
    import torch
    from peft import get_peft_model

    from distft.model.adapters.base_reads import BaseReads

    lm.requires_grad_(False)
    head = lm.get_output_embeddings()
    bases = {id(param): name for name, param in lm.named_parameters()}
    with warnings.catch_warnings(), _stand_ins(lm) as originals:
        warnings.simplefilter("ignore")
        stand_ins = {id(stand_in) for stand_in in originals.values()}
        reads = BaseReads(originals.values())
        try:
            with reads:
                wrapped = get_peft_model(lm, config(), autocast_adapter_dtype=False)
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            if "linalg" in str(error):  # of NaN there is no decomposition
                raise _mistake(
                    "what it starts from follows from a decomposition of the base's weights, which are filled later",
                    'choose another method, or name = "lora"',
                ) from error
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise _mistake(f"PEFT: {first}", "give settings and target_modules that it takes for this model") from error
        own = {name: param for name, param in wrapped.named_parameters() if id(param) not in stand_ins}
        trained = [name for name, param in wrapped.named_parameters() if param.requires_grad]
        _refuse_other_trained(trained, own)
        starts = {name: param.detach() for name, param in own.items() if owns(name)}
        _refuse_lost_reads(wrapped, starts, reads.operations)
        wanted = dtype if params.adapter_dtype == "auto" else getattr(torch, params.adapter_dtype)
        _to_meta(wrapped, own, wanted)
    if {id(param) for name, param in wrapped.named_parameters() if name not in own} != set(bases):
        raise MachineError(f"PEFT's {type(wrapped).__name__} has left out or copied weights of the base")
    if lm.get_output_embeddings() is not head and not hasattr(lm.get_output_embeddings(), "modules_to_save"):
        raise _mistake("the head takes no adapter of this method", "leave it out, or train it whole: modules_to_save")
    wrapped.__dict__[_STARTS] = starts
    return wrapped


def _refuse_other_trained(trained: list[str], own: Mapping[str, Any]) -> None:
    """Refuse an adapter of which something trains the base, or nothing is trained."""
    outside = [name for name in trained if name not in own]
    strange = [name for name in own if not owns(name) and ".modules_to_save." not in name]
    if outside:
        raise _mistake(f"it would train {outside[0]}, which is the base's", 'leave bias = "none"')
    if strange:
        raise _mistake(f"it adds {strange[0]}, whose name is none of an adapter's", "choose another method")
    if not any(owns(name) for name in trained):
        raise _mistake("nothing of the adapter would be trained", "choose another method")


def _refuse_lost_reads(wrapped: nn.Module, starts: Mapping[str, Tensor], operations: set[str]) -> None:
    """Refuse what follows from the base's weights and cannot be drawn again when they are there.

    Parameters that are NaN can; buffers cannot, nor what a choice of elements has lost the NaN of.
    """
    again = any(value.is_floating_point() and bool(value.isnan().any()) for value in starts.values())
    buffers = [name for name, buffer in wrapped.named_buffers() if owns(name)]
    if operations and (buffers or not again):
        raise _mistake(
            f"what it starts from follows from the base's weights ({', '.join(sorted(operations)[:3])}), which are "
            "filled later, block by block",
            'choose another method, or name = "lora"',
        )


def _to_meta(wrapped: nn.Module, own: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Put parameters without values where PEFT's are; those that are shared stay shared."""
    import torch
    from torch import nn

    metas: dict[int, nn.Parameter] = {}
    ours = {id(param) for param in own.values()}
    for module in wrapped.modules():
        for short, param in module._parameters.items():
            if param is None or id(param) not in ours:
                continue
            if id(param) not in metas:
                kind = dtype if param.is_floating_point() else param.dtype
                empty = torch.empty(param.shape, device="meta", dtype=kind)
                metas[id(param)] = nn.Parameter(empty, requires_grad=param.requires_grad)
            module._parameters[short] = metas[id(param)]


@contextlib.contextmanager
def _stand_ins(lm: nn.Module) -> Iterator[dict[int, nn.Parameter]]:
    """Put one NaN, seen as a whole tensor, in the place of each parameter inside the context.

    Yields original's id -> stand-in. Copies that were made of modules meanwhile keep theirs.
    """
    import torch
    from torch import nn

    stand_ins: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in lm.modules():
        for short, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in stand_ins:
                kind = param.dtype if param.is_floating_point() else torch.float32
                value = torch.full((), math.nan, dtype=kind).expand(param.shape)
                stand_in = nn.Parameter(value, requires_grad=False)
                # What bitsandbytes' weights say of themselves.
                for said, value_said in vars(param).items():
                    setattr(stand_in, said, value_said)
                stand_ins[id(param)] = stand_in
            places.append((module, short, param))
            module._parameters[short] = stand_ins[id(param)]
    try:
        yield stand_ins
    finally:
        for module, short, param in places:
            module._parameters[short] = param


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("recipe", [Problem(message=f"[method] {message}", fix=fix)])


def adapted_layers(model: nn.Module) -> tuple[int, int]:
    """Return (layers that have an adapter, 0)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(module, BaseTunerLayer) for module in model.modules()), 0


# -- values ------------------------------------------------------------------------------------------------------------


def fresh(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
    """Return what PEFT drew for a parameter; of one that follows from the base's weights, what it draws beside them."""
    starts: dict[str, Tensor] = model.__dict__[_STARTS]
    if starts[name].is_floating_point() and starts[name].isnan().any():
        starts.update(_beside_base(model, _layer_of(name, model), generator))
    return starts[name]


def keep_starts(attached: nn.Module, own: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
    """Keep what parameters have been drawn as, for `start_of`, and put some without values in their place."""
    attached.__dict__[_STARTS] = {name: param.detach() for name, param in own.items()}
    _to_meta(attached, own, dtype)


def start_of(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
    """Return what a parameter was drawn as when it was attached (see `keep_starts`)."""
    return model.__dict__[_STARTS][name]


def _layer_of(name: str, model: nn.Module) -> str:
    """Return the name of the adapted layer that a parameter belongs to."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:length])), BaseTunerLayer):
            return ".".join(parts[:length])
    raise MachineError(f"{name} belongs to no adapted layer, and what it starts from follows from the base's weights")


def _beside_base(model: Any, layer: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Return what the parameters of one layer start from, drawn by PEFT beside its filled base.

    Raises:
        RecipeError: PEFT changes the base's weights while it does: the adapter would not fit the base.
    """
    import torch
    from peft import inject_adapter_in_model
    from torch import nn

    base: Any = model.get_submodule(layer).get_base_layer()
    before = base.weight.detach().clone()
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.target_modules, config.exclude_modules, config.modules_to_save = {"target"}, None, None
    holder: Any = nn.Module()
    holder.target = base
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(generator.initial_seed() % 2**63)
        holder = inject_adapter_in_model(config, holder)
    if base.weight.shape != before.shape or not torch.equal(base.weight, before):
        raise _mistake("it changes the base's weights when it starts, so that its adapter would fit no base", "")
    return {
        f"{layer}.{name}": param.detach().clone()
        for name, param in holder.target.named_parameters()
        if owns(f"{layer}.{name}")
    }


def save(lm: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Save as PEFT does: what is trained, and the buffers that belong to the adapter.

    Raises:
        DistftError: all of it is still what PEFT drew.
    """
    starts: dict[str, Tensor] = lm.__dict__[_STARTS]
    if all(name in starts and tensor.equal(starts[name].to(tensor.dtype)) for name, tensor in tensors.items()):
        raise DistftError(UNTRAINED)
    state = {name: buffer.detach().cpu() for name, buffer in lm.named_buffers(remove_duplicate=False)}
    first = {id(param): name for name, param in lm.named_parameters()}
    for name, param in lm.named_parameters(remove_duplicate=False):  # PEFT asks for what layers share by a name of its
        if first[id(param)] in tensors:
            state[name] = tensors[first[id(param)]]
    lm.save_pretrained(folder, state_dict=state)
