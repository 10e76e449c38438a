"""The miniature: a rendered world with conversations about it, and the architectures of its tiny towers.

Everything is deterministic and offline. The rest of the package uses it through its YAMLs only.
"""
