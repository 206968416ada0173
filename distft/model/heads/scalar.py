"""The scalar head of reward models: one number for a document, read at its last token.

The model is transformers' own sequence classification model with one label, so that transformers loads what was
trained (`AutoModelForSequenceClassification`).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError
from distft.model.heads import lm as language_model
from distft.model.heads.spec import HeadSpec, put_head

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from distft.model.head import Observation
    from distft.model.paths import ForwardPath

LAYER = "score"
"""Transformers' name of the layer."""


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise _mistake(
            f"transformers has no {config.model_type} model with a scalar head (AutoModelForSequenceClassification)",
            "use an architecture that has one, such as Llama, Qwen, Mistral or Gemma",
        )
    return AutoModelForSequenceClassification


def _prepare(config: Any) -> Any:
    named = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
    if named and config.num_labels != 1:
        raise _mistake(
            f"{named[0]} of the folder has {config.num_labels} labels, and a reward is one number",
            "name a reward model's folder, or a language model, whose head starts at random",
        )
    made = copy.deepcopy(config)
    made.num_labels = 1
    return made


def _observe(lm: Any) -> Observation:
    from distft.model.head import Observation
    from distft.model.logit_rule import LogitRule

    return Observation(trunk=lm.base_model_prefix, rule=LogitRule())


def _output_layer(lm: Any) -> Any:
    layer = getattr(lm, LAYER, None)
    if layer is None:
        raise _mistake(
            f"{type(lm).__name__} has no layer {LAYER!r} on its last hidden states",
            "use an architecture that has one, such as Llama, Qwen, Mistral or Gemma",
        )
    return layer


def _surplus(config: Any) -> frozenset[str]:
    import torch

    with torch.device("meta"):
        model = language_model.auto_class(config).from_config(config)
    output = model.get_output_embeddings()
    return frozenset(
        f"{name}.{short}"
        for name, part in model.named_modules()
        if part is output
        for short, _ in part.named_parameters()
    )


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("recipe", [Problem(message=f"[model] path: {message}", fix=fix)])


def _hold(config: Any, path: ForwardPath, device: torch.device, max_length: int) -> None:
    """Compare rewards and gradients of a small copy with those of transformers' own forward, document by document.

    Raises:
        NotEqualError: says what differs and by how much.
    """
    import torch

    from distft.model.activation_checkpointing import compile_blocks
    from distft.model.blocks import blocks_of
    from distft.model.causal import CausalLM
    from distft.model.cross_entropy import chunked_sum
    from distft.model.precision import in_double
    from distft.model.proof import small_models
    from distft.model.reference import GRADIENT, LOSS, NotEqualError, drawn_weights, probe_batch

    def build(small: Any, kernel: str) -> Any:
        made = _prepare(small)
        model = _auto_class(made).from_config(made, attn_implementation=kernel)
        put_head(model, SPEC)
        return model

    def filled(small: Any, kernel: str) -> Any:
        model = build(copy.deepcopy(small), kernel).to(device, torch.float64)
        with torch.no_grad():
            for name, value in drawn_weights(model):
                model.get_parameter(name).copy_(value)
        return model.eval()

    small = next(small_models(config, build, max_length))
    loss_rtol, gradient_rtol = LOSS[torch.float64].ceiling, GRADIENT[torch.float64].ceiling
    with torch.random.fork_rng(devices=[]), in_double():
        torch.manual_seed(0)
        reference, generator = filled(small, "eager"), torch.Generator().manual_seed(1)
        vocabulary = reference.get_input_embeddings().weight.shape[0]
        probes = [torch.randint(3, vocabulary, (length,), generator=generator).to(device) for length in (7, 3, 12)]
        right_D = torch.stack([reference(input_ids=ids[None], use_cache=False).logits[0, 0] for ids in probes])
        weight_D = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=device)
        (right_D * weight_D).sum().backward()

        model = filled(small, path.attention)
        wrapped = CausalLM(model, chunked_sum, path=path, observed=_observe(model)).eval()
        if path.compiled:
            compile_blocks(blocks_of(model))
        packed = [probes] if path.documents == "packed" else [[ids] for ids in probes]
        scores: list[Tensor] = []
        for documents in packed:
            batch = probe_batch(documents)
            ends_D = batch["cu_seqlens"][1:].long() - 1
            given = {name: batch[name] for name in ("input_ids_T", "position_ids_T", "cu_seqlens", "max_seqlen")}
            scores.append(wrapped(**given, ends_D=ends_D))
        score_D = torch.cat(scores).double()
        gap = float(((score_D - right_D).abs() / right_D.abs().clamp(min=1e-3)).max())
        if not gap <= 10 * loss_rtol:
            raise NotEqualError(f"a reward differs by {gap:.1e} of itself")
        (score_D * weight_D).sum().backward()
        right = {name: param.grad for name, param in reference.named_parameters() if param.grad is not None}
        largest = max(float(grad.abs().max()) for grad in right.values())
        for name, param in model.named_parameters():
            if name in right:
                if param.grad is None:
                    raise NotEqualError(f"{name} gets no gradient")
                gap = float((param.grad - right[name]).abs().max()) / max(
                    float(right[name].abs().max()), 1e-4 * largest
                )
                if not gap <= 10 * gradient_rtol:
                    raise NotEqualError(f"the gradient of {name} differs by {gap:.1e} of its largest entry")


def _finish_config(config: Any, pad_id: int | None) -> None:
    """Set the padding token: transformers reads the reward at the last token that is none.

    A padding token that rows end with would move it one token ahead.
    """
    config.num_labels = 1
    config.pad_token_id = pad_id


SPEC = HeadSpec(
    name="scalar",
    auto_class=_auto_class,
    observe=_observe,
    output_layer=_output_layer,
    task_type="SEQ_CLS",
    prepare=_prepare,
    fresh=(f"{LAYER}.weight", f"{LAYER}.bias"),
    surplus=_surplus,
    trained_whole=(LAYER,),
    hold=_hold,
    finish_config=_finish_config,
)
