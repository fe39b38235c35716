"""`hf-attn scan`: a tiny random model of every family of Transformers under every plugin, against its default backend."""
