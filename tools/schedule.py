import sys

from lbdet.cli.schedule import main

sys.exit(main())
