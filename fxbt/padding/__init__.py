"""The graph on valid tokens alone, where that is proven."""
