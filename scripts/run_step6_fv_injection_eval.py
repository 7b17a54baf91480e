"""Step6 at one layer (spec section 9)."""

import sys

from relfv.cli import script_main

if __name__ == "__main__":
    sys.exit(script_main("step6"))
