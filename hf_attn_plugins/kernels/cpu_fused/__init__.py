"""Attention for CPUs with AVX512-BF16, fused in C: `attend.py` is the entry, `build.py` compiles, `call.py` calls."""
