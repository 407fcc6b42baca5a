import sys

from lbdet.cli.prepare_cifar10_10k import main

sys.exit(main())
