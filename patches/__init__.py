"""Checkpoint patches, one recipe a file; README.md says how to add one."""

from __future__ import annotations

# Name on the command line -> module in this package: each has SUMMARY, add_arguments(parser), plan(source, arguments).
RECIPES = {
    "set-attention": "set_attention",
    "first-layer": "first_layer",
    "rope-freeze": "rope_freeze",
}
