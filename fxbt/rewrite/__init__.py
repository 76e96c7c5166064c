"""What was found is replaced, and the numbers are checked."""
