"""Checkpoint patches: audit -> transform -> verify -> write, each step in a file of its own.

`source` finds and checks a checkpoint, `first_layer` audits a model and computes its tables, `verify` compares logits,
`write` puts the patched folder in place and undoes it, `attach` and `loader` bring tables back at load.
"""
