"""worker.py with logits of a few rows at a time: ranks have different numbers of chunks, as with real vocabularies."""

import worker

from distft.core.hard_exit import hard_exit
from distft.model import cross_entropy

if __name__ == "__main__":
    cross_entropy.CHUNK_BYTES = 4 * 1024 * 20
    worker.main()
    hard_exit(0)
