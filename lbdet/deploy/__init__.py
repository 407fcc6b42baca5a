"""What leaves the laboratory: a trained low-bit model as a small file, and as one that engines run."""

from __future__ import annotations

from lbdet.deploy.load import Predictor, load

__all__ = ["Predictor", "load"]
