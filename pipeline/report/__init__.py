"""Writes one HTML page that compares runs."""
