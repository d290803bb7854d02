"""What to train and how: recipes, typed, and to and from JSON."""
