"""Runs the blocks of a page with a `relfv` whose commands are forks of this process, which has imported what they need
once: a command then costs what it computes. `.ci/package` is where commands start as they do for users.

`python .ci/warm.py README.md`; the `.venv/bin/relfv` that it makes calls `warm.py --ask` with its words.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import traceback
from pathlib import Path

PROGRAM = """#!/bin/sh
exec "{python}" -S "{here}" --ask "{path}" "$@"
"""


def ask(path: str, *words: str) -> int:
    """Have ``relfv`` run with these words, this folder, environment and files. Its exit code; 1 if it was killed."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps([words, os.getcwd(), dict(os.environ)]).encode() + b"\n")  # noqa: PTH109
        return int(server.makefile().readline() or 1)


def main(page: str) -> int:
    """Exit code of the page's blocks."""
    import blocks

    if not blocks.calls(page, "relfv"):
        return blocks.main(page)
    import_all()
    program, path = Path(".venv/bin/relfv"), Path(".venv/relfv.socket").absolute()
    program.write_text(PROGRAM.format(python=sys.executable, here=Path(__file__).absolute(), path=path))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        alive, ours = os.pipe()  # ours closes with this process, however it ends
        if (server := os.fork()) == 0:
            os.close(ours)
            serve(listener, alive)
        os.close(alive)
    try:
        return blocks.main(page)
    finally:
        os.close(ours)
        os.waitpid(server, 0)


def import_all() -> None:
    """What a run imports on its way."""
    import matplotlib.backends.backend_agg  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import relfv.cli
    import relfv.language_model
    import relfv.report.page
    import relfv.runs.worker  # noqa: F401


def serve(listener: socket.socket, alive: int) -> None:
    """A fork for each that asks, until nobody holds the other end of ``alive``."""
    while True:
        asked, _, _ = select.select([listener, alive], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if alive in asked:
            os._exit(0)
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os.close(alive)
            answer(client)
        client.close()


def answer(client: socket.socket) -> None:
    """Be the command that the client asks for."""
    from relfv.__main__ import main as relfv

    code: object = 1
    try:
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        words, folder, environment = json.loads(client.makefile().readline())
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["relfv", *words]
        code = relfv()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall(f"{code}\n".encode())
        os._exit(0)


if __name__ == "__main__":
    sys.exit(ask(*sys.argv[2:]) if sys.argv[1] == "--ask" else main(sys.argv[1]))
