"""Indexed attention as a Transformers model and its config."""
