"""StepD of one q_id (spec section 5)."""

import sys

from relfv.cli import script_main

if __name__ == "__main__":
    sys.exit(script_main("stepd"))
