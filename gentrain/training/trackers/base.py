"""What a tracker is to the rest of gentrain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gentrain.config import Component


@dataclass(frozen=True)
class Tracked:
    """The run that is tracked.

    Attributes:
        identity: the same at each attempt of the run, and of no other run.
        config: the resolved configuration, in which what came from the environment is named and not shown.
        samples: seen before this attempt: whatever an earlier one told beyond them is void.
    """

    directory: Path
    identity: str
    config: dict[str, Any]
    samples: int


class Tracking:
    """A tracker at work, on rank 0. Whatever one of these raises ends the tracking, not the run."""

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """Finite numbers, at so many samples seen."""
        raise NotImplementedError

    def image(self, file: Path, samples: int) -> None:
        """A PNG of generated samples."""
        raise NotImplementedError

    def close(self) -> None:
        """After the last record of this attempt."""
        raise NotImplementedError


class Tracker(Component, kind="tracker"):
    """A tracker as configured.

    Attributes:
        package: that it needs and gentrain does not bring, and its extra, if any.
    """

    package: ClassVar[tuple[str, str] | None] = None

    def start(self, run: Tracked) -> Tracking:
        """Opens, or opens again, the run's place, and tells it the configuration."""
        raise NotImplementedError
