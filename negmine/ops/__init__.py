"""The kernel ops: their declarations, the choice of a backend, and code that all of their calls share."""
