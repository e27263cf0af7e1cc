"""One attention call whose sequence, or whose heads, lie over the processes of torch.distributed."""

from .call import context_parallel_attention
from .copies import copied, summed
from .shards import positions, shard, unshard

__all__ = ["context_parallel_attention", "copied", "positions", "shard", "summed", "unshard"]
