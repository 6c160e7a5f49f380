"""From samples and a teacher to a sealed cache, and extensions of it."""
