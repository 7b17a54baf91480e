"""Where commands begin: ``relfv``, ``python -m relfv`` and the files in scripts/.

Nothing that takes time is imported before handlers are in place, so that an interrupt during imports is one, too.
"""

from __future__ import annotations

import signal
import sys


def main(script: str | None = None) -> int:
    """``relfv <command> ...``, or the command of one script. Returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
    try:
        from relfv import cli
    except KeyboardInterrupt:
        print("ERROR: interrupted", file=sys.stderr)
        return 130
    return cli.script_main(script) if script else cli.main()


if __name__ == "__main__":
    sys.exit(main())
