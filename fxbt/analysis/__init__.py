"""Analysis: what can be known about a graph; changes nothing."""
