"""`python -m leantrain` is the command `leantrain`."""

import sys

from leantrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
