"""Checkpoints of other code bases to and from the models of this package."""
