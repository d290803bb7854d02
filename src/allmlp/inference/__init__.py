"""From weights and images to predicted classes."""
