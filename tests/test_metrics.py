"""Numbers against values from outside: published packages run once (named beside each value) and closed forms."""

import importlib.util
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import evaluate
import filter as filter_script
import metrics
from evaluate import METRICS, permutation_draws, yardstick
from filter import calibrate, judge
from metrics import frechet, kid

A = np.random.RandomState(0)
REAL, FAKE = A.randn(60, 16), 1.1 * A.randn(50, 16) + 0.2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def noise(count, size=64, seed=0, spread=0.2):
    """Smooth random uint8 pictures (count, 3, size, size)."""
    rough = torch.randn(count, 3, 8, 8, generator=metrics.generator(seed, "test"))
    smooth = torch.nn.functional.interpolate(rough, (size, size), mode="bicubic")
    return (smooth * spread + 0.5).clamp(0, 1).mul(255).to(torch.uint8)


def observed(real, fake, **more):
    joint = evaluate.joint_matrices(real, fake, standardise=False) | more
    return joint, permutation_draws(len(real), len(fake), 0, seed=0)


# ---------------------------------------------------------------- set against set


def test_frechet_agrees_with_pytorch_fid_and_with_the_closed_form():
    line = frechet(np.array([[0.0], [1], [2], [3]]), np.array([[1.0], [3], [5], [7]]))
    assert line == pytest.approx(6.25 + 5 / 3, rel=1e-12)
    assert frechet(REAL, FAKE) == pytest.approx(
        4.648399843789, rel=1e-10
    )  # pytorch-fid 0.3.0, torch-fidelity 0.4.0


def test_frechet_is_exact_where_there_are_fewer_images_than_features():
    r = np.random.RandomState(1)
    few, fewer = r.randn(30, 64), r.randn(25, 64) * 1.2 + 0.1
    assert frechet(few, fewer) == pytest.approx(81.927118320674, rel=1e-11)
    assert frechet(few, fewer) == pytest.approx(
        81.927116573, rel=1e-6
    )  # pytorch-fid 0.3.0, through sqrtm


def test_the_gram_matrix_gives_the_frechet_distance_of_the_features():
    r = np.random.RandomState(1)
    for real, fake in ((REAL, FAKE), (r.randn(30, 64), r.randn(25, 64) * 1.2 + 0.1)):
        joint, draws = observed(real + 100, fake + 100)
        assert evaluate.frechet_draws(joint, draws)[0] == pytest.approx(
            frechet(real, fake), rel=1e-9
        )


def test_frechet_of_a_set_with_itself_is_zero_and_shifts_and_turns_do_not_move_it():
    turn = np.linalg.qr(np.random.RandomState(3).randn(16, 16))[0]
    assert frechet(REAL, REAL) < 1e-9
    assert frechet(REAL[::-1] @ turn + 5, FAKE @ turn + 5) == pytest.approx(
        frechet(REAL, FAKE), rel=1e-9
    )


def test_kid_and_its_jackknife_error_have_the_reference_values():
    value, error = kid(REAL, FAKE)
    assert value == pytest.approx(0.270729429815, rel=1e-10)
    assert error == pytest.approx(0.120100621680, rel=1e-10)
    assert kid(REAL[:50], FAKE)[0] == pytest.approx(
        0.298755094560, rel=1e-10
    )  # torch-fidelity, torchmetrics
    joint, draws = observed(REAL, FAKE)
    assert evaluate.kid_draws(joint, draws)[0] == pytest.approx(value, rel=1e-10)


def test_the_jackknife_from_row_sums_is_the_jackknife_by_leaving_each_image_out():
    real, fake = REAL[:12], FAKE[:9]
    left = [
        [kid(np.delete(real, n, 0), fake)[0] for n in range(12)],
        [kid(real, np.delete(fake, n, 0))[0] for n in range(9)],
    ]
    slow = sum((len(part) - 1) * np.var(part) for part in left) ** 0.5
    assert kid(real, fake)[1] == pytest.approx(slow, rel=1e-9)


@pytest.mark.parametrize(
    "k, expected", [(3, (0.7, 0.7833333333333, 0.68, 0.75)), (5, (0.78, 0.9, 0.716, 0.9))]
)
def test_precision_recall_density_and_coverage_agree_with_prdc(k, expected):
    blocks = [
        metrics.squared_distances(x, y) for x, y in ((REAL, REAL), (FAKE, FAKE), (REAL, FAKE))
    ]
    assert metrics.precision_recall(*blocks, k) == pytest.approx(expected, abs=1e-12)  # prdc 0.2


def test_identical_images_give_clear_numbers():
    same = np.repeat(REAL[:1], 20, 0)
    joint, draws = observed(same, same)
    found = {name: row[0](joint, draws)[0] for name, row in METRICS.items() if row[2] == "features"}
    assert found == pytest.approx(
        {
            "frechet": 0,
            "kid": 0,
            "cmmd": 0,
            "precision": 1,
            "recall": 1,
            "density": 4,
            "coverage": 1,
            "vendi": 1,
        },
        abs=1e-9,
    )


