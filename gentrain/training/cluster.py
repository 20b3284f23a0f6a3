"""The section `cluster:` of a configuration: where the processes of a run live, and where `gentrain submit` sends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gentrain.config import ConfigError, option

_MOST_MORE = 100  # workers than the fewest: a batch is a multiple of every size between
_NETWORK_VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_")


@dataclass
class Submitting:
    """Where `gentrain submit` sends a configuration."""

    submit: dict[str, Any] | str = option("local", "place that `gentrain submit` sends it to, by name or with its keys")


@dataclass
class Network:
    """How the workers of a run reach each other."""

    interface: str | None = option(None, "network interface of their traffic, such as ib0; left out: what gloo and NCCL choose")
    variables: dict[str, str] = option(dict, "further variables of NCCL and gloo, such as {NCCL_IB_HCA: mlx5}")
    start_limit_s: PositiveFloat = option(300.0, "for all ranks to have come; then those that are missing are named", unit="s")

    def __post_init__(self) -> None:
        for name in self.variables:
            if not name.startswith(_NETWORK_VARIABLES):
                raise ConfigError(
                    f"{name} is no variable of NCCL or gloo; they begin with {', '.join(_NETWORK_VARIABLES)}", key="variables"
                )

    def environment(self) -> dict[str, str]:
        """What the workers find in their environment."""
        named = {} if self.interface is None else {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        return named | self.variables


@dataclass
class Cluster(Submitting):
    """Where the run's processes live."""

    place: Literal["inline", "ray"] = option("inline", "inline: this process (or one rank of torchrun); ray: workers under Ray Train")
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = option(
        1, "training workers, or [fewest, most]: as many as the cluster has room for at the time (ray)"
    )
    cpus_per_worker: PositiveInt = option(1, "cores and threads of a worker (ray)")
    gpus_per_worker: NonNegativeFloat = option(0.0, "accelerators of a worker (ray)")
    max_failures: NonNegativeInt = option(3, "worker or node deaths after which the run goes on from its last checkpoint (ray)")
    max_preemptions: NonNegativeInt | None = option(None, "nodes taken away with notice after which it goes on; null = any number (ray)")
    max_attempts: PositiveInt = option(3, "times that it is started, where the launcher or the head of the Ray cluster dies (ray)")
    backoff_s: NonNegativeFloat = option(5.0, "before a restart; doubled for each further one, up to 300 s (ray)", unit="s")
    grace_s: PositiveFloat = option(60.0, "for a checkpoint after a signal; then workers are ended without one (ray)", unit="s")

    network: Network = option(Network, "how workers reach each other (ray)")

    def __post_init__(self) -> None:
        if self.fewest > self.most:
            raise ConfigError(f"it reads [fewest, most], and {self.fewest} is more than {self.most}; swap them", key="workers")
        if self.most - self.fewest > _MOST_MORE:
            raise ConfigError(f"no batch can be shared by so many sizes; let them be at most {_MOST_MORE} apart", key="workers")

    @property
    def fewest(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]
