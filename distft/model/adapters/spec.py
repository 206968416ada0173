"""What a method of choosing trainable weights declares about itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.core.registry import Params

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from distft.core.engine_traits import EngineTraits
    from distft.model.quant_params import QuantParams


def _none(params: Any) -> None:
    return None


def _no_tokens(params: Any) -> int:
    return 0


def file_key(name: str) -> str:
    """Return a parameter's name in PEFT's file, which leaves the adapter's name out."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")


def _by_file_key(weights: Any, name: str, meta: Tensor) -> Tensor | None:
    key = file_key(name)
    return weights.get_tensor(key) if key in weights.keys() else None  # noqa: SIM118


def _as_trained(params: Any) -> Any:
    return params


def _same_rate(params: Any) -> float:
    return 1.0


def _never(params: Any, engine: EngineTraits) -> str:
    return ""


def _no_difference(params: Any) -> bool:
    return False


def _no_reason(params: Any) -> str:
    return ""


def _same(params: Any, config: dict[str, Any]) -> Any:
    return params


def _no_name(name: str) -> bool:
    return False


def _save(lm: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Save as PEFT does, and transformers."""
    lm.save_pretrained(folder, state_dict=tensors)


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A named method: full fine-tuning, or an adapter beside a frozen base."""

    name: str
    params: type[Params]
    title: str = ""
    """What reports and model cards call it; empty: its name."""
    attach: Callable[[Any, Any, torch.dtype], nn.Module]
    """(transformers model on meta, params, model dtype) -> module with requires_grad set; may wrap."""
    owns: Callable[[str], bool]
    """Whether a parameter name belongs to the method itself and so is not in the base checkpoint."""
    fresh: Callable[[str, nn.Module, Tensor, torch.Generator], Tensor] | None = None
    """(name, attached model, meta tensor, generator) -> initial value of an owned parameter; the base layer it sits
    beside is already filled."""
    starts_at_zero: Callable[[str], bool] = _no_name
    """Whether an owned parameter of this name starts at zero. Where all of them are still zero nothing was trained, and
    no adapter is written."""
    base_name: Callable[[str], str] = str
    """Name of a parameter in the attached model -> its name in the base checkpoint."""
    quant: Callable[[Any], QuantParams | None] = _none
    """How the base is quantised, None when it is not."""
    quantized: bool = False
    """The base is stored in 4 bits."""
    adapted: Callable[[nn.Module], tuple[int, int]] | None = None
    """Attached model -> (layers, expert tensors) that have an adapter."""
    adapter: bool = False
    """final/ holds an adapter folder instead of a whole model."""
    saves_memory: int = 0
    """Place among the methods that a plan offers where memory is short: those with larger numbers save more. 0: it is
    not offered."""
    base_alone: Callable[[nn.Module], AbstractContextManager[None]] | None = None
    """Filled model (`distft.model.causal.CausalLM`) -> context in which its forwards compute with the base's weights
    alone; what a preference objective takes for its reference. None: the method changes the base itself."""
    virtual_tokens: Callable[[Any], int] = _no_tokens
    """params -> positions before every document and every prompt whose embeddings the method trains: it puts a
    `distft.model.adapters.virtual_tokens.VirtualEmbedding` in the place of the model's embedding."""
    save_adapter: Callable[[Any, Path, dict[str, Tensor]], None] = _save
    """(attached model, folder, trained tensors by their names) -> writes the adapter's files."""
    stored: Callable[[Any, str, Tensor], Tensor | None] = _by_file_key
    """(opened safetensors file of a saved adapter, name of an owned parameter, meta tensor) -> what is stored of it;
    None: the file does not hold it."""
    saved: Callable[[Any], Any] = _as_trained
    """params -> those of the adapter that final/ holds, where it is saved in another form than it is trained in."""
    reads_rows: Callable[[Any], bool] = _no_difference
    """params -> whether what the adapter starts from is found in the training rows (`distft.model.adapters.eva`)."""
    settled: Callable[[Any, dict[str, Any]], Any] = _same
    """(params, config of a saved adapter) -> params with what was found when it began, such as its ranks."""
    unplanned: Callable[[Any], str] = _no_reason
    """params -> why nobody can know before training what is trained; "" where a plan can count it."""
    filled_from: Path | None = None
    """The folder of the saved adapter that owned parameters are filled from (see `distft.model.adapters.trained`)."""
    faster: Callable[[str], bool] = _no_name
    """Whether a parameter of this name has a learning rate of `lr_ratio` times that of the others."""
    lr_ratio: Callable[[Any], float] = _same_rate
    """params -> that ratio."""
    blocks_differ: Callable[[Any], bool] = _no_difference
    """params -> whether what is trained differs from block to block, so that a plan has to look at all of them."""
    loader: str = ""
    """Python of the model card that loads final/, where PEFT does not: with `{folder}`, it makes `tokenizer` and
    `model`."""
    refuses: Callable[[Any, EngineTraits], str] = _never
    """(params, engine) -> why it cannot be trained under that engine; "" where it can."""
    optimizer: Callable[[Any, Any, int], Any] | None = None
    """(params, the recipe's `OptimizerSpec`, updates of the run or 0 for a plan) -> the spec of an optimizer around it
    that keeps state of the method's and changes weights after each update. Its parameter groups have the `names` of
    their tensors, which are whole: `refuses` has to name the engines that cut them."""
    penalty: Callable[[Any, nn.Module], Tensor] | None = None
    """(params, attached model) -> fp32 [], added to the loss of every supervised token. It reads parameters outside
    their modules' forwards, so they are whole here too."""
    library: str | None = None
    """Importable name of the package it needs beyond torch and transformers."""


def optimizer_of(method: MethodSpec, params: Any, optim: Any, num_steps: int = 0) -> Any:
    """Return the `OptimizerSpec` that a method trains with: the recipe's, or one around it."""
    return optim if method.optimizer is None else method.optimizer(params, optim, num_steps)


def leaves_base_alone(spec: MethodSpec, params: Any) -> bool:
    """Return whether the base alone is the model before training, and can be had beside the adapters.

    It is not where training goes on from an adapter, or where adapters start as a part of the base.
    """
    started = getattr(params, "start", None) is not None
    return spec.base_alone is not None and not started and spec.saved(params) == params
