"""Benchmark metrics as pure functions of answers and annotations."""
