"""`distft submit RECIPE --nodes N --gpus-per-node G`: into a Slurm queue, once all that can be checked here was."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from distft.cluster import asked, script
from distft.cluster.fits import refuse_what_cannot_fit
from distft.cluster.site import Site, read_site
from distft.core.errors import DONE, DistftError, MachineError
from distft.recipe import check_world
from distft.run_folder import RunFolder

SUBMIT_S = 60.0


def submit(text: str) -> str:
    """Hand a script to sbatch; the job's id.

    Raises:
        MachineError: there is no Slurm here, or it refuses; carries its words.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=text, capture_output=True, text=True, timeout=SUBMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"sbatch: {error}; submit from a login node, or use --dry-run") from None
    if done.returncode:
        raise MachineError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # "id;cluster" where several clusters share a controller


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    parser = argparse.ArgumentParser(
        prog="distft submit",
        description="Put a run into a Slurm queue. Options that are not listed here go to distft.train.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML recipe")
    parser.add_argument("--nodes", default="1", metavar="N", help="a number, or a range such as 2-8 (default 1)")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="0: one process a node, on CPUs")
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="limit of one start; the run goes on in the next")
    parser.add_argument("--partition", help="instead of the site's")
    parser.add_argument("--site", type=Path, metavar="FILE", help="TOML file of the cluster; see cluster/sites/")
    parser.add_argument("--gpu", metavar="NAME|GiB", help="plan for it, instead of the site's")
    parser.add_argument("--no-plan", action="store_true", help="submit even what the plan says cannot fit")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change one key; repeat")
    parser.add_argument("--output-dir", metavar="DIR", help="folder of run folders")
    own, more = parser.parse_known_args(argv)
    train = [own.recipe, *(word for change in own.set for word in ("--set", change))]
    train += ["--output-dir", own.output_dir] if own.output_dir is not None else []
    try:
        site = Site() if own.site is None else read_site(own.site)
        recipe = asked.read([*train, *more]).recipe
        if own.nodes.isdecimal():  # of a range, a start uses as many as the global batch allows
            check_world(recipe, int(own.nodes) * max(1, own.gpus_per_node))
        wanted = script.Wanted(
            name=recipe.name,
            nodes=own.nodes,
            gpus_per_node=own.gpus_per_node,
            time=own.time,
            partition=own.partition,
            output_dir=recipe.run_dir,
        )
        gpu = own.gpu or site.gpu
        if gpu and own.gpus_per_node and not own.no_plan:
            said = refuse_what_cannot_fit(
                recipe, own.recipe, own.set, gpu=gpu, gpus_per_node=own.gpus_per_node, nodes=own.nodes
            )
            print(f"plan: {said}", file=sys.stderr)
        text = script.render(site, wanted, [*train, *more])
        if own.dry_run:
            print(text, end="")
            return DONE
        RunFolder(recipe.run_dir, writes=True)  # sbatch does not make folders for a job's output
        job = submit(text)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"job {job}")
    print(f"output: {recipe.run_dir}/job-{job}.out")
    print(f"state:  distft status {recipe.run_dir}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
