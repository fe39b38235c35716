"""The charts of a run, as inline SVG."""
