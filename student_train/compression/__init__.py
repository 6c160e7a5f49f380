"""Drops vision tokens inside the language model (DART, FastV, Random)."""
