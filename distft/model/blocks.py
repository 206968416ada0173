"""The repeated blocks of a transformers model."""

from __future__ import annotations

from typing import Any

from torch import nn

from distft.core.errors import MachineError


def blocks_of(lm: Any) -> list[nn.Module]:
    """The repeated transformer blocks of a transformers model, in order: what engines gather and shard at a time.

    The architecture names them (`_no_split_modules`), some with a part of each of them, which is left out here (Mamba
    names block and mixer); where it does not, they are the entries of its largest list.

    Raises:
        MachineError: there is no list of modules of one class.
    """
    kinds = set(lm._no_split_modules or ())
    blocks: list[nn.Module] = []
    inside: set[int] = set()
    for module in lm.modules():  # an outer module comes before what it holds
        if type(module).__name__ in kinds and id(module) not in inside:
            blocks.append(module)
            inside |= {id(part) for part in module.modules()}
    return blocks or _largest_list(lm)


def _largest_list(lm: Any) -> list[nn.Module]:
    """The entries of the list of modules that holds most parameters."""

    def numel(module: nn.Module) -> int:
        return sum(param.numel() for param in module.parameters())

    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    lists = [entries for entries in lists if len({type(entry) for entry in entries}) == 1 and numel(entries)]
    if not lists:
        raise MachineError(f"{type(lm).__name__} has no list of blocks, so it cannot be sharded")
    return list(dict.fromkeys(max(lists, key=numel)))
