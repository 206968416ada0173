"""`python -m distft.chat` is `distft chat`."""

import sys

from distft.chat.command import main

sys.exit(main())
