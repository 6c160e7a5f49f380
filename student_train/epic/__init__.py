"""EPIC: a step's student pass and teacher pass, from one plan."""
