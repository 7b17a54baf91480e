"""Heatmap of one q_id (spec section 6)."""

import sys

from relfv.__main__ import main

if __name__ == "__main__":
    sys.exit(main("heatmap"))
