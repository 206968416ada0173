"""`reward_model`: the reward that a model with a scalar head gives an answer to what was asked.

A folder of `distft train` with the objective `reward` (whole or an adapter), or any sequence classification model of
transformers with one label. Question and answer are written by the reward model's own tokenizer and chat template, and
the reward is read at the last token, as in its training. Rank 0 computes it, on its accelerator where it has one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distft.core.errors import DataError, Problem, RecipeError
from distft.core.registry import Params
from distft.scores.spec import Answer, MetricInfo, Scorer, ScoreResult, ScoreSpec, by_row

if TYPE_CHECKING:
    import torch

FIGURE = MetricInfo(name="reward")


class RewardModelParams(Params):
    """Which model, and where it computes."""

    path: str = Field(min_length=1, examples=["runs/llama8b-reward-lora/final"])
    """Folder of the reward model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What it computes in. The plan does not count its memory."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the accelerator of rank 0, where there is one."""


class _RewardModel:
    """The model and its tokenizer."""

    def __init__(self, params: RewardModelParams) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = str(Path(params.path).expanduser())
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        dtype = torch.bfloat16 if params.dtype == "bfloat16" else torch.float32
        with_head: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
        on = "cuda" if params.device == "auto" and torch.cuda.is_available() else "cpu"
        if not hasattr(with_head, "score"):
            raise _mistake(params, f"{type(with_head).__name__} has no layer 'score' on its last hidden states")
        self._model = with_head.to(on).eval()
        self._device: torch.device = with_head.device

    def reward(self, answer: Answer) -> float:
        """Return the reward at the last token.

        Raises:
            DataError: the question is a chat, and the tokenizer has no chat template.
        """
        import torch

        with torch.no_grad():
            ids = torch.tensor([self._ids(answer)], device=self._device)
            # Not the model's own forward, which passes over an end of sequence where that is the padding token too.
            hidden = self._model.base_model(input_ids=ids).last_hidden_state[:, -1]
            return float(self._model.score(hidden))

    def _ids(self, answer: Answer) -> list[int]:
        if answer.messages is None:
            ids = self.tokenizer(answer.prompt + answer.text)["input_ids"]
            end = self.tokenizer.eos_token_id
            return ids if ids[-1:] == [end] else [*ids, end]
        if not self.tokenizer.chat_template:
            raise DataError(f"{answer.id}: the question is a chat, and the reward model's tokenizer has no template")
        chat = [*answer.messages, {"role": "assistant", "content": answer.text}]
        return list(self.tokenizer.apply_chat_template(chat, tools=answer.tools, tokenize=True, return_dict=False))


class _RewardScorer:
    """A `Scorer` that loads its model once."""

    def __init__(self, params: RewardModelParams) -> None:
        self._model = functools.cache(lambda: _RewardModel(params))
        self._score = by_row((FIGURE,), lambda answer: (self._model().reward(answer),))

    def __call__(self, answers: Sequence[Answer]) -> ScoreResult:
        return self._score(answers)

    def load(self) -> None:
        """Load the model now."""
        self._model()


def build(params: RewardModelParams) -> Scorer:
    """Look at the folder now; its weights are loaded when the first answers are judged.

    Raises:
        RecipeError: the folder holds no model with a scalar head.
    """
    _refuse_other_models(params)
    return _RewardScorer(params)


def _refuse_other_models(params: RewardModelParams) -> None:
    folder = Path(params.path).expanduser()
    adapter, config = folder / "adapter_config.json", folder / "config.json"
    try:
        if adapter.is_file():
            task = json.loads(adapter.read_text(encoding="utf-8")).get("task_type")
            if task != "SEQ_CLS":
                raise _mistake(params, f"the adapter's task_type is {task}, not SEQ_CLS")
            return
        content = json.loads(config.read_text(encoding="utf-8"))
    except OSError:
        raise _mistake(params, "the folder has neither config.json nor adapter_config.json") from None
    except ValueError as error:
        raise _mistake(params, f"its config is no JSON ({error})") from None
    names = content.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise _mistake(params, f"{', '.join(names) or 'the model'} has no scalar head")
    labels = content.get("num_labels") or len(content.get("id2label") or {}) or 2
    if labels != 1:
        raise _mistake(params, f"the model has {labels} labels, and a reward is one number")


def _mistake(params: RewardModelParams, message: str) -> RecipeError:
    fix = 'name the final/ of a run with [objective] name = "reward"'
    return RecipeError("recipe", [Problem(message=f'score reward_model, path = "{params.path}": {message}', fix=fix)])


SPEC = ScoreSpec(
    name="reward_model",
    params=RewardModelParams,
    figures=lambda params: (FIGURE,),
    build=build,
    load=_RewardScorer.load,
)
