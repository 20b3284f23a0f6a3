"""Where pipelines lie: in directories, in repositories of the hub (whose cache is of this test's making), in folders of either."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import ModelCard

from gentrain.config import ConfigError
from gentrain.models.families.source import Source, outputs_to_come
from gentrain.models.hub import fetched
from gentrain.models.pretrained import Pretrained
from gentrain.recipes.export import CARD, Export
from gentrain.training.roles import load_network
from tests.distributed.cases import run_of
from tests.models.pipelines import SIDE, call, images, stable_diffusion
from tests.test_export_pretrained import trained

FIRST, SECOND = "1" * 40, "2" * 40
Lay = Callable[..., Path]


@pytest.fixture
def lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lays a tiny pipeline into a folder of a repository's commit as the hub's cache has it, and returns where."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def lay(repository: str, folder: str = "", commit: str = FIRST, ref: str = "main", scale: float = 1.0) -> Path:
        root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
        place = root / "snapshots" / commit / folder
        scaled(stable_diffusion(place), scale)
        return place

    fetched.cache_clear()
    yield lay
    fetched.cache_clear()


def scaled(pipeline: Path, scale: float) -> Path:
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    unet.conv_in.weight.data.mul_(scale)
    unet.save_pretrained(pipeline / "unet")
    return pipeline


def first_layer(model: Pretrained) -> torch.Tensor:
    weight: torch.Tensor = model.build((4, SIDE // 2, SIDE // 2), 0).state_dict()["backbone.conv_in.weight"]
    return weight


def settings(root: Path, model: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "method": "diffusion", "data": images(root / "images"), "model": {"name": "pretrained", **model}, "engine": "torch",
        "optimizer": {"name": "adamw", "lr": 0.01}, "training": {"samples": 4, "batch_size": 2, "log_every": 2},
        "output": str(root / "run"), **more,
    }  # fmt: skip


def code_of(card: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (card / CARD).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "a directory": ({"directory": "pipelines", "subfolder": "models/base"}, 'from_pretrained("{root}/pipelines/models/base")'),
    "a repository": ({"directory": "ada/flowers"}, 'from_pretrained("ada/flowers")'),
    "a branch": ({"directory": "ada/flowers", "revision": "trial"}, 'from_pretrained("ada/flowers", revision="trial")'),
    "a folder of a branch": (
        {"directory": "ada/flowers", "revision": "trial", "subfolder": "v1.5/[base]"},
        'snapshot_download("ada/flowers", revision="trial", allow_patterns="v1.5/[[]base]/*") + "/v1.5/[base]")',
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_pipeline_is_trained_from_where_it_lies_and_given_back(tmp_path: Path, lay: Lay, place: str) -> None:
    """Each holds other weights. What the card says loads it again with plain diffusers."""
    model, said = PLACES[place]
    scaled(stable_diffusion(tmp_path / "pipelines" / "models" / "base"), 2.0)
    lay("ada/flowers", scale=3.0)
    lay("ada/flowers", commit=SECOND, ref="trial", scale=4.0)
    lay("ada/flowers", "v1.5/[base]", commit=SECOND, ref="trial", scale=5.0)
    model = model | ({"directory": str(tmp_path / "pipelines")} if place == "a directory" else {})
    plain = first_layer(Pretrained(str(stable_diffusion(tmp_path / "plain"))))
    torch.testing.assert_close(first_layer(Pretrained(**model)), plain * (2.0 + list(PLACES).index(place)))

    run = trained(settings(tmp_path, model, adapter={"rank": 2}))
    network: Any = load_network(run)[0].network
    merged = Export(run=str(run)).write(tmp_path / "merged")
    written = UNet2DConditionModel.from_pretrained(merged / "unet").state_dict()
    assert all(torch.equal(written[name.removeprefix("backbone.")], value) for name, value in network.merged().items())
    adapter = Export(run=str(run), form="adapter").write(tmp_path / "adapter")
    assert ModelCard.load(adapter / CARD).data.base_model == (None if place == "a directory" else "ada/flowers")
    code, told = code_of(adapter), {}
    assert said.replace("{root}", str(tmp_path)) in code
    exec(code.replace('"adapter"', repr(str(adapter))), told)
    exec(code_of(merged).replace('"merged"', repr(str(merged))), whole := {})
    loaded, expected = (torch.as_tensor(call(each["pipeline"], SIDE, steps=2, guidance=3.0)) for each in (told, whole))
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-4)


def test_caches_tell_commits_and_folders_of_a_repository_apart(lay: Lay, tmp_path: Path) -> None:
    lay("ada/flowers")
    lay("ada/flowers", commit=SECOND, ref="trial")
    lay("ada/flowers", "a/b")
    lay("ada/flowers", "c")
    places: list[dict[str, Any]] = [{}, {"revision": "trial"}, {"subfolder": "a/b"}, {"subfolder": "c"}]
    assert len({Pretrained("ada/flowers", **place).encoder_digest for place in places}) == 4
    before = Pretrained("ada/flowers", subfolder="a/b").encoder_digest
    assert Pretrained("ada/flowers", revision=FIRST, subfolder="a/b").encoder_digest == before  # the same commit by its name
    fetched.cache_clear()
    lay("ada/flowers", "a/b", commit="3" * 40)
    assert Pretrained("ada/flowers", subfolder="a/b").encoder_digest != before
    stable_diffusion(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "inside")
    moved = Pretrained(str(tmp_path / "there"), subfolder="inside")
    here = Pretrained(str(tmp_path / "here")).encoder_digest
    assert moved.encoder_digest == here  # of files, wherever they lie
    for file, matters in (("unet/config.json", False), ("text_encoder/model.safetensors", True), ("tokenizer/tokenizer_config.json", True)):
        with (tmp_path / "here" / file).open("ab") as content:
            content.write(b" ")
        assert (Pretrained(str(tmp_path / "here")).encoder_digest != here) == matters
        here = Pretrained(str(tmp_path / "here")).encoder_digest


def test_folders_that_hold_no_pipeline_are_told(tmp_path: Path, lay: Lay) -> None:
    root = tmp_path / "pipelines"
    stable_diffusion(root / "models" / "base")
    lay("ada/flowers", "base")
    local = {"directory": str(root)}
    for model, said in (
        (local, r"pipelines/model_index\.json cannot be read .*pipelines lie in models/base; set `subfolder`"),
        (local | {"subfolder": "base"}, r"pipelines has no folder base, which `subfolder` names; pipelines lie in models/base"),
        (local | {"subfolder": "models"}, r"pipelines/models/model_index\.json cannot be read"),
        (local | {"subfolder": "../pipelines/models/base"}, r"subfolder '\.\./pipelines/models/base' is no folder in"),
        (local | {"subfolder": str(root / "models")}, r"subfolder '/.*' is no folder in"),
        (local | {"subfolder": ""}, r"subfolder '' is no folder in"),
        ({"directory": "ada/flowers"}, r"ada/flowers/model_index\.json cannot be read .* in `subfolder` the folder of it"),
        ({"directory": "ada/flowers", "subfolder": "bass"}, r"ada/flowers/bass/model_index\.json cannot be read"),
        ({"directory": "ada/flowers/base"}, r"there is no directory ada/flowers/base; .* in `subfolder` the folder of it"),
        ({"directory": "ada/unknown"}, r"ada/unknown/model_index\.json cannot be read \(LocalEntryNotFoundError"),
        ({"directory": "ada/flowers", "revision": "nowhere"}, r"ada/flowers/model_index\.json cannot be read"),
    ):
        with pytest.raises(ConfigError, match=rf"model: .*{said}"):
            run_of(settings(tmp_path, model))


def test_pipelines_of_one_directory_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        stable_diffusion(tmp_path / "both" / name)
    config = tmp_path / "both" / "b" / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.5"))
    both = {name: {"name": "pretrained", "directory": str(tmp_path / "both"), "subfolder": name} for name in ("a", "b")}
    values = settings(tmp_path, both["a"], method={"name": "distribution_matching", "generator_loss": "dmd"})
    with pytest.raises(ConfigError, match=r"roles\.teacher\.model: .*both/b and .*both/a differ in scaling_factor"):
        run_of(values | {"roles": {"teacher": {"model": both["b"]}}})


def test_a_folder_that_a_stage_will_write_may_be_missing(tmp_path: Path) -> None:
    with outputs_to_come([tmp_path / "stage"]):
        model = Pretrained(str(tmp_path / "stage"), subfolder="base")
        assert model.to_come and model.law() is None
        stable_diffusion(tmp_path / "stage" / "base")
        assert not model.to_come and model.law() is not None


def test_a_missing_component_of_a_repository_is_named(lay: Lay) -> None:
    place = lay("ada/flowers")
    shutil.rmtree(place / "tokenizer")
    with pytest.raises(ValueError, match=r"ada/flowers has no folder tokenizer, which its model_index\.json names"):
        Source("ada/flowers").pipeline()
    (place / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unet of the pipeline in ada/flowers cannot be loaded"):
        Source("ada/flowers").load("unet")


def test_half_precision_files_are_read_into_float32_and_damaged_ones_are_told(tmp_path: Path, lay: Lay) -> None:
    """An autoencoder that overflows in half precision works; one whose file holds what overflowed is refused."""
    place = lay("ada/flowers")
    for part, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        component = cls.from_pretrained(place / part)
        if part == "vae":
            component.encoder.conv_in.weight.data.mul_(3e5)  # activations beyond 65504, weights within
            component.decoder.conv_in.weight.data.mul_(3e5)
        (place / part / "diffusion_pytorch_model.safetensors").unlink()
        component.half().save_pretrained(place / part, variant="fp16")
    model = Pretrained("ada/flowers", variant="fp16")  # its text encoder has no such files
    assert first_layer(model).dtype == torch.float32
    codec: Any = model.codec(run_of(settings(tmp_path, {"directory": "ada/flowers", "variant": "fp16"})).data)
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.manual_seed(0))
    with torch.no_grad():
        assert codec._vae.encoder.conv_in(x).abs().max() > 65504
    mean, deviation = codec.posterior(x)
    images = codec.decode(mean)
    assert mean.isfinite().all() and deviation.isfinite().all() and images.isfinite().all()
    with pytest.raises(ValueError, match=r"vae of the pipeline in ada/flowers cannot be loaded .*correct `variant`"):
        Source("ada/flowers").load("vae")

    half = AutoencoderKL.from_pretrained(place / "vae", variant="fp16")
    half.decoder.conv_in.weight.data[0, 0] = 7e4  # inf in half precision
    half.half().save_pretrained(place / "vae", variant="fp16")
    codec = model.codec(codec.data)
    for use in (lambda: codec.posterior(x), lambda: codec.decode(mean)):
        with pytest.raises(ValueError, match=r"vae of the pipeline in ada/flowers .*its weights decoder\.conv_in\.weight are not finite"):
            use()
