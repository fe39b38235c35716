"""Attention calls: Transformers' arguments turned into ours, and what an open trace records of them."""
