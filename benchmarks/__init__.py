"""Benchmarks and the demo of negmine. They run from a checkout and are not part of the wheel."""
