"""What all HTML pages share: style, numbers as text, pictures inside the file."""
