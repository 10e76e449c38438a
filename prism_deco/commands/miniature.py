"""`prism-deco pretrain-mini` and `record-blind`: what the miniature study ships with, made again."""

from __future__ import annotations

import argparse
from pathlib import Path

from prism_deco.commands.common import Subparsers

MINIATURE_PARTS = ("mini_clip", "mini_siglip", "mini_dinov2", "tokenizers")
"""What `pretrain-mini` makes."""

TOKENIZER_TEXTS = 500
"""Conversations that the miniature's tokenizers are trained on."""


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `pretrain-mini` and `record-blind`."""
    pretrain = subparsers.add_parser(
        "pretrain-mini", parents=[common], help="remake the towers and tokenizers of the miniature"
    )
    pretrain.add_argument("names", nargs="*", help=f"{', '.join(MINIATURE_PARTS)}; all by default")
    pretrain.add_argument("--out", type=Path, required=True, help="folder to write to")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.set_defaults(command=pretrain_mini)

    blind = subparsers.add_parser("record-blind", parents=[common], help="keep a blind run's scores as the reference")
    blind.add_argument("run", type=Path, help="run folder, trained with recipe.blind=true and scored")
    blind.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="reference file to add to (of a checkout: prism_deco/assets/reference/blind.json)",
    )
    blind.set_defaults(command=record_blind)


def pretrain_mini(args: argparse.Namespace) -> None:
    """Makes the miniature's towers and tokenizers."""
    from prism_deco.config.registry import unknown
    from prism_deco.miniature.conversations import corpus
    from prism_deco.miniature.pretraining import pretrain_tower
    from prism_deco.miniature.train_tokenizer import train_tokenizers

    for name in args.names:
        if name not in MINIATURE_PARTS:
            raise unknown("part of the miniature", name, MINIATURE_PARTS)
    for name in args.names or MINIATURE_PARTS:
        if name == "tokenizers":
            train_tokenizers(corpus(args.seed, TOKENIZER_TEXTS), args.out / "tokenizers")
        else:
            pretrain_tower(name, args.out / "towers", args.seed)


def record_blind(args: argparse.Namespace) -> None:
    """Keeps a blind run's scores as the reference."""
    from prism_deco.report.blind import record

    record(args.run, args.out)
