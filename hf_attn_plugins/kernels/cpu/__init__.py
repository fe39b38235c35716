"""Tiles in plain PyTorch for CPUs. Start with `attend.py`, then read `tiling.py`, `forward.py`, `backward.py`."""
