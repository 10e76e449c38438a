"""`prism-deco pretrain-mini` and `record-blind`: what the miniature study ships with, made again."""

from __future__ import annotations

import argparse
from pathlib import Path

MINIATURE_PARTS = ("mini_clip", "mini_siglip", "mini_dinov2", "tokenizers")
"""What `pretrain-mini` makes."""

TOKENIZER_TEXTS = 500
"""Conversations that the miniature's tokenizers are trained on."""


def pretrain_mini_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `pretrain-mini`."""
    parser.add_argument("names", nargs="*", help=f"{', '.join(MINIATURE_PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: %(default)s)")


def record_blind_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `record-blind`."""
    parser.add_argument("run", type=Path, help="run folder, trained with recipe.blind=true and scored")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="reference file to add to (in a checkout: prism_deco/assets/reference/blind.json)",
    )


def pretrain_mini(args: argparse.Namespace) -> None:
    """Train the miniature's towers and tokenizers again, as they ship with the package."""
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
    """Keep the scores of an image-blind run as the reference that tables show."""
    from prism_deco.report.baselines import record

    record(args.run, args.out)
