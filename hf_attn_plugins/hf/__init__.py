"""The side of Transformers that all methods share: registration, masks, the attention call, and the verbs."""
