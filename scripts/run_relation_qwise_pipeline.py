"""All stages of all q_ids: relfv run."""

import sys

from relfv.cli import script_main

if __name__ == "__main__":
    sys.exit(script_main("run"))
