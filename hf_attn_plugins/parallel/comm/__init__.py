"""Ranks and how they talk: group, launch, failure, traffic, collectives."""
