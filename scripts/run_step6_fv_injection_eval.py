"""Step6 at one layer (spec section 9)."""

import sys

from relfv.__main__ import main

if __name__ == "__main__":
    sys.exit(main("step6"))