def test_cmmd_vendi_and_inception_score_have_the_reference_values():
    joint, draws = observed(REAL, FAKE)
    assert evaluate.cmmd_draws(joint, draws)[0] == pytest.approx(0.978710395038, abs=1e-9)
    assert evaluate.vendi_draws(joint, -draws)[0] == pytest.approx(14.006448341064, abs=1e-9)
    assert evaluate.vendi_draws(joint, draws)[0] == pytest.approx(13.500512667004, abs=1e-9)
    orthonormal, _ = observed(np.eye(9), np.eye(9))
    assert evaluate.vendi_draws(orthonormal, -np.repeat([[0, 1]], 9, 1))[0] == pytest.approx(
        9, abs=1e-9
    )
    logits = np.random.RandomState(2).randn(100, 1008) * 2
    assert evaluate.inception_draws({"logits": logits}, -np.ones((1, 100)))[0] == pytest.approx(
        6.196864017596, abs=1e-9
    )
    splits, order = np.zeros((10, 100)), np.random.RandomState(2020).permutation(100)
    for n in range(10):
        splits[n, order[10 * n : 10 * n + 10]] = -1
    found = evaluate.inception_draws({"logits": logits}, splits)  # torch-fidelity 0.4.0
    assert (found.mean(), found.std()) == pytest.approx((3.759963656667, 0.146130318331), abs=1e-9)


@pytest.mark.parametrize("standardise", [False, True])
def test_large_sets_have_the_same_values_in_blocks(standardise):
    names = ["frechet", "kid", "cmmd", "precision", "recall", "density", "coverage", "vendi"]
    both = np.concatenate([REAL, FAKE]) + 1
    both = (both - both.mean(0)) / both.std(0) if standardise else both
    joint, draws = observed(both[:60], both[60:])
    found = evaluate.large_values(REAL + 1, FAKE + 1, standardise, width=7)
    assert found == pytest.approx(
        {name: METRICS[name][0](joint, draws)[0] for name in names}, abs=1e-9
    )


@pytest.mark.parametrize("m", [2, 3, 5])
def test_a_few_images_beside_many_have_the_same_values_in_blocks(m):
    joint, draws = observed(REAL, FAKE[:m])
    found = evaluate.large_values(REAL, FAKE[:m], width=7)
    assert found == pytest.approx(
        {name: METRICS[name][0](joint, draws)[0] for name in found}, abs=1e-9
    )


def test_colour_shifts_are_seen_and_the_excess_grows_with_them():
    pixels, excess = noise(80), []
    for shift in (4, 12, 40):
        shifted = pixels[40:].float() + torch.tensor([shift, 0.0, -shift])[:, None, None]
        joint = {
            "colour": evaluate.joint_matrices(
                metrics.colour(pixels[:40]),
                metrics.colour(shifted.clamp(0, 255).byte()),
                standardise=True,
            )
        }
        found = yardstick(METRICS["colour"][0](joint, permutation_draws(40, 40, 199, seed=0)), True)
        excess.append(found["excess"])
        assert found["p_high"] < 0.01 or shift == 4
    assert excess == sorted(excess)
    grey = metrics.colour(pixels[:, :1].expand(-1, 3, -1, -1))
    assert (grey[:, :6] == 0).all() and np.ptp(grey) == pytest.approx(-np.log(1e-3), rel=1e-5)
    shot = {
        "colour": evaluate.joint_matrices(
            metrics.colour(pixels[:40]), metrics.colour(altered(pixels)["jpeg"][40:]), True
        )
    }
    assert (
        yardstick(METRICS["colour"][0](shot, permutation_draws(40, 40, 199, seed=0)), True)[
            "p_high"
        ]
        < 0.01
    )


def grainy(count, seed=0):
    """PIL pictures of 96 pixels with grain of two grey levels."""
    pixels = noise(count, 96, seed).float() + 2 * torch.randn(
        count, 1, 96, 96, generator=metrics.generator(seed, "grain")
    )
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels.clamp(0, 255).byte()]


def test_jpeg_blur_and_noise_show_as_artefacts_and_the_excess_grows_with_them():
    real, other = np.array([metrics.artefacts(image) for image in grainy(30)]), grainy(30, seed=1)
    draw = np.random.RandomState(0)

    def jpeg(image, quality):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    blocky, plain = metrics.artefacts(jpeg(other[0], 20)), metrics.artefacts(other[0])
    assert (blocky[:2] > plain[:2] + 0.3).all() and blocky[3] < plain[3]
    changes = {
        jpeg: (80, 50, 20),
        lambda image, size: image.filter(ImageFilter.GaussianBlur(size)): (0.6, 1, 2),
        lambda image, sd: Image.fromarray(
            (np.asarray(image) + sd * draw.randn(96, 96, 1)).clip(0, 255).astype(np.uint8)
        ): (2, 5, 15),
    }
    for change, strengths in changes.items():
        excess = []
        for strength in strengths:
            changed = np.array([metrics.artefacts(change(image, strength)) for image in other])
            joint = {"artefacts": evaluate.joint_matrices(real, changed, True)}
            found = yardstick(
                METRICS["artefacts"][0](joint, permutation_draws(30, 30, 199, seed=0)), True
            )
            assert found["p_high"] < 0.01
            excess.append(found["excess"])
        assert excess == sorted(excess)


