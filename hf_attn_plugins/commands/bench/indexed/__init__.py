"""`hf-attn bench indexed`: indexed attention against the direct form."""
