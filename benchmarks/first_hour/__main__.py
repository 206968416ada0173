"""`python -m benchmarks.first_hour`: see `driver`."""

import sys

from benchmarks.first_hour.driver import main

sys.exit(main(sys.argv[1:]))
