"""A pipeline that takes prompts forgets a concept, a tiny one with random weights: both deliveries, their checks, what is laid out."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gentrain.config import ConfigError
from gentrain.data.drawn import Drawn
from gentrain.models.adapters import digest_of
from gentrain.recipes.attacks import Inversion, read_finding
from gentrain.recipes.base import load_recipe, run_recipe
from gentrain.recipes.eval_unlearn import EvalUnlearn
from gentrain.recipes.generate import Generate
from gentrain.recipes.patch import Patch
from gentrain.training.roles import load_network, load_weights
from tests.models.pipelines import SIDE, stable_diffusion

RECIPE = """
stages:
  original:
    name: adopt
    model: &model {name: pretrained, directory: pipeline}
    data: &prompts {name: prompts, path: prompts.txt, size: 16}
    sampler: {name: ddim, steps: 2, guidance: 3}
  original_drawn: &drawn {name: generate, run: '${output:original}', count: 400, seed: 1, prompts: &asked [cat, dog, a bus, red]}
  judge:
    name: train
    run:
      method: classifier
      data: {name: drawn, directory: '${output:original_drawn}', size: [3, 16, 16], classes: *asked, held_out: 0.5}
      model: {name: cnn, channels: [8]}
      engine: torch
      training: {samples: 40, batch_size: 20}
  student:
    name: train
    run: &run
      data: *prompts
      model: *model
      method: {name: distribution_matching, generator_loss: sid, guidance: 3}
      adapter: {rank: 2}
      engine: torch
      training: {samples: 8, batch_size: 4}
  unlearned:
    name: train
    run:
      <<: *run
      data: {name: concepts, prompts: *prompts, concepts: {cat: {words: [cat, kitten], replace: dog}}}
      method: {name: sfd, guidance: 3, fake_guidance: 3, condition_dropout: 0.1}
      roles: {fake_score: {weights: '${output:student}'}, student: {weights: '${output:student}'}}
  student_drawn: {<<: *drawn, run: '${output:student}', seed: 0}
  unlearned_drawn: {<<: *drawn, run: '${output:unlearned}', seed: 0}
  inversion: &attack
    {name: inversion, run: '${output:unlearned}', forget: cat, judge: '${output:judge}', images: 4, attempts: 1, count: 8, steps: 1}
  relearning: {<<: *attack, name: relearning, steps: [1], back: 1.0, lr: 1.0e-6}
  scores:
    name: unlearning
    forget: cat
    override: dog
    judge: ${output:judge}
    before: ${output:student_drawn}
    after: ${output:unlearned_drawn}
    attacks: ['${output:relearning}', '${output:inversion}']
    gate: &gate {forget: 1.0, remain_loss: 1.0, distance_factor: 100.0, distance_floor: 1000000.0}
  pipeline: {name: export, run: '${output:unlearned}', scores: '${output:scores}', gate: '${output:scores}'}
  erased:
    name: train
    run:
      <<: *run
      data: {name: concepts, prompts: *prompts, concepts: {cat: {words: [cat, kitten], replace: dog}}}
      method: {name: esd, steps: 2}
      optimizer: {name: adamw, lr: 0.05}
      sampler: {name: ddim, steps: 2, guidance: 3}
  erased_drawn: {<<: *drawn, run: '${output:erased}', seed: 0}
  original_again: {<<: *drawn, seed: 0}
  erased_scores:
    name: unlearning
    forget: cat
    judge: ${output:judge}
    before: ${output:original_again}
    after: ${output:erased_drawn}
    gate: *gate
  patch: {name: patch, run: '${output:erased}', version: 1.2.0, prompts: [cat, a bus], steps: 2, gate: '${output:erased_scores}'}
  laid_out:
    name: eval_unlearn
    samples: ${output:unlearned_drawn}
    pipeline: ${output:pipeline}
    forget: [cat]
    concept: cat
    instead: dog
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlearn_pipeline")
    stable_diffusion(folder / "pipeline")
    (folder / "prompts.txt").write_text("cat\na kitten\ndog\na bus\nred\ncatalogue\n")
    (folder / "toy.yaml").write_text(RECIPE)
    with contextlib.chdir(folder):
        run_recipe(load_recipe("toy.yaml", [f"output={folder / 'out'}"]), lambda line: None)
    return folder / "out"


