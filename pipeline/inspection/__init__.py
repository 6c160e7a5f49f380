"""Looks at a sealed cache, and runs the teacher against it again."""
