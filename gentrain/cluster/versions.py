"""Whether what was submitted meets, where it runs, the versions of who submitted it."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version

from gentrain.config import ConfigError

log = logging.getLogger(__name__)

SUBMITTED_WITH = "GENTRAIN_SUBMITTED_WITH"  # in the environment of a job; empty: anything goes
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


_LIBRARIES = ("torch", "deepspeed", "diffusers", "transformers")


def installed() -> str:
    """Those that a configuration, a checkpoint or Ray's processes may depend on."""
    return f"gentrain {version('gentrain')}, Ray {version('ray')}, Python {PYTHON}"


def libraries() -> str:
    """Those on which numbers may depend, without what follows a +: the same torch is built for several accelerators."""
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in _LIBRARIES)


def stamp() -> dict[str, str]:
    """What a job's environment says of who submitted it."""
    return {SUBMITTED_WITH: f"{installed()}; {libraries()}"}


def refuse_others() -> None:
    """Raises ConfigError in a job that was submitted with other versions than it finds; of other libraries it warns."""
    expected, _, further = os.environ.get(SUBMITTED_WITH, "").partition("; ")
    if expected and expected != installed():
        raise ConfigError(
            f"this was submitted with {expected}, and here are {installed()}; install the same in the image or environment of the job, or "
            f"submit it from a machine that has them ({SUBMITTED_WITH}: '' in cluster.submit.environment lets it run all the same)"
        )
    if further and further != libraries():
        log.warning(
            "this was submitted with %s, and here are %s: its numbers may differ from those of where it was submitted", further, libraries()
        )
