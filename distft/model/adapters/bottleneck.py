"""Bottleneck adapters: two small layers with a nonlinearity between them, behind or beside a block's parts.

PEFT has none. They merge into nothing, and are saved as tensors by their names with a config in PEFT's place, which
the loader of the model card reads (`LOADER`).
Sources: https://arxiv.org/abs/1902.00751 (behind both parts), https://arxiv.org/abs/2005.00247 (behind the second),
https://arxiv.org/abs/2110.04366 (beside it)
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distft.core.registry import Params
from distft.model.adapters.spec import MethodSpec
from distft.model.adapters.sublayers import attention_of, feed_forward_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import Tensor, nn

PEFT_TYPE = "DISTFT_BOTTLENECK"
"""What the config says in the place of PEFT's type; PEFT refuses it."""
_CONFIG = "bottleneck_config"


class BottleneckParams(Params):
    """Of the two layers, and where they stand."""

    size: int = Field(default=64, ge=1)
    """Width between the two layers."""
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """Behind attention and behind the MLP, before the residual is added; behind the MLP alone; or beside the MLP, from
    what it reads."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Between the two layers."""
    scale: float = Field(default=1.0, gt=0)
    """What the adapter gives is multiplied by this."""
    bias: bool = True
    """Whether the two layers have biases."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type adapters compute in; auto = the model's. The optimizer keeps an fp32 master either way."""
    start: str | None = None
    """Go on from an adapter that was trained before, instead of from none: its folder, the folder of a run, or a hub
    id. Base, layers and sizes have to be the same."""


def _attach(lm: Any, params: BottleneckParams, dtype: torch.dtype) -> nn.Module:
    import torch

    from distft.model.adapters.bottleneck_layer import BottleneckLayer
    from distft.model.blocks import blocks_of

    lm.requires_grad_(False)
    wanted = dtype if params.adapter_dtype == "auto" else getattr(torch, params.adapter_dtype)
    width = lm.get_input_embeddings().weight.shape[1]
    for block in blocks_of(lm):
        parts = [feed_forward_of(lm, block, "bottleneck")]
        if params.placement == "houlsby":
            parts.append(attention_of(lm, block, "bottleneck"))
        for part in parts:
            BottleneckLayer(width, params, wanted).stand_behind(part)
    lm.__dict__[_CONFIG] = {"peft_type": PEFT_TYPE, **params.model_dump(mode="json", exclude={"start"})}
    return lm


def _owns(name: str) -> bool:
    return ".bottleneck." in name


def _starts_at_zero(name: str) -> bool:
    return ".bottleneck.up." in name or name.endswith(".bottleneck.down.bias")


def _fresh(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the first layer as torch draws linear layers; the second is zero, so that it starts as identity."""
    import torch

    value = torch.zeros(meta.shape)
    if _starts_at_zero(name):
        return value
    bound = 1 / math.sqrt(meta.shape[1])
    return value.uniform_(-bound, bound, generator=generator)


@contextlib.contextmanager
def _base_alone(module: nn.Module) -> Iterator[None]:
    from distft.model.adapters.bottleneck_layer import BottleneckLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BottleneckLayer)]
    for layer in layers:
        layer.left_out = True
    try:
        yield
    finally:
        for layer in layers:
            layer.left_out = False


def _adapted(model: nn.Module) -> tuple[int, int]:
    from distft.model.adapters.bottleneck_layer import BottleneckLayer

    return sum(isinstance(layer, BottleneckLayer) for layer in model.modules()), 0


def _save(lm: Any, folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    settings = lm.__dict__[_CONFIG]
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": lm.name_or_path, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")


LOADER = """\
import json
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}  # of this card
config = json.loads(Path(folder, "adapter_config.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype="auto")
tensors = load_file(Path(folder, "adapter_model.safetensors"))


def stand_behind(name):
    down, up = (
        [tensors.get(f"{{name}}.bottleneck.{{layer}}.{{kind}}") for kind in ("weight", "bias")]
        for layer in ("down", "up")
    )

    def add(part, args, kwargs, output):
        made = output[0] if isinstance(output, tuple) else output
        read = (*args, *kwargs.values())[0] if config["placement"] == "parallel" else made
        hidden = getattr(F, config["activation"])(F.linear(read.to(down[0].dtype), *down))
        made = made + (config["scale"] * F.linear(hidden, *up)).to(made.dtype)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    model.get_submodule(name).register_forward_hook(add, with_kwargs=True)


for name in {{key.partition(".bottleneck.")[0] for key in tensors}}:
    stand_behind(name)
"""

SPEC = MethodSpec(
    name="bottleneck",
    title="Bottleneck adapters",
    params=BottleneckParams,
    attach=_attach,
    owns=_owns,
    fresh=_fresh,
    starts_at_zero=_starts_at_zero,
    adapted=_adapted,
    adapter=True,
    base_alone=_base_alone,
    save_adapter=_save,
    loader=LOADER,
)
