import sys

from lbdet.cli.benchmark import main

sys.exit(main())
