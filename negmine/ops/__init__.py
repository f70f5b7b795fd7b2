"""The kernel ops: their declarations, the choice of a backend, and what every call of one shares."""
