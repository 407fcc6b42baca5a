import sys

from lbdet.cli.eval_cls import main

sys.exit(main())
