"""Self-contained HTML pages: the report of a run, and of an evaluation."""
