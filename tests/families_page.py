"""docs/families.md, whose two tables are written by two tests."""

from __future__ import annotations

from conftest import ROOT

PAGE = ROOT / "docs" / "families.md"
EVERY_MODEL = "\n## Every causal language model of transformers "
"""The title of the second table."""
