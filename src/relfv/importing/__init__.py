"""Word pairs of other projects as a relation CSV: formats.py reads them, cleaning.py makes them fit, convert.py writes
the CSV and what was done to get there."""