def test_artefacts_of_one_source_have_a_uniform_p_and_the_smallest_pictures_numbers():
    r, small, found = (
        np.random.RandomState(0),
        0,
        np.array([metrics.artefacts(image) for image in grainy(200)]),
    )
    for trial in range(150):
        picked = r.permutation(200)[:40]
        joint = {"artefacts": evaluate.joint_matrices(found[picked[:20]], found[picked[20:]], True)}
        small += (
            yardstick(
                METRICS["artefacts"][0](joint, permutation_draws(20, 20, 39, seed=trial)), True
            )["p_high"]
            <= 0.1
        )
    assert 4 <= small <= 28  # 15 expected, 3.5 standard deviations
    for size in ((1, 1), (9, 3), (600, 20)):
        assert metrics.artefacts(Image.new("RGB", size)) == pytest.approx(
            [0, 0, 0, np.log(0.1)], abs=1e-5
        )


# ---------------------------------------------------------------- the reference packages, on the same numbers and weights


def test_frechet_is_pytorch_fids():
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    parts = [part for x in (REAL, FAKE) for part in (x.mean(0), np.cov(x, rowvar=False))]
    try:
        theirs = fid_score.calculate_frechet_distance(*parts)
    except TypeError:
        pytest.skip("this pytorch-fid does not run on this scipy")
    assert frechet(REAL, FAKE) == pytest.approx(theirs, rel=1e-10)


def test_kid_is_torch_fidelitys():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    kernels = [
        (x @ y.T / 16 + 1) ** 3
        for x, y in ((REAL[:50], REAL[:50]), (REAL[:50], FAKE), (FAKE, FAKE))
    ]
    assert kid(REAL[:50], FAKE)[0] == pytest.approx(metric_kid.mmd2(*kernels), rel=1e-10)


def test_precision_recall_density_and_coverage_are_prdcs():
    theirs = pytest.importorskip("prdc").compute_prdc(REAL, FAKE, 5)
    blocks = [
        metrics.squared_distances(x, y) for x, y in ((REAL, REAL), (FAKE, FAKE), (REAL, FAKE))
    ]
    ours = metrics.precision_recall(*blocks, 5)
    assert ours == pytest.approx(
        [theirs[name] for name in ("precision", "recall", "density", "coverage")], abs=1e-12
    )


def test_kid_is_torchmetrics():
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    assert kid(REAL[:50], FAKE)[0] == pytest.approx(
        poly_mmd(*map(torch.from_numpy, (REAL[:50], FAKE))).item(), rel=1e-10
    )


def test_the_clean_resize_is_clean_fids():
    resize = pytest.importorskip("cleanfid.resize").make_resizer(
        "PIL", False, "bicubic", (299, 299)
    )
    pixels = noise(2, size=96)
    for image, ours in zip(pixels, metrics.resized(pixels, 299, "clean")):
        assert (
            np.abs(resize(image.permute(1, 2, 0).numpy()) - ours.permute(1, 2, 0).numpy()).max()
            < 2e-3
        )


def test_ssim_and_ms_ssim_agree_with_scikit_image_and_pytorch_msssim():
    y, x = np.mgrid[0:192, 0:192] / 191
    a = 0.5 + 0.5 * np.sin(20 * x + 14 * y**2)
    b = np.clip(a + 0.1 * np.random.RandomState(4).randn(192, 192), 0, 1)
    pair = [torch.from_numpy(image)[None, None] for image in (a, b)]
    assert metrics.ms_ssim(*pair).item() == pytest.approx(
        0.942919394, abs=1e-6
    )  # pytorch-msssim 1.0.0
    theirs = pytest.importorskip("skimage.metrics").structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
    )
    assert metrics.ssim(*pair).item() == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_agrees_with_the_lpips_package_on_the_same_random_trunk(net, tmp_path):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = {name.split(".", 1)[1]: value for name, value in theirs.net.state_dict().items()}
    pixels = noise(3)
    network = dict(
        name=net,
        trunk=metrics.trunk_of(metrics.LPIPS[net][0], state),
        indices=metrics.LPIPS[net][1],
        weights=[
            theirs.state_dict()[f"lin{n}.model.1.weight"][0]
            for n in range(len(metrics.LPIPS[net][1]))
        ],
    )
    with torch.no_grad():
        expected = [
            theirs(pixels[:1] / 127.5 - 1, pixels[n : n + 1] / 127.5 - 1).item() for n in (1, 2)
        ]
    assert metrics.lpips_matrix(pixels, network, "cpu")[0, 1:] == pytest.approx(expected, abs=2e-5)


def tiny_clip(folder):
    """A CLIP of 32-pixel images and byte words with random weights, in transformers' form."""
    from conftest import tiny_parts
    from transformers import CLIPConfig, CLIPModel

    _, _, tokenizer, *_ = tiny_parts()
    size = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=dict(size, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
            vision_config=dict(size, image_size=32, patch_size=16),
            projection_dim=8,
        )
    ).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_clip_features_and_clip_score_are_those_of_transformers(tmp_path):
    model, tokenizer = tiny_clip(tmp_path)
    pixels, captions = noise(3, size=32), ["a wound", "", "a wound"]
    mean, sd = (torch.tensor(v)[:, None, None] for v in metrics.CLIP_SCALE)
    with torch.no_grad():
        seen = model(
            pixel_values=(pixels / 255 - mean) / sd,
            **tokenizer(captions, padding=True, return_tensors="pt"),
        )
    network = metrics.load_features(str(tmp_path), "cpu")
    found = metrics.extract(pixels, network, "cpu")
    assert found / np.linalg.norm(found, axis=1)[:, None] == pytest.approx(
        seen.image_embeds.numpy(), abs=1e-5
    )
    scores = metrics.caption_scores(pixels, captions, str(tmp_path), "cpu")
    expected = (100 * seen.image_embeds @ seen.text_embeds.T).clamp(min=0).numpy()
    assert scores == pytest.approx(expected, abs=1e-3)
    assert evaluate.caption_draws({"captions": scores}, np.zeros((3, 6)))[0] == pytest.approx(
        scores.diagonal().mean()
    )


