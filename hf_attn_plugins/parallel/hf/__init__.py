"""Context parallelism with a model: session, forward hooks, sharded cache, training."""
