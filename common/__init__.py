"""predlog's modules, in layers: each imports only from the layers below its own (tests/unit/test_layers.py)."""

__version__ = "2.0.0"
