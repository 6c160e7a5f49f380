"""Stores rows in files, in several formats behind one interface."""
