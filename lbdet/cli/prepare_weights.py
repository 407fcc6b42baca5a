"""`prepare_weights.py`: make the COCO weights of SSDlite that the published configs start from.

torchvision's COCO_V1 weights, downloaded once by torchvision, as an 8-bit model for inference has them: batch
norm is folded into each convolution, and the weights are rounded to 256 steps an output channel. They stay
float32 under torchvision's names: batch norm is put back with a gain of 1 and the statistics that the folded
convolution's output has. The published numbers started from a copy that was made elsewhere from the same
weights, with slightly other steps and perhaps other statistics: expect numbers near those, not equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from lbdet.cli import check_new_file, exit_code, write_new_file
from lbdet.engine.progress import say
from lbdet.models.weights import PREPARED, check_fit, load_weights

ARCHITECTURE = "ssdlite320_mobilenet_v3_large"
EPS = 1e-3
"""of its batch norm"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, make the file, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="prepare_weights.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", default="COCO_V1", metavar="NAME|FILE",
        help=f"of {ARCHITECTURE}: torchvision's name, or its file fetched elsewhere; default: COCO_V1",
    )  # fmt: skip
    parser.add_argument(
        "--output", default=Path("datasets/weights", PREPARED), type=Path, metavar="FILE",
        help=f"new; default: datasets/weights/{PREPARED}",
    )  # fmt: skip
    return exit_code(partial(_prepare, parser.parse_args(argv)))


def _prepare(args: argparse.Namespace) -> None:
    check_new_file(args.output, ".pth")
    weights = load_weights(args.weights, ARCHITECTURE)
    check_fit(ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None), weights)
    tensors = fold_batch_norm(weights.tensors)
    rounded = {key: round_rows(t) if t.ndim == 4 else t for key, t in tensors.items()}
    write_new_file(args.output, partial(torch.save, rounded))
    say(f"{args.output}: written, {sum(t.ndim == 4 for t in rounded.values())} convolutions rounded")


def fold_batch_norm(tensors: Mapping[str, Tensor], eps: float = EPS) -> dict[str, Tensor]:
    """Give each convolution the gain of the batch norm behind it, which keeps its bias and a gain of 1.

    In evaluation the result computes what `tensors` do. With g = gamma / sqrt(var + eps) the convolution's
    output is g times what it was; so are its running mean and deviation.

    Args:
        tensors: a state dict in which the batch norm `a.1` stands behind the convolution `a.0`.

    Returns:
        A new dict; tensors that do not change are shared.
    """
    folded = dict(tensors)
    for key, var in tensors.items():
        if not key.endswith(".1.running_var"):
            continue
        norm = key.removesuffix("running_var")
        conv, mean = f"{norm.removesuffix('1.')}0.weight", f"{norm}running_mean"
        gain = tensors[f"{norm}weight"].double() / (var.double() + eps).sqrt()
        folded[conv] = (tensors[conv] * gain[:, None, None, None]).float()
        folded[mean] = (tensors[mean] * gain).float()
        folded[key] = (var * gain.square()).float()
        folded[f"{norm}weight"] = (folded[key].double() + eps).sqrt().float()
    return folded


def round_rows(weight: Tensor) -> Tensor:
    """Round each output channel to -128..127 times a step, the smallest that clips nothing.

    Args:
        weight: `[C, ...]`.

    Returns:
        A new tensor; rounding it again changes nothing beyond the rounding of float32.
    """
    rows = weight.flatten(1).double()
    step = torch.maximum(rows.amax(1) / 127, rows.amin(1) / -128).clamp(min=torch.finfo().tiny)[:, None]
    return (step * (rows / step).round()).to(weight.dtype).view_as(weight)
