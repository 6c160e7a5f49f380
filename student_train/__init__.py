"""Student models, stream, matching, losses and trainer. Reads the cache, never writes it."""
