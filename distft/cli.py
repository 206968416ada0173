"""`distft VERB`: one table of verbs. A verb's flags and code are its module's, which is imported when it is called.

`python -m distft.VERB` runs the same code. Help and completion are made from the parsers alone, so they are instant.
"""

from __future__ import annotations

import os
import sys

from distft.core.stop import hold

if sys.argv[1:2] in (["train"], ["eval"]) and (__name__ == "__main__" or os.path.basename(sys.argv[0]) == "distft"):
    hold(True)  # at once: a signal that comes during these imports is for the run, which will take it

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distft.core.nearest import nearest

if TYPE_CHECKING:
    from distft.core.command_line import CommandParser

_USAGE_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command: what it does in a line, and where its code is."""

    help: str
    main: str
    """`module:function` that takes the arguments and returns the exit code."""
    parser: str
    """`module:function` that makes the parser; its module imports nothing heavy."""
    leaves: bool = False
    """The process ends by `core.hard_exit.hard_exit`, for the sake of libraries whose threads outlive `main`."""


VERBS: dict[str, Verb] = {
    "train": Verb(
        help="Fine-tune: becomes `accelerate launch -m distft.train` with one process per accelerator.",
        main="distft.launch:start_training",
        parser="distft.train_options:parser",
    ),
    "check": Verb(
        help="Resolve the recipe and read the data: counts, lengths, masks. Touches no GPU, loads no weights.",
        main="distft.check:main",
        parser="distft.check_options:parser",
    ),
    "plan": Verb(
        help="Does it fit, what to change, how fast. Needs the model's config alone: no GPU, weights, rows or network.",
        main="distft.plan.command:main",
        parser="distft.plan.command:parser",
    ),
    "eval": Verb(
        help="Look at a model: held-out loss, answers and their scores, compared with the base model's.",
        main="distft.eval.command:start",
        parser="distft.eval.command:parser",
    ),
    "submit": Verb(
        help="Put a run into a Slurm queue: writes the batch script, submits it, says where to look.",
        main="distft.submit:main",
        parser="distft.submit:parser",
    ),
    "status": Verb(
        help="Where a run is, or all runs of a folder: state, step, loss, time left, restarts and why.",
        main="distft.status:main",
        parser="distft.status:parser",
    ),
    "doctor": Verb(
        help="Is this machine, or are these machines, ready: versions, GPUs, network, shared folder, disk, clocks.",
        main="distft.doctor.command:main",
        parser="distft.doctor.command:parser",
        leaves=True,
    ),
    "advise": Verb(
        help="What to choose: prompt, retrieve or fine-tune, method and settings, each with its reason; a recipe.",
        main="distft.advise.command:main",
        parser="distft.advise.command:parser",
    ),
    "bench": Verb(
        help="Measure methods, engines and sizes of a recipe: speed and peak memory, beside the plan of each.",
        main="distft.bench.command:main",
        parser="distft.bench.command:parser",
    ),
    "report": Verb(
        help="A run as one HTML page: what it taught, curves, faults, data, cost, the way back; unfinished runs too.",
        main="distft.report.command:main",
        parser="distft.report.command:parser",
    ),
    "compare": Verb(
        help="Several runs side by side on one HTML page: quality, memory, speed, cost, and settings that differ.",
        main="distft.compare:main",
        parser="distft.compare:parser",
    ),
    "reproduce": Verb(
        help="Run a run again: hashes first, then whether losses and final tensors are equal, or how far off.",
        main="distft.reproduce.command:main",
        parser="distft.reproduce.command:parser",
    ),
    "export": Verb(
        help="A trained model as GGUF, safetensors, a PEFT adapter or for Ollama, compared where it will run.",
        main="distft.export_formats.command:main",
        parser="distft.export_options:parser",
    ),
    "chat": Verb(
        help="Chat with a trained model in the terminal, beside its base and other adapters.",
        main="distft.chat.command:main",
        parser="distft.chat.command:parser",
    ),
    "recipes": Verb(
        help="List the recipes, launch files and cluster files that come with distft, or copy one of them.",
        main="distft.recipes:main",
        parser="distft.recipes:parser",
    ),
    "import": Verb(
        help="Make a recipe of a file of Axolotl, LLaMA-Factory, TRL or torchtune, or of an OpenAI job.",
        main="distft.import:main",
        parser="distft.import_options:parser",
    ),
    "merge": Verb(
        help="Merge an adapter into its base: a whole model, compared with the adapter on held-out rows.",
        main="distft.merge:main",
        parser="distft.merge_options:parser",
    ),
    "adapters": Verb(
        help="Combine adapters on what they changed, look at them, compare, extract, resize, convert.",
        main="distft.adapters:main",
        parser="distft.adapters_options:parser",
    ),
    "router": Verb(
        help="Train a small classifier that chooses among adapters of one base, request by request.",
        main="distft.router:main",
        parser="distft.router_options:parser",
    ),
    "serve": Verb(
        help="Serve OpenAI's fine-tuning API on this machine: files, jobs in a queue, chat with what was trained.",
        main="distft.service.command:main",
        parser="distft.service.options:parser",
    ),
    "completion": Verb(
        help="Print the script that completes verbs, flags and values in bash, zsh or fish.",
        main="distft.cli:print_completion",
        parser="distft.completion:parser",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line and end the process with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else _USAGE_ERROR)
    if words[0] == "--version":
        from distft import __version__

        print(f"distft {__version__}")
        sys.exit(0)
    verb = VERBS.get(words[0])
    if verb is None:
        print(_unknown(words[0]), file=sys.stderr)
        sys.exit(_USAGE_ERROR)
    if not {"-h", "--help"}.isdisjoint(words[1:]):
        parser_of(verb).print_help()
        sys.exit(0)
    code = _load(verb.main)(words[1:])
    if verb.leaves:
        from distft.core.hard_exit import hard_exit

        hard_exit(code)
    sys.exit(code)


def usage() -> str:
    """Return the help of `distft` itself."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "Usage: distft VERB [arguments]   (distft VERB --help says which; distft --version)",
            "",
            "Distributed fine-tuning of language models from one recipe.",
            "",
            *lines,
        ]
    )


def parser_of(verb: Verb) -> CommandParser:
    """Return the verb's parser."""
    return _load(verb.parser)()


def print_completion(argv: Sequence[str]) -> int:
    """Run `distft completion SHELL`."""
    from distft import completion

    shell = completion.parser().parse_args(argv).shell
    print(completion.script(shell, {name: (verb.help, parser_of(verb)) for name, verb in VERBS.items()}), end="")
    return 0


def _unknown(word: str) -> str:
    meant = nearest(word, [*VERBS, "--help", "--version"])
    hint = f"  did you mean {meant}?" if meant else ""
    return f"distft: unknown {'flag' if word.startswith('-') else 'verb'} {word}{hint}  allowed: {', '.join(VERBS)}"


def _load(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    main()
