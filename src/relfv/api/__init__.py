"""relfv from Python: results, vectors on your own model, runs, and single steps. The names are in ``relfv`` itself."""
