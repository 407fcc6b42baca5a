import sys

from lbdet.cli.predict import main

sys.exit(main())
