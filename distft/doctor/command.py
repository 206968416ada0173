"""`distft doctor`: parses, has every process look, lets rank 0 judge and print."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft.core.command_line import CommandParser, add_json, add_output_dir, add_overrides, add_site
from distft.core.errors import DistftError, MachineError

if TYPE_CHECKING:  # nothing heavy before the flags are read: help is instant
    from distft.doctor.finding import DoctorOptions
    from distft.recipe import Recipe

JOIN_S = 120.0
"""Hosts of one job start seconds apart; imports from a busy file system take minutes."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return 0, or 9 when a run would fail here."""
    args = parser().parse_args(argv)
    from distft.core.log import quiet_libraries
    from distft.doctor.checks import CHECKS
    from distft.doctor.finding import Here, Seen, fail, run_judge, run_look
    from distft.doctor.findings_table import Report
    from distft.doctor.together import Together
    from distft.engine.processes import detect_launcher

    quiet_libraries()
    try:
        options = _options(args)
    except DistftError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(error, file=sys.stderr)
        return error.exit_code
    host = socket.gethostname()
    try:
        _, rank, world, local_rank = detect_launcher(os.environ)
    except MachineError as error:
        report = Report((host,))
        report.add("processes", [fail(str(error).partition(";")[0], str(error).partition(";")[2].strip())])
        print(report.text(as_json=args.json), flush=True)
        return report.code
    here = Here(rank=rank, world=world, local_rank=local_rank, env=os.environ, options=options, hosts=(host,))
    if world > 1:
        return Together(here, as_json=args.json, join_s=args.join_s).examine()
    report = Report((host,))
    for check in CHECKS:
        if check.short or not options.short:
            seen = [Seen(rank=0, host=host, facts=run_look(check, here))]
            report.add(check.name, run_judge(check, seen, options))
    print(report.text(as_json=args.json), flush=True)
    return report.code


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft doctor",
        description="Whether a run would work here: alone, or under torchrun, accelerate launch or srun.",
        epilog="Ends with 0, or with 9 when a run would fail. torchrun and accelerate turn 9 into 1.",
    )
    made.add_argument("--recipe", metavar="FILE", help="a recipe: its run folder, and the batch it splits")
    add_overrides(made)
    add_output_dir(made)
    made.add_argument("--shared-folder", type=Path, metavar="DIR", help="one that all hosts see (default: the same)")
    add_site(made)
    made.add_argument("--link-floor", type=float, metavar="GB/s", help="fail below this bus bandwidth")
    made.add_argument("--disk-floor", type=float, metavar="GB/s", help="fail below this write speed")
    made.add_argument("--gib", type=float, help="size of each test of disk and network")
    made.add_argument("--short", action="store_true", help="some seconds, as before every job on several nodes")
    made.add_argument("--per-host", type=int, metavar="N", help="processes a host will have, if more than now")
    made.add_argument("--join-s", type=float, default=JOIN_S, metavar="S", help="how long others may take to come")
    add_json(made)
    return made


def _options(args: argparse.Namespace) -> DoctorOptions:
    from distft.catalog import REGISTRIES
    from distft.cluster.site import Site, read_site
    from distft.doctor.finding import DoctorOptions
    from distft.recipe import load_recipe

    recipe: Recipe | None = None
    if args.recipe is not None:
        folder = [] if args.output_dir is None else [f"output_dir={_toml(str(args.output_dir))}"]
        recipe = load_recipe(args.recipe, registries=REGISTRIES, overrides=[*args.overrides, *folder])
    elif args.overrides:
        raise MachineError("--set changes a recipe: give --recipe FILE")
    site = Site() if args.site is None else read_site(args.site)
    output = recipe.run_dir if recipe is not None else args.output_dir or Path()
    return DoctorOptions(
        recipe=recipe,
        output=output,
        shared=args.shared_folder or output,
        short=args.short,
        gib=args.gib,
        link_floor_gb_per_s=args.link_floor if args.link_floor is not None else site.link_floor_gb_per_s,
        disk_floor_gb_per_s=args.disk_floor if args.disk_floor is not None else site.disk_floor_gb_per_s,
        per_host=args.per_host,
    )


def _toml(text: str) -> str:
    from distft.recipe.toml_text import toml_value

    return toml_value(text)
