"""Tiles in plain PyTorch for CPUs: `attend.py` is the entry; read it, then tiling, forward, backward."""
