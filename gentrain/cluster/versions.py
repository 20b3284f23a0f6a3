"""Whether what was submitted meets, where it runs, the versions of who submitted it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

from gentrain.config import ConfigError

SUBMITTED_WITH = "GENTRAIN_SUBMITTED_WITH"  # in the environment of a job; empty: anything goes
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def installed() -> str:
    """Those that a configuration, a checkpoint or Ray's processes may depend on."""
    return f"gentrain {version('gentrain')}, Ray {version('ray')}, Python {PYTHON}"


def stamp() -> dict[str, str]:
    """What a job's environment says of who submitted it."""
    return {SUBMITTED_WITH: installed()}


def refuse_others() -> None:
    """Raises ConfigError in a job that was submitted with other versions than it finds."""
    expected = os.environ.get(SUBMITTED_WITH)
    if expected and expected != installed():
        raise ConfigError(
            f"this was submitted with {expected}, and here are {installed()}; install the same in the image or environment of the job, or "
            f"submit it from a machine that has them ({SUBMITTED_WITH}: '' in cluster.submit.environment lets it run all the same)"
        )
