"""The first hour on a GPU: everything that only a GPU can tell, in one command (`make gpu-first`).

A phase is a file in `phases/` and a line in `phases/__init__.py`. Phases do their work in processes of their own, in
steps that are kept one by one, so that a machine which is taken away leaves what was found.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "benchmarks", ROOT / "tests" / "helpers"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
