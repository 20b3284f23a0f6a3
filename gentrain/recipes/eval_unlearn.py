"""The stage `eval_unlearn`."""

from __future__ import annotations

import csv
import json
import logging
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, option, register
from gentrain.images import save_image
from gentrain.recipes.base import Stage
from gentrain.recipes.evaluate import read_samples
from gentrain.recipes.unlearning import read_info
from gentrain.training.run import open_run

log = logging.getLogger(__name__)

EXTRAS = {"asr_i2p": "asr", "asr_p4d": "asr", "asr_mma_diffusion": "asr", "asr_ring_a_bell": "asr", "fid": "fid", "tifa": "tifa"}
METRICS = (*EXTRAS, "clip_score", "err", "ua_ira")
_TECHNIQUE = "free_run"  # eval-unlearn's name for a pipeline as it is


@register("eval_unlearn")
@dataclass
class EvalUnlearn(Stage):
    """Lays samples of an exported text-to-image pipeline out as eval-unlearn does, and configures its metrics: config.json, command.txt.

    eval-unlearn (MIT) draws from the pipeline itself for the metrics it is asked for; what is laid out are the samples that were measured
    here, in the same folders. It is installed in an environment of its own: its extras bring torchvision, a detector under the AGPL and
    models of the hub. Written for its version 1.1.
    """

    samples: str = option(help="directory of a generate stage, drawn for prompts")
    pipeline: str = option(help="directory of the exported pipeline")
    forget: list[str] = option(help="those of the prompts that were to be forgotten; the others were to stay")
    concept: str = option(help="what was to be forgotten, in words, such as cat")
    instead: str = option(help="what is drawn in its place, in words, such as dog")
    metrics: list[str] = option(
        lambda: ["ua_ira", "asr_ring_a_bell", "asr_p4d", "asr_mma_diffusion", "asr_i2p", "tifa"], f"of {', '.join(METRICS)}"
    )
    steps: PositiveInt = option(50, "with which eval-unlearn draws")
    guidance: NonNegativeFloat = option(7.5, "with which it draws")

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ConfigError(f"eval-unlearn has no metric {unknown[0]!r}; there are {', '.join(sorted(METRICS))}", key="metrics")

    def execute(self, directory: Path) -> None:
        info = read_info(self.samples)
        names = info.get("names") or []
        if missing := [prompt for prompt in self.forget if prompt not in names]:
            raise ConfigError(f"{missing[0]!r} is none of the prompts in {self.samples}: {', '.join(names)}", key="forget")
        shape = torch.Size(open_run(str(info.get("run")), "samples").data.shape)
        ((_, samples),) = read_samples({"samples": self.samples}, shape, "{}")
        groups = {"target": [place for place, name in enumerate(names) if name in self.forget]}
        groups["retain"] = [place for place in range(len(names)) if place not in groups["target"]]
        number = str(info.get("weights", ""))[:8]
        for group, places in groups.items():
            self._lay_out(directory, group, number, samples, places)
            with _made(directory / "prompts" / f"{group}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["prompt"], *([names[place]] for place in places)])
        (directory / "config.json").write_text(json.dumps(self._config(directory), indent=1))
        command = self._command(directory)
        (directory / "command.txt").write_text(f"{command}\n")
        log.info("for the metrics of eval-unlearn, in an environment of its own: %s", command)

    def _lay_out(self, directory: Path, group: str, number: str, samples: dict[str, Tensor], places: list[int]) -> None:
        """<directory>/results/free_run_ua_ira_<number>/images/<group>/free_run_ua_ira_<number>_<n>.png, prompt after prompt."""
        run, images = f"{_TECHNIQUE}_ua_ira_{number}", [samples["x"][samples["label"] == place] for place in places]
        for count, image in enumerate(image for rows in images for image in rows):
            save_image(image, _made(directory / "results" / run / "images" / group / f"{run}_{count}.png"))

    def _config(self, directory: Path) -> dict[str, object]:
        prompts = (directory / "prompts").absolute()
        ua_ira = {
            "target_prompts_path": str(prompts / "target.csv"), "retain_prompts_path": str(prompts / "retain.csv"),
            "target_concept": self.concept, "retain_concept": self.instead,
        }  # fmt: skip
        drawn = {"model_id": str(Path(self.pipeline).absolute()), "num_inference_steps": self.steps, "guidance_scale": self.guidance}
        configs = {name: {"concept_name": self.concept} for name in self.metrics if name.startswith("asr")} | {"ua_ira": ua_ira}
        metrics = [{"name": name, "config": configs.get(name, {})} for name in self.metrics]
        return {
            "output_dir": str((directory / "results").absolute()), "technique": {"name": _TECHNIQUE, "config": drawn}, "metrics": metrics
        }  # fmt: skip

    def _command(self, directory: Path) -> str:
        extras = sorted({EXTRAS[name] for name in self.metrics if name in EXTRAS})
        package = f"eval-unlearn[{','.join(extras)}]~=1.1" if extras else "eval-unlearn~=1.1"
        python, config = os.path.join("eval-unlearn", "bin"), shlex.quote(str((directory / "config.json").absolute()))
        return f"python3 -m venv eval-unlearn && {python}/pip install '{package}' && {python}/eval-unlearn run --config {config}"


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
