"""What was done, and what was not and why."""
