"""StepE of one q_id, and its zero-shot snapshot (spec sections 7 and 8)."""

import sys

from relfv.__main__ import main

if __name__ == "__main__":
    sys.exit(main("stepe"))
