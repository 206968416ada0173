"""Single rows of a frozen embedding and head are trained beside LoRA, in PEFT's form of it (trainable tokens).

PEFT's layer puts the trained rows into a copy of the whole matrix in every forward. Here the outputs are replaced
instead: of the embedding where one of these tokens is looked up, of the head in the columns of these tokens. That is
the same number, without a copy of the vocabulary and without a gradient of that size.

N trained tokens, V vocabulary, E hidden size, S positions.
Source: peft/tuners/trainable_tokens/layer.py
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from distft.model.cross_entropy import HeadLoss
    from distft.model.logit_rule import LogitRule

_IDS = "distft_trained_tokens"
"""Attribute: of a model, ids whose rows its method is to train."""
_DELTA = "trainable_tokens_delta"
_ADAPTER = "default"


def mark(lm: Any, ids: Sequence[int]) -> None:
    """Note the tokens whose rows an adapter trains, before it is attached."""
    lm.__dict__[_IDS] = tuple(ids)


def indices(lm: Any, params: Any) -> dict[str, list[int]] | None:
    """Return PEFT's `trainable_token_indices` of a marked model: of its embedding, and of a head of its own.

    Raises:
        RecipeError: embedding or head are trained in another way too, or the head has a bias.
    """
    ids: tuple[int, ...] = lm.__dict__.get(_IDS, ())
    if not ids:
        return None
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    names = {id(module): name for name, module in lm.named_modules()}
    tables = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    if head is not None and getattr(head, "bias", None) is not None:
        raise _mistake("the head has a bias, which PEFT leaves out beside trained rows", 'name = "full"')
    named = [params.target_modules] if isinstance(params.target_modules, str) else params.target_modules
    for table in (embedding, head):
        short = names.get(id(table), "").rpartition(".")[2]
        if short and any(name.rpartition(".")[2] == short for name in (*named, *params.modules_to_save)):
            raise _mistake(f"{short} has rows that are trained, and is named in another key too", "name it in one")
    return {names[id(table)]: list(ids) for table in tables}


def owns(name: str) -> bool:
    """Return whether a parameter holds trained rows."""
    return f".{_DELTA}." in name


def fresh(name: str, model: nn.Module) -> Tensor:
    """Return the rows as the filled base has them."""
    layer: Any = model.get_submodule(name.partition(f".{_DELTA}.")[0])
    return layer.get_base_layer().weight.detach()[layer.token_indices[_ADAPTER]]


def trains(table: Any) -> bool:
    """Return whether rows of an embedding or a head are trained by this module's means."""
    return hasattr(table, "token_adapter")


def install(wrapped: nn.Module) -> None:
    """Compute trained rows here; PEFT's wrappers hold them and take part in names."""
    from peft.utils.other import TrainableTokensWrapper
    from torch import nn

    for module in wrapped.modules():
        if isinstance(module, TrainableTokensWrapper):
            layer: Any = module.token_adapter
            # What merging and unmerging in place would need; a copy without values that no engine fills.
            if _ADAPTER in layer.trainable_tokens_original:
                del layer.trainable_tokens_original[_ADAPTER]
            forward = _embedded if isinstance(layer.get_base_layer(), nn.Embedding) else _projected
            module.forward = types.MethodType(forward, module)


def _ids(layer: Any, device: Any) -> Tensor:
    """Return the ids of the trained rows, ascending, [N]."""
    import torch

    return torch.tensor(layer.token_indices[_ADAPTER], device=device)


def _embedded(self: Any, ids: Tensor) -> Tensor:
    """Return the embeddings of tokens, of the trained ones their rows."""
    import torch
    import torch.nn.functional as F

    layer = self.token_adapter
    base = layer.get_base_layer()
    embedded = base(ids)
    if layer.disable_adapters:
        return embedded
    trained_N = _ids(layer, ids.device)
    place = torch.searchsorted(trained_N, ids.contiguous()).clamp_(max=len(trained_N) - 1)
    rows = F.embedding(place, layer.trainable_tokens_delta[_ADAPTER].to(embedded.dtype))
    scale = layer._get_embed_scale()
    if scale is not None:
        rows = rows * scale.to(rows.dtype)
    return torch.where((trained_N[place] == ids)[..., None], rows, embedded)


def _projected(self: Any, hidden: Tensor) -> Tensor:
    """Return the logits of a head with trained rows."""
    layer = self.token_adapter
    base = layer.get_base_layer()
    product = base(hidden)
    if layer.disable_adapters:
        return product
    return _with_columns(product, hidden, layer.trainable_tokens_delta[_ADAPTER], _ids(layer, hidden.device))


def _with_columns(product: Tensor, hidden: Tensor, rows_NE: Tensor, ids_N: Tensor) -> Tensor:
    import torch.nn.functional as F

    columns = F.linear(hidden.to(product.dtype), rows_NE.to(product.dtype))
    return product.index_copy(-1, ids_N, columns)


def use_loss_with_rows(head: Any, loss: HeadLoss, rule: LogitRule) -> None:
    """Let the forward of a head with trained rows give a loss where it is given labels (see `distft.model.causal`).

    The loss runs inside the forward of the base layer: there its weight may be touched.
    """
    from distft.model.cross_entropy import with_product

    layer = head.token_adapter
    base = layer.get_base_layer()
    own_base = types.MethodType(type(base).forward, base)

    def product(hidden_CE: Tensor, weight_VE: Tensor, rows_NE: Tensor, ids_N: Tensor) -> Tensor:
        import torch.nn.functional as F

        return _with_columns(F.linear(hidden_CE, weight_VE), hidden_CE, rows_NE, ids_N)

    def base_forward(self: nn.Linear, hidden: Tensor, rows_NE: Any = None, *labelled: Any) -> Tensor:
        if not labelled:
            return own_base(hidden.to(self.weight.dtype))
        labels, head_loss = labelled
        hidden = hidden.to(self.weight.dtype)
        if rows_NE is None:  # adapters are left out
            return head_loss(hidden, self.weight, None, labels, rule)
        if rule.hidden_scale != 1.0:
            hidden = hidden * rule.hidden_scale
        shared = (self.weight, rows_NE, _ids(layer, hidden.device))
        return with_product(head_loss, product, (hidden,), shared, labels, rule)

    def forward(self: Any, hidden: Tensor, labels: Tensor | None = None, head_loss: HeadLoss = loss) -> Tensor:
        if labels is None:
            return _projected(self, hidden)
        rows_NE = None if layer.disable_adapters else layer.trainable_tokens_delta[_ADAPTER]
        return base(hidden, rows_NE, labels, head_loss)

    base.forward = types.MethodType(base_forward, base)
    head.forward = types.MethodType(forward, head)


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("recipe", [Problem(message=f"[method] trainable_tokens: {message}", fix=fix)])
