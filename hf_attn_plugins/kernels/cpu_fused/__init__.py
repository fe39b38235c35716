"""Attention for CPUs, fused in C: `attend.py` is the entry, `build.py` compiles, `call.py` calls."""
