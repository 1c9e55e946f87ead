"""The command line, with the test room."""

import sys

import toy  # noqa: F401  registers the test room

from polyrep.cli import main

sys.exit(main(sys.argv[1:]))
