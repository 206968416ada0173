"""A type of adapter that nobody has heard of, as somebody's package would register it with PEFT: outputs are scaled."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

NAME = "SCALE"


@dataclass
class ScaleConfig(PeftConfig):
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers that are left out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Layers that are trained whole."})
    start_at: float = field(default=1.0, metadata={"help": "What the factors start as."})
    from_weight: bool = field(default=False, metadata={"help": "Start them at the norm of the weight's rows instead."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME
        self.target_modules = set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules


class ScaleLayer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("scale_factor",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ScaleConfig) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.scale_factor = nn.ParameterDict({})
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], adapter_name
        factor = torch.full((self.base_layer.out_features,), config.start_at)
        if config.from_weight:
            factor = self.base_layer.weight.detach().norm(dim=1)
        self.scale_factor[adapter_name] = nn.Parameter(factor)
        self.set_adapter(self.active_adapters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.base_layer(x)
        return made if self.disable_adapters else made * self.scale_factor[self.active_adapters[0]]


class ScaleModel(BaseTuner):
    prefix = "scale_"
    tuner_layer_cls = ScaleLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self, config: Any, name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        self._replace_module(parent, target_name, ScaleLayer(target, name, config), target)


def register() -> None:
    """What the package's entry point would do."""
    mappings: Any = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    for mapping, value in zip(mappings, (ScaleConfig, ScaleModel, "scale_"), strict=True):
        mapping[NAME] = value


def unregister() -> None:
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(NAME, None)  # type: ignore[call-overload]
