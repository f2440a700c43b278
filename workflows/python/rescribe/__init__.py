"""Rescribe in Python: `load` a model and use it, `open` what was made as a table. docs/python.md shows how."""

from workflows.api import load, open

__all__ = ["load", "open"]
