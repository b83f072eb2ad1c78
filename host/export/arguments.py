"""The command line of `host.export`."""

import argparse
from pathlib import Path
from typing import Final, get_args

from host.evaluate.likelihood import STORIES
from host.export.hub.publish import Dtype
from host.model.network import CONFIGS
from shared.manifest import SamplingDefaults

DESCRIPTION: Final = """
Export a trained model as a bundle: `python -m host.export --int8` takes the newest diffusion run.

A run that learned ar gets graphs for blocks, one that learned canvas graphs for canvas; for CPU and CUDA.

no flag   FP32 graphs for the CPU
--int8    INT8 graphs: for blocks with static scales; for canvas on the CPU the fastest scheme that passes the parity
          gate; for CUDA explicit Q/DQ around the linear layers, FP16 elsewhere. Layers without which the gate would be
          missed stay in float.
--fp16    FP16 graphs for CUDA; goes with --int8 or alone
--hf OUT  the weights as a folder that the Hugging Face libraries load, which host.train --init also takes; alone, or
          with --out, --int8 or --fp16 beside a bundle
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m host.export",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m host.export --int8 --fp16 --out bundles/mine",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="run folder (default: the newest in runs/)")
    what.add_argument(
        "--untrained", choices=list(CONFIGS), help="random weights of this shape instead, for measuring and testing"
    )
    parser.add_argument(
        "--conditions-onto",
        type=Path,
        metavar="BUNDLE",
        help="only the conditions of the run, beside a copy of this bundle's graphs of blocks for the CPU, in their "
        "precision: for a run whose network it has already",
    )
    parser.add_argument("--conditions", action="store_true", help="with --untrained: also take words and pictures")
    parser.add_argument("--out", type=Path, help="bundle folder (default: bundles/NAME-OF-RUN)")
    parser.add_argument("--int8", action="store_true", help="INT8 graphs for the CPU and for CUDA")
    parser.add_argument("--fp16", action="store_true", help="FP16 graphs for CUDA")
    parser.add_argument("--fp32-norms", action="store_true", help="compute LayerNorm in float32 in the CUDA graphs")
    parser.add_argument("--hf", type=Path, metavar="OUT", help="write a folder for the Hugging Face libraries")
    parser.add_argument(
        "--hf-dtype", choices=get_args(Dtype), help="of the weights there (default: float32; float16 takes half)"
    )
    parser.add_argument(
        "--hf-figures", type=Path, metavar="BUNDLE", help="bundle of the run that has its figures (default: measure)"
    )
    parser.add_argument("--target", choices=["cpu", "cuda"], help="only the graphs of this target")
    parser.add_argument("--source", type=Path, help="text files to measure on (default: the run's validation split)")
    parser.add_argument(
        "--stories", type=int, default=STORIES, help=f"evaluate on the first N stories (default: {STORIES})"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=SamplingDefaults().steps,
        help="denoising steps of canvas requests that name none (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=SamplingDefaults().temperature,
        help="temperature of requests that name none (default: %(default)s)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=0.0,
        help="guidance of requests with a condition that name none (default: %(default)s)",
    )
    parser.add_argument("--report", action="store_true", help="also print each layer's error and every graph's figures")
    return parser.parse_args()
