"""PyTorch's FlexAttention with this package's masks and plans.

`attend.py` calls it. `pairs.py` holds the mask as a function of one pair, `blocks.py` lists the tiles that are visited.
A list of rectangles becomes bands of rows (`bands.py`, integers), and these a table and tiles (`plan.py`).
"""
