"""The version of the package, here and nowhere else: pyproject.toml reads it. Every layer may import this file."""

__version__ = "0.2.0"
