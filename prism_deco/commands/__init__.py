"""The commands of `prism-deco`, a module each: its arguments, and what it does with the rooms of the package.

Heavy imports stand inside the functions, so that `--help` answers at once.
"""

from prism_deco.commands import bench, chat, data, evaluate, explain, export, miniature, sweep, train

MODULES = (train, evaluate, explain, chat, export, sweep, data, bench, miniature)
"""In the order of `--help`."""
