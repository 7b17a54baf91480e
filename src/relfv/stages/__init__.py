"""The science. A stage is declared in one file: first what it computes (typed values in and out, no files), with what
takes pages of its own in files beside it, then its files, then its declaration. ``table.py`` lists the stages in the
spec's order, docs/stages.md with the file of each.

What a stage file imports at its top is light: torch is imported where something is computed with it, so that the table,
and with it ``relfv status`` and ``relfv verify``, costs no seconds.
"""
