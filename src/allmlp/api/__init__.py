"""Training, fine-tuning and evaluation as functions: the commands and Python call the same."""
