"""What a cache costs and what it loses of the teacher, before and after it is built."""
