import sys

from lbdet.cli.report import main

sys.exit(main())
