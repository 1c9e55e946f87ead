"""Train a run: ``accelerate launch train.py hub_configs/<run> [--flag value ...]``; the same as ``polyrep train``."""

import sys

from polyrep.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], prog="train.py"))
