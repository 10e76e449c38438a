"""Sweeps: a grid of training command lines, each run in its own processes and tracked in a ledger."""

from prism_deco.sweep.expand import SweepCell, expand
from prism_deco.sweep.ledger import Ledger
from prism_deco.sweep.live import render
from prism_deco.sweep.run import dry_run, run
from prism_deco.sweep.spec import parse

__all__ = ["Ledger", "SweepCell", "dry_run", "expand", "parse", "render", "run"]
