"""The kernel ops: their declarations, the choice of a backend, and the code that is shared by their callers."""
