"""Trains students, generates their answers and scores them."""
