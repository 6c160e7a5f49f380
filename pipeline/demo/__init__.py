"""The miniatures' data, models and recipes."""
