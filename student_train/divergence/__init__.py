"""KL and JSD against a teacher that may be known only in part, and their bounds."""
