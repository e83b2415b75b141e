"""Measures of samples and of models, and what they hold for."""
