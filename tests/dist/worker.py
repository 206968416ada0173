"""Runs many recipes in one launch: one process group, one import of everything, a result per case.

usage: torchrun --nproc-per-node N tests/dist/worker.py PLAN.json
PLAN: {"cases": [{"name", "recipe", "overrides": [...], "fault": "", "resume": "auto"}], "results": FILE}
"""

import json
import os
import sys
import traceback
from pathlib import Path

from distft import load_recipe, train
from distft.core.hard_exit import hard_exit
from distft.core.stop import STOP
from distft.engine import processes


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    STOP.install()
    processes.join()  # the group outlives the cases
    results = {}
    for case in plan["cases"]:
        try:
            STOP.clear()
            os.environ["DISTFT_FAULT"] = case.get("fault", "")
            resume = case.get("resume", "auto")
            recipe = load_recipe(case["recipe"], overrides=case["overrides"])
            result = train(recipe, resume=resume if resume in ("auto", "never") else Path(resume))
            results[case["name"]] = {"folder": str(result.folder)}
        except Exception as error:
            results[case["name"]] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            if os.environ.get("RANK", "0") != "0":
                print(results[case["name"]]["trace"], file=sys.stderr)
    if os.environ.get("RANK", "0") == "0":
        Path(plan["results"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    hard_exit(0)
