"""Questions about a model: its family, its configs, its attention modules, what a wrapper holds."""
