"""predlog's parts, in floors: a module imports only from floors below its own (tests/unit/test_floors.py)."""

__version__ = "2.0.0"