def test_an_adopted_pipeline_is_drawn_from_as_it_is(out: Path) -> None:
    denoiser, run = load_network(out / "original")
    assert run.method.registered_name == "as_is" and not (out / "original/checkpoints").exists()
    (weights,) = (out.parent / "pipeline/unet").glob("*.safetensors")
    for name, value in load_file(weights).items():
        assert torch.equal(denoiser.network.state_dict()[f"backbone.{name}"], value)
    assert json.loads((out / "original_drawn/info.json").read_text())["weights"] == digest_of(load_weights(str(out / "original")))


def test_a_judge_learns_what_was_drawn_for_each_prompt(out: Path, tmp_path: Path) -> None:
    data = Drawn(directory=str(out / "original_drawn"), size=[3, SIDE, SIDE], classes=["cat", "dog", "a bus", "red"], held_out=0.25)
    train, held_out = data.split("train"), data.split("held_out")
    samples = load_file(out / "original_drawn/samples.safetensors")
    assert (len(train), len(held_out)) == (300, 100)
    assert torch.equal(torch.cat([train.x, held_out.x]), samples["x"]) and torch.equal(train.label, torch.arange(300) % 4)
    for change, said in (
        ({"classes": ["dog", "cat", "a bus", "red"]}, "data.classes: .*name these, in this order"),
        ({"size": [3, 8, 8]}, "data.size: .*expected finite float32 of shape"),
        ({"directory": str(tmp_path)}, "data.directory: .*draw them with a stage"),
    ):
        with pytest.raises(ConfigError, match=said):
            Drawn(**{"directory": data.directory, "size": data.size, "classes": data.classes, **change}).split("train")


