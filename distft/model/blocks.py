"""The repeated blocks of a transformers model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from distft.core.errors import MachineError

if TYPE_CHECKING:
    from distft.model.causal import CausalLM


def blocks_of(lm: Any) -> list[nn.Module]:
    """Return the repeated blocks of a transformers model, in order: what engines gather and shard at a time.

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


def block_matrices(module: nn.Module, blocks: list[nn.Module]) -> dict[str, int]:
    """Return the trained weight matrices of the blocks and their dimensions: those of linear layers and experts.

    Embeddings and heads lie outside of the blocks; norms and biases are no matrices.
    """
    in_blocks = {id(param) for block in blocks for param in block.parameters()}
    return {
        name: param.ndim
        for name, param in module.named_parameters()
        if param.requires_grad and param.ndim >= 2 and id(param) in in_blocks
    }


def ends_of(module: CausalLM) -> list[nn.Module]:
    """Return the embeddings and the head that an engine may gather each around its own forward.

    That takes weights that nothing else touches: they are not tied, not part of a block, and the head is known to be
    called once (`observe` saw it). What an adapter wraps stays with the root.
    """
    critics = [] if module.critic is None else [module.pretrained[1].get_input_embeddings()]
    return [*_ends_of_policy(module), *(end for end in critics if type(end) is nn.Embedding)]


def _ends_of_policy(module: CausalLM) -> list[nn.Module]:
    embedding = module.transformer.get_input_embeddings()
    if module.path.head != "chunked" or type(embedding) is not nn.Embedding or type(module.head) is not nn.Linear:
        return []
    ends: list[nn.Module] = [embedding, module.head]
    names = {id(end.weight): 0 for end in (embedding, module.head)}
    for _, param in module.named_parameters(remove_duplicate=False):
        if id(param) in names:
            names[id(param)] += 1
    return ends if list(names.values()) == [1, 1] else []


def _largest_list(lm: Any) -> list[nn.Module]:
    """Return the entries of the list of modules that holds most parameters."""

    def numel(module: nn.Module) -> int:
        return sum(param.numel() for param in module.parameters())

    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    lists = [entries for entries in lists if len({type(entry) for entry in entries}) == 1 and numel(entries)]
    if not lists:
        raise MachineError(f"{type(lm).__name__} has no list of blocks, so it cannot be sharded")
    return list(dict.fromkeys(max(lists, key=numel)))
