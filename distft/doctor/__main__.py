"""`python -m distft.doctor`, one process alone or as many as a launcher starts."""

import sys

from distft.core.hard_exit import leave
from distft.doctor.command import main

leave(main(sys.argv[1:]))