def test_dinov2_features_are_its_class_token(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56)
    ).eval()
    model.save_pretrained(tmp_path)
    pixels = noise(2, size=224)
    mean, sd = (torch.tensor(v)[:, None, None] for v in metrics.IMAGENET_SCALE)
    with torch.no_grad():
        expected = model(pixel_values=(pixels / 255 - mean) / sd).last_hidden_state[:, 0]
    found = metrics.extract(pixels, metrics.load_features(str(tmp_path), "cpu"), "cpu")
    assert found == pytest.approx(expected.numpy(), abs=1e-4)


# ---------------------------------------------------------------- copies


def altered(pixels):
    """Copies of pictures: exact, mirrored, JPEG 70, 90 % crops, blended with noise."""
    side, found = pixels.shape[2], {"exact": pixels, "flipped": pixels.flip(3)}

    def each(change):
        pictures = [
            change(n, Image.fromarray(p.permute(1, 2, 0).numpy())) for n, p in enumerate(pixels)
        ]
        return torch.stack(
            [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
        )

    def jpeg(_, image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=70)
        return Image.open(buffer)

    cut = side - round(0.9 * side)
    found["jpeg"] = each(jpeg)
    found["crop"] = each(
        lambda n, image: image.resize(
            (side, side), box=(n % cut, n * 3 % cut, side - cut + n % cut, side - cut + n * 3 % cut)
        )
    )
    rough = torch.rand(pixels.shape, generator=metrics.generator(0, "blend")) * 255
    found["blended"] = (0.8 * pixels + 0.2 * rough).byte()
    return found


def test_copies_are_found_whatever_was_done_to_them_and_fresh_pictures_as_often_as_promised():
    real, fresh = noise(150, seed=1), noise(400, seed=2)
    between, same, limit = (
        metrics.copy_distances(real, real),
        np.eye(150, dtype=bool),
        2 / 151 + 1e-9,
    )
    for kind, copies in altered(real[:60]).items():
        p = metrics.copy_chances(between, metrics.copy_distances(copies, real), same)
        assert (p <= limit).mean() >= 0.95, kind
    p = metrics.copy_chances(between, metrics.copy_distances(fresh, real), same)
    assert (p <= limit).mean() < 0.04 and 0.02 < (p <= 0.1).mean() < 0.2


def test_real_pictures_that_were_cut_twice_from_one_do_not_excuse_copies():
    real = noise(150, seed=1)
    real[:12:2] = altered(real[1:12:2])["crop"]  # six pairs
    between = metrics.copy_distances(real, real)
    for kind, copies in altered(real[20:80]).items():
        p = metrics.copy_chances(
            between, metrics.copy_distances(copies, real), np.eye(150, dtype=bool)
        )
        assert (p <= 2 / 151 + 1e-9).mean() >= 0.95, kind


# ---------------------------------------------------------------- the yardstick


def test_a_permutation_p_is_uniform_when_both_sets_come_from_one_source():
    r = np.random.RandomState(0)
    small = {name: 0 for name, row in METRICS.items() if row[2] == "features"}
    for trial in range(200):
        joint = evaluate.joint_matrices(r.randn(20, 30), r.randn(20, 30), standardise=True)
        draws = permutation_draws(20, 20, 39, seed=trial)
        for name in small:
            small[name] += (
                yardstick(METRICS[name][0](joint, draws), METRICS[name][1])["p_high"] <= 0.1
            )
    assert all(count <= 34 for count in small.values()), (
        small
    )  # 20 expected, + 3.3 standard deviations
    assert (
        small["frechet"] >= 8 and small["kid"] >= 8
    )  # the others take few values and are cautious


def test_a_shift_is_called_worse_than_chance_and_copies_closer_than_chance():
    r = np.random.RandomState(0)
    real = r.randn(40, 64)
    for fake, name in ((r.randn(40, 64) + 0.4, "p_high"), (real + 0.01 * r.randn(40, 64), "p_low")):
        joint = evaluate.joint_matrices(real, fake, standardise=True)
        draws = permutation_draws(40, 40, 99, seed=0)
        for metric in ("frechet", "kid"):
            assert yardstick(METRICS[metric][0](joint, draws), METRICS[metric][1])[name] == 0.01


def test_draws_have_the_sets_sizes_and_keep_a_patient_together():
    groups = ["a"] * 4 + ["b"] * 3 + ["c", "d", "e"] + [""] * 10
    draws = permutation_draws(12, 8, 50, 0, groups)
    assert (draws[0] == [1] * 12 + [-1] * 8).all()
    assert ((draws == 1).sum(1) == 12).all() and ((draws == -1).sum(1) == 8).all()
    assert all(len(set(row[:4])) == 1 and len(set(row[4:7])) == 1 for row in draws[1:])
    assert len({row.tobytes() for row in draws}) > 45
    assert (draws == permutation_draws(12, 8, 50, 0, groups)).all()


def test_halves_of_the_real_set_are_compared_at_equal_sizes():
    real, fake = evaluate.half_draws(21, 30, 5, seed=0)
    for draws in (real, fake):
        assert ((draws == 1).sum(1) == 10).all() and ((draws == -1).sum(1) == 10).all()
    assert (real[:, 21:] == 0).all() and (fake[:, :21] != -1).all()


# ---------------------------------------------------------------- image against image


def test_ssim_agrees_with_scikit_image_on_noise_and_with_the_closed_form_on_flat_images():
    r = np.random.RandomState(3)
    a = r.rand(64, 48, 3)
    b = np.clip(a + 0.1 * r.randn(64, 48, 3), 0, 1)
    a, b = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (a, b))
    assert metrics.ssim(a, b).item() == pytest.approx(
        0.946309482727, abs=1e-9
    )  # scikit-image 0.26, gaussian
    grey = [
        torch.einsum("bchw,c->bhw", x, torch.tensor(metrics.LUMA).double())[:, None] for x in (a, b)
    ]
    assert metrics.ssim(*grey).item() == pytest.approx(0.947221478643, abs=1e-7)
    y, x = np.mgrid[0:64, 0:64] / 63
    waves = [
        torch.from_numpy(0.5 + 0.5 * np.sin(6 * x + 4 * y**2 + turn))[None, None]
        for turn in (0, 0.5)
    ]
    assert metrics.ssim(*waves).item() == pytest.approx(
        0.569981499344, abs=1e-9
    )  # scikit-image 0.26
    flat = [torch.full((1, 1, 32, 32), value, dtype=torch.float64) for value in (0.4, 0.6)]
    assert metrics.ssim(*flat).item() == pytest.approx((2 * 0.24 + 1e-4) / (0.52 + 1e-4), abs=1e-12)


