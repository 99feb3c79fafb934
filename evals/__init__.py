"""Evaluations: how well BAT OS does what it is for. `python -m evals --help`."""
