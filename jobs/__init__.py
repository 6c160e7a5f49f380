"""Command line and Ray: where a stage runs and how often, never what it computes."""
