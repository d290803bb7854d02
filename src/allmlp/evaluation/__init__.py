"""Measures how good a model is, and reports it."""
