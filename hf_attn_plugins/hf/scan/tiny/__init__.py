"""A tiny random model of any family, and inputs for it."""
