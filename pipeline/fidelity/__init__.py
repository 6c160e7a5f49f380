"""Estimates and measures what a cache costs and what it loses of the teacher."""
