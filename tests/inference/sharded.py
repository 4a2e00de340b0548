"""Sharded models for tests of the arena: FSDP2 as PyTorch has it, without threefold's own engine."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from threefold.engine.distributed import World


class ShardedWeights:
    """Shards a model in place, a unit for each block and one for all else, and hands its units out whole."""

    def __init__(self, model: PreTrainedModel, world: World) -> None:
        self._model = model
        lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
        self.blocks = list(lists[0])
        for module in [*self.blocks, model]:
            fully_shard(module, mesh=world.mesh)

    def units(self) -> Iterator[nn.Module]:
        for module in [*self.blocks, self._model]:
            module.unshard()
            yield module
            module.reshard()
