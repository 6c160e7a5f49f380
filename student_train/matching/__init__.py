"""Pairs each student vision token with one teacher vision token."""
