"""Benchmarks of single components: time, memory and arithmetic."""
