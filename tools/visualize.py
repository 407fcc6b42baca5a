import sys

from lbdet.cli.visualize import main

sys.exit(main())
