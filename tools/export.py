import sys

from lbdet.cli.export import main

sys.exit(main())
