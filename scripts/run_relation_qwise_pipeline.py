"""All stages of all q_ids: relfv run."""

import sys

from relfv.__main__ import main

if __name__ == "__main__":
    sys.exit(main("run"))
