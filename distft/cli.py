"""`distft VERB`: parses, calls, prints errors. Each verb is imported when it is called, so help is instant."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from distft.core.stop import hold

if sys.argv[1:2] in (["train"], ["eval"]) and (__name__ == "__main__" or os.path.basename(sys.argv[0]) == "distft"):
    hold(True)  # at once: a signal that comes during these imports is for the run, which will take it

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Distributed fine-tuning of language models from one recipe.",
)  # fmt: skip

Recipe = Annotated[str, typer.Argument(help="TOML recipe")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change one key; repeat.")
]


@app.command()
def train(
    recipe: Recipe,
    set_: Overrides = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of run folders.")] = None,
    resume: Annotated[str, typer.Option(metavar="auto|never|DIR", help="Where to continue.")] = "auto",
    allow_changes: Annotated[bool, typer.Option(help="Continue under a changed learning rate or length.")] = False,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes on this machine; default: one per GPU.")] = None,
) -> None:
    """Fine-tune: becomes `accelerate launch -m distft.train` with one process per accelerator."""
    from distft import load_recipe
    from distft.compatibility import refuse_missing_folder
    from distft.core.errors import RecipeError
    from distft.launch import become, launch_command, launch_env, num_accelerators

    try:  # once, and before any process is started
        refuse_missing_folder(load_recipe(recipe, overrides=set_ or []))
    except RecipeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    passed = [recipe, "--resume", resume, *(["--allow-changes"] if allow_changes else [])]
    for override in set_ or []:
        passed += ["--set", override]
    if output_dir is not None:
        passed += ["--output-dir", output_dir]
    nproc = nproc if nproc is not None else num_accelerators()
    become(launch_command(nproc, passed), launch_env(), nproc=nproc)


@app.command()
def check(
    recipe: Recipe,
    set_: Overrides = None,
    samples: Annotated[int, typer.Option(help="Rows to show with their trained tokens marked.")] = 2,
    card: Annotated[str | None, typer.Option(metavar="FILE", help="Write a data card (Markdown) as well.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Resolve the recipe and read the data: counts, lengths, masks. Touches no GPU, loads no weights."""
    from distft.check import main as run

    argv = [recipe, "--samples", str(samples), *(["--json"] if json else []), *(["--card", card] if card else [])]
    for override in set_ or []:
        argv += ["--set", override]
    raise typer.Exit(run(argv))


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Argument(help="TOML recipe")] = None,
    set_: Overrides = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME|GiB", help="A GPU, or its usable memory.")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs in each node.")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    methods: Annotated[str, typer.Option(metavar="full,lora,qlora", help="Compare these methods.")] = "",
    engines: Annotated[str, typer.Option(metavar="ddp,zero3,…", help="Compare these engines.")] = "",
    max_: Annotated[str | None, typer.Option("--max", metavar="seq|micro|model", help="The largest that fits.")] = None,
    price: Annotated[float | None, typer.Option(metavar="PER_GPU_HOUR", help="For the cost of the run.")] = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="The model's config.json.")] = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="FILE", help="Take a GPU's rates from a measurement.")
    ] = None,
    calibration: Annotated[str | None, typer.Option(metavar="FILE", help="Where calibrations are kept.")] = None,
    explain: Annotated[bool, typer.Option(help="The formula behind every figure.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Does it fit, what to change, how fast. Needs the model's config alone: no GPU, weights, rows or network."""
    from distft.plan.command import main as run

    argv = [] if recipe is None else [recipe]
    argv += ["--gpus", str(gpus), "--nodes", str(nodes), "--methods", methods, "--engines", engines]
    given = {"--gpu": gpu, "--max": max_, "--price": price, "--config": config}
    given |= {"--calibrate": calibrate, "--calibration": calibration}
    argv += [text for flag, value in given.items() if value is not None for text in (flag, str(value))]
    argv += [*(["--explain"] if explain else []), *(["--json"] if json else [])]
    for override in set_ or []:
        argv += ["--set", override]
    raise typer.Exit(run(argv))


@app.command(name="eval")
def eval_(
    target: Annotated[str, typer.Argument(metavar="RECIPE_OR_RUN", help="TOML recipe, or a run's folder.")],
    model: Annotated[
        str | None, typer.Option(metavar="base|final|best|STEP|FOLDER", help="Default: final if there is one.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name of the results.")] = None,
    set_: Overrides = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of run folders.")] = None,
    lm_eval: Annotated[str | None, typer.Option(metavar="TASK,…", help="Tasks of lm-eval to run as well.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Rows shown in each task's prompts.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes on this machine; default: one per GPU.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Look at a model: held-out loss, answers and their scores, compared with the base model's."""
    given = {"--model": model, "--label": label, "--output-dir": output_dir, "--lm-eval": lm_eval, "--limit": limit}
    given["--num-fewshot"] = num_fewshot
    passed = [target, *(text for flag, value in given.items() if value is not None for text in (flag, str(value)))]
    for override in set_ or []:
        passed += ["--set", override]
    passed += ["--json"] * json
    from distft.launch import become, launch_command, launch_env, num_accelerators

    nproc = nproc if nproc is not None else num_accelerators()
    become(launch_command(nproc, passed, module="distft.eval"), launch_env(), nproc=nproc)


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For verbs whose module parses the rest, --help included: `distft VERB` and `python -m distft.VERB` are one."""


@app.command(context_settings=PASSED_ON)
def submit(context: typer.Context) -> None:
    """Put a run into a Slurm queue: writes the batch script, submits it, says where to look."""
    from distft.submit import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASSED_ON)
def status(context: typer.Context) -> None:
    """Where a run is, or all runs of a folder: state, step, loss, time left, restarts and why."""
    from distft.status import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASSED_ON)
def doctor(context: typer.Context) -> None:
    """Is this machine, or are these machines, ready: versions, GPUs, network, shared folder, disk, clocks."""
    from distft.core.hard_exit import hard_exit
    from distft.doctor.command import main as run

    hard_exit(run(context.args))


@app.command(context_settings=PASSED_ON)
def advise(context: typer.Context) -> None:
    """What to choose: prompt, retrieve or fine-tune, method and settings, each with its reason; writes a recipe."""
    from distft.advise.command import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASSED_ON)
def bench(context: typer.Context) -> None:
    """Measure methods, engines and sizes of a recipe: speed and peak memory, beside the plan of each."""
    from distft.bench.command import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASSED_ON)
def report(context: typer.Context) -> None:
    """A run as one HTML page: what it taught, curves, faults, data, cost, the way back. Also of an unfinished run."""
    from distft.report.command import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASSED_ON)
def compare(context: typer.Context) -> None:
    """Several runs side by side on one HTML page: quality, memory, speed, cost, and the settings that differ."""
    from distft.compare import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASSED_ON)
def reproduce(context: typer.Context) -> None:
    """Run a run again: hashes first, then whether losses and final tensors are equal, or how far off."""
    from distft.reproduce.command import main as run

    raise typer.Exit(run(context.args))


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
