"""The table of what a model writes while it is trained on its own answers, and what rewards them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from distft.core.registry import Params
from distft.recipe.resume_policy import Free


class RewardTerm(Params):
    """What an entry of `rewards` has besides the settings of its score."""

    weight: float = 1.0
    """Factor of the figure in the reward."""
    figure: str | None = Field(default=None, min_length=1)
    """Which of the score's figures; its first unless set."""


class RolloutTable(Params):
    """Answers to the prompts of [[data.train]], for objectives that train on the model's own."""

    answers_per_prompt: int = Field(default=8, ge=1)
    """Answers to each prompt of a step: the group whose rewards are compared. 1 is for `ppo`, which compares none."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer. A group, each answer behind its prompt, has to fit in [data] max_length."""
    temperature: float = Field(default=1.0, gt=0)
    """What logits are divided by: in draws, and in the log-probabilities of the policy, of the one before an update and
    of the reference alike."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the likeliest tokens that together have this probability are drawn. The policy stays the whole distribution:
    every log-probability, the sampler's too, is the one before tokens are left out."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the model's end tokens."""
    updates: int = Field(default=1, ge=1)
    """Optimizer steps taken on the same answers; above 1, probabilities are compared with those of the first."""
    mask_truncated: bool = False
    """Leave out answers that did not end within max_new_tokens."""
    refill: int = Field(default=0, ge=0)
    """Times that prompts whose answers are all worth the same, which teach nothing, are replaced by others from
    elsewhere in the run (DAPO's dynamic sampling); those that are left then stay. 0: no prompt is replaced."""
    generator: Free[str | dict[str, Any]] = Field(default={"name": "engine"}, examples=["vllm"])
    """What writes the answers: "engine", the model as it is trained; or "vllm", a server, or its name and settings."""
    batch_size: int | None = Field(default=None, ge=1)
    """Answers written at a time on one GPU; as many as fit unless set. It changes no answer."""
    rewards: tuple[dict[str, Any], ...] = Field(default=(), examples=[[{"name": "exact_match", "weight": 1.0}]])
    """What answers are rewarded for: name and settings of each score, with `weight` (1.0) and `figure` (its first)."""
    reward_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that all rewards of one answer may take together; then it has none, and does not count."""
    reward_memory_gib: float = Field(default=8.0, gt=0)
    """Address space of the process that judges; an answer that asks for more has no reward."""
    max_unscored: float = Field(default=0.2, ge=0, lt=1)
    """Share of a step's answers that may have no reward before the run ends with the reasons."""
