"""Reading and canonicalising FX graphs."""
