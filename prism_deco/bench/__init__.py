"""Measurements of single components: time, memory and arithmetic."""
