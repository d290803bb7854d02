"""From weights files to models, and from models to files."""
