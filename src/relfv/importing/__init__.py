"""Import word pairs of other projects as a relation CSV: formats.py reads them, cleaning.py makes them fit, convert.py
writes the CSV and an account of what was done."""
