import sys

from lbdet.cli.sensitivity import main

sys.exit(main())
