"""What a model does with one text: how far its heads look, and where predictions change under a plugin."""
