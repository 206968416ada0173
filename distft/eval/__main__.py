"""`python -m distft.eval RECIPE_OR_RUN`, for launchers that start modules."""

from distft.core.hard_exit import hard_exit
from distft.core.stop import STOP

if __name__ == "__main__":
    STOP.install()
    from distft.eval.command import main

    hard_exit(main())
