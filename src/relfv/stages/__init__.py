"""The science, one file a stage: first what it computes (typed values in and out, no files), then its files, then its
declaration. ``table.py`` lists the stages in the spec's order.

What a stage file imports at its top is light: torch is imported where something is computed with it, so that the table,
and with it ``relfv status`` and ``relfv verify``, costs no seconds.
"""
