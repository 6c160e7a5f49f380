"""Runs the demos: every stage in miniature."""
