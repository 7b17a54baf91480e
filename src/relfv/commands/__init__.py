"""The command line: the parser and its errors, flags made from settings, examples, completion, and the commands of
runs, of single stages and of figures. cli.py puts them together."""
