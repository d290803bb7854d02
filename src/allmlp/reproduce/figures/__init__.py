"""What the figures show, and their pictures."""
