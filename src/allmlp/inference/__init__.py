"""From weights and images to labels."""
