"""Measuring and predicting cost."""
