"""`hf-attn bench parallel`: what each rank of a method sends, holds and computes."""
