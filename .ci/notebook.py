"""Makes examples/tutorial.ipynb of docs/tutorial.md: `python .ci/notebook.py` in the root of a clone runs the page's
blocks, in a minute, and writes the notebook with what they print and the run's own pictures.

What the blocks print is checked by `make pages` on the page; tests/test_notebook.py compares the
notebook with it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from blocks import _of_python

PAGE, NOTEBOOK = Path("docs/tutorial.md"), Path("examples/tutorial.ipynb")
RUN = "results_fv/relation_qwise/relationA_ex/Q15/artifacts"
PICTURES = {
    "## The vector": ("Every head's effect, as the run drew it:", f"{RUN}/aie_heatmap_Q15.png"),
    "## Is it more than a push in any direction?": ("The same as a curve:", f"{RUN}/step6/injection_curve.png"),
}
"""Shown just before the section of that name."""
SETUP = """import os
from pathlib import Path

while not Path("src/relfv").is_dir():  # the paths below count from the root of the clone
    os.chdir("..")"""
PREFACE = """*Made of [this page](../docs/tutorial.md) by `.ci/notebook.py`, and run. On Colab, clone the repository,
enter it (`%cd`) and `pip install '.[pandas]'` first; the other cells are as they are here.*"""
_PART = re.compile(r"^```(\w+)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)


def cells(page: str) -> list[dict[str, Any]]:
    """The page as cells; those of code with the text that the page says they print, without pictures."""
    found, end = [markdown(PREFACE), code(SETUP)], 0
    for block in _PART.finditer(page):
        found += texts(page[end : block.start()])
        end = block.end()
        if block[1] == "python":
            found.append(code(block[2].rstrip("\n")))
        elif block[1] == "output":
            found[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines(block[2])}]
    return [{**cell, "id": f"cell-{i}"} for i, cell in enumerate([*found, *texts(page[end:])])]


def texts(text: str) -> list[dict[str, Any]]:
    """Markdown cells, with pictures before the sections that have them."""
    found, start = [], 0
    for title, (words, path) in PICTURES.items():
        if (at := text.find(f"{title}\n")) >= 0:
            show = f'from IPython.display import Image\n\nImage("{path}")'
            found += [markdown(text[start:at] + words), code(show)]
            start = at
    return [cell for cell in [*found, markdown(text[start:])] if cell["source"]]


def markdown(text: str) -> dict[str, Any]:
    """With links that count from examples/."""
    linked = re.sub(r"\]\((?!https?:|\.\./|#)", "](../docs/", text.strip())
    return {"cell_type": "markdown", "metadata": {}, "source": lines(linked)}


def code(program: str) -> dict[str, Any]:
    """Not yet run."""
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": lines(program)}


def lines(text: str) -> list[str]:
    """As notebooks keep text."""
    return text.splitlines(keepends=True)


def run(notebook: list[dict[str, Any]]) -> None:
    """Run the code in this process and keep what it prints and shows."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in notebook if cell["cell_type"] == "code"), 1):
        program = "".join(cell["source"])
        cell["execution_count"] = number
        if picture := re.search(r'^Image\("(.*)"\)$', program, re.MULTILINE):
            png = base64.b64encode(Path(picture[1]).read_bytes()).decode()
            data = {"image/png": png, "text/plain": ["<IPython.core.display.Image object>"]}
            cell["outputs"] = [
                {"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"}
            ]
        elif printed := _of_python(program, f"cell {number}", names):
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines(printed)}]


def main() -> int:
    """Write the notebook."""
    os.chdir(Path(__file__).resolve().parents[1])
    notebook = cells(PAGE.read_text(encoding="utf-8"))
    run(notebook)
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    document = {"cells": notebook, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    NOTEBOOK.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
