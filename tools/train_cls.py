import sys

from lbdet.cli.train_cls import main

sys.exit(main())
