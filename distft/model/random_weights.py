"""Weights that are not read from files: the architecture's own initialisation, or none where nothing is filled."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distft.core.errors import MachineError
from distft.model import quantize
from distft.model.weights import meta_params


class RandomSource:
    """The architecture's own initialisation, one module at a time, seeded by its name.

    Drawn on the CPU whatever the run's device: generators of other devices, and of GPUs of another kind, give other
    numbers for the same seed.
    """

    def __init__(self, lm: Any, seed: int, dtype: torch.dtype) -> None:
        self._init: Callable[[nn.Module], None] = lm._init_weights
        self._seed, self._dtype = seed, dtype

    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Run transformers' rule for this module on a stand-in that holds real tensors."""
        kind: Any = quantize.plain_class(module)
        stand_in: Any = kind.__new__(kind)
        stand_in.__dict__.update({k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_modules")})
        stand_in._modules = {}
        # NaN tells what the rule leaves to the constructor, whose values a model on the meta device does not have.
        stand_in._parameters = {
            short: nn.Parameter(torch.full(shape, math.nan, dtype=self._dtype, device="cpu"))
            for short, meta in meta_params(module)
            for shape in (quantize.whole_shape(module, short, meta),)
        }
        stand_in._parameters |= {short: None for short in module._parameters if short not in stand_in._parameters}
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
            torch.default_generator.manual_seed(seed_of(self._seed, name))
            try:
                self._init(stand_in)
            except AttributeError as error:  # its rule reaches into its parts, which the stand-in does not have
                raise MachineError(
                    f'init = "random": transformers initialises the parts of {kind.__name__} together ({error}), and '
                    'here each is made by itself; save such a model with transformers, load it with init = "pretrained"'
                ) from error
        values = {short: param.detach() for short, param in stand_in._parameters.items() if param is not None}
        for short, value in values.items():
            if value.isnan().any():
                raise MachineError(
                    f'init = "random": transformers has no rule for {name}.{short} of {kind.__name__} beside its '
                    'constructor; save such a model with transformers, load it with init = "pretrained"'
                )
        return {short: value.to(device) for short, value in values.items()}

    def buffer(self, name: str, device: torch.device) -> Tensor | None:
        """Return None: what constructors put into buffers stands."""
        return None


class NoSource:
    """For models that are counted and never filled."""

    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Refuse to give values.

        Raises:
            MachineError: always.
        """
        raise MachineError("this model was built without weights, for counting only")

    def buffer(self, name: str, device: torch.device) -> Tensor | None:
        """Refuse to give a buffer.

        Raises:
            MachineError: always.
        """
        raise MachineError("this model was built without weights, for counting only")


def seed_of(seed: int, name: str) -> int:
    """Return the seed of what is called `name`, for any order of asking."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
