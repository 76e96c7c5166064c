"""Unpadding: computes a graph on valid tokens only, where that is proven to be right."""
