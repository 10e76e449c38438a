"""The miniature: a rendered world with conversations about it, and the tiny towers and tokenizers that go with it.

Everything is deterministic and offline. The rest of the package knows it by its YAMLs alone.
"""
