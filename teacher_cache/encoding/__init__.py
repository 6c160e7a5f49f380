"""Samples to token positions: chat templates, pictures, view geometry, batches."""
