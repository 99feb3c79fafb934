"""The organs of BAT OS, in layers; `tests/test_layers.py` holds the table of who may import whom."""
