"""The paper's tables and figures: published numbers as data, experiments as commands."""
