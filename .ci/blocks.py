"""Runs the blocks of one page in the current folder, in their order: `bash` in a shell each, `python` all in one
process. An `output` block holds what the block before it prints, spaces and line breaks aside; `--write` puts it
there. `sh` and `py` are only shown."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```(bash|python|output)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main(page: str, *, write: bool = False) -> int:
    """Exit code 1 where a block fails or prints something else."""
    path, names, printed = Path(page), {"__name__": "__main__"}, ""
    text = path.read_text(encoding="utf-8")
    shown, end = "", 0
    for block in _BLOCK.finditer(text):
        kind, content, line = block[1], block[2], text.count("\n", 0, block.start()) + 1
        if kind == "output":
            if not write and printed.split() != content.split():
                print(f"{page}:{line}: the page shows\n{content}\nbut what is printed is\n{printed}", file=sys.stderr)
                return 1
            shown, end = f"{shown}{text[end : block.start()]}```output\n{printed}```", block.end()
            continue
        print(f"-- {page}:{line} {kind}", flush=True)
        try:
            printed = _of_shell(content) if kind == "bash" else _of_python(content, f"{page}:{line}", names)
        except subprocess.CalledProcessError as problem:
            print(f"{page}:{line}: {problem}", file=sys.stderr)
            return 1
        except Exception:
            traceback.print_exc()
            return 1
        print(printed, end="", flush=True)
    if write:
        path.write_text(shown + text[end:], encoding="utf-8")
    return 0


def calls(page: str, program: str) -> bool:
    """Whether a shell block of the page calls this program, or one by this name in a folder."""
    shell = (block[2] for block in _BLOCK.finditer(Path(page).read_text(encoding="utf-8")) if block[1] == "bash")
    return any(re.search(rf"(^|[\s/;|(]){program}\s", commands, re.MULTILINE) for commands in shell)


def _of_shell(commands: str) -> str:
    shell = ["bash", "-euo", "pipefail", "-c", commands]
    return subprocess.run(shell, stdout=subprocess.PIPE, text=True, check=True).stdout


def _of_python(program: str, where: str, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, where, "exec"), names)
    return printed.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], write="--write" in sys.argv[2:]))
