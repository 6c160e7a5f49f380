"""Vocabulary types, record codecs, identity, shards, and the teacher's forward pass."""
