"""Convert on text, one layer at a time."""
