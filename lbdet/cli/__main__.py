"""`python -m lbdet.cli <verb> ...`, the same as the command `lbdet`."""

import sys

from lbdet.cli import main

if __name__ == "__main__":
    sys.exit(main())
