"""PyTorch's own fused attention operators: `attend.py` is the entry, `ops.py` wraps the operators."""
