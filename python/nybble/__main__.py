"""`python -m nybble` is the command `nybble`."""

import sys

from nybble.cli import main

sys.exit(main())
