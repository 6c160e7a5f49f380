"""Students, and which parts of them are trained."""
