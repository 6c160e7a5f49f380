"""The `emkd` command: `emkd ...` and `python -m emkd ...` are the same."""

import sys

from jobs.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
