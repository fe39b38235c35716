"""`hf-attn bench front`: what accuracy costs in speed."""
