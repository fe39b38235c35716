"""The scores of generated answers."""
