"""Benchmarks: what BAT OS costs beside the raw limits. `python -m bench --help`."""
