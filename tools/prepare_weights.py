import sys

from lbdet.cli.prepare_weights import main

sys.exit(main())
