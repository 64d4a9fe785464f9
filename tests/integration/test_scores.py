"""CLIP's scores with a tiny random CLIP, saved as the real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from farm.datasets.gates import Gates, GatesSection
from farm.errors import ModelNotLoaded
from tests.diffusers_kit import QUIET
from tests.model_parts import clip_tokenizer
from tests.picture_kit import PIXELS, picture
from workers.scores import Aesthetic, ClipScore

pytestmark = QUIET
PROMPTS = ("a red cat", "the photo of a dog on blue", "", "赤い円", "a cat " * 200)
IMAGE = Image.fromarray(PIXELS)


def clip_model(**changes: Any) -> Any:
    layers = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    tokenizer = clip_tokenizer()
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config={**layers, "image_size": 32, "patch_size": 8},
                text_config={**layers, **tokens, "vocab_size": len(tokenizer)},
                projection_dim=24,
                **changes,
            )
        )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("clip")
    clip_model().save_pretrained(home)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(**sizes), clip_tokenizer()
    ).save_pretrained(home)
    return home


def similarity(clip: Path, prompt: str) -> float:
    """The model's own, x 100."""
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    inputs = processor(
        text=[prompt], images=[IMAGE], return_tensors="pt", truncation=True, max_length=77
    )
    model = clip_model().eval()
    with torch.no_grad():
        return 100 * float(model(**inputs).logits_per_image / model.logit_scale.exp())


def test_the_score_is_the_models_own_similarity_from_0_to_100(clip: Path) -> None:
    scorer = ClipScore(str(clip))
    own = [similarity(clip, prompt) for prompt in PROMPTS]
    assert len({round(value, 3) for value in own}) == len(PROMPTS)
    for prompt, value in zip(PROMPTS, own, strict=True):
        assert scorer.score(IMAGE, prompt) == pytest.approx(max(value, 0), abs=1e-3)
        assert scorer.score(IMAGE, prompt) == scorer.score(IMAGE, prompt)


def test_a_cosine_below_zero_is_zero_and_a_prefix_is_said_first(clip: Path) -> None:
    plain, prefixed = ClipScore(str(clip)), ClipScore(str(clip), prefix="a photo of ")
    assert prefixed.score(IMAGE, "a cat") == plain.score(IMAGE, "a photo of a cat")
    with torch.no_grad():
        plain._clip._model.text_projection.weight.neg_()
    both = similarity(clip, "a red cat"), plain.score(IMAGE, "a red cat")
    assert (both[0] > 0, both[1] > 0) in ((True, False), (False, True))
    assert min(both) <= 0
    assert both[1] >= 0


def test_as_plug_ins_of_a_recipe(clip: Path, tmp_path: Path) -> None:
    save_file(
        {"weight": torch.ones(1, 24), "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors"
    )
    told = GatesSection(
        blank=False,
        exact_duplicates=False,
        scores=[
            {"name": "clip", "plugin": "workers.scores:ClipScore", "options": {"path": str(clip)}},
            {
                "name": "aesthetic",
                "plugin": "workers.scores:Aesthetic",
                "options": {"path": str(clip), "head": str(tmp_path / "head.safetensors")},
            },
        ],
    )
    scores = Gates(told).measure(picture(), {"prompt": "a red cat"})["scores"]
    assert scores["clip"] == ClipScore(str(clip)).score(IMAGE, "a red cat")
    assert 5 - 24**0.5 <= scores["aesthetic"] <= 5 + 24**0.5


def test_the_layers_of_an_aesthetic_head_go_in_their_order(clip: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    widths = {"layers.0": (24, 16), "layers.2": (16, 8), "layers.10": (8, 1)}
    tensors = {}
    for name, (into, out) in widths.items():
        tensors[f"{name}.weight"] = torch.tensor(rng.normal(size=(out, into)).astype(np.float32))
        tensors[f"{name}.bias"] = torch.tensor(rng.normal(size=out).astype(np.float32))
    save_file(tensors, tmp_path / "head.safetensors")
    scorer = Aesthetic(str(tmp_path / "head.safetensors"), str(clip))
    value = scorer._clip.picture(IMAGE).numpy()
    assert np.linalg.norm(value) == pytest.approx(1)
    for name in widths:
        value = tensors[f"{name}.weight"].numpy() @ value + tensors[f"{name}.bias"].numpy()
    assert scorer.score(IMAGE, "whatever") == pytest.approx(float(value[0]), abs=1e-5)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(1, 768), "bias": torch.ones(1)},
        {"weight": torch.ones(2, 24), "bias": torch.ones(2)},
        {"weight": torch.ones(1, 24)},
        {"weight": torch.ones(1, 24), "bias": torch.ones(1), "norm.scale": torch.ones(24)},
        {"weight": torch.ones(24), "bias": torch.ones(1)},
        {},
    ],
)
def test_a_head_that_does_not_fit(clip: Path, tmp_path: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ModelNotLoaded, match="the head"):
        Aesthetic(str(tmp_path / "head.safetensors"), str(clip))


def test_a_head_that_is_a_pickle_or_missing_is_not_read(clip: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1, 24), "bias": torch.ones(1)}, tmp_path / "head.pth")
    for name in ("head.pth", "nowhere"):
        with pytest.raises(ModelNotLoaded, match="no safetensors file"):
            Aesthetic(str(tmp_path / name), str(clip))


def test_a_model_that_is_missing_half_there_or_pickled(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotLoaded, match="no CLIP model"):
        ClipScore("openai/clip-vit-large-patch14")
    clip_model().config.save_pretrained(tmp_path)
    weights = clip_model().state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotLoaded, match="the CLIP model in"):
        ClipScore(str(tmp_path))
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    with pytest.raises(ModelNotLoaded, match=r"lacks visual_projection\.weight"):
        ClipScore(str(tmp_path))
