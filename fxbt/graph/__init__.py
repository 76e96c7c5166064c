"""Reading and spelling FX graphs."""
