import sys

from lbdet.cli.prepare_voc_subset import main

sys.exit(main())