def test_the_ssim_matrix_is_ssim_of_every_pair_at_64_pixels():
    first, second = noise(5), noise(7, seed=1)
    slow = [
        [
            metrics.ssim(
                metrics.to_grey(a[None]).double(), metrics.to_grey(b[None]).double()
            ).item()
            for b in second
        ]
        for a in first
    ]
    assert metrics.ssim_matrix(first, second) == pytest.approx(np.array(slow), abs=2e-5)


def test_patients_that_a_permutation_cannot_keep_whole_are_dealt_out_singly():
    """One patient of 20 films against 8 drawn ones: whole, he fits no group, and every draw would be the same."""
    assert evaluate.whole_groups(["a"] * 20 + [""] * 8, 20, 8) is None
    draws = evaluate.permutation_draws(20, 8, 50, 0, ["a"] * 20 + [""] * 8)
    assert (
        all((row == 1).sum() == 20 and (row == -1).sum() == 8 for row in draws)
        and len({r.tobytes() for r in draws}) > 40
    )
    for real, fake in zip(
        *evaluate.half_draws(24, 12, 9, 0, [str(i // 3) for i in range(24)] + [""] * 12)
    ):
        assert (
            (real == 1).sum() == (real == -1).sum() == (fake == -1).sum() == (fake == 1).sum() > 0
        )


def test_chances_of_copies_are_small_for_copies_and_uniform_for_fresh_images():
    draw = np.random.RandomState(0)
    chances = []
    for _ in range(30):
        real, fresh = draw.randn(100, 20), draw.randn(40, 20)
        near = (
            np.sqrt(metrics.squared_distances(real, real)),
            np.sqrt(metrics.squared_distances(fresh, real)),
        )
        chances += metrics.copy_chances(*near, np.eye(100, dtype=bool)).tolist()
    assert 0.01 < np.mean(np.array(chances) <= 0.05) < 0.09
    copies = real[:10] + 0.05 * draw.randn(10, 20)
    near = near[0], np.sqrt(metrics.squared_distances(copies, real))
    assert (metrics.copy_chances(*near, np.eye(100, dtype=bool)) <= 2 / 101 + 1e-9).all()


LPIPS_VALUES = {
    "alex": 0.027844432555,
    "vgg": 0.048296213661,
    "squeeze": 0.030263287327,
}  # lpips 0.1.4, float64


def golden_lpips(net):
    """The distance network with the trunk of research notes: seeded float64 weights, packaged linear layers."""
    rs, state = np.random.RandomState(7), {}
    with torch.device("meta"):
        import torchvision

        shapes = getattr(torchvision.models, metrics.LPIPS[net][0])().features.state_dict()
    for name, value in shapes.items():
        fan_in = value[0].numel() if value.ndim == 4 else 1
        state[name] = (
            torch.from_numpy(rs.randn(*value.shape) * np.sqrt(2 / fan_in))
            if value.ndim == 4
            else torch.zeros(value.shape, dtype=torch.float64)
        )
    linear = metrics.load_weights(metrics.lpips_files(net)[1], metrics.LPIPS[net][3])
    weights = [linear[f"lin{n}.model.1.weight"][0].double() for n in range(len(linear))]
    return dict(
        name=net,
        trunk=metrics.trunk_of(metrics.LPIPS[net][0], state),
        indices=metrics.LPIPS[net][1],
        weights=weights,
    )


@pytest.mark.skipif(
    importlib.util.find_spec("lpips") is None, reason="the lpips package has the linear weights"
)
@pytest.mark.parametrize("net", LPIPS_VALUES)
def test_lpips_is_the_squared_distance_of_two_vectors(net):
    y, x = np.mgrid[0:64, 0:64] / 63
    images = [
        np.stack([np.sin(9 * x + 3 * y + a), np.cos(7 * y * x + b), np.sin(5 * x**2 + 8 * y + c)])
        for a, b, c in ((0, 0, 0), (0.7, 0.3, 0.2))
    ]
    one, other = metrics.lpips_vectors(golden_lpips(net), torch.from_numpy(np.stack(images)))
    assert (one - other).square().sum().item() == pytest.approx(LPIPS_VALUES[net], abs=1e-8)


def test_the_random_perceptual_matrix_is_symmetric_zero_for_copies_and_the_same_in_blocks():
    pixels = noise(6)
    pixels[5] = pixels[0]
    network = metrics.load_lpips("random", "cpu")
    whole = metrics.lpips_matrix(pixels, network, "cpu")
    blocks = metrics.lpips_matrix(pixels, network, "cpu", batch_size=1, memory=4 * 500_000 * 2)
    assert whole == pytest.approx(whole.T) and whole == pytest.approx(blocks, abs=1e-5)
    assert whole[0, 5] == 0 and (whole[0, 1:5] > 0.01).all()
    black = metrics.lpips_matrix(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), network, "cpu")
    assert (black == 0).all()


# ---------------------------------------------------------------- features


def test_the_inception_has_every_patch_of_the_fid_network():
    from torchvision.models import Inception3

    state = Inception3(num_classes=1008, aux_logits=False, init_weights=False).double().state_dict()
    rs = np.random.RandomState(8)
    assert len(state) == 566
    for name, value in state.items():
        if value.ndim == 4:
            drawn = rs.randn(*value.shape) * np.sqrt(2 / value[0].numel())
        elif name == "fc.weight":
            drawn = rs.randn(*value.shape) * 0.02
        else:
            drawn = np.full(value.shape, float(name.endswith(("running_var", "bn.weight"))))
        value.copy_(torch.from_numpy(np.asarray(drawn, np.float32)))
    net = metrics.fid_inception({name: value.float() for name, value in state.items()}).double()
    y, x = np.mgrid[0:128, 0:128] / 127
    image = np.stack(
        [
            0.5 + 0.5 * np.sin(9 * x + 3 * y),
            0.5 + 0.5 * np.cos(7 * y * x),
            0.5 + 0.5 * np.sin(5 * x**2 + 8 * y),
        ]
    )
    big = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None], (299, 299), mode="bilinear"
    )
    found = net(2 * big - 1)[0].numpy()
    # pytorch-fid 0.3.0's own classes in float64
    assert (found.mean(), found.std(), found[2047]) == pytest.approx(
        (0.339946443, 0.447930402, 0.007591808), abs=1e-6
    )
    assert found.argmax() == 1913


