"""`hf-attn bench star`: Star Attention against dense attention."""
