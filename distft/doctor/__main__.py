"""`python -m distft.doctor`, one process alone or as many as a launcher starts."""

import sys

from distft.core.leave import leave
from distft.doctor.command import main

leave(main(sys.argv[1:]))
