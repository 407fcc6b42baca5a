import sys

from lbdet.cli.eval_det import main

sys.exit(main())
