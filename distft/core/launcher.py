"""`python -m distft.core.launcher MODULE ARGUMENTS...`: a launcher's module, without its long report of a known end.

torchrun reports every rank that did not end with 0 as a failure, with a traceback of its own below which the rank's
message is not seen. A rank that ends with one of our codes has said why.
"""

from __future__ import annotations

import runpy
import sys

from distft.core.errors import PREEMPTED_AND_SAVED, MachineError

KNOWN = (*range(2, MachineError.exit_code + 1), PREEMPTED_AND_SAVED)
"""Exit codes that come with a message; 1 is an error of this project, and a signal's number is told by nobody."""


def main(module: str) -> None:
    """Run it as its own program; ends with a rank's code where that is known."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:
        # torch's ChildFailedError, by its name: importing it here would slow down every start.
        failures = getattr(error, "failures", {}) if type(error).__name__ == "ChildFailedError" else {}
        codes = [failure.exitcode for failure in failures.values()]
        if not codes or any(code not in KNOWN for code in codes):
            raise
        sys.exit(codes[0])


if __name__ == "__main__":
    del sys.argv[0]
    main(sys.argv[0])
