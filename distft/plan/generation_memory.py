"""Predicts the memory of generation: a key-value cache, and a forward over prompts beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.generation import GENERATORS
from distft.generation.batching import CACHE_SHARE, MAX_ROWS, PROMPT_TOKENS
from distft.model.attention_shape import largest_attention
from distft.model.inference import cache_bytes_per_token, longest_text
from distft.plan.inventory import Inventory
from distft.plan.kernels import EAGER
from distft.plan.setup import Setup
from distft.plan.state import FP32
from distft.plan.trace import Activations
from distft.recipe import AnswersTable, Recipe


@dataclass(frozen=True, kw_only=True)
class GenerationMemory:
    """The set of questions that needs most."""

    name: str
    rows: int
    """Answered at once."""
    prompt: int
    """Tokens of the longest prompt: a row as long as [data] max_length allows."""
    new_tokens: int
    cache: int
    forward: int
    """Temporaries of a block, and what says which keys are padding."""

    @property
    def num_bytes(self) -> int:
        """Beyond what the model itself holds."""
        return self.cache + self.forward


def generation_memory(inventory: Inventory, setup: Setup, kept: Activations, *, held: int) -> GenerationMemory | None:
    """Return the memory of the largest evaluation set; None where the recipe has none.

    Args:
        inventory: of the model.
        setup: with the recipe.
        kept: of a traced micro-batch.
        held: bytes on the device before the first question.
    """
    free = setup.machine.gpu.memory_bytes - held
    recipe = setup.recipe
    needs = [_of(asked, recipe.data.max_length, inventory, setup, kept, free) for asked in recipe.eval.answers]
    needs += [] if (written := rollout_memory(inventory, setup, kept, held=held)) is None else [written]
    return max(needs, key=lambda need: need.num_bytes, default=None)


def rollout_memory(inventory: Inventory, setup: Setup, kept: Activations, *, held: int) -> GenerationMemory | None:
    """Return the memory of writing the answers that are trained; None where they are rows', or a server writes them.

    Arguments as above.
    """
    recipe, rollout = setup.recipe, setup.recipe.rollout
    if not recipe.objective.spec.writes or is_written_elsewhere(recipe):
        return None
    longest = max(1, recipe.data.max_length // rollout.answers_per_prompt - rollout.max_new_tokens)
    batch_size = "auto" if rollout.batch_size is None else rollout.batch_size
    table = AnswersTable(name="rollout", max_new_tokens=rollout.max_new_tokens, batch_size=batch_size)
    return _of(table, longest, inventory, setup, kept, setup.machine.gpu.memory_bytes - held)


def is_written_elsewhere(recipe: Recipe) -> bool:
    """Return whether a server writes the answers that are trained, with memory and time of its own."""
    chosen: Any = recipe.rollout.generator
    return recipe.objective.spec.writes and not GENERATORS[chosen["name"]].on_this_machine


def _of(
    answers: AnswersTable, longest_prompt: int, inventory: Inventory, setup: Setup, kept: Activations, free: int
) -> GenerationMemory:
    """Return a set's memory; `batch_size = "auto"` takes as many rows as the cache's share of free memory holds."""
    new = answers.max_new_tokens  # a task's own limit is known when it has been loaded
    longest = longest_text(inventory.config)
    prompt = longest_prompt if longest is None else min(longest_prompt, max(1, longest - new))
    per_token = cache_bytes_per_token(inventory.config, inventory.dtype)
    room = int(max(0, free) * CACHE_SHARE) // max(1, per_token * (prompt + new))
    batch_size = MAX_ROWS if answers.batch_size == "auto" else answers.batch_size
    rows = max(1, min(PROMPT_TOKENS // prompt, room, batch_size))
    path = setup.path
    cached = path.generation != "uncached"
    read = prompt if cached else prompt + new
    """Tokens of a row in the largest forward."""
    if path.generation != "batched":
        rows = 1
    per_forward = kept.evaluation_block * read * rows // setup.tokens
    mask = rows * prompt * (prompt + new) if rows > 1 else 0
    if path.generation_attention == "eager" and setup.kernel != EAGER:
        # Scores, and their softmax in fp32, that the training's attention does not keep.
        heads = largest_attention(inventory.config).heads
        mask += rows * heads * read * read * (inventory.dtype.itemsize + FP32)
    return GenerationMemory(
        name=answers.name,
        rows=rows,
        prompt=prompt,
        new_tokens=new,
        cache=rows * (prompt + new) * per_token if cached else 0,
        forward=per_forward + mask,
    )
