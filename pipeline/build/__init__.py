"""Builds sealed caches from a source and a teacher, and extends them."""
