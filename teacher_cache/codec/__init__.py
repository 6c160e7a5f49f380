"""Turns a record into named columns, and columns into checked frames."""
