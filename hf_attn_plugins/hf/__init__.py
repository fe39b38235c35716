"""The side of Transformers that all methods share: the verbs here, calls, masks, models and inputs in their folders."""
