"""Writes, reads, verifies and cleans a cache folder."""
