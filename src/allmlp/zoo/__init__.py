"""The systems that the paper compares Mixer with, built from timm's modules."""