def test_an_inception_of_other_weights_serves_but_is_not_called_published(tmp_path):
    from torchvision.models import Inception3

    torch.save(
        Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict(),
        tmp_path / "own.pth",
    )
    network = metrics.load_features(str(tmp_path / "own.pth"), "cpu")
    assert not network["published"] and network["name"].startswith("inception-")
    assert metrics.extract(noise(2), network, "cpu").shape == (2, 2048)


@pytest.mark.skipif(
    importlib.util.find_spec("lpips") is None, reason="the lpips package has the linear weights"
)
def test_lpips_takes_its_trunk_from_the_cache_and_refuses_a_damaged_one(cache, monkeypatch, capsys):
    import torchvision

    cache.mkdir()
    torch.save(torchvision.models.alexnet(num_classes=2).state_dict(), cache / "new.pth")
    kind, indices, _, digest = metrics.LPIPS["alex"]
    name = f"alexnet-owt-{metrics.content_hash(cache / 'new.pth')[:8]}.pth"
    (cache / "new.pth").rename(cache / name)
    monkeypatch.setitem(metrics.LPIPS, "alex", (kind, indices, name, digest))
    found = metrics.lpips_matrix(noise(3), metrics.load_lpips("alex", "cpu"), "cpu")
    assert (found[np.triu_indices(3, 1)] > 0).all() and (found.diagonal() == 0).all()
    (cache / name).write_bytes(b"half")
    with pytest.raises(SystemExit):
        metrics.load_lpips("alex", "cpu")
    assert "is damaged or another file" in capsys.readouterr().err


def test_texture_gives_368_numbers_that_notice_blur_and_noise():
    pixels = noise(4, size=80)
    found = metrics.texture(pixels)
    assert found.shape == (4, 368) and found.isfinite().all()
    assert torch.allclose(metrics.texture(pixels[2:3]), found[2:3], atol=1e-4)
    speckled = (
        pixels + torch.randint(0, 9, pixels.shape, generator=metrics.generator(0, "speckle"))
    ).to(torch.uint8)
    assert (metrics.texture(speckled) - found).norm() > 5
    assert metrics.texture(torch.zeros(1, 3, 40, 40, dtype=torch.uint8)).isfinite().all()


