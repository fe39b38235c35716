"""`hf-attn bench`: one file a verb."""
