"""Recipes: what to train and how, with limits, and their JSON."""
