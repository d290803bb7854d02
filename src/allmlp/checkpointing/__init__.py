"""Checkpoints: written completely or not at all, verified, and found again."""
