"""`prism-deco bench`: speed and memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from prism_deco.bench.presets import PRESETS
from prism_deco.commands.common import OVERRIDES, count, show
from prism_deco.config import load_config
from prism_deco.config.choices import choice_name, plugins_of
from prism_deco.config.registry import import_plugins
from prism_deco.files import check_writable


def bench_projectors_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="projectors, or YAML files (default: all shipped)")
    parser.add_argument("--in-dim", type=count, default=1024, help="channels of a patch feature (default: %(default)s)")
    parser.add_argument("--out-dim", type=count, default=4096, help="embedding size of the LLM (default: %(default)s)")
    parser.add_argument(
        "--in-grid", type=count, nargs=2, default=(24, 24), metavar=("H", "W"), help="patch grid (default: 24 24)"
    )
    parser.add_argument("--num-tokens", type=count, default=144, help="visual tokens (default: %(default)s)")
    parser.add_argument("--batch-size", type=count, default=8, help="images per pass (default: %(default)s)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"],
        metavar="DTYPE",
        help="float32 | bfloat16 (default: both)",
    )
    parser.add_argument("--repeats", type=count, default=10, help="timed passes per projector (default: %(default)s)")
    _add_device(parser)


def bench_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument(
        "--size", type=count, nargs=2, default=(640, 480), metavar=("W", "H"), help="image size (default: 640 480)"
    )


def bench_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="qwen_small",
        help="configuration that the settings modify (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=count, default=8, help="records per step (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=4, help="steps per round (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="timed rounds, alternating (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers to this JSON file")
    _add_device(parser)


def bench_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help="names of parts (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench_gpu"), metavar="DIR", help="result folder (default: %(default)s)"
    )
    parser.add_argument("--redo", action="store_true", help="rerun parts that already have a result")
    parser.add_argument("--minutes", type=float, default=30.0, help="time for all parts (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="use miniatures instead of the real sizes")
    parser.add_argument("--device", help="cpu | cuda (default: cuda; cpu with --rehearse)")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu | cuda (default: %(default)s)")


def bench_projectors(args: argparse.Namespace) -> None:
    """Time the forward and backward passes of the projectors, and measure their memory."""
    from prism_deco.bench.projectors import bench_projectors
    from prism_deco.distributed import requested_device

    import_plugins(module for name in args.names for module in plugins_of("projector", name))
    result = bench_projectors(
        [choice_name(name) for name in args.names],
        in_dim=args.in_dim,
        out_dim=args.out_dim,
        in_grid=tuple(args.in_grid),
        num_tokens=args.num_tokens,
        batch_size=args.batch_size,
        dtypes=args.dtypes,
        device=requested_device(args.device),
        repeats=args.repeats,
    )
    show(result.table())


def bench_data(args: argparse.Namespace) -> None:
    """Count the images per second of the input pipeline, compared with PIL and torchvision alone."""
    config = load_config(args.arguments)
    # Heavy imports only after the arguments were checked.
    import tempfile

    from prism_deco.backbones import build_backbone
    from prism_deco.bench.data import bench_data
    from prism_deco.build import group
    from prism_deco.llms import build_llm

    # Without weights: the input pipeline needs only the image transform and the tokenizer.
    backbone = build_backbone(group(config, "backbone"), pretrained=False, device="meta")
    llm = build_llm(group(config, "llm"), pretrained=False, device="meta")
    name, side = config.backbone.name, backbone.image_size
    with tempfile.TemporaryDirectory() as folder:
        result = bench_data(Path(folder), llm, backbone.transform, side=side, size=tuple(args.size), title=name)
    show(result.table())


def bench_train(args: argparse.Namespace) -> None:
    """Time a training step and measure its memory, compared with transformers' own LLaVA."""
    if args.out:
        check_writable(args.out.parent, "Name another file with --out.")
    config = load_config([*PRESETS[args.preset], *args.arguments])
    import torch

    from prism_deco.bench.train import bench_train
    from prism_deco.distributed import requested_device

    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    sizes = {"batch_size": args.batch_size, "steps": args.steps, "rounds": args.rounds}
    result = bench_train(config, device=requested_device(args.device), **sizes)
    show(result.table())
    if args.out:
        result.write(args.out)


def bench_gpu(args: argparse.Namespace) -> int:
    """Prove a GPU: results, memory and speed, part by part. The same command continues where it stopped."""
    check_writable(args.out, "Name another folder with --out.")
    from prism_deco.bench.gpu import Bench, run_parts, table
    from prism_deco.bench.gpu_parts import PARTS
    from prism_deco.distributed import requested_device

    device = requested_device(args.device or ("cpu" if args.rehearse else "cuda"))
    bench = Bench(args.out.absolute(), device, args.rehearse)
    results = run_parts(bench, PARTS, minutes=args.minutes, redo=args.redo, names=args.parts)
    show(table(results, device))
    return int(any(result["state"] in ("failed", "error") for result in results))
