"""The recipes, by their names on the command line."""

from __future__ import annotations

# Name -> module in this package: each has SUMMARY, add_arguments(parser), plan(source, arguments).
RECIPES = {
    "set-attention": "set_attention",
    "first-layer": "first_layer",
    "rope-freeze": "rope_freeze",
}
