import sys

from lbdet.cli.check_data import main

sys.exit(main())
