"""The stage `export`."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gentrain.config import ConfigError, option, register, to_dict
from gentrain.export import export, refuse_present
from gentrain.export_pretrained import Form, export_pretrained, pretrained_network
from gentrain.export_towers import export_towers
from gentrain.methods.forgetting import Forgetting
from gentrain.models.adapters import OnBase
from gentrain.models.denoiser import Denoiser
from gentrain.models.towers import TwoTowers
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import read_metrics
from gentrain.recipes.hub import Push, as_repository
from gentrain.recipes.unlearning import read_release, statement, unmet
from gentrain.samplers.base import Sampler
from gentrain.training.roles import load_network
from gentrain.training.run import RunConfig

log = logging.getLogger(__name__)

CARD = "README.md"


@register("export")
@dataclass
class Export(Stage):
    """Writes a run's generator as a diffusers pipeline, or its towers as a SigLIP of transformers, with a model card."""

    run: str = option(help="the run to export")
    sampler: Sampler | None = option(None, "whose steps the pipeline takes; null = the run's")
    form: Form = option(
        "pipeline",
        "pipeline: complete, an adapter merged in; of a network that is pretrained adapter: that alone, control_net: its ControlNet",
    )
    scores: str | None = option(None, "directory of an evaluate stage, for the card")
    gate: str | None = option(None, "directory of a stage `unlearning` whose conditions must be met")
    force: bool = option(False, "export what does not meet them; the card says so")
    push: Push | None = option(None, "the repository on the hub that gets it; null = none")

    def execute(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # of an interrupted attempt at this very stage
        self.write(directory)
        for line in self.publish(directory):
            log.info("%s", line)

    def publish(self, out: Path) -> list[str]:
        """Sends what `write` has written to the hub, where `push` says so; lines that tell of it. Raises RuntimeError."""
        return [] if self.push is None else list(self.push.send(out))

    def write(self, out: Path) -> Path:
        """Exports to `out`, which must not exist or be empty (FileExistsError)."""
        if self.push is not None:
            self.push.check()
        refuse_present(out)  # before a large network is read
        self._write(out)
        if self.push is not None:
            card = out / CARD
            card.write_text(as_repository(card.read_text(encoding="utf-8"), out.name, self.push.repository), encoding="utf-8")
        return out

    def _write(self, out: Path) -> None:
        denoiser, run = load_network(self.run)
        if isinstance(denoiser, TwoTowers):
            model: Any = run.model_of("towers")
            export_towers(out, denoiser, model, licence=run.data.licence, config=to_dict(run))
            return
        if run.method.generator is None:
            raise ConfigError(f"{self.run} holds a {run.method.registered_name}, which generates nothing", key="run")
        if run.method.of_tokens:
            raise ConfigError(f"{self.run} draws tokens, for which diffusers has no pipeline: it cannot be exported", key="run")
        release = None if self.gate is None else read_release(self.gate, self.run)
        if release is not None and unmet(release) and not self.force:
            raise ConfigError(f"not released: {'; '.join(unmet(release))}; train on, or set force=true", key="gate")
        self._write_generator(out, denoiser, run)
        if release is not None or isinstance(run.method, Forgetting):
            forgotten = release["forget"] if release is not None else run.method.told  # type: ignore[attr-defined]
            card = out / CARD
            before, limits, after = card.read_text(encoding="utf-8").partition("\n## Limits")
            card.write_text(f"{before}\n{statement(forgotten, release)}{limits.lstrip()}{after}", encoding="utf-8")

    def _write_generator(self, out: Path, denoiser: Any, run: RunConfig) -> Path:
        metrics = read_metrics(self.scores) if self.scores else []
        network = denoiser.network
        if pretrained_network(network) is not None:
            about: Any = {"licence": run.data.licence, "config": to_dict(run), "metrics": metrics}
            try:
                return export_pretrained(out, network, self.form, sampler=run.drawn_with(self.sampler), **about)
            except ValueError as error:
                raise ConfigError(str(error), key="form") from error
        if self.form == "adapter":
            raise ConfigError("the network came from no pipeline of diffusers; its adapter goes with it: form=pipeline", key="form")
        if self.form == "control_net":
            raise ConfigError("diffusers' ControlNets are for networks of its pipelines; draw samples with gentrain instead", key="form")
        if isinstance(network, OnBase):
            denoiser = Denoiser(network.fold(), denoiser.path, denoiser.prediction)
        return export(
            out,
            denoiser,
            run.drawn_with(self.sampler),
            class_names=run.data.class_names,
            licence=run.data.licence,
            config=to_dict(run),
            metrics=metrics,
        )
