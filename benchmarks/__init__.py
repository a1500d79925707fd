"""Benchmarks: each prints one table and says how it was made."""
