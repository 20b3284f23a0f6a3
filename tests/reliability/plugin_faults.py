"""A user's plugin: flow matching that keeps a record of the samples it saw, and on one of them hangs or kills its process, once."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch._guards import detect_fake_mode

from gentrain.config import option, register
from gentrain.methods.base import Batch, Clock, Loss, Nets, Update
from gentrain.methods.flow_matching import FlowMatching
from gentrain.noise import Noise


@register("faulty_flow")
@dataclass
class FaultyFlow(FlowMatching):
    """Flow matching in the presence of a fault."""

    fault: Literal["none", "hang", "kill"] = option("none", "what happens to the process that reads sample `at`")
    at: int = option(0, "position of the sample", unit="samples")
    directory: str = option("", "where `seen.jsonl` is kept, and `happened` once the fault has happened")
    step_s: float = option(0.0, "how long every loss takes at least", unit="s")

    def updates(self, clock: Clock) -> Iterator[Update]:
        yield Update("model", self._loss)

    def _loss(self, nets: Nets, batch: Batch, noise: Noise) -> Loss:
        if detect_fake_mode() is not None:  # a plan looks at what it would keep, and trains nothing
            return self.loss(nets, batch, noise)
        directory = Path(self.directory)
        with (directory / "seen.jsonl").open("a") as file:
            file.write(json.dumps({"pid": os.getpid(), "time": time.time(), "index": batch["index"].tolist()}) + "\n")
        time.sleep(self.step_s)
        if self.fault != "none" and bool((batch["index"] == self.at).any()) and not (directory / "happened").exists():
            (directory / "happened").touch()
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            _hang_for_ever()
        return self.loss(nets, batch, noise)


def _hang_for_ever() -> None:
    while True:
        torch.zeros(1)
        time.sleep(60)
