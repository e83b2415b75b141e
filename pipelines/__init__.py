"""Sampling: one pipeline a file, each of which travels to the Hub with the weights."""
