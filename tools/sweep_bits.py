"""mAP against bit-width in one command; see `--help`."""

import sys

from lbdet.cli.sweep_bits import main

sys.exit(main())
