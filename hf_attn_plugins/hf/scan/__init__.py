"""`hf-attn scan`: a tiny random model of every family of Transformers, each plugin against the default backend."""