def test_orthogonal_filters_are_orthogonal_and_the_same_each_time():
    state, again = metrics.orthogonal_vgg(), metrics.orthogonal_vgg()
    assert all(torch.equal(state[name], again[name]) for name in state)
    wide = state["28.weight"].flatten(1)
    assert torch.allclose(wide @ wide.T, 2 * torch.eye(512), atol=1e-4)
    first = state["0.weight"].flatten(1)
    assert torch.allclose(first.T @ first, 2 * torch.eye(27), atol=1e-4)


def test_features_come_from_the_cache_and_a_damaged_entry_is_computed_again(cache):
    calls = []

    def means(pixels):
        calls.append(len(pixels))
        return pixels.float().mean((2, 3))

    network = dict(name="means", function=means)
    pixels = noise(5)
    fresh = metrics.extract(pixels, network, "cpu", batch_size=2)
    assert calls == [2, 2, 1] and fresh.shape == (5, 3)
    assert (metrics.extract(pixels, network, "cpu") == fresh).all() and len(calls) == 3
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"x")
    files[1].write_bytes(b"")
    assert (metrics.extract(pixels, network, "cpu") == fresh).all() and calls[3:] == [2]
    pixels[0, 0, 0, 0] += 1
    assert metrics.extract(pixels, network, "cpu")[0, 0] != fresh[0, 0]


