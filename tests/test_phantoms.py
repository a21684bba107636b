"""The drawn pictures are what they say, and the base that was trained on them works."""

import csv
import pathlib

import numpy as np
import pytest
from PIL import Image

import phantoms

HERE = pathlib.Path(__file__).parent
TINY = HERE / "tiny-base"
needs_tiny = pytest.mark.skipif(
    not TINY.exists(), reason="tests/tiny-base is not built: see make_tiny_base.py"
)
# caption and mean colour of seed 1,000,000 of each kind
PINNED = [
    ("inflammatory ulcer", "an inflammatory ulcer with black necrosis", [155.8, 106.0, 87.2]),
    ("remodelling ulcer", "healing ulcer with a small open centre", [160.7, 136.8, 128.2]),
    ("normal chest", "chest x-ray without abnormality, soft exposure", [147.1, 147.1, 147.1]),
    ("pleural effusion", "chest film, right-sided pleural effusion", [133.6, 133.6, 133.6]),
    (
        "lung nodule",
        "chest x-ray with a lung nodule in the left upper zone",
        [124.7, 124.7, 124.7],
    ),
    ("normal fundus", "fundus photograph of a left eye, no lesion", [126.9, 57.4, 28.2]),
    (
        "retinal haemorrhages",
        "retina with many dark red bleedings, brown fundus",
        [90.1, 34.4, 17.0],
    ),
    ("mpox lesion", "an mpox skin lesion on light skin", [197.6, 149.3, 121.6]),
]


def rows_of(folder):
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def small(image, side=16):
    return np.asarray(Image.fromarray(image).resize((side, side), Image.BOX), np.float32)


@pytest.mark.parametrize("kind", phantoms.KINDS)
def test_a_seed_gives_the_same_picture_each_time_and_its_neighbour_another(kind):
    first, caption, attributes = phantoms.draw(kind, 11)
    again, caption_again, attributes_again = phantoms.draw(kind, 11)
    assert first.dtype == np.uint8 and first.shape == (128, 128, 3)
    assert np.array_equal(first, again)
    assert caption == caption_again
    assert attributes == attributes_again
    assert np.abs(first.astype(int) - phantoms.draw(kind, 12)[0]).mean() > 2


@pytest.mark.parametrize("kind", phantoms.KINDS)
def test_another_size_shows_the_same_scene(kind):
    small_one, caption, _ = phantoms.draw(kind, 21, 64)
    large_one, caption_large, _ = phantoms.draw(kind, 21, 192)
    other = phantoms.draw(kind, 24, 192)[0]
    assert caption == caption_large
    same = np.abs(small(small_one) - small(large_one)).mean()
    assert same < 4 and same < 0.5 * np.abs(small(other) - small(large_one)).mean()


@pytest.mark.parametrize("kind", phantoms.KINDS)
def test_at_least_six_factors_vary_and_captions_come_in_several_wordings(kind):
    drawn = [phantoms.draw(kind, seed, 32) for seed in range(0, 80, 2)]
    varying = []
    for name in drawn[0][2]:
        values = {str(attributes[name]) for _, _, attributes in drawn}
        if len(values) > 1:
            varying.append(name)
    captions = {caption for _, caption, _ in drawn}
    assert len(varying) >= 6
    assert len(phantoms.CAPTIONS[kind]) >= 6
    assert len(captions) >= 6
    for caption in captions:
        assert caption == caption.lower()
        assert len(caption.encode()) <= 75


def test_captions_tell_the_truth_about_side_and_skin():
    for seed in range(0, 60, 2):
        film, caption, attributes = phantoms.draw("pleural effusion", seed)
        named_side = [side for side in ("left", "right") if side in caption]
        assert not named_side or named_side == [attributes["side"]]
        # The patient's right is on the left of the picture; fluid makes the lower lung field white.
        left_of_picture, right_of_picture = film[70:85, 20:42].mean(), film[70:85, 86:108].mean()
        assert (left_of_picture > right_of_picture) == (attributes["side"] == "right"), seed
    tones = {"light": [], "brown": [], "dark": []}
    for seed in range(0, 120, 2):
        image, _, attributes = phantoms.draw("remodelling ulcer", seed, 32)
        if not attributes["limb"] and not attributes["ruler"]:
            tones[attributes["tone"]].append(image.mean())
    assert np.mean(tones["light"]) > np.mean(tones["brown"]) > np.mean(tones["dark"])


def test_two_pictures_of_a_patient_share_the_body():
    for kind, factor in (
        ("inflammatory ulcer", "tone_value"),
        ("normal chest", "width"),
        ("normal fundus", "pigment"),
    ):
        values = [phantoms.draw(kind, seed, 16)[2][factor] for seed in (40, 41, 42)]
        assert values[0] == values[1] != values[2]


