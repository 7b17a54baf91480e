"""StepE of one q_id, and its zero-shot snapshot (spec sections 7 and 8)."""

import sys

from relfv.cli import script_main

if __name__ == "__main__":
    sys.exit(script_main("stepe"))
