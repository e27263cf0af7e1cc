"""One attention call whose sequence lies over the processes of torch.distributed."""

from .call import context_parallel_attention
from .shards import positions, shard, unshard

__all__ = ["context_parallel_attention", "positions", "shard", "unshard"]
