"""Samples from LLaVA JSON, WebDataset and Parquet."""