def test_the_one_step_pipeline_draws_in_diffusers_what_the_run_draws(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the code of its own card. The run's student reads noise at sigma / alpha = 2.5, between two timesteps of the scheduler."""
    card = (out / "pipeline/README.md").read_text()
    assert "Made to forget cat." in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = code[1].replace("guidance_scale=1", "guidance_scale=1, latents=z, output_type='pt', height=16, width=16")
    scope: dict[str, Any] = {"z": z, "prompt": ["dog", "a bus"]}
    monkeypatch.chdir(out)
    exec(text, scope)
    denoiser, run = load_network(out / "unlearned")
    codec, sampler = run.codec(), run.sampler
    with torch.no_grad():
        condition = codec.condition(torch.tensor([0, 1]), scope["prompt"])
        x = sampler.solve(denoiser, z * sampler.start(run.path), None, condition)  # type: ignore[arg-type]
        ours = (codec.decode(x) + 1) / 2
    torch.testing.assert_close(scope["images"], ours, atol=2e-3, rtol=0)


def test_the_patch_says_which_pipeline_it_is_for_and_comes_off(out: Path) -> None:
    told = json.loads((out / "patch/patch.json").read_text())
    assert told["version"] == "1.2.0" and told["adapter"] == "v1_2_0" and told["check"]["rolled_back"] is True
    assert told["check"]["changed"] > 1e-4 and len(told["sha256"]) == 64
    assert (out / "patch/pytorch_lora_weights.safetensors").is_file() and not (out / "patch/unet").exists()
    card = (out / "patch/README.md").read_text()
    assert 'adapter_name="v1_2_0"' in card and 'delete_adapters("v1_2_0")' in card and "## Unlearning" in card
    with Image.open(out / "patch/grid.png") as grid:
        assert grid.size == (2 * 18 * 2, 3 * 18 * 2)
        rows = torch.tensor(list(grid.getdata())).reshape(3, -1)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_a_patch_that_changes_nothing_or_is_none_is_refused(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = Patch(str(out / "erased"), "1.0.0", ["cat"], steps=1)
    same = torch.zeros(1, 3, 4, 4)
    monkeypatch.setattr(Patch, "_check", lambda *_: (same, same, same))
    with pytest.raises(ConfigError, match="run: the patch changes nothing"):
        patch.execute(tmp_path / "a")
    monkeypatch.setattr(Patch, "_check", lambda *_: (same, same + 1, same + 1e-6))
    with pytest.raises(ConfigError, match="run: the patch does not come off again"):
        patch.execute(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"run: .*learnt on no pipeline"):
        Patch(str(out / "judge"), "1.0.0", ["cat"]).execute(tmp_path / "c")
    with pytest.raises(ConfigError, match="prompts: give at least one"):
        Patch(str(out / "erased"), "1.0.0", [])


def test_images_are_laid_out_as_eval_unlearn_does(out: Path) -> None:
    place = out / "laid_out"
    number = json.loads((out / "unlearned_drawn/info.json").read_text())["weights"][:8]
    folder = place / f"results/free_run_ua_ira_{number}/images"
    assert sorted(file.name for file in (folder / "target").iterdir()) == sorted(f"free_run_ua_ira_{number}_{n}.png" for n in range(100))
    assert len(list((folder / "retain").iterdir())) == 300
    samples = load_file(out / "unlearned_drawn/samples.safetensors")
    for group, row in (("target", 4), ("retain", 5)):  # the second drawn for cat; the second drawn for dog
        with Image.open(folder / group / f"free_run_ua_ira_{number}_1.png") as image:
            pixels = torch.tensor(list(image.getdata())).reshape(16, 16, 3).permute(2, 0, 1)
        torch.testing.assert_close(pixels.float(), (samples["x"][row].clamp(-1, 1) + 1) * 127.5, atol=0.51, rtol=0)
    prompts = {group: list(csv.DictReader((place / f"prompts/{group}.csv").open())) for group in ("target", "retain")}
    assert [row["prompt"] for row in prompts["target"]] == ["cat"]
    assert [row["prompt"] for row in prompts["retain"]] == ["dog", "a bus", "red"]
    config = json.loads((place / "config.json").read_text())
    assert config["technique"] == {
        "name": "free_run",
        "config": {"model_id": str(out / "pipeline"), "num_inference_steps": 50, "guidance_scale": 7.5},
    }
    metrics = {metric["name"]: metric["config"] for metric in config["metrics"]}
    assert metrics["ua_ira"]["target_concept"] == "cat" and metrics["ua_ira"]["target_prompts_path"] == str(place / "prompts/target.csv")
    assert metrics["asr_p4d"] == {"concept_name": "cat"} and metrics["tifa"] == {}
    command = (place / "command.txt").read_text()
    assert "'eval-unlearn[asr,tifa]~=1.1'" in command and f"eval-unlearn run --config {place / 'config.json'}" in command


@pytest.mark.parametrize(
    "change, said",
    [({"metrics": ["nice"]}, "metrics: eval-unlearn has no metric 'nice'"), ({"forget": ["cow"]}, "forget: 'cow' is none of the prompts")],
)
def test_what_eval_unlearn_does_not_know_is_refused(out: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    given = {"samples": str(out / "unlearned_drawn"), "pipeline": "p", "forget": ["cat"], "concept": "cat", "instead": "dog", **change}
    with pytest.raises(ConfigError, match=said):
        EvalUnlearn(**given).execute(tmp_path)


def test_relearning_fine_tunes_what_draws_for_the_prompt(out: Path) -> None:
    found = read_finding(str(out / "relearning"))
    assert found.weights == digest_of(load_weights(str(out / "unlearned")))
    (read,) = found.curve["shares"]
    assert found.metric.name == "steps until relearnt" and "0" in read
    table = json.loads((out / "scores/metrics.json").read_text())["metrics"]
    assert {"steps until relearnt, after", "success of inversion, after"} <= {row["name"] for row in table}


def test_an_inversion_of_prompts_learns_what_the_network_is_given(out: Path) -> None:
    finding = read_finding(str(out / "inversion"))
    assert finding.weights == digest_of(load_weights(str(out / "unlearned"))) and len(finding.curve["shares"]) == 1
    assert isinstance(Inversion(run="r", forget="cat", judge="j"), Inversion)


def test_classes_are_no_prompts(out: Path, tmp_path: Path) -> None:
    denoiser, _ = load_network(out / "original")
    with pytest.raises(ValueError, match="takes prompts, not classes"):
        denoiser.x0(torch.zeros(1, 4, 8, 8), torch.tensor([5.0]), {"label": torch.tensor([1])})
    denoiser.x0(torch.zeros(1, 4, 8, 8), torch.tensor([5.0]), {"label": torch.tensor([-1])})


def test_generate_names_what_was_asked_for(out: Path, tmp_path: Path) -> None:
    Generate(str(out / "original"), 2, prompts=["cat", "dog"]).execute(tmp_path)
    assert json.loads((tmp_path / "info.json").read_text())["names"] == ["cat", "dog"]
