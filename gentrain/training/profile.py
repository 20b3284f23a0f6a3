"""When the profiler looks at a run."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import NonNegativeInt, PositiveInt

from gentrain.config import option


@dataclass
class Profile:
    """When the profiler looks, at each attempt."""

    skip: NonNegativeInt = option(5, "steps before it looks: the first ones load and compile", unit="optimiser steps")
    steps: PositiveInt = option(3, "steps it looks at", unit="optimiser steps")
    memory: bool = option(False, "records allocations, too: on CUDA a snapshot for pytorch.org/memory_viz")
