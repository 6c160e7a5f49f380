"""One stage, in this process or on Ray."""