def test_the_random_network_sees_pictures_in_imagenets_units(monkeypatch):
    from torchvision.transforms.v2.functional import normalize

    monkeypatch.setattr(metrics, "orthogonal_vgg", dict)
    monkeypatch.setattr(metrics, "trunk_of", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(metrics, "taps", lambda trunk, images, indices: [images])
    seen = normalize(noise(3) / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(
        metrics.load_features("vgg-random", "cpu")["function"](noise(3)),
        torch.cat([seen.mean((2, 3)), seen.std((2, 3))], 1),
        rtol=1e-4,
        atol=1e-4,
    )


def test_features_of_another_precision_are_others_and_lie_elsewhere_in_the_cache():
    weights, pixels = torch.rand(3 * 64 * 64, 5, generator=metrics.generator(0)), noise(4)
    network = dict(name="w", function=lambda pixels: pixels.float().flatten(1) / 255 @ weights)
    full, half = (
        metrics.extract(pixels, network, "cpu", precision=name) for name in ("auto", "bf16")
    )
    assert 0 < np.abs(full - half).max() < 0.02 * full.max()
    assert full == pytest.approx(
        (pixels.double().flatten(1) / 255 @ weights.double()).numpy(), rel=1e-5
    )


def test_of_which_figures_less_is_better():
    assert {name for name, (_, lower_is_better, _) in METRICS.items() if lower_is_better} == {
        "frechet",
        "kid",
        "cmmd",
        "colour",
        "artefacts",
        "ssim_pairs",
        "lpips_nearest",
        "ms_ssim_pairs",
    }


def test_a_weight_file_that_is_missing_damaged_or_another_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "torn.pth").write_bytes(b"PK not weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, said in (
        ("inception", "no such weight file"),
        (str(tmp_path / "torn.pth"), "not a readable"),
        (str(tmp_path / "other.pth"), "not the weights of FID"),
    ):
        with pytest.raises(SystemExit) as stop:
            metrics.load_features(name, "cpu")
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and said in lines[0]


# ---------------------------------------------------------------- calibration


def test_the_joint_threshold_passes_the_promised_share_of_unseen_real_images():
    r = np.random.RandomState(0)
    passed = []
    for _ in range(200):
        common = r.randn(180, 1)
        scores = np.concatenate(
            [common + 0.7 * r.randn(180, 3), r.randn(180, 1)], 1
        )  # three correlated, one apart
        real, unseen = (
            {name: part[:, n] for n, name in enumerate("abcd")}
            for part in (scores[:80], scores[80:])
        )
        passed.append(judge(real, unseen, calibrate(real, 0.1))[0].mean())
    assert 0.88 < np.mean(passed) < 0.93  # each score cut at 0.1 alone would pass about 0.75


def test_a_bad_image_is_refused_by_the_name_of_its_worst_score():
    real = {"blur": np.arange(40.0), "noise": np.arange(40.0)}
    passes, worst = judge(
        real, {"blur": np.array([5.0, 90]), "noise": np.array([6.0, 3])}, calibrate(real, 0.05)
    )
    assert passes.tolist() == [True, False] and worst[1] == "blur"


def test_too_few_real_images_for_a_threshold_refuse_nothing():
    assert calibrate({"a": np.arange(10.0)}, 0.05) == float("inf")


def test_the_nearest_real_image_of_a_real_one_is_never_its_own_patient():
    distances = np.array([[0, 1, 5, 9], [1, 0, 6, 2], [5, 6, 0, 3], [9, 2, 3, 0.0]])
    index, found = metrics.nearest(distances, metrics.same_unit(["p", "p", "", ""]))
    assert index.tolist() == [2, 3, 3, 1] and found.tolist() == [5, 2, 3, 2]


def test_scores_rise_with_sharpness_contrast_and_colour():
    pixels = noise(3, size=64)
    sharp = pixels + torch.randint(
        0, 9, pixels.shape, generator=metrics.generator(0, "speckle")
    ).to(torch.uint8)
    flat = (pixels // 2 + 64).to(torch.uint8)
    plain = filter_script.image_scores(pixels)
    assert (filter_script.image_scores(sharp)["sharpness"] > plain["sharpness"]).all()
    assert (filter_script.image_scores(flat)["contrast"] < plain["contrast"]).all()
    grey = pixels[:, :1].expand(-1, 3, -1, -1)
    assert (metrics.colour(grey)[:, 5] == 0).all() and (metrics.colour(pixels)[:, 5] > 0.05).all()
    assert filter_script.two_sided(np.arange(101.0), np.array([0.0, 50, 100])) == pytest.approx(
        [1.349, 0, 1.349], abs=1e-3
    )


# ---------------------------------------------------------------- files, seeds, errors, the page


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with metrics.replacing(path) as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt), metrics.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.bin"]


def test_a_generator_depends_on_seed_and_key_alone():
    first = torch.rand(3, generator=metrics.generator(1, "noise", 4))
    assert torch.equal(first, torch.rand(3, generator=metrics.generator(1, "noise", 4)))
    others = [
        torch.rand(3, generator=metrics.generator(*key))
        for key in ((2, "noise", 4), (1, "order", 4), (1, "noise"))
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_a_device_that_is_not_there_is_refused(capsys):
    assert metrics.pick_device("cpu").type == "cpu"
    for name in ("cuda:99", "gpu", "mps"):
        with pytest.raises(SystemExit):
            metrics.pick_device(name)
        assert "this machine has cpu" in capsys.readouterr().err


GUARDED = """
import argparse, os, signal, sys, torch
from metrics import BadImage, run_script
def main(args):
    if args.what == "term": os.kill(os.getpid(), signal.SIGTERM)
    if args.what == "file": open("/no/such/place")
    if args.what == "image": raise BadImage("x.png", "is empty")
    if args.what == "memory": raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    if args.what == "host": raise MemoryError("Unable to allocate 745 GiB")
    if args.what == "bug": raise KeyError("bug")
run_script(main, lambda: argparse.Namespace(what=sys.argv[1], precision="fp32"))
"""


@pytest.mark.parametrize(
    "what, code, said",
    [
        ("term", 130, "interrupted"),
        ("file", 2, "error: No such file or directory: /no/such/place"),
        ("image", 2, "error: x.png: is empty"),
        ("memory", 2, "--batch-size or --precision"),
        ("host", 2, "error: the memory is full"),
        ("bug", 1, "KeyError"),
    ],
)
def test_what_a_user_did_ends_in_one_line_and_a_bug_in_a_traceback(what, code, said):
    run = subprocess.run(
        [sys.executable, "-c", GUARDED, what],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(metrics.__file__),
    )
    assert run.returncode == code and said in run.stderr
    assert (len(run.stderr.splitlines()) == 1) == (what != "bug")


def test_halves_are_random_whatever_the_order_of_the_files():
    real, _ = evaluate.half_draws(200, 50, 9, seed=0)
    for side in (1, -1):
        places = np.concatenate([np.flatnonzero(row == side) for row in real])
        assert 80 < places.mean() < 120 and len(set(places)) > 100


def test_a_page_escapes_what_it_is_told_and_needs_no_network():
    text = metrics.page(
        "<b>",
        metrics.table(["<i>"], [["<script>"]])
        + metrics.curve({"<u>": [(0, 1), (1, float("nan"))]})
        + metrics.thumbnail(Image.new("RGB", (300, 200), "red")),
    )
    assert not any(tag in text for tag in ("<script>", "<i>", "<u>", "http", 'src="/'))
    assert "&lt;script&gt;" in text and "<svg" in text and "data:image/jpeg;base64," in text


def test_the_yardsticks_range_holds_95_of_100():
    found = yardstick(np.append(50.0, np.arange(101.0)), True)
    assert [found[key] for key in ("null_low", "null", "null_high")] == pytest.approx(
        [2.5, 50, 97.5]
    )
    assert found["p_high"] == found["p_low"] == 52 / 102


def test_few_real_images_show_no_smaller_chance():
    assert (metrics.copy_limit(49), metrics.copy_limit(999)) == (0.02, 0.01)


def test_a_set_of_one_picture_again_and_again_is_worse_than_chance_by_each_figure_of_variety():
    r = np.random.RandomState(0)
    real, fake = r.randn(30, 40), r.randn(1, 40) + 0.1 * r.randn(30, 40)
    joint = evaluate.joint_matrices(real, fake, True)
    distance = np.sqrt(joint["distance"])
    joint |= {"ssim": np.exp(-distance), "ms_ssim": np.exp(-distance), "lpips": distance}
    draws = evaluate.permutation_draws(30, 30, 99, 0)
    for name in ("vendi", "recall", "coverage", "ssim_pairs", "ms_ssim_pairs", "lpips_pairs"):
        assert yardstick(METRICS[name][0](joint, draws), METRICS[name][1])["p_high"] <= 0.02, name


@pytest.mark.parametrize("module", ["metrics", "lora"])
def test_a_file_is_on_the_disk_before_it_takes_its_name(module, tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    with __import__(module).replacing(tmp_path / "a") as file:
        file.write(b"x")
    assert done == ["fsync", "replace"]
