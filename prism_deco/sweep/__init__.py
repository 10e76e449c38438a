"""Many trainings: a grid of command lines, each in processes of its own, with a ledger of what became of them."""

from prism_deco.sweep.expand import Cell, expand
from prism_deco.sweep.ledger import Entry, Ledger
from prism_deco.sweep.live import render
from prism_deco.sweep.run import dry_run, run
from prism_deco.sweep.spec import Spec, parse

__all__ = ["Cell", "Entry", "Ledger", "Spec", "dry_run", "expand", "parse", "render", "run"]
