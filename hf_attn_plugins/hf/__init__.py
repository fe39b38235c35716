"""Transformers' side of every method."""
