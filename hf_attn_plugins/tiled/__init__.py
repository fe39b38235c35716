"""Tiled attention: FlashAttention-style tiles, and their plan drawn and walked through."""