def test_kinds_can_be_told_apart_by_their_coarse_look():
    """Ridge regression on 12 px thumbnails: 1 in 8 would be chance."""
    kinds = list(phantoms.KINDS)
    flat = []
    for kind in kinds:
        for seed in range(0, 200, 2):
            image, _, _ = phantoms.draw(kind, seed, 48)
            flat.append(small(image, 12).ravel() / 255)
    flat = np.stack(flat)
    train = np.tile(np.arange(100) < 70, len(kinds))
    truth = np.repeat(np.arange(len(kinds)), 100)
    design = np.c_[flat, np.ones(len(flat))]
    goal = np.eye(len(kinds))[truth]
    gram = design[train].T @ design[train] + np.eye(design.shape[1])
    weights = np.linalg.solve(gram, design[train].T @ goal[train])
    predicted = (design[~train] @ weights).argmax(1)
    modality = np.array(list(phantoms.KINDS.values()))
    assert (predicted == truth[~train]).mean() > 0.6
    assert (modality[predicted] == modality[truth[~train]]).mean() > 0.88


def test_writing_a_folder_gives_pictures_and_metadata_and_patients_of_one_kind(tmp_path):
    phantoms.write(tmp_path, 12, seed=50, kinds=["normal chest", "mpox lesion"], size=32)
    rows = rows_of(tmp_path)
    assert list(rows[0]) == ["file_name", "text", "label", "modality", "patient_id"]
    assert len(rows) == 12
    assert [row["label"] for row in rows[:2]] == ["normal chest", "mpox lesion"]
    labels_of_patient = {}
    for row in rows:
        assert Image.open(tmp_path / row["file_name"]).size == (32, 32)
        labels_of_patient.setdefault(row["patient_id"], set()).add(row["label"])
    assert len(labels_of_patient) == 6
    for labels in labels_of_patient.values():
        assert len(labels) == 1


@pytest.mark.parametrize("kind, caption, colour", PINNED)
def test_a_seed_is_still_the_picture_that_the_tiny_base_was_trained_on(kind, caption, colour):
    image, now, _ = phantoms.draw(kind, 1_000_000)
    assert now == caption
    # Another numpy or libm may round a value the other way.
    assert np.abs(image.mean((0, 1)) - colour).max() < 0.5


def test_a_kind_that_is_named_twice_comes_twice_as_often(tmp_path):
    kinds = ["mpox lesion", "normal chest", "mpox lesion"]
    phantoms.write(tmp_path, 6, seed=50, kinds=kinds, size=16)
    names = [row["file_name"][:-4] for row in rows_of(tmp_path)]
    assert sorted(names) == [
        "mpox-lesion-0000050",
        "mpox-lesion-0000051",
        "mpox-lesion-0000052",
        "mpox-lesion-0000053",
        "normal-chest-0000050",
        "normal-chest-0000051",
    ]


@needs_tiny
def test_the_tiny_base_fits_sixteen_megabytes_and_loads_as_a_plain_pipeline():
    from diffusers import StableDiffusionPipeline

    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 16_000_000
    pipeline = StableDiffusionPipeline.from_pretrained(TINY)
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert round(sum(model.num_parameters() for model in models) / 1e6) == 8  # README's number
    assert len(phantoms.BASE_KINDS) == 7 and "mpox lesion" not in phantoms.BASE_KINDS
    assert pipeline.vae_scale_factor == 8
    assert pipeline.unet.config.sample_size == 16
    for text in ("chest x-ray with a right pleural effusion", "naïve 胸部X線 🙂"):
        ids = pipeline.tokenizer(text).input_ids
        back = pipeline.tokenizer.decode(ids, skip_special_tokens=True)
        assert back.replace(" ", "") == text.lower().replace(" ", "")
        assert pipeline.tokenizer.eos_token_id not in ids[1:-1]
    drawn = pipeline("normal chest", num_inference_steps=2, height=64, width=64, output_type="np")
    assert drawn.images.shape == (1, 64, 64, 3)
    assert np.isfinite(drawn.images).all()


@needs_tiny
def test_the_tiny_vae_rebuilds_unseen_phantoms_to_thirty_decibels():
    import torch
    from diffusers import AutoencoderKL

    import make_tiny_base

    vae = AutoencoderKL.from_pretrained(TINY / "vae")
    images = make_tiny_base.unseen(6)
    assert make_tiny_base.psnr(vae, images).mean() >= 30
    latents = make_tiny_base.encode(vae, images) * vae.config.scaling_factor
    assert 0.85 < latents.std() < 1.15 and latents.mean().abs() < 0.15
    assert torch.isfinite(latents).all()


@needs_tiny
def test_the_tiny_text_encoder_places_unseen_wordings_near_their_kind():
    from transformers import CLIPTextModel, CLIPTokenizer

    import make_tiny_base

    encoder = CLIPTextModel.from_pretrained(TINY / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    assert make_tiny_base.check_text(encoder, tokenizer) >= 0.8
