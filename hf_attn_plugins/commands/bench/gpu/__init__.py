"""`hf-attn bench gpu`: results, times and tile sizes of the kernels on a GPU."""
