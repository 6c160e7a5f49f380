"""Shows what a sealed cache holds, and runs its teacher again to compare."""
