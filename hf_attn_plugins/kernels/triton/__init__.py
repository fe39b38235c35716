"""Triton kernels: read attend, ops, launch, forward, program, tiles in this order."""
