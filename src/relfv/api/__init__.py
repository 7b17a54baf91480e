"""The Python API: results, vectors on your own model, runs, and single steps. Import its names from ``relfv``
itself."""
