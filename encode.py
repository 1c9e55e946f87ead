"""Encode a corpus: ``accelerate launch encode.py MODEL --input ... --output DIR``; the same as ``polyrep encode``."""

import sys

from polyrep.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]], prog="encode.py"))
