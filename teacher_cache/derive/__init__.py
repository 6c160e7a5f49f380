"""Makes caches from caches."""
