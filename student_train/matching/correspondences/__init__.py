"""Ways to pair the student's vision tokens with the teacher's, one to a file."""
