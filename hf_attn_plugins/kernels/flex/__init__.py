"""PyTorch's FlexAttention with this package's masks: `attend.py` calls it, `blocks.py` lists the tiles it visits."""
