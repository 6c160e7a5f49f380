"""Ray: options, actors, workers and submission."""
