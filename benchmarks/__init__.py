"""Benchmarks and the demo of negmine: run from a checkout, never part of the wheel."""
