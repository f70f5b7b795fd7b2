"""python -m negmine: the command, where its script is not on the path."""

import sys

from negmine.cli import main

sys.exit(main())
