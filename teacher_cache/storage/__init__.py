"""Stores the files of a cache, each whole or absent, on a disk or in an object store."""
