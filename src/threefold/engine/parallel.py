"""A model spread over the processes: ZeRO stages 0 to 3 (Rajbhandari et al. 2020), weights in host memory.

PyTorch does the work: FSDP2's `fully_shard` for stages 2 and 3 (in 2 the gathered weights stay from the forward to the
backward pass), ZeroRedundancyOptimizer for stage 1 (engine.optim). Stages 0 and 1 hold the weights whole, and sum the
gradients once per optimizer step.

Gradients are sums over the processes, never means: every loss is divided by the global count of what it is over.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from threefold.engine.distributed import World, lone_mesh
from threefold.errors import ConfigError
from threefold.machine.memory import free_bytes

# It warns of in-place operations on what a block returns, if that is a view; neither models nor losses have any.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

T = TypeVar("T")
BUCKET_ELEMENTS = 2**23
"""Gradients are summed in pieces of this many numbers: large enough for the wire, small beside the model."""
FREE_SHARE_FOR_FROZEN = 0.5
ALIGNMENT_BYTES = 64


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, held: Tensor) -> Tensor:
    """`held`, of the shape of what this process holds of the parameter, as a tensor that is sharded like it."""
    if not isinstance(parameter, DTensor):
        return held
    return DTensor(held, parameter._spec, requires_grad=False)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """A transformer's blocks: what its base model holds in lists."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(part) for outer in lists for block in outer for part in block.modules()}
    return [block for outer in lists if id(outer) not in inner for block in outer]


