"""Star Attention with a model: encode a context once, ask many questions, save and load."""
