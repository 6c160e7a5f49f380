"""The drivers of the miniatures."""
