"""Which batch norm directly follows which convolution? Read from the code of `forward`, without an input.

Names and containers do not tell: a ResNet's `bn1` follows `conv1` in `forward` alone, and a convolution's
output may go elsewhere too. So `torch.fx` traces every part of the model that can be traced, the largest
first (a detector as a whole cannot be, its backbone can), with layers as single nodes. A part whose `forward`
has optional arguments is not traced, only what it is made of: with other arguments it may compute another
thing. A pair is a convolution whose output has one use, a batch norm, where both are called once in that
part, nothing else there reads their tensors, and neither has a second name in the model. What is in no pair
stays as it is. (What tracing cannot see: a model that calls a part's layers itself, and never the part's
`forward`, or code that first computes something of their tensors alone, such as `2 * conv.weight`.)
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbdet.nn import QuantConv2d, QuantLinear

_CONVOLUTIONS = (nn.Conv2d, QuantConv2d)


def batch_norm_pairs(model: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Return convolution -> batch norm by name, and the batch norms that follow no convolution directly.

    Only `nn.BatchNorm2d` with running statistics and `nn.Conv2d`, quantized or not, count, no subclasses.
    """
    modes = [(module, module.training) for module in model.modules()]
    shared = _shared(model)
    try:
        model.eval()
        graphs = list(_graphs(model, ""))
    finally:
        for module, training in modes:
            module.training = training
    pairs = {
        conv: norm
        for prefix, graph in graphs
        for conv, norm in _pairs(model, prefix, graph)
        if not {conv, norm} & shared
    }
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return pairs, [name for name in norms if name not in pairs.values()]


@torch.no_grad()
def factor_and_bias(norm: nn.BatchNorm2d, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what a batch norm in eval mode does to a convolution's output, as a factor and a bias.

    Args:
        bias: the convolution's own, `[C]`.

    Returns:
        gamma / sqrt(var + eps), and beta + (bias - mean) * that; float64 `[C]`.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    factor = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    before = -mean if bias is None else bias.double() - mean
    return factor, before * factor + (0.0 if norm.bias is None else norm.bias.double())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (QuantConv2d, QuantLinear)) or super().is_leaf_module(m, module_qualified_name)


def _graphs(module: nn.Module, prefix: str) -> Iterator[tuple[str, fx.Graph]]:
    """Yield the graphs of the largest traceable parts that have batch norms, and their names' prefixes."""
    if isinstance(module, _BatchNorm) or not any(isinstance(m, _BatchNorm) for m in module.modules()):
        return
    graph = _graph(module)
    if graph is not None:
        yield prefix, graph
        return
    for name, child in module.named_children():
        yield from _graphs(child, f"{prefix}{name}.")


def _graph(module: nn.Module) -> fx.Graph | None:
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.default is not p.empty for p in parameters):
        return None
    try:
        return _Tracer().trace(module)
    except Exception:  # code that asks for values can fail in any way when it is traced
        return None


def _pairs(model: nn.Module, prefix: str, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    for node in calls:
        before = next(iter(node.args), None)
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        first, second = f"{prefix}{before.target}", f"{prefix}{node.target}"
        conv, norm = model.get_submodule(first), model.get_submodule(second)
        once = times[before.target] == times[node.target] == 1 and len(before.users) == 1
        others = any(name.startswith((f"{before.target}.", f"{node.target}.")) for name in read)
        foldable = type(norm) is nn.BatchNorm2d and norm.running_mean is not None
        if foldable and once and not others and type(conv) in _CONVOLUTIONS:
            yield first, second


def _shared(model: nn.Module) -> set[str]:
    """Return the names of modules with a parameter or buffer that stands twice in the state dict."""
    state = model.state_dict(keep_vars=True)
    times = Counter(id(tensor) for tensor in state.values())
    return {key.rpartition(".")[0] for key, tensor in state.items() if times[id(tensor)] > 1}
