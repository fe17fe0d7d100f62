"""Benchmarks: one file a system, and the workshop's own."""
