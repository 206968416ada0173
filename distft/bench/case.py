"""`python -m distft.bench.case SPEC.json`: one case in processes of its own, through the job's parts and its loop.

What happens is what `distft.job` does from its rows to its last step; nothing is evaluated, saved or exported. Rank 0
writes the measurement; a rank that fails writes why. See `distft.bench.case_launcher` for who starts this.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distft.bench.memory_meter import die_with_parent, set_limit

if TYPE_CHECKING:
    from distft.bench.meter import Clock, Count
    from distft.core.types import Engine
    from distft.engine.processes import Processes
    from distft.model.load import MetaModel
    from distft.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class BenchCaseSpec:
    """What the processes of a case are told."""

    recipe: str
    """The resolved recipe's file."""
    out: str
    """Where rank 0 writes the measurement; failures go beside it."""
    rows: str
    """real | full."""
    warmup: int
    steps: int
    profile: bool = False
    """One more step under torch's profiler."""
    limit_gib: float | None = None
    """Memory of each process on a CPU; see `memory.set_limit`."""

    @classmethod
    def read(cls, path: Path) -> BenchCaseSpec:
        """Read the specification that `write` left."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write the specification as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def failure(self, rank: int) -> Path:
        """Return where a rank writes why it failed."""
        return Path(f"{self.out}.failed.{rank}")


def measure(spec: BenchCaseSpec) -> tuple[dict[str, Any], Engine]:
    """Train; return (rank 0's record of it, equal on the others but for times; the closed engine).

    Raises:
        DistftError: the recipe cannot run like this here.
    """
    from distft import assemble, compatibility
    from distft.bench.mock_rows import FullSteps
    from distft.catalog import REGISTRIES
    from distft.core.errors import MachineError
    from distft.core.log import quiet_libraries
    from distft.engine import processes
    from distft.engine.determinism import expandable_segments
    from distft.model import load
    from distft.recipe import load_recipe

    expandable_segments()
    quiet_libraries()
    _, rank, world, _ = processes.detect_launcher(os.environ)
    say = _say if rank == 0 else _say_nothing
    recipe = assemble.with_start_of(load_recipe(spec.recipe, registries=REGISTRIES), None)
    layout = assemble.choose_layout(recipe, world, say)
    if spec.rows == "real":
        # Nothing is held out here, and preparing rows that nobody evaluates takes time.
        rows = assemble.load_data(_without_eval(recipe), layout, rank, world, say)
    else:
        config = load.read_config(load.find_folder(recipe.model)).get_text_config(decoder=True)
        steps = FullSteps(
            seed=recipe.seed,
            vocabulary=config.vocab_size,
            max_length=recipe.data.max_length,
            num_steps=recipe.train.max_steps or 0,
            global_batch_size=recipe.train.global_batch_size,
            micro_batch_size=1 if layout.single else layout.micro_batch_size,
            rank=rank,
            world=world,
            group_size=recipe.objective.spec.group_size,
            values=compatibility.fitting_values(recipe.objective.spec),
        )
        rows = assemble.Data(
            steps=steps,  # type: ignore[arg-type]  # all of `StepSource`, and what the meters ask
            eval_steps=None,
            fingerprint={},
            largest_id=config.vocab_size - 1,
            stop_ids=(),
            longest=recipe.data.max_length,
            mean_tokens=recipe.data.max_length,
        )
        compatibility.refuse_long_rows(recipe, recipe.data.max_length, "train")
    with processes.leaving() as group:
        process_info = processes.join()
        group.callback(processes.leave, process_info)
        engine = assemble.open_engine(recipe, process_info, say)
        group.callback(engine.close)
        if assemble.agree_on_layout(layout, engine.gather) != layout:
            raise MachineError(
                "GPUs of several kinds choose several micro-batches: set [train] micro_batch_size and "
                "activation_checkpointing, or measure on one kind"
            )
        return _Measurement(spec, recipe, layout, rows, process_info, engine, say).record(), engine


@dataclass(frozen=True)
class _Measurement:
    """Everything between opening the engine and leaving it."""

    spec: BenchCaseSpec
    recipe: Recipe
    layout: Any
    rows: Any
    processes: Processes
    engine: Engine
    say: Callable[[str], None]

    def record(self) -> dict[str, Any]:
        """Set up the engine, train, measure, and gather the figures of all ranks."""
        from distft import assemble
        from distft.bench import memory_meter, profile
        from distft.bench.meter import Clock, Count, GradientBytes
        from distft.core.types import TrainState
        from distft.engine import state_bytes
        from distft.model import stats

        recipe, engine, processes = self.recipe, self.engine, self.processes
        device = memory_meter.Device(processes.device)
        own_bytes = memory_meter.host()["data_bytes"]
        assemble.compute_other_reference(recipe, processes, engine, self.layout, self.rows, self.say)
        built = assemble.build_model(self.recipe, processes, self.layout, self.rows, self.say)
        facts = assemble.run_facts(built, processes, TrainState())
        counts, ran = stats.count(built.module), self._ran(built, facts.device_name)
        products = sum(weights for weights, _ in stats.products(built.module))
        assemble.set_up_engine(recipe, engine, built, self.layout, self.rows.steps.num_steps)
        objective = assemble.build_objective(recipe, engine, built, self.layout, self.rows, self.say)
        device.phase("load")
        graphs = _compiled_graphs if self.layout.path.compiled else lambda: 0
        clock = Clock(
            warmup=self.spec.warmup,
            steps=self.spec.steps,
            sync=device.sync,
            graphs=graphs,
            edge=lambda: device.phase("first_steps"),
        )
        gradients = GradientBytes(lambda: state_bytes.gradient_bytes(engine))
        began = time.perf_counter()
        state = self._fit(objective, TrainState(), clock, facts, gradients)
        device.phase("steady_step")
        self.say(f"{len(clock.losses)} steps in {time.perf_counter() - began:.1f} s")
        after = state_bytes.measure(engine)
        mine: dict[str, Any] = {
            "held": {f"{name}_bytes": value for name, value in vars(after).items()}
            | {"gradients_bytes": gradients.held},
            "device": device.read() | {"peaks": device.peaks},
            "host": memory_meter.host() | {"own_data_bytes": own_bytes},
            "slots": clock.slots,
            "squares": clock.squares,
        }
        if processes.device.type == "cpu":
            memory_meter.lift_limit()  # the profiler needs memory of its own
            once = Count(1)
            mine["tensors_bytes"] = memory_meter.cpu_tensors()

            def another_step() -> None:
                nonlocal state
                state = self._fit(objective, state, once, facts)

            mine["tensor_growth_bytes"] = memory_meter.cpu_growth(another_step)
        ranks = engine.gather(mine)
        profiled = {}
        if self.spec.profile:
            again = Count(1)
            profiled = {"profile": profile.of(lambda: self._fit(objective, state, again, facts), processes.device)}
        return profiled | {
            "ran": ran | {"parameters": counts.total, "trained_parameters": counts.trainable},
            "speed": self._speed(clock, facts, ranks, products, memory_meter.matmul_rate(processes.device)),
            "loss": clock.losses,
            "grad_norm": clock.grad_norms,
            "left_out": clock.left_out,
            "ranks": ranks,
        }

    def _fit(self, objective: Any, state: Any, clock: Clock | Count, facts: Any, *more: Any) -> Any:
        """Run the job's loop, with the job's metrics and the clock, until the clock is done."""
        from distft.bench.meter import Nobody
        from distft.core.protocols import Every
        from distft.loop import fit
        from distft.metrics import METRICS, Meters

        metrics = [spec.build(facts) for spec in METRICS.values()]
        never = Every(log=lambda step: False, eval=lambda step: False, save=lambda step: False)
        return fit(
            state,
            self.rows.steps,
            engine=self.engine,
            look=lambda state: None,
            objective=objective,
            meters=Meters([*metrics, clock, *more], [], epoch_at=self.rows.steps.epoch_at),
            checkpoints=Nobody(),
            guard=Nobody(),
            best=Nobody(),
            stop=lambda: clock.done,
            every=never,
        )

    def _ran(self, built: MetaModel, device_name: str) -> dict[str, Any]:
        """Return what was left open in the recipe, as it was decided here."""
        import torch

        from distft.model import activation_checkpointing

        recipe, device = self.recipe, self.processes.device
        wanted = recipe.train.activation_checkpointing
        whole = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        return {
            "engine": self.engine.name,
            "world": self.processes.world,
            "micro_batch_size": self.layout.micro_batch_size,
            "micros_per_step": self.layout.micros_per_step,
            "activation_checkpointing": activation_checkpointing.choose_checkpointing(
                wanted, self.layout.checkpointing, ""
            )[0],
            "attention": built.module.transformer.config._attn_implementation,
            "cross_entropy": _head_loss(recipe, device),
            "path": self.layout.path.to_json(),
            "row_tokens": self.rows.mean_tokens,
            "device": device_name,
            "device_bytes": whole,
            "threads": torch.get_num_threads(),
        }

    def _speed(
        self, clock: Clock, facts: Any, ranks: list[dict[str, Any]], products: int, rate: float | None
    ) -> dict[str, Any]:
        from distft.bench.meter import spread
        from distft.core.accelerators import peak_flops

        world, steps = self.processes.world, spread(clock.times_s)
        # A median is what the next step takes; the whole block is what an interruption has made of it.
        seconds = len(clock.times_s) * steps.median
        slots, squares = (sum(rank[key] for rank in ranks) for key in ("slots", "squares"))
        needed = clock.tokens * facts.flops_per_token + squares * facts.flops_per_squared_length
        # 12·L·h·d per token and position of a full (not causal) matrix; ours are 3.5 x 2·L·h·d of the causal half.
        conventional = 6.0 * products * clock.tokens + squares * facts.flops_per_squared_length * 12 / 7
        peak = peak_flops(facts.device_name)
        return {
            "tokens_per_s": clock.tokens / seconds,
            "tokens_loss_per_s": clock.tokens_loss / seconds,
            "slots_per_s": slots / seconds,
            "block_tokens_per_s": clock.tokens / clock.block_s,
            "block_s": clock.block_s,
            "step_s": asdict(steps),
            "steps_s": clock.times_s,
            "warmup_steps": clock.discarded,
            "settled": clock.settled,
            "mfu": peak and needed / (seconds * world * peak),
            "mfu_conventional": peak and conventional / (seconds * world * peak),
            "formulas": {
                "tokens_per_s": "tokens of the measured steps / (steps x median step)",
                "mfu": "products the method needs and causal attention over each document / (s x ranks x bf16 peak)",
                "mfu_conventional": "(6 N_matmul tokens + 12 L h d sum(len^2)) / (s x ranks x bf16 peak)",
            },
            "matmul_flops_per_s": rate,
            "of_matmul_rate": rate and needed / (seconds * world * rate),
        }


def _without_eval(recipe: Recipe) -> Recipe:
    return replace(recipe, data=recipe.data.model_copy(update={"eval": ()}))


def _head_loss(recipe: Recipe, device: Any) -> str:
    """Return fused, chunked or full, as the model room chooses."""
    from distft.model import cross_entropy

    chosen = cross_entropy.choose(recipe.model.cross_entropy, device, per_token=recipe.objective.spec.per_token)
    if chosen is cross_entropy.full_loss:
        return "full"
    return "fused" if chosen is cross_entropy.fused_loss else "chunked"


def _compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    """Print nothing, on other ranks: things are said once."""


def why(error: BaseException) -> dict[str, str]:
    """Return {kind: memory | refused | failed, reason} of what ended a case."""
    from distft.core.errors import DistftError
    from distft.core.out_of_memory import is_out_of_memory

    problems = getattr(error, "problems", ())
    reason = "; ".join(problem.message for problem in problems) or str(error).strip() or type(error).__name__
    if is_out_of_memory(error):
        return {"kind": "memory", "reason": reason.splitlines()[0]}
    kind = "refused" if isinstance(error, DistftError) and error.exit_code in (2, 3, 9) else "failed"
    return {"kind": kind, "reason": reason.splitlines()[0]}


def main(argv: list[str]) -> NoReturn:
    """Run one process of a case.

    It ends by `hard_exit` while the engine, or the error whose frames hold it, is still referred to: a destructor of a
    gloo group whose other ranks have gone may wait for ever (torch 2.13; under ddp in one of eight ends).
    """
    from distft.core.hard_exit import hard_exit

    die_with_parent()
    spec = BenchCaseSpec.read(Path(argv[0]))
    rank = int(os.environ.get("RANK", "0"))
    if spec.limit_gib is not None:
        set_limit(spec.limit_gib)
    try:
        record, engine = measure(spec)
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError, MemoryError):
            spec.failure(rank).write_text(json.dumps(why(error)), encoding="utf-8")
        hard_exit(1)
    if engine.rank == 0:
        from distft.core.files import replace_file

        replace_file(Path(spec.out), json.dumps(record))
    hard_exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
