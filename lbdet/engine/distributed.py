"""Several processes, one training: who am I, and what do the others say?

torchrun starts the processes ("ranks") and numbers them. Each holds the whole model and works on its share of
every batch; after each update all hold the same state, bit for bit. In one process every function here
returns at once what it was given, and no process group exists.

    who          rank, world_size, own_batches
    everyone's   average, average_gradients, divisor, largest, gather
    rank 0's     first, same_state
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from lbdet.data.records import DataT
from lbdet.engine.signals import Interrupted
from lbdet.errors import NumericsError, UserError

T = TypeVar("T")


def rank() -> int:
    """Return this process' number, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_batches(data: DataT, batch_size: int) -> DataT:
    """Return the images that this rank evaluates: whole batches, one behind the other; there may be none.

    A batch is that of one process, so that what a detector makes of it, padding included, is the same.
    """
    if world_size() == 1:
        return data
    batches = -(-len(data) // batch_size)
    start, end = (batches * r // world_size() * batch_size for r in (rank(), rank() + 1))
    return data.take(range(start, min(end, len(data))))


def average(values: Sequence[float]) -> Sequence[float]:
    """Return the mean of each number over all ranks: not finite where it is not finite in one of them."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / world_size()).tolist()


def largest(value: int) -> int:
    """Return the largest number of all ranks."""
    if world_size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in the order of ranks; they travel as pickles."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def first(make: Callable[[], T]) -> T:
    """Return on all ranks what `make` returns on rank 0, the only one that calls it.

    Raises:
        UserError, NumericsError: everywhere, where `make` raises it.
    """
    if world_size() == 1:
        return make()
    answer: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank() == 0:
        try:
            answer = [(make(), None)]
        except (UserError, NumericsError) as error:
            answer = [(None, error)]
    dist.broadcast_object_list(answer)
    value, error = answer[0]
    if error is not None:
        raise error
    return value  # pyright: ignore[reportReturnType] - T may be None


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], statistics: Sequence[Tensor]) -> None:
    """Replace gradients, and tensors that each rank changed by its own images, by their means; one message.

    A parameter with a gradient on some ranks only counts as 0 on the others. Without one on any it has none.

    Args:
        parameters: the same on all ranks, and so are `statistics`, which change in place.
    """
    if world_size() == 1:
        return
    wanted = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]
    used = torch.tensor([float(p.grad is not None) for p in wanted], device=wanted[0].device)
    tensors = [*gradients, *statistics, used]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view(tensor.shape))
    for parameter, gradient, share in zip(wanted, gradients, used.tolist(), strict=True):
        parameter.grad = gradient if share else None


def divisor(count: Tensor, least: float) -> Tensor:
    """Return what a rank divides its sum by, so that the mean of all ranks is the sum of all over all counts.

    Args:
        count: `[]`, of this rank's objects, or whatever a sum is divided by.
        least: what the count of all ranks is raised to if it is below.

    Returns:
        `[]`, max(sum of counts, least) / ranks; in one process `count.clamp_min(least)`.
    """
    if world_size() == 1:
        return count.clamp_min(least)
    total = count.detach().clone()
    dist.all_reduce(total)
    return total.clamp_min(least) / world_size()


def same_state(model: nn.Module) -> None:
    """Give a model rank 0's state; what each rank computed by itself can differ in a GPU's last bit."""
    if world_size() == 1:
        return
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    for value in state.values():
        dist.broadcast(value, 0)
    model.load_state_dict(state)


@contextmanager
def process_group() -> Iterator[None]:
    """Work together with the other processes that torchrun has started, if there are any.

    Only rank 0 prints. Where a process fails, the first one that does raises its error; the others leave
    with its exit code and without a word.

    Raises:
        UserError: more processes than GPUs, or another process was killed.
        SystemExit: another process has failed.
    """
    if _started() == 1:
        yield
        return
    store, number, size = next(iter(rendezvous("env://")))
    with _silent_unless(number == 0, errors=False):
        try:
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(_gpu())
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=number, world_size=size
            )
            yield
            largest(0)  # all leave together
        except BaseException as error:
            _leave_unless_first(store, error)
            if _is_broken_connection(error):
                raise UserError(
                    "another process of this command was killed, from outside or for want of memory; "
                    "continue a training with --resume"
                ) from None
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """Let the arguments of a command, which all processes read, be explained or refused once."""
    with _silent_unless(os.environ.get("RANK", "0") == "0" or _started() == 1, errors=True):
        yield


def refuse_many(tool: str) -> None:
    """Refuse a tool that works in one process where there are several.

    Raises:
        UserError: in the first of several.
        SystemExit: in the others.
    """
    if _started() == 1:
        return
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(2)
    raise UserError(f"{tool}: works in one process, got {_started()}; start it without torchrun")


def _started() -> int:
    """Return how many processes torchrun has started; it tells them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _gpu() -> int:
    """Return the number of this process' GPU."""
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise UserError(
            f"torchrun: --nproc-per-node must be at most the {gpus} GPUs, got {local + 1} or more; "
            "start fewer, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    return local


@contextmanager
def _silent_unless(speaks: bool, errors: bool) -> Iterator[None]:
    """Drop what is printed and logged, and written to stderr too if `errors`."""
    if speaks:
        yield
        return
    disabled = logging.root.manager.disable
    with ExitStack() as stack:
        null = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(null))
        if errors:
            stack.enter_context(redirect_stderr(null))
        logging.disable(logging.INFO)
        stack.callback(logging.disable, disabled)
        yield


def _leave_unless_first(store: Store, error: BaseException) -> None:
    """Return in the first process that fails; end the others with the exit code of that one's error."""
    try:
        is_first = store.add("lbdet/failed", 1) == 1
        if is_first:
            store.set("lbdet/exit_code", str(_exit_code(error)))
        code = int(store.get("lbdet/exit_code"))
    except RuntimeError:  # rank 0 kept the store, and has gone
        is_first, code = False, _exit_code(error)
    if not is_first:
        raise SystemExit(code) from None


def _exit_code(error: BaseException) -> int:
    """Return what `lbdet.cli` makes of an error."""
    match error:
        case UserError():
            return 2
        case NumericsError():
            return 3
        case Interrupted():
            return 128 + error.signum
        case KeyboardInterrupt():
            return 130
    return 2 if _is_broken_connection(error) or "DataLoader worker" in str(error) else 1


def _is_broken_connection(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "gloo" in str(error)
