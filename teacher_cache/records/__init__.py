"""Turns the teacher's final states into records."""
