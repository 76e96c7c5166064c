"""What a graph calls at run time."""
