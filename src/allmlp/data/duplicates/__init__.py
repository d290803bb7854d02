"""Images that are in a data set more than once: found, and left out."""
