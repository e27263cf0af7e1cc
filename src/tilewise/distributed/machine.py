"""What ranks and their links can do, as a few numbers: the inputs of every prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Machine:
    """Ranks, `node` neighbouring ones of which stand in one node.

    Attributes:
        flops: multiplications and additions a second that one rank's attention reaches.
        bandwidth: bytes a second that a rank sends, and at the same time receives, between nodes.
        latency: seconds from a message's start to its first byte.
        node, node_bandwidth, node_latency: ranks in a node, and the same for two ranks within one; 0 or None: as
            between nodes.
        overhead: seconds of a step beside its products: launching kernels, merging.
        memory: bytes that a rank may hold beside its own shards, or None.
        name: for people.

    Raises:
        ValueError: a rate that is not positive, a negative time, or a node without ranks; beginning with its name.
    """

    flops: float
    bandwidth: float
    latency: float
    node: int = 1
    node_bandwidth: float | None = None
    node_latency: float | None = None
    overhead: float = 0.0
    memory: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth", "node_bandwidth", "memory", "node"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, expected more than 0")
        for name in ("latency", "node_latency", "overhead"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: got {value}, expected 0 or more seconds")

    def transfer(self, amount: np.ndarray | float, inside: np.ndarray | bool) -> np.ndarray:
        """Seconds that messages of `amount` bytes take, 0 where there are none.

        Args:
            amount: of any shape; inside: broadcasts to it; whether both ends stand in one node.
        """
        near_rate = self.bandwidth if self.node_bandwidth is None else self.node_bandwidth
        near_wait = self.latency if self.node_latency is None else self.node_latency
        near, far = near_wait + amount / near_rate, self.latency + amount / self.bandwidth
        return np.where(np.asarray(amount) > 0, np.where(inside, near, far), 0.0)

    def one_node(self, ranks: int) -> bool:
        """Whether so many neighbouring ranks, from the first of a node on, stand in one node."""
        return self.node % ranks == 0


# Round numbers of public data sheets, brought down to what attention and collectives usually reach; not measured here.
MACHINES = {
    "h100": Machine(
        flops=400e12, bandwidth=40e9, latency=15e-6, node=8, node_bandwidth=300e9, node_latency=8e-6, overhead=2e-5,
        name="H100 nodes of 8, NVLink inside, 400 Gbit/s for each rank between",
    ),
    "ethernet": Machine(
        flops=400e12, bandwidth=10e9, latency=30e-6, node=8, node_bandwidth=300e9, node_latency=8e-6, overhead=2e-5,
        name="H100 nodes of 8, NVLink inside, 100 Gbit/s for each rank between",
    ),
    "cpu": Machine(flops=100e9, bandwidth=1e9, latency=1e-4, overhead=1e-4, name="CPU cores of one host, gloo"),
}  # fmt: skip


def machine_of(device: str) -> Machine:
    """The machine assumed for a device when none is given."""
    return MACHINES["cpu" if device == "cpu" else "h100"]
