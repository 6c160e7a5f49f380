"""Data, models and recipes of the demos."""
