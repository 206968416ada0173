"""`python -m distft.step_sources.reward_worker FD BYTES`: judges one answer a line, in a process that can be killed.

Reads JSON lines from standard input: first what rewards there are, then answers. Writes a JSON line for each to the
file descriptor FD, which nothing else writes to: what a user's function prints goes to standard error. The process may
use BYTES of addresses.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Sequence
from typing import Any

from distft.core.errors import DistftError
from distft.recipe import listed_params
from distft.scores import SCORES, Answer
from distft.scores.spec import Scorer


def main() -> None:
    """Serve until standard input is closed."""
    out = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    most = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    os.dup2(2, 1)  # a function's own prints

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    lines = iter(sys.stdin)
    chosen = json.loads(next(lines))
    try:
        scorers = [(_built(settings), figure) for settings, figure in chosen]
    except DistftError as error:
        say({"failed": str(error)})
        return
    say({"built": True})
    try:
        for (settings, _), (scorer, _) in zip(chosen, scorers, strict=True):
            if (load := SCORES[settings["name"]].load) is not None:
                load(scorer)
    except DistftError as error:
        say({"failed": str(error)})
        return
    say({"loaded": True})
    for line in lines:
        say(_judged(scorers, Answer(**json.loads(line))))


def _built(settings: dict[str, Any]) -> Scorer:
    spec = SCORES[settings["name"]]
    return spec.build(listed_params(settings, spec.params))


def _judged(scorers: Sequence[tuple[Scorer, str]], answer: Answer) -> dict[str, Any]:
    """Return the figures, or why there is one that has none."""
    values: list[float] = []
    for scorer, figure in scorers:
        try:
            result = scorer([answer])
        except DistftError as error:
            return {"why": str(error)}
        except Exception as error:  # a score's own fault: named, and the answer has no reward
            return {"why": f"{type(error).__name__}: {error}"}
        value = result.rows[figure][0]
        if not math.isfinite(value):
            return {"why": result.unscored.get(answer.id, f"{figure} is {value}")}
        values.append(value)
    return {"values": values}


if __name__ == "__main__":
    main()
