"""`python -m distft.serve`: OpenAI's fine-tuning API on this machine. The code is in `distft.service`."""

import sys

from distft.service.command import main
from distft.service.options import parser as parser

if __name__ == "__main__":
    sys.exit(main())
