import sys

from lbdet.cli.sweep_bits import main

sys.exit(main())
