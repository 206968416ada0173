"""The source as transformers and PEFT compute it, in fp32: what every export is compared with.

Shape letters: L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distft.core.errors import DataError
from distft.export_formats.source import ModelSource, stop_ids

if TYPE_CHECKING:
    from distft.export_formats.calibration import CalibrationRows


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The likeliest continuation, and how much likelier each of its tokens was."""

    ids: tuple[int, ...]
    logits_LV: Tensor
    ended: bool


class SourceReference:
    """A model in this process, loaded when it is first asked. On a GPU where there is one."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self._written: dict[tuple[tuple[int, ...], int], Greedy] = {}
        self._importance: tuple[CalibrationRows, dict[str, Tensor]] | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The source's own tokenizer with its chat template.

        Raises:
            DataError: it has none that can be loaded.
        """
        from distft.core.tokenizer_files import load_tokenizer

        return load_tokenizer(self.source.folder)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, the tokenizer's own end of sequence first."""
        return stop_ids(self.source.folder, self.tokenizer)

    @cached_property
    def model(self) -> Any:
        """The model in fp32, an adapter beside its base."""
        import transformers

        on = "cuda" if torch.cuda.is_available() else "cpu"
        if self.source.is_adapter:
            from distft.export_formats.whole_model import beside_its_base

            return beside_its_base(self.source).to(on)
        return load_model(self.source.folder, transformers, rewards=self.source.kind == "reward").to(on)

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(param.numel() for param in self.model.parameters())

    def importance(self, calibration: CalibrationRows) -> dict[str, Tensor]:
        """Return what goes into each matrix on the rows; every level asks the same, so it is kept."""
        from distft.export_formats.importance import importance_matrix

        if self._importance is None or self._importance[0] is not calibration:
            self._importance = (calibration, importance_matrix(self.model, calibration.rows))
        return self._importance[1]

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Return the log-probabilities behind every position, fp32 [L, V] on the CPU."""
        return logprobs(self.model, ids)

    def greedy(self, ids: Sequence[int], most: int) -> Greedy:
        """Return the likeliest continuation, up to a stop token; every level asks the same, so it is kept."""
        key = (tuple(ids), most)
        if key not in self._written:
            self._written[key] = greedy(self.model, ids, most, self.stop_ids)
        return self._written[key]

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return the prompt that asks for the assistant's next turn."""
        return render(self.tokenizer, messages)


def load_model(folder: Path, transformers: Any, *, rewards: bool = False, **how: Any) -> Any:
    """Return the model of a folder in fp32 for inference; `how`: more for from_pretrained.

    Raises:
        DataError: transformers cannot load it, or it lacks weights.
    """
    kind = transformers.AutoModelForSequenceClassification if rewards else transformers.AutoModelForCausalLM
    try:
        model, found = kind.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{folder}: transformers cannot load it: {(str(error).splitlines() or [''])[0]}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(f"{folder}: has no weights for {', '.join(missing[:3])}, which would be random")
    unused = sorted(name for name in found["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq"))
    if unused:
        raise DataError(
            f"{folder}: {type(model).__name__} computes without {', '.join(unused[:3])}, which the folder holds: it is "
            "another kind of model than its config.json says  fix: name that kind under architectures (a reward model: "
            "…ForSequenceClassification)"
        )
    return model.eval()


@torch.no_grad()
def logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the log-probabilities behind every position, fp32 [L, V] on the CPU."""
    logits_LV = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].float()
    return torch.log_softmax(logits_LV, dim=-1).cpu()


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], most: int, stops: Sequence[int]) -> Greedy:
    """Return the likeliest continuation with transformers' own `generate`."""
    written = model.generate(
        input_ids=torch.tensor([list(ids)], device=model.device),
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = tuple(written.sequences[0, len(ids) :].tolist())
    return Greedy(ids=new, logits_LV=torch.cat(written.logits).float().cpu(), ended=bool(new) and new[-1] in stops)


@torch.no_grad()
def reward(model: Any, ids: Sequence[int]) -> float:
    """Return the reward at the last token."""
    return float(model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0, 0])


def render(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> str:
    """Return the prompt that asks for the assistant's next turn."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
