"""Adapters on tiny random models of the classes that they are for, from a directory, without network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import Data
from gentrain.data.toys import Rings
from gentrain.models.image_text import resize
from gentrain.models.towers import Towers
from gentrain.rewards.base import Reward
from gentrain.rewards.networks import TowerSimilarity
from tests.models import readers
from tests.models.pipelines import WORDS, clip_tokenizer
from tests.models.readers import MEAN, SIDE, STD, VISION, preprocessing


@dataclass
class Captioned(Data):
    shape = (3, 24, 24)  # type: ignore[assignment]
    class_names = ()  # type: ignore[assignment]
    captions = ("cat", "dog", "a bird")  # type: ignore[assignment]
    registered_name = "captioned"


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = readers.clip(tmp_path_factory.mktemp("clip"))
    save_file(head(12), directory / "reward_head.safetensors")
    return directory


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return readers.siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    directory, tokenizer = tmp_path_factory.mktemp("blip"), clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 40, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "sep_token_id": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=8, projection_dim=8)
    BlipForImageTextRetrieval(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    preprocessing(directory)
    save_file(head(16), directory / "reward_head.safetensors")
    return directory


def head(width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (8, width), "0.bias": (8,), "1.weight": (1, 8), "1.bias": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def built(name: str, directory: Path, **settings: Any) -> Reward:
    reward = build(Reward, Document({"name": name, "directory": str(directory), **settings}, "x.yaml"))
    reward.check_data(Captioned())
    return reward


def images(side: int = 24) -> torch.Tensor:
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9


ASKED = {"caption": torch.tensor([2, 0, 2, 1])}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_cosine_is_that_of_the_model_asked_directly(kind: str, request: pytest.FixtureRequest) -> None:
    import transformers

    directory = request.getfixturevalue(kind)
    found = built("text_image", directory, template="a {}")(images(), ASKED, {})
    model = transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    x = (resize((images() + 1) / 2, SIDE).clamp(0, 1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    texts = [f"a {Captioned.captions[place]}" for place in ASKED["caption"]]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=x, **tokens)
    assert (output.text_embeds[0] - output.text_embeds[1]).abs().max() > 1e-3  # short enough for the tokenizer to tell them apart
    torch.testing.assert_close(found, (output.image_embeds * output.text_embeds).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, kind", [("text_image", "clip"), ("text_image", "siglip"), ("aesthetic", "clip"), ("image_reward", "blip")])
def test_gradients_reach_the_images_and_nothing_else(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    reward = built(name, request.getfixturevalue(kind))
    x = images().requires_grad_()
    scores = reward(x, ASKED, {})
    assert scores.shape == (4,) and scores.dtype == torch.float32
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    with torch.no_grad():
        moved = [reward(x + sign * 1e-2 * direction, ASKED, {}).double().sum() for sign in (1, -1)]
    assert gradient.abs().max() > 0
    assert (gradient * direction).sum().item() == pytest.approx((moved[0] - moved[1]).item() / 2e-2, rel=0.05, abs=1e-3)
    again = reward(x.detach()[[1]], {"caption": ASKED["caption"][[1]]}, {})
    torch.testing.assert_close(again, scores.detach()[[1]], rtol=1e-4, atol=1e-5)


def test_image_reward_reads_text_and_saturates(blip: Path) -> None:
    free, bounded = (built("image_reward", blip, saturate=saturate)(images(), ASKED, {}) for saturate in (None, 0.5))
    torch.testing.assert_close(bounded, (free - 0.5).clamp(max=0))
    other = built("image_reward", blip, saturate=None)(images(), {"caption": torch.tensor([0, 0, 0, 0])}, {})
    assert not torch.allclose(free, other)
    raw = built("image_reward", blip, saturate=None, mean=0.0, std=1.0)(images(), ASKED, {})
    torch.testing.assert_close(free, (raw - 0.16717530) / 1.0333394)


def test_the_aesthetic_head_is_linear_in_the_unit_embedding(clip: Path) -> None:
    import transformers

    model = transformers.CLIPModel.from_pretrained(clip).eval()
    x = (resize((images() + 1) / 2, SIDE).clamp(0, 1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        unit = torch.nn.functional.normalize(model.get_image_features(pixel_values=x).pooler_output, dim=1)
    weights = head(12)
    expected = (unit @ weights["0.weight"].T + weights["0.bias"]) @ weights["1.weight"].T + weights["1.bias"]
    torch.testing.assert_close(built("aesthetic", clip)(images(), {}, {}), expected[:, 0], rtol=1e-5, atol=1e-5)


def test_resizing_is_pillows_but_for_its_rounding() -> None:
    x = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()).resize((24, 16), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(picture.tobytes())).reshape(16, 24, 3).permute(2, 0, 1)[:, :, 4:20] / 255
    assert (resize(x[None], 16)[0].clamp(0, 1) - expected).abs().max() < 3 / 255
    assert torch.equal(resize(x[None, :, :16, :16], 16), x[None, :, :16, :16])


def test_mistakes_name_the_file_and_the_remedy(clip: Path, blip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of the type 'blip'; text_image reads clip, siglip"):
        built("text_image", blip)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    reward = built("text_image", tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json does not exist"):
        reward(images(), ASKED, {})
    preprocessing(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        reward(images(), ASKED, {})
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks the size of images"):
        built("aesthetic", tmp_path)(images(), ASKED, {})
    with pytest.raises(ValueError, match=r"no directory, and preprocessor_config\.json of that repository cannot be had"):
        built("text_image", Path("no-such/repository"))(images(), ASKED, {})
    with pytest.raises(ValueError, match="it reads images with"):
        build(Reward, Document({"name": "text_image", "directory": str(clip)}, "x.yaml")).check_data(Rings(rings=3))


def test_our_own_towers() -> None:
    torch.manual_seed(0)
    towers = Towers(width=8, channels=(8, 8), norm_groups=4, buckets=64)
    network = towers.build((3, 24, 24), 0).eval().requires_grad_(False)
    reward = TowerSimilarity(model=towers)
    reward.check_data(Captioned())
    x = images().requires_grad_()
    scores = reward(x, ASKED, {"towers": network})
    from gentrain.models.towers import CaptionCodec

    tokens = CaptionCodec(Towers(buckets=64), Captioned()).tokens[ASKED["caption"]]
    image, text = network.image(x), network.text(tokens)
    torch.testing.assert_close(scores, torch.nn.functional.cosine_similarity(image, text, dim=1))
    assert torch.autograd.grad(scores.sum(), x)[0].abs().max() > 0


def test_our_own_towers_see_no_more_than_pictures_have() -> None:
    torch.manual_seed(0)
    towers = Towers(width=8, channels=(8, 8), norm_groups=4, buckets=64)
    networks = {"towers": towers.build((3, 24, 24), 0).eval().requires_grad_(False)}
    reward = TowerSimilarity(model=towers)
    reward.check_data(Captioned())
    x = 3 * images()
    torch.testing.assert_close(reward(x, ASKED, networks), reward(x.clamp(-1, 1), ASKED, networks))
