"""What can be known of a graph; changes nothing."""
