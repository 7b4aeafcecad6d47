"""`python -m opcd`: the command `opcd`."""

import sys

from opcd.cli import main

sys.exit(main())
