"""The list of cases: each method, engine, micro-batch and length as a recipe of its own, or why there is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from distft.bench import provenance
from distft.bench.meter import MOST_WARMUP
from distft.catalog import REGISTRIES
from distft.core.environment import versions
from distft.core.errors import RecipeError
from distft.plan.planner import engine_override, method_override
from distft.recipe import Recipe, check_world, load_recipe, parse_recipe
from distft.recipe.toml_text import toml_text

BESIDE_THE_POINT = ("name", "output_dir", "checkpoint", "log", "eval")
"""Top keys of a recipe that change nothing that is measured."""


@dataclass(frozen=True, kw_only=True)
class BenchGrid:
    """What the command was asked for."""

    recipe: str
    overrides: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    """Empty, here and below: the recipe's own."""
    engines: tuple[str, ...] = ()
    micros: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    nproc: int = 1
    steps: int = 30
    warmup: int = 10
    rows: str = "real"
    """real | full."""
    profile: bool = False
    """One more step under torch's profiler, after those that are timed."""
    limit_gib: float | None = None
    """Memory of each process, on a CPU."""


@dataclass(frozen=True, kw_only=True)
class BenchCase:
    """One measurement."""

    method: str
    engine: str
    """The engine asked for: "auto" is decided where it runs."""
    world: int
    micro_batch_size: int | str
    max_length: int
    rows: str
    steps: int
    warmup: int
    limit_gib: float | None
    profile: bool = False
    content: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe of its processes; empty when there is none."""
    refused: str = ""
    """Why there is none."""

    @property
    def text(self) -> str:
        """The recipe as TOML."""
        return toml_text(self.content)

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return parse_recipe(self.text, source=self.key, registries=REGISTRIES)

    @property
    def key(self) -> str:
        """Name of the measurement: another recipe, option, version, machine or code has another one."""
        settings = {key: value for key, value in self.content.items() if key not in BESIDE_THE_POINT}
        what = [settings, self.refused, self.world, self.rows, self.steps, self.warmup, self.limit_gib]
        what += ["profile"] * self.profile
        where = [provenance.hardware(), versions(), provenance.code()["source_sha256"]]
        digest = hashlib.sha256(json.dumps([what, where], sort_keys=True).encode()).hexdigest()[:12]
        size = f"m{self.micro_batch_size}-l{self.max_length}"
        return f"{self.method}-{self.engine}x{self.world}-{size}-{self.rows}-{digest}"

    def facts(self) -> dict[str, Any]:
        """Return the case's part of the record."""
        table = self.content
        return {
            "method": self.method,
            "engine": self.engine,
            "world": self.world,
            "micro_batch_size": self.micro_batch_size,
            "max_length": self.max_length,
            "rows": self.rows,
            "steps": self.steps,
            "warmup": self.warmup,
            "limit_gib": self.limit_gib,
            "model": table.get("model"),
            "method_params": table.get("method"),
            "optim": table.get("optim"),
            "global_batch_size": table.get("train", {}).get("global_batch_size"),
            "activation_checkpointing": table.get("train", {}).get("activation_checkpointing"),
            "compile": table.get("train", {}).get("compile"),
            "packing": table.get("data", {}).get("packing"),
        }

    def __str__(self) -> str:
        ranks = f" x {self.world}" if self.world > 1 else ""
        return f"{self.method}, {self.engine}{ranks}, micro-batch {self.micro_batch_size}, length {self.max_length}"


def grid(wanted: BenchGrid) -> list[BenchCase]:
    """Return all cases, those of one length together.

    Raises:
        RecipeError: the recipe itself is wrong, before anything of the grid is put into it.
    """
    base_recipe = load_recipe(wanted.recipe, registries=REGISTRIES, overrides=wanted.overrides)
    return list(_grid(wanted, base_recipe))


def _grid(wanted: BenchGrid, base_recipe: Recipe) -> Iterator[BenchCase]:
    for length, method, engine, micro in product(
        wanted.lengths or [base_recipe.data.max_length],
        wanted.methods or [base_recipe.method.name],
        wanted.engines or [base_recipe.engine.name],
        wanted.micros or [base_recipe.train.micro_batch_size],
    ):
        yield make_case(wanted, base_recipe, method=method, engine=engine, micro=micro, length=length)


def make_case(
    wanted: BenchGrid,
    base_recipe: Recipe,
    *,
    method: str,
    engine: str,
    micro: int | str,
    length: int,
    extra: Sequence[str] = (),
) -> BenchCase:
    """Return one case; what the recipe's rules refuse is a case too, with the reason.

    Engine `solo` runs in one process whatever `wanted.nproc` is.
    """
    world = 1 if engine == "solo" else wanted.nproc
    overrides = [
        *wanted.overrides,
        *method_override(base_recipe, method),
        *engine_override(base_recipe, engine),
        *extra,
    ]
    overrides.append(f"data.max_length={length}")
    if micro != "auto":
        overrides.append(f"train.micro_batch_size={micro}")
    requested: dict[str, Any] = {
        "method": method,
        "engine": engine,
        "world": world,
        "micro_batch_size": micro,
        "max_length": length,
        "rows": wanted.rows,
        "steps": wanted.steps,
        "warmup": wanted.warmup,
        "limit_gib": wanted.limit_gib,
        "profile": wanted.profile,
    }
    try:
        recipe = load_recipe(wanted.recipe, registries=REGISTRIES, overrides=overrides)
        check_world(recipe, world)
    except RecipeError as error:
        return BenchCase(**requested, refused="; ".join(problem.message for problem in error.problems))
    return BenchCase(**requested, content=_timed(recipe, wanted))


def _timed(recipe: Recipe, wanted: BenchGrid) -> dict[str, Any]:
    """Return the recipe for as many steps as are measured and discarded, without evaluations."""
    content = recipe.resolved()
    content["train"].pop("epochs", None)
    allowance = MOST_WARMUP if recipe.train.compile else 0  # auto: it may be
    content["train"]["max_steps"] = (
        wanted.warmup + allowance + wanted.steps + 1 + wanted.profile
    )  # one more, for its memory
    schedule = content["schedule"]
    if schedule.get("warmup_steps"):  # of the whole run: longer than these few steps, it would be a mistake in a recipe
        schedule["warmup_steps"] = min(schedule["warmup_steps"], (content["train"]["max_steps"] - 1) // 2)
    for holder, key in ((content, "eval"), (content["data"], "eval")):
        holder.pop(key, None)
    content["train"].pop("rehearse", None)
    return content
