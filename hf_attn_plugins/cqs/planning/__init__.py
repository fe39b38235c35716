"""Which worker computes which pairs of tokens, and what that costs. Integers only, no tensors."""
