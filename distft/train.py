"""`python -m distft.train RECIPE`: the command line of the main job (`distft.job`), for launchers that start modules.

From Python it is `from distft import train`, a function: importing this module would put the module in its place.
"""

import sys

from distft.core import faults
from distft.core.hard_exit import hard_exit
from distft.core.stop import STOP

if __name__ == "distft.train":
    raise ImportError("this module is a command; in Python: from distft import train")
if __name__ == "__main__":
    STOP.install()  # before anything heavy: being asked to stop during the imports is no crash
    faults.inject("import")
    if any(word.partition("=")[0] == "--nproc" for word in sys.argv[1:]):
        from distft.launch import start_training

        hard_exit(start_training(sys.argv[1:]))
    from distft.job import main

    hard_exit(main())
