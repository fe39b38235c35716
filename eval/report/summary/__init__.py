"""The figures of metrics.json, from the predictions of a run."""
