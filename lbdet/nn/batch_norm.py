"""Batch norm in a detector: trained or frozen, and its statistics re-estimated after training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbdet.errors import UserError


def set_training_mode(model: nn.Module, batch_norm: Literal["train", "frozen"]) -> None:
    """Put `model` into training mode; `frozen` batch norm uses its running statistics and keeps them.

    Call it instead of `model.train()`, which would thaw batch norm. Gamma and beta train in both modes,
    unless `freeze_batch_norm` was called.
    """
    if batch_norm not in ("train", "frozen"):
        raise UserError(f"batch_norm: must be 'train' or 'frozen', got {batch_norm!r}; choose one of them")
    model.train()
    if batch_norm == "frozen":
        for layer in _batch_norms(model):
            layer.eval()


def freeze_batch_norm(model: nn.Module) -> None:
    """Exclude gamma and beta of every batch norm from training; the statistics are `set_training_mode`'s."""
    for layer in _batch_norms(model):
        for parameter in layer.parameters():
            parameter.requires_grad_(False)


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Iterable[Sequence[Tensor] | Tensor]) -> int:
    """Estimate the running statistics of every batch norm anew, at the model's present precision.

    A layer's mean and (unbiased) variance are pooled over all its inputs, so they include the variance
    between batches; averaging the variances of batches, as PyTorch does, loses it, and on maps of a few
    pixels it counts. The model is in eval mode throughout (no dropout, no targets), and a layer normalises
    each batch with its pooled statistics *so far*. The first batch norm of a path is therefore exactly
    independent of how images are batched; those behind it nearly, as early batches are normalised by the
    statistics of few images. One pass; old statistics have no influence.

    Args:
        model: a detector or classifier; changed in place. A batch norm that no batch reaches stays as it is.
        batches: what `model` takes in eval mode, on its device: a list of images `[3, H, W]` or a tensor
            `[N, 3, H, W]`. Not read where the model has no batch norm.

    Returns:
        The number of images seen.
    """
    layers = [layer for layer in _batch_norms(model) if layer.track_running_stats]
    if not layers:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_pre_hook(_Pool(layer)) for layer in layers]
    images = 0
    try:
        model.eval()
        for batch in batches:
            model(batch)
            images += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return images


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norm normalise by the batch at hand, as in training, and keep its running statistics."""
    layers = [layer for layer in _batch_norms(model) if layer.track_running_stats]
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, training in zip(layers, modes, strict=True):
            layer.training, layer.track_running_stats = training, True


def statistics(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of the running mean and variance, float32 `[C]` each, of every batch norm by name."""
    return {
        name: (layer.running_mean.clone(), layer.running_var.clone())
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    }


@torch.no_grad()
def set_statistics(model: nn.Module, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Take over running means and variances by name, as `statistics` returns them, in place."""
    for name, values in found.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, _BatchNorm)
        for buffer, value in zip((layer.running_mean, layer.running_var), values, strict=True):
            assert buffer is not None
            buffer.copy_(value)


@torch.no_grad()
def shift_statistics(
    model: nn.Module,
    stored: Mapping[str, tuple[Tensor, Tensor]],
    before: Mapping[str, tuple[Tensor, Tensor]],
    after: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Change running statistics from `stored` by what lies between `before` and `after`, in place.

    With `v` for a variance plus eps and r = v_after / v_before, a channel gets the variance r * v_stored and
    the mean m_after + sqrt(r) * (m_stored - m_before): if `before` equals `stored`, simply `after`.
    """
    for name, (stored_mean, stored_var) in stored.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        ratio = (after[name][1] + layer.eps) / (before[name][1] + layer.eps)
        layer.running_mean.copy_(after[name][0] + ratio.sqrt() * (stored_mean - before[name][0]))
        layer.running_var.copy_((ratio * (stored_var + layer.eps) - layer.eps).clamp_min_(0))


@dataclass
class _Pool:
    """A hook that merges each input of a batch norm into running statistics over all of them.

    Reference: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979.
    """

    layer: _BatchNorm
    count: int = 0
    mean: Tensor | float = 0.0
    """float64 `[C]`"""
    squares: Tensor | float = 0.0
    """float64 `[C]`: sum of squared differences from `mean`"""

    def __call__(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0]  # [N, C, ...]
        count = x.numel() // x.shape[1]
        if count == 0:  # a layer on proposals, of which there may be none
            return
        var, mean = torch.var_mean(x.float(), dim=[d for d in range(x.ndim) if d != 1], correction=0)
        total = self.count + count
        delta = mean.double() - self.mean
        self.squares = self.squares + var.double() * count + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total
        assert self.layer.running_mean is not None
        assert self.layer.running_var is not None
        self.layer.running_mean.copy_(self.mean)
        self.layer.running_var.copy_(self.squares / max(total - 1, 1))


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
