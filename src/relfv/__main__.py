"""``python -m relfv`` is ``relfv``."""

import sys

from relfv.cli import main

sys.exit(main())
