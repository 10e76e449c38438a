"""`prism-deco bench`: speed and memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from prism_deco.bench.presets import PRESETS
from prism_deco.commands.common import Subparsers, show
from prism_deco.config import load_config


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `bench`."""
    bench = subparsers.add_parser("bench", help="measure speed and memory")
    benches = bench.add_subparsers(required=True, metavar="WHAT")

    projectors = benches.add_parser("projectors", parents=[common], help="forward and backward of every projector")
    projectors.add_argument("names", nargs="*", help="projectors; all by default")
    projectors.add_argument("--in-dim", type=int, default=1024, help="channels of a patch feature")
    projectors.add_argument("--out-dim", type=int, default=4096, help="embedding size of the LLM")
    projectors.add_argument("--in-grid", type=int, nargs=2, default=(24, 24), metavar=("H", "W"), help="patch grid")
    projectors.add_argument("--num-tokens", type=int, default=144, help="visual tokens of compressing projectors")
    projectors.add_argument("--batch-size", type=int, default=8, help="images per pass")
    projectors.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    projectors.add_argument("--device", default="cpu", help="cpu | cuda")
    projectors.add_argument("--repeats", type=int, default=10, help="timed passes per projector")
    projectors.set_defaults(command=bench_projectors)

    loading = benches.add_parser("data", parents=[common], help="images per second beside PIL and torchvision")
    loading.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="as for train: backbone=NAME llm=NAME")
    loading.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("W", "H"), help="of the images")
    loading.set_defaults(command=bench_data)

    steps = benches.add_parser("train", parents=[common], help="our training step beside transformers' own LLaVA")
    steps.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="as for train: backbone=NAME llm=NAME")
    steps.add_argument("--preset", choices=list(PRESETS), default="qwen_small", help="what the overrides build on")
    steps.add_argument("--batch-size", type=int, default=8, help="records per step")
    steps.add_argument("--steps", type=int, default=4, help="steps per round")
    steps.add_argument("--rounds", type=int, default=3, help="timed rounds; the variants alternate")
    steps.add_argument("--ablation", action="store_true", help="also each of our optimisations alone")
    steps.add_argument("--device", default="cpu", help="cpu | cuda")
    steps.add_argument("--out", type=Path, metavar="FILE", help="write the numbers to this JSON file")
    steps.set_defaults(command=bench_train)


def bench_projectors(args: argparse.Namespace) -> None:
    """Compares the projectors."""
    from prism_deco.bench.projectors import Sizes, bench_projectors, render
    from prism_deco.distributed import requested_device

    sizes = Sizes(args.in_dim, args.out_dim, tuple(args.in_grid), args.num_tokens, args.batch_size)
    device = str(requested_device(args.device))
    rows = bench_projectors(args.names, sizes, dtypes=args.dtypes, device=device, repeats=args.repeats)
    show(render(rows, sizes, args.device))


def bench_data(args: argparse.Namespace) -> None:
    """Compares the input pipeline with a plain one."""
    config = load_config(args.arguments)
    import tempfile

    from prism_deco.backbones import build_backbone
    from prism_deco.bench.data import bench_data, photographs, render
    from prism_deco.build import group
    from prism_deco.llms import build_llm

    backbone = build_backbone(group(config, "backbone"), pretrained=False, device="meta")
    llm = build_llm(group(config, "llm"), pretrained=False, device="meta")
    with tempfile.TemporaryDirectory() as folder:
        source = photographs(Path(folder), size=tuple(args.size))
        rows = bench_data(source, llm, backbone.transform, side=backbone.image_size)
    show(render(rows, config.backbone.name))


def bench_train(args: argparse.Namespace) -> None:
    """Compares our training step with that of transformers' own LLaVA."""
    config = load_config([*PRESETS[args.preset], *args.arguments])
    import torch

    from prism_deco.bench.train import bench_train
    from prism_deco.bench.train_report import render
    from prism_deco.distributed import requested_device

    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    sizes = {"batch_size": args.batch_size, "steps": args.steps, "rounds": args.rounds}
    report = bench_train(config, device=str(requested_device(args.device)), ablation=args.ablation, **sizes)
    show(render(report))
    if args.out:
        report.write(args.out)
