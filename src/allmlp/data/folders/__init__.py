"""Trees of folders, on disk or in a zip: what lies in them, and which folders are parts, classes or neither."""
