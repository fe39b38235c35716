"""PyTorch's own fused attention operators. Start with `attend.py`; `ops.py` wraps the operators."""
