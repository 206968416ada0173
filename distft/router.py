"""`python -m distft.router train RECIPE`: a classifier that chooses among adapters of one base."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from distft.core.ending import exit_code, report_error
from distft.core.errors import DONE
from distft.core.log import quiet_libraries
from distft.router_options import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code is that of the error, if any."""
    options = parser().parse_args(argv)
    quiet_libraries()
    try:
        from distft.routing.router_recipe import load_router_recipe
        from distft.routing.training import train_router

        recipe = load_router_recipe(options.recipe)
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there; it is for the result alone
            made = train_router(recipe, str(options.recipe), _say, min_accuracy=options.min_accuracy)
    except (Exception, KeyboardInterrupt) as error:
        report_error(error, 0)
        return exit_code(error)
    if options.json:
        print(json.dumps(made, indent=1))
        return DONE
    print(f"{recipe.folder}: a router among {', '.join(entry['name'] for entry in made['adapters'])}")
    print(f"  distft chat {recipe.folder}")
    print(f"  distft eval RUN --model {recipe.folder}")
    return DONE


def _say(line: str) -> None:
    print(f"distft: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