class _Root(nn.Module):
    """Runs closures inside a forward pass of its own, so that FSDP gathers what the model holds outside its blocks
    before them, whichever parts of the model they call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, closure: Callable[[], T]) -> T:
        return closure()


class ParallelModel:
    """A model on its device, sharded or whole.

    Args:
        model: with its adapters, its dropout set; on any device.
        zero_stage: of the recipe. A single process has nothing to shard.
        offload: keep the weights in host memory: sharded ones come to the device block by block, whole ones for the
            time of `in_use`.
        frozen_base: of parallel.frozen_base; concerns weights that are frozen beside others that are trained.
        free: memory that each process may count on for them, bytes, the same everywhere; 0: what is free here now.

    Attributes:
        sharded: whether the parameters are shards, which are gathered for every forward pass: then every process has
            to make as many passes as the others.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        world: World,
        device: torch.device,
        zero_stage: int = 0,
        offload: bool = False,
        frozen_base: str = "auto",
        free: float = 0.0,
    ) -> None:
        self.model, self.world, self.device, self.zero_stage = model, world, device, zero_stage
        self._free = free
        self._moves = offload and zero_stage < 2
        self.sharded = zero_stage >= 2 and (world.size > 1 or (offload and zero_stage == 3))
        self._root: nn.Module = _Root(model)
        self._units: list[FSDPModule] = []
        if self.sharded:
            self._shard(offload, frozen_base)
        else:
            model.to("cpu" if self._moves else device)
            _align(model)

    def _shard(self, offload: bool, frozen_base: str) -> None:
        replicated = self._replicated(frozen_base)
        for parameter in replicated:
            parameter.data = parameter.data.to(self.device)
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()
        arguments: dict[str, Any] = {
            "mesh": self.world.mesh or lone_mesh(self.device),
            "reshard_after_forward": self.zero_stage == 3,
            "offload_policy": policy,
            "ignored_params": replicated,
        }
        for module in [*blocks_of(self.model), self._root]:
            unit = fully_shard(module, **arguments)
            # gradients are summed as they are: the default divides by the number of processes
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            self._units.append(unit)

    def _replicated(self, frozen_base: str) -> set[nn.Parameter]:
        """Frozen parameters beside trained ones, where every process is to hold them whole."""
        parameters = list(self.model.parameters())
        frozen = {parameter for parameter in parameters if not parameter.requires_grad}
        if len(frozen) == len(parameters) or frozen_base == "sharded":
            return set()
        if frozen_base == "auto" and self.zero_stage == 3:
            taken = sum(parameter.nbytes for parameter in frozen)
            free = self._free or free_bytes(self.device) / sharing_the_memory(self.world, self.device)
            fits = taken <= FREE_SHARE_FOR_FROZEN * free
            return frozen if fits else set()
        return frozen

    def check_agreement(self) -> None:
        """Make sure that every process has sharded the same parameters. Collective."""
        shards = sum(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        if len(set(self.world.gather(shards))) > 1:
            raise ConfigError(
                'parallel.frozen_base = "auto": the frozen weights fit beside others in the memory of some processes '
                'and not of others; set it to "replicated" or "sharded"'
            )

    # ------------------------------------------------------------------------------------------------- forward

    def run(self, closure: Callable[[], T]) -> T:
        """Run forward passes of the model, or of any of its parts. Collective where the model is sharded.

        What has a gradient must be among what the closure returns (or returned by a block of the model).
        """
        if not self.sharded:
            return closure()
        with _casts_let_go():
            result: T = self._root(closure)
        if not torch.is_grad_enabled():
            # without a backward pass nothing else would let go of gathered weights, which the next step makes stale
            for unit in self._units:
                unit.reshard()
        return result

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """For the time of the block, weights that wait in host memory are on the device."""
        if self._moves:
            self.model.to(self.device)
        try:
            yield
        finally:
            if self._moves:
                self.model.to("cpu")

    # --------------------------------------------------------------------------------------------- whole weights

    def units(self) -> Iterator[nn.Module]:
        """Each block, and last the model itself for all that is outside the blocks, while its parameters are whole and
        on the device. Collective."""
        if not self.sharded:
            yield from [*blocks_of(self.model), self.model]
            return
        for unit in self._units:
            unit.unshard()
            try:
                module = cast(nn.Module, unit)
                yield self.model if module is self._root else module
            finally:
                unit.reshard()

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, whole, by its name in the state dict: shards gathered on the CPU,
        what is whole anyway where it is. Tied ones share memory. Collective; empty but on the first process."""
        if not self.sharded:
            return dict(self.model.state_dict()) if self.world.is_first else {}
        names = state_names(self.model)
        whole: dict[int, Tensor] = {}
        for tensor in names.values():
            if id(tensor) not in whole:  # tied ones have several names, and are gathered once
                gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
                whole[id(tensor)] = gathered.to("cpu", copy=True) if self.world.is_first else torch.empty(0)
        return {name: whole[id(tensor)] for name, tensor in names.items()} if self.world.is_first else {}

    # --------------------------------------------------------------------------------------------------- training

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name; shards where the model is sharded."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up what the processes have accumulated, where that has not happened in the backward pass."""
        if self.sharded or self.world.size == 1:
            return
        parameters = list(self.trained.values())
        has = self.world.max([float(parameter.grad is not None) for parameter in parameters])
        wanted = [parameter for parameter, found in zip(parameters, has, strict=True) if found]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([cast(Tensor, parameter.grad) for parameter in wanted]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to the global norm `max_norm` if theirs is larger; the norm that they had.

        The squares are added in float64 and the norm rounded to float32, so that it comes out the same in whatever
        order shards are added.
        """
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        pieces = [local(gradient) for gradient in gradients]
        squares = [torch.linalg.vector_norm(piece, dtype=torch.float64).square() for piece in pieces if piece.numel()]
        total = float(torch.stack(squares).sum()) if squares else 0.0
        if self.sharded:
            total = self.world.sum([total])[0]
        norm = float(torch.tensor(total, dtype=torch.float64).sqrt().float())
        if norm > max_norm:
            torch._foreach_mul_(pieces, max_norm / (norm + 1e-6))
        return norm


@contextmanager
def _casts_let_go() -> Iterator[None]:
    """Autocast does not keep its copies of weights for reuse: it would hold every gathered block, cast, until the end
    of the pass."""
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(keeps)


def _align(model: nn.Module) -> None:
    """Put parameters in host memory at multiples of 64 bytes, as gathered ones are.

    A file puts them anywhere, and the last bits of some products (MKL's, of a narrow head) depend on it.
    """
    for parameter in model.parameters():
        unaligned = parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT_BYTES
        if unaligned and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def sharing_the_memory(world: World, device: torch.device) -> int:
    """How many processes live on the memory of a device: on a CPU all of the machine."""
    return 1 if device.type == "cuda" else world.local_size


def free_everywhere(world: World, device: torch.device) -> float:
    """Memory that each process may count on, bytes: that of the process with the least. Collective."""
    return -world.max([-free_bytes(device) / sharing_the_memory(world, device)])[0]


def state_names(model: nn.Module) -> dict[str, Tensor]:
    """The state dict's names and tensors without FSDP's hooks, which would change what is gathered."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                named[f"{prefix}.{name}" if prefix else name] = buffer
    return named


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, up to BUCKET_ELEMENTS together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        other = bucket and (bucket[0].dtype, bucket[0].device) != (tensor.dtype, tensor.device)
        if bucket and (other or size + tensor.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
