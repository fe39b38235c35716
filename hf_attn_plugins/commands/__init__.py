"""The commands of `hf-attn` that belong to no single method."""
