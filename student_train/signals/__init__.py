"""What the teacher says, in three forms behind one interface."""
