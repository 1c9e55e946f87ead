"""Measure models: ``python evaluate.py MODEL --dataset PATH_OR_ID --mteb NAME [--flag value ...]``.

The same as ``polyrep evaluate``; one of ``--dataset`` and ``--mteb`` is enough. With ``--frontier`` it compares every
way to make the index of one MODEL smaller.
"""

import sys

from polyrep.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]], prog="evaluate.py"))
