"""A cache folder: its layout, writing, reading, verifying and clearing it."""
