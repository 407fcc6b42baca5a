import sys

from lbdet.cli.train_det import main

sys.exit(main())
