"""Reads samples from LLaVA JSON, WebDataset tars and Parquet."""
