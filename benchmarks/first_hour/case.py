"""`python -m benchmarks.first_hour.case CHANGE SPEC.json`: a case of `distft bench`, with one change made before."""

from __future__ import annotations

import sys

from benchmarks.first_hour.changes import CHANGES
from distft.bench.case import main

if __name__ == "__main__":
    change, spec = sys.argv[1:]
    if change != "none":
        CHANGES[change].patch()
    main([spec])
