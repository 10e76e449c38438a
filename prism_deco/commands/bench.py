"""`prism-deco bench projectors`."""

from __future__ import annotations

import argparse

from prism_deco.commands.common import show


def bench_projectors_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bench projectors`."""
    parser.add_argument("names", nargs="*", help="projectors (default: all)")
    parser.add_argument("--in-dim", type=int, default=1024, help="channels of a patch feature (default: %(default)s)")
    parser.add_argument("--out-dim", type=int, default=4096, help="embedding size of the LLM (default: %(default)s)")
    parser.add_argument(
        "--in-grid", type=int, nargs=2, default=(24, 24), metavar=("H", "W"), help="patch grid (default: 24 24)"
    )
    parser.add_argument("--num-tokens", type=int, default=144, help="visual tokens (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per pass (default: %(default)s)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"],
        metavar="DTYPE",
        help="float32 | bfloat16 (default: both)",
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed passes per projector (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu | cuda (default: %(default)s)")


def bench_projectors(args: argparse.Namespace) -> None:
    """Time the forward and backward passes of the projectors, and measure their memory."""
    from prism_deco.bench.projectors import bench_projectors
    from prism_deco.distributed import requested_device

    result = bench_projectors(
        args.names,
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
