"""Masks: what Transformers asks for, recognised, and carried to the attention call without being written out."""
