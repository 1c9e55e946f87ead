"""Measure models: ``python evaluate.py MODEL --dataset PATH_OR_ID [--flag value ...]``, as ``polyrep evaluate``."""

import sys

from polyrep.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]], prog="evaluate.py"))
