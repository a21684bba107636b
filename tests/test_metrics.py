"""Numbers against values from outside: published packages run once and closed forms."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2.functional import center_crop, normalize

import metrics
import phantoms
from metrics import Network, frechet, kid, squared_distances

A = np.random.RandomState(0)
REAL = A.randn(60, 16)
FAKE = 1.1 * A.randn(50, 16) + 0.2
LPIPS_PACKAGE = importlib.util.find_spec("lpips")
needs_lpips = pytest.mark.skipif(
    LPIPS_PACKAGE is None, reason="the lpips package has the linear weights"
)
if LPIPS_PACKAGE:
    PACKAGED_LAYERS = Path(LPIPS_PACKAGE.origin).parent / "weights" / "v0.1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def noise(count, size=64, seed=0, spread=0.2):
    """Smooth random uint8 pictures (count, 3, size, size)."""
    rough = torch.randn(count, 3, 8, 8, generator=metrics.generator(seed, "test"))
    smooth = torch.nn.functional.interpolate(rough, (size, size), mode="bicubic")
    return (smooth * spread + 0.5).clamp(0, 1).mul(255).to(torch.uint8)


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def change_each(pixels, change):
    """uint8 (N, 3, H, W) after change(number, PIL image)."""
    changed = []
    for n, image in enumerate(pixels):
        values = np.array(change(n, metrics.picture(image)))
        changed.append(torch.from_numpy(values).permute(2, 0, 1))
    return torch.stack(changed)


def standardised_frechet(first, second):
    """The Fréchet distance in units of the spread of both sets."""
    spread = np.concatenate([first, second]).std(0) + 1e-9
    return frechet(first / spread, second / spread)


# ---------------------------------------------------------------- set against set


def test_frechet_agrees_with_pytorch_fid_and_with_the_closed_form():
    line = frechet(np.array([[0.0], [1], [2], [3]]), np.array([[1.0], [3], [5], [7]]))
    assert line == pytest.approx(6.25 + 5 / 3, rel=1e-12)
    # pytorch-fid 0.3.0, torch-fidelity 0.4.0
    assert frechet(REAL, FAKE) == pytest.approx(4.648399843789, rel=1e-10)


def test_frechet_is_exact_where_there_are_fewer_images_than_features():
    r = np.random.RandomState(1)
    few = r.randn(30, 64)
    fewer = r.randn(25, 64) * 1.2 + 0.1
    assert frechet(few, fewer) == pytest.approx(81.927118320674, rel=1e-11)
    # pytorch-fid 0.3.0, through sqrtm
    assert frechet(few, fewer) == pytest.approx(81.927116573, rel=1e-6)


def test_frechet_of_a_set_without_spread_in_a_direction_is_that_of_the_others():
    flat_real = np.concatenate([REAL, np.zeros((60, 1))], 1)
    flat_fake = np.concatenate([FAKE, np.zeros((50, 1))], 1)
    assert frechet(flat_real, flat_fake) == pytest.approx(frechet(REAL, FAKE), rel=1e-10)


def test_frechet_of_a_set_with_itself_is_zero_and_shifts_and_turns_do_not_move_it():
    turn = np.linalg.qr(np.random.RandomState(3).randn(16, 16))[0]
    turned = frechet(REAL[::-1] @ turn + 5, FAKE @ turn + 5)
    assert frechet(REAL, REAL) < 1e-9
    assert turned == pytest.approx(frechet(REAL, FAKE), rel=1e-9)


def test_kid_and_its_jackknife_error_have_the_reference_values():
    value, error = kid(REAL, FAKE)
    assert value == pytest.approx(0.270729429815, rel=1e-10)
    assert error == pytest.approx(0.120100621680, rel=1e-10)
    # torch-fidelity, torchmetrics
    assert kid(REAL[:50], FAKE)[0] == pytest.approx(0.298755094560, rel=1e-10)


def test_the_jackknife_from_row_sums_is_the_jackknife_by_leaving_each_image_out():
    real = REAL[:12]
    fake = FAKE[:9]
    without_real = [kid(np.delete(real, n, 0), fake)[0] for n in range(12)]
    without_fake = [kid(real, np.delete(fake, n, 0))[0] for n in range(9)]
    slow = 11 * np.var(without_real) + 8 * np.var(without_fake)
    assert kid(real, fake)[1] == pytest.approx(slow**0.5, rel=1e-9)


def precision_recall(first, second, k):
    """The four figures of two sets."""
    both = np.concatenate([first, second])
    distances = squared_distances(both, both)
    draw = np.repeat(np.array([1, -1], np.int8), (len(first), len(second)))
    return metrics.precision_recall(distances, distances.argsort(1), draw, k)


@pytest.mark.parametrize(
    "k, expected", [(3, (0.7, 0.7833333333333, 0.68, 0.75)), (5, (0.78, 0.9, 0.716, 0.9))]
)
def test_precision_recall_density_and_coverage_agree_with_prdc(k, expected):
    assert precision_recall(REAL, FAKE, k) == pytest.approx(expected, abs=1e-12)  # prdc 0.2


@pytest.mark.parametrize("n, m, spread", [(3, 4, 1), (200, 9, 1), (9, 200, 1), (60, 50, 0.01)])
def test_precision_and_the_others_of_tiny_unequal_narrow_and_coinciding_sets(n, m, spread):
    r = np.random.RandomState(0)
    real = r.randint(3, size=(n, 2))  # many of them at one place
    fake = spread * r.randn(m, 2) + 1
    cross = squared_distances(real, fake)
    radii = []
    for points in (real, fake):
        own = np.sort(squared_distances(points, points), 1)
        radii.append(own[:, min(3, len(points) - 1)])
    in_real = cross <= radii[0][:, None]
    in_fake = cross <= radii[1]
    expected = [in_real.any(0).mean(), in_fake.any(1).mean()]
    expected += [in_real.sum() / (3 * m), in_real.any(1).mean()]
    assert precision_recall(real, fake, 3) == pytest.approx(expected, abs=1e-12)


def test_equal_rows_are_at_distance_zero_whatever_rounding_leaves():
    far = REAL + 1000
    distances = squared_distances(far, far[::-1])
    assert (distances[:, ::-1].diagonal() == 0).all()
    expected = np.square(REAL[0] - REAL[2]).sum()
    assert distances[0, -3] == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- descriptors


def test_texture_gives_368_numbers_that_notice_blur_and_noise():
    pixels = noise(4, size=80)
    speckle = torch.randint(0, 9, pixels.shape, generator=metrics.generator(0, "speckle"))
    vectors = metrics.texture(pixels)
    assert vectors.shape == (4, 368)
    assert vectors.isfinite().all()
    # another batch size is another order of sums in fp32: 1e-4 of logs that reach -7
    assert torch.allclose(metrics.texture(pixels[2:3]), vectors[2:3], atol=1e-4)
    assert (metrics.texture((pixels + speckle).to(torch.uint8)) - vectors).norm() > 5
    assert metrics.texture(torch.zeros(1, 3, 40, 40, dtype=torch.uint8)).isfinite().all()


def test_colour_moves_with_a_shift_and_with_jpegs_coarse_chroma():
    pixels = noise(80)
    real = metrics.colour(pixels[:40])
    distances = [standardised_frechet(real, metrics.colour(pixels[40:]))]
    for shift in (4, 12, 40):
        shifted = pixels[40:].float() + torch.tensor([shift, 0.0, -shift])[:, None, None]
        shifted = metrics.colour(shifted.clamp(0, 255).byte())
        distances.append(standardised_frechet(real, shifted))
    compressed = metrics.colour(change_each(pixels[40:], lambda _, image: jpeg(image, 70)))
    assert distances == sorted(distances)
    assert distances[-1] > 3 * distances[0]
    assert standardised_frechet(real, compressed) > 3 * distances[0]


def test_grey_pictures_have_no_colour_and_coloured_ones_have():
    pixels = noise(3)
    grey = metrics.colour(pixels[:, :1].expand(-1, 3, -1, -1))
    assert (grey[:, :6] == 0).all()
    assert grey[:, 6:] == pytest.approx(np.log(1e-3), rel=1e-5)
    assert (metrics.colour(pixels)[:, 5] > 0.05).all()


SHARPNESS, CONTRAST, NOISE, SIGNAL, OVER_STEPS, DOWN, ACROSS = range(7)


def grainy(count, seed=0):
    """PIL pictures of 96 pixels with grain of two grey levels."""
    rough = torch.randn(count, 1, 96, 96, generator=metrics.generator(seed, "grain"))
    pixels = noise(count, 96, seed).float() + 2 * rough
    return [metrics.picture(image) for image in pixels.clamp(0, 255).byte()]


def blurred(image, size):
    return image.filter(ImageFilter.GaussianBlur(size))


def noisy(image, sd):
    draw = np.random.RandomState(0)
    values = np.asarray(image) + sd * draw.randn(image.height, image.width, 1)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "change, strengths", [(jpeg, (80, 50, 20)), (blurred, (0.6, 1, 2)), (noisy, (2, 5, 15))]
)
def test_jpeg_blur_and_noise_show_in_the_grain_of_stored_pictures(change, strengths):
    real = np.array([metrics.stored_grain(image) for image in grainy(30)])
    other = grainy(30, seed=1)
    distances = [standardised_frechet(real, np.array(list(map(metrics.stored_grain, other))))]
    for strength in strengths:
        changed = [metrics.stored_grain(change(image, strength)) for image in other]
        distances.append(standardised_frechet(real, np.array(changed)))
    assert distances == sorted(distances)
    assert distances[1] > 5 * distances[0]


def test_the_measures_of_grain_move_the_way_their_names_say():
    image = grainy(1)[0]
    plain = metrics.stored_grain(image)
    blocky = metrics.stored_grain(jpeg(image, 20))
    smooth = metrics.stored_grain(blurred(image, 1))
    rough = metrics.stored_grain(noisy(image, 5))
    flat = metrics.stored_grain(image.point(lambda value: value // 2 + 64))
    assert blocky[DOWN] > plain[DOWN] + 0.3
    assert blocky[ACROSS] > plain[ACROSS] + 0.3
    assert smooth[SHARPNESS] < plain[SHARPNESS] < rough[SHARPNESS]
    assert smooth[NOISE] < plain[NOISE] < rough[NOISE]
    assert smooth[SIGNAL] > plain[SIGNAL] > rough[SIGNAL]
    assert smooth[OVER_STEPS] < plain[OVER_STEPS] < rough[OVER_STEPS]
    assert flat[CONTRAST] < plain[CONTRAST] - 0.5


def test_the_noise_of_grain_is_its_standard_deviation():
    r = np.random.RandomState(0)
    values = (128 + 10 * r.randn(256, 256)).round().clip(0, 255).astype(np.uint8)
    noise_level = np.exp(metrics.stored_grain(Image.fromarray(values))[NOISE])
    assert noise_level == pytest.approx(10, rel=0.03)


def test_grain_of_parts_is_grain_of_all_and_the_smallest_pictures_have_numbers():
    pixels = noise(20)
    singly = np.concatenate([metrics.grain(image[None]) for image in pixels])
    # fp32 sums in another order: 1e-4 of logs
    assert metrics.grain(pixels) == pytest.approx(singly, abs=1e-4)
    assert metrics.grain(pixels).dtype == np.float64
    expected = [np.log(0.1)] * 3 + [0] * 8
    for size in ((1, 1), (9, 3), (600, 20)):
        assert metrics.stored_grain(Image.new("RGB", size)) == pytest.approx(expected, abs=1e-5)


def test_stored_grain_keeps_to_jpegs_grid_in_the_middle_of_a_large_picture():
    r = np.random.RandomState(0)
    values = np.kron(r.randint(0, 255, (100, 100)), np.ones((8, 8))).astype(np.uint8)
    measures = metrics.stored_grain(Image.fromarray(values[:, :-5]))
    assert measures[DOWN] > 1.5
    assert measures[ACROSS] > 1.5


# ---------------------------------------------------------------- the reference packages


def test_frechet_is_pytorch_fids():
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    real = REAL.mean(0), np.cov(REAL, rowvar=False)
    fake = FAKE.mean(0), np.cov(FAKE, rowvar=False)
    try:
        theirs = fid_score.calculate_frechet_distance(*real, *fake)
    except TypeError:
        pytest.skip("this pytorch-fid does not run on this scipy")
    assert frechet(REAL, FAKE) == pytest.approx(theirs, rel=1e-10)


def test_kid_is_torch_fidelitys():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    real = REAL[:50]
    pairs = ((real, real), (real, FAKE), (FAKE, FAKE))
    theirs = metric_kid.mmd2(*[(x @ y.T / 16 + 1) ** 3 for x, y in pairs])
    assert kid(real, FAKE)[0] == pytest.approx(theirs, rel=1e-10)


def test_precision_recall_density_and_coverage_are_prdcs():
    theirs = pytest.importorskip("prdc").compute_prdc(REAL, FAKE, 5)
    expected = [theirs[name] for name in ("precision", "recall", "density", "coverage")]
    assert precision_recall(REAL, FAKE, 5) == pytest.approx(expected, abs=1e-12)


def test_kid_is_torchmetrics():
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    theirs = poly_mmd(torch.from_numpy(REAL[:50]), torch.from_numpy(FAKE)).item()
    assert kid(REAL[:50], FAKE)[0] == pytest.approx(theirs, rel=1e-10)


def test_the_clean_resize_is_clean_fids():
    cleanfid = pytest.importorskip("cleanfid.resize")
    resize = cleanfid.make_resizer("PIL", False, "bicubic", (299, 299))
    pixels = noise(2, size=96)
    ours = metrics.clean_resize(pixels, 299).permute(0, 2, 3, 1).numpy()
    theirs = [resize(image.permute(1, 2, 0).numpy()) for image in pixels]
    assert np.abs(ours - theirs).max() < 2e-3  # Pillow's weights are fp64, torch's fp32


def test_ssim_agrees_with_scikit_image():
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    how = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
    first = noise(5)
    second = noise(7, seed=1)
    theirs = np.empty((5, 7))
    for i, a in enumerate(metrics.to_grey(first)[:, 0].double().numpy()):
        for j, b in enumerate(metrics.to_grey(second)[:, 0].double().numpy()):
            theirs[i, j] = structural_similarity(a, b, **how)
    # the matrix is of fp32 products
    assert metrics.ssim_matrix(first, second) == pytest.approx(theirs, abs=2e-5)


def test_ssim_of_a_set_with_itself_is_symmetric_and_that_of_two_equal_sets():
    pixels = noise(9, size=64)
    alone = metrics.ssim_matrix(pixels, pixels, height=4)
    assert (alone == alone.T).all()
    assert alone == pytest.approx(metrics.ssim_matrix(pixels, pixels.clone()), abs=1e-6)


def lpips_network(net, trunk_state, weights):
    """LPIPS on a trunk of these weights, with these weights of its layers' channels."""
    kind, layers, _ = metrics.LPIPS[net]
    trunk = metrics.trunk_of(kind, trunk_state)

    def function(pixels):
        return metrics.lpips_vectors(pixels / 127.5 - 1, trunk, layers, weights)

    return Network(net, function)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_agrees_with_the_lpips_package_on_the_same_random_trunk(net):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    trunk = {}
    for name, value in theirs.net.state_dict().items():
        trunk["features." + name.split(".", 1)[1]] = value
    state = theirs.state_dict()
    count = len(metrics.LPIPS[net][1])
    network = lpips_network(net, trunk, [state[f"lin{n}.model.1.weight"][0] for n in range(count)])
    pixels = noise(3)
    images = pixels / 127.5 - 1
    with torch.no_grad():
        expected = [theirs(images[:1], images[n : n + 1]).item() for n in (1, 2)]
    ours = metrics.lpips_matrix(pixels, network, "cpu")
    # |a|^2 + |b|^2 - 2ab in fp32: 2e-5 where |a|^2 is about 1
    assert ours[0, 1:] == pytest.approx(expected, abs=2e-5)


# ---------------------------------------------------------------- vision models of transformers


def tiny_dinov2(folder, **how):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56)
    model = Dinov2Model(config).eval()
    model.save_pretrained(folder)
    BitImageProcessor(**how).save_pretrained(folder)
    return model


def resized(pixels, side):
    """Pictures as Pillow resizes them, bicubic, as dgm-eval's DINOv2 encoder does: 0 to 1."""
    parts = []
    for image in pixels:
        picture = metrics.picture(image).resize((side, side), Image.Resampling.BICUBIC)
        parts.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    return torch.stack(parts)


def class_token(model, images):
    with torch.no_grad():
        return model(pixel_values=images).last_hidden_state[:, 0].numpy()


def test_dinov2_gives_what_dgm_eval_defines(tmp_path):
    """Straight to a square, ImageNet's mean and spread, the class token after the last norm."""
    scale = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    how = dict(do_center_crop=False, image_mean=scale[0], image_std=scale[1])
    model = tiny_dinov2(tmp_path, size={"height": 56, "width": 56}, **how)
    pixels = noise(3, size=100)[:, :, :80]
    vectors = metrics.extract(pixels, metrics.load_features(str(tmp_path), "cpu"), "cpu")
    expected = class_token(model, normalize(resized(pixels, 56), *scale))
    assert vectors == pytest.approx(expected, abs=1e-5)


def test_a_vision_model_sees_images_as_its_own_processor_makes_them(tmp_path):
    scale = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]
    how = dict(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    model = tiny_dinov2(tmp_path, image_mean=scale[0], image_std=scale[1], **how)
    pixels = noise(2, size=100)
    network = metrics.load_features(str(tmp_path), "cpu")
    vectors = metrics.extract(pixels, network, "cpu")
    images = center_crop(resized(pixels, 64), [56, 56])
    assert vectors == pytest.approx(class_token(model, normalize(images, *scale)), abs=1e-5)
    assert network.name.startswith("dinov2-")
    assert not network.published


def test_other_weights_or_another_preparation_are_another_network_in_the_cache(tmp_path):
    import json

    model = tiny_dinov2(tmp_path / "a")
    model.layernorm.bias.data += 1
    model.save_pretrained(tmp_path)
    names = {metrics.load_features(str(tmp_path / "a"), "cpu").name}
    metrics.copy_file(
        tmp_path / "a/preprocessor_config.json", tmp_path / "preprocessor_config.json"
    )
    names.add(metrics.load_features(str(tmp_path), "cpu").name)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"image_mean": [0.1, 0.1, 0.1]}
    file.write_text(json.dumps(settings))
    names.add(metrics.load_features(str(tmp_path), "cpu").name)
    assert len(names) == 3


LAYERS = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
SMALL = dict(LAYERS, hidden_size=16, image_size=32, patch_size=16)


def saved_model(name, folder, config):
    """A model of transformers of random weights and a processor, in a folder."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=side).save_pretrained(folder)
    return model


def embedding_of(folder, model, pool):
    """What load_features gives for random pictures, and what pool gives of the model's output."""
    pixels = noise(2, size=32)
    network = metrics.load_features(str(folder), "cpu")
    vectors = metrics.extract(pixels, network, "cpu")
    assert metrics.load_features(str(folder), "cpu").name == network.name  # nothing is random
    with torch.no_grad():
        return vectors, pool(model, pixels / 127.5 - 1).flatten(1).numpy()


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_clip_and_siglip_give_their_image_embedding(kind, tmp_path):
    import transformers

    size = dict(LAYERS, hidden_size=16, projection_dim=8)
    parts = {"text_config": dict(size, vocab_size=10), "vision_config": dict(SMALL)}
    if kind == "CLIP":
        parts |= {"projection_dim": 8}
    config = getattr(transformers, f"{kind}Config")(**parts)
    model = saved_model(f"{kind}Model", tmp_path, config)

    def pool(model, images):
        pooled = model.vision_model(pixel_values=images).pooler_output
        return model.visual_projection(pooled) if kind == "CLIP" else pooled

    vectors, expected = embedding_of(tmp_path, model, pool)
    assert vectors == pytest.approx(expected, abs=1e-5)


def test_masked_autoencoders_give_the_mean_of_all_patches(tmp_path):
    from transformers import ViTMAEConfig

    model = saved_model("ViTMAEModel", tmp_path, ViTMAEConfig(**SMALL, mask_ratio=0.75))

    def pool(model, images):
        model.config.mask_ratio = 0.0
        in_order = torch.arange(4.0).expand(2, 4)
        return model(images, noise=in_order).last_hidden_state[:, 1:].mean(1)

    vectors, expected = embedding_of(tmp_path, model, pool)
    assert vectors == pytest.approx(expected, abs=1e-5)


def test_a_file_without_the_pooler_gives_the_class_token_and_one_with_it_the_pooler(tmp_path):
    from transformers import ViTConfig, ViTModel

    whole = saved_model("ViTModel", tmp_path / "whole", ViTConfig(**SMALL))
    vectors, expected = embedding_of(tmp_path / "whole", whole, lambda net, x: net(x).pooler_output)
    assert vectors == pytest.approx(expected, abs=1e-5)
    bare = ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).eval()
    (tmp_path / "whole").rename(tmp_path / "bare")
    bare.save_pretrained(tmp_path / "bare")
    vectors, expected = embedding_of(
        tmp_path / "bare", bare, lambda net, x: net(x).last_hidden_state[:, 0]
    )
    assert vectors == pytest.approx(expected, abs=1e-5)


def test_maps_without_a_pooler_give_their_mean(tmp_path):
    from transformers import SegformerConfig

    config = SegformerConfig(hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, decoder_hidden_size=8)
    model = saved_model("SegformerModel", tmp_path, config)
    vectors, expected = embedding_of(
        tmp_path, model, lambda net, x: net(x).last_hidden_state.mean((2, 3))
    )
    assert vectors == pytest.approx(expected, abs=1e-5)


def test_convolutional_and_windowed_networks_give_what_they_pool(tmp_path):
    from transformers import ResNetConfig, SwinConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    resnet = saved_model("ResNetModel", tmp_path / "resnet", config)
    config = SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    swin = saved_model("SwinModel", tmp_path / "swin", config)
    for folder, model in (("resnet", resnet), ("swin", swin)):
        vectors, expected = embedding_of(
            tmp_path / folder, model, lambda net, x: net(x).pooler_output
        )
        assert vectors.shape == (2, 16)
        assert vectors == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- weights, downloaded once

CONTENT = bytes(range(256)) * 400


class Answers(BaseHTTPRequestHandler):
    """Serves CONTENT under any name, in the server's manner."""

    def do_GET(self):
        self.server.asked.append(self.path)
        manner = self.server.manner.get(self.path, self.server.manner.get("all"))
        if manner == "silent":
            self.server.closing.wait(20)
        elif manner == "not found":
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            with contextlib.suppress(OSError):  # wait_for asks for no more than the header
                self.wfile.write(CONTENT[: len(CONTENT) // 2])
                if manner == "stalls":
                    self.server.closing.wait(20)
                elif manner != "breaks":
                    self.wfile.write(CONTENT[len(CONTENT) // 2 :])

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server on the loopback that has every file of WEIGHTS, each the same small one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.manner = {}
    server.asked = []
    server.closing = threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    folder = f"http://127.0.0.1:{server.server_port}/"
    entry = (folder, hashlib.sha256(CONTENT).hexdigest(), 0.1, "MIT")
    monkeypatch.setattr(metrics, "WEIGHTS", dict.fromkeys(metrics.WEIGHTS, entry))
    monkeypatch.setattr(metrics, "PROBLEMS", [])
    monkeypatch.setattr(metrics, "PATIENCE", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    socket.setdefaulttimeout(None)


def test_weights_are_downloaded_once_and_named_with_their_size_and_licence(web, cache, capsys):
    path = metrics.get_weights("vgg.pth")
    said = capsys.readouterr().err
    count = len(web.asked)
    assert path == cache / "vgg.pth"
    assert path.read_bytes() == CONTENT
    assert "/vgg.pth: 0.1 MB, licence MIT" in said
    assert metrics.get_weights("vgg.pth") == path
    assert len(web.asked) == count
    path.write_bytes(b"damaged")
    assert metrics.get_weights("vgg.pth").read_bytes() == CONTENT


def test_weights_in_the_cache_of_torch_are_taken_from_there(web, tmp_path):
    place = tmp_path / "torch" / "hub" / "checkpoints" / "alex.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert metrics.get_weights("alex.pth") == place
    assert web.asked == []


@pytest.mark.parametrize(
    ("manner", "said"),
    [("not found", "404"), ("breaks", "hash"), ("silent", "no answer"), ("stalls", "timed out")],
)
def test_a_download_that_fails_leaves_nothing_and_says_what_to_put_where(
    manner, said, web, cache, capsys
):
    web.manner["all"] = manner
    with pytest.raises(SystemExit) as stop:
        metrics.need_weights("alex.pth", "--lpips alex")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert line.startswith("error: --lpips alex: needs alex.pth")
    assert said in line
    url = f"{metrics.WEIGHTS['alex.pth'][0]}alex.pth"
    assert f"download {url} on another machine and copy it into {cache}" in line
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_a_file_of_another_sha_256_is_not_kept(web, cache, monkeypatch):
    folder, *rest = metrics.WEIGHTS["alex.pth"]
    monkeypatch.setitem(metrics.WEIGHTS, "alex.pth", (folder, "0" * 64, *rest[1:]))
    assert metrics.get_weights("alex.pth") is None
    assert "invalid hash" in str(metrics.PROBLEMS)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("manner", ["silent", "stalls"])
def test_a_network_that_hangs_is_waited_for_once(manner, web):
    web.manner["all"] = manner
    assert metrics.get_weights("alex.pth") is None
    count = len(web.asked)
    assert metrics.get_weights("vgg.pth") is None
    with pytest.raises(TimeoutError):
        metrics.wait_for("http://127.0.0.1:1/")
    assert len(web.asked) == count


def test_a_silent_name_server_is_waited_for_no_longer(web, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: web.closing.wait(20))
    assert metrics.get_weights("alex.pth") is None
    assert "no answer" in str(metrics.PROBLEMS[0])


def test_no_server_and_no_network_cost_nothing(web, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        entry = (f"http://127.0.0.1:{taken.getsockname()[1]}/", "", 1, "MIT")
        monkeypatch.setitem(metrics.WEIGHTS, "alex.pth", entry)
        assert metrics.get_weights("alex.pth") is None
    assert "refused" in str(metrics.PROBLEMS[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert metrics.get_weights("vgg.pth") is None
    assert "HF_HUB_OFFLINE" in str(metrics.PROBLEMS[1])
    assert web.asked == []


def test_processes_may_download_the_same_file_at_once(web, cache):
    with ThreadPool(4) as pool:
        paths = pool.map(metrics.get_weights, ["alex.pth"] * 4)
    assert paths == [cache / "alex.pth"] * 4
    assert [path.name for path in cache.iterdir()] == ["alex.pth"]
    assert paths[0].read_bytes() == CONTENT


def test_auto_is_the_published_network_and_one_line_says_where_it_is_not(web, capsys):
    assert metrics.resolve_auto("texture", "none") == ("texture", "none")
    assert web.asked == []
    web.manner["/alex.pth"] = "not found"
    assert metrics.resolve_auto("auto", "auto") == ("inception", "none")
    said = [line for line in capsys.readouterr().err.splitlines() if "evaluate.py" in line]
    assert len(said) == 1
    assert "LPIPS none" in said[0]
    del web.manner["/alex.pth"]
    metrics.PROBLEMS.clear()
    assert metrics.resolve_auto("auto", "auto") == ("inception", "alex")
    assert "evaluate.py" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("manner", "offline"), [("silent", True), ("not found", False), ("", False)]
)
def test_the_hub_is_asked_only_where_it_answers(manner, offline, web, monkeypatch):
    asked = {}
    web.manner["all"] = manner
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", metrics.WEIGHTS["alex.pth"][0])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **how: asked.update(how))
    metrics.from_hub("owner/name", "*.json")
    assert asked["local_files_only"] == offline


# ---------------------------------------------------------------- copies


@functools.cache
def wound(seed, size=96):
    return phantoms.draw("inflammatory ulcer", seed, size)[0]


def wounds(seeds):
    pictures = [wound(seed) for seed in seeds]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def finder():
    return finder_of(wounds(range(24)))


def finder_of(pictures, groups=None, labels=None, most=2000):
    """The CopyFinder of pictures (N, 3, S, S), by default of no group and no label."""
    rows = []
    for n in range(len(pictures)):
        row = metrics.Row("", str(n))
        row.group = groups[n] if groups else ""
        row.label = labels[n] if labels else ""
        rows.append(row)
    return metrics.CopyFinder(rows, pictures, most)


def shifted(image):
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 9, 0, 1, -9))


def cropped(image):
    return image.crop((8, 18, 80, 90)).resize(image.size)


CHANGES = {
    "as it is": lambda image: image,
    "mirrored": ImageOps.mirror,
    "mirrored, turned by 180°": ImageOps.flip,
    "turned by 90°": lambda image: image.rotate(90),
    "turned by 12°": lambda image: image.rotate(-12, Image.Resampling.BICUBIC),
    "cropped": cropped,
    "zoomed out": lambda image: ImageOps.expand(image, 16, "white").resize(image.size),
    "negative": ImageOps.invert,
    "re-saved": lambda image: jpeg(image, 30),
    "shifted": shifted,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
    "darker": lambda image: image.point([round(255 * (v / 255) ** 2) for v in range(256)] * 3),
    "mirrored, turned by 90°, cropped": lambda image: cropped(ImageOps.mirror(image.rotate(90))),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_copy_is_found_whatever_was_done_to_it(finder, kind):
    copies = change_each(wounds(range(5, 12)), lambda _, image: CHANGES[kind](image))
    index, _, kinds, is_copy = finder.find(copies)
    assert (index == range(5, 12)).all()
    assert is_copy.sum() >= 6
    if kind in ("re-saved", "shifted", "blurred", "darker"):
        kind = "as it is"
    assert kinds.count(kind) >= 4


def test_fresh_pictures_are_no_copies(finder):
    assert not finder.find(wounds(range(1000, 1012)))[3].any()
    assert (finder.usual < finder.limits.min()).all()
    assert len(finder.usual) >= 23


def test_where_all_pictures_are_alike_copies_must_agree_better():
    one = wounds([0])
    noisy = one.repeat(8, 1, 1, 1) + torch.randint(0, 9, (8, *one.shape[1:])).byte()
    pictures = torch.cat([noisy, wounds(range(8))])
    finder = finder_of(pictures, labels=["alike"] * 8 + ["wound"] * 8)
    assert (finder.limits == [0.9] * 8 + [metrics.SAME_PICTURE] * 8).all()
    finder = finder_of(noisy, ["patient"] * 8)
    assert (finder.limits == metrics.SAME_PICTURE).all()


def test_real_pictures_of_one_patient_or_photograph_are_one_unit():
    pictures = wounds([*range(6), 0, 1, 2, 2, 2, 2])
    crops = change_each(pictures[6:8], lambda _, image: cropped(image))
    finder = finder_of(torch.cat([pictures[:6], crops, pictures[8:]]), [*"aabc"] + [""] * 8)
    assert (
        finder.picture_of[[6, 7, 8, 9, 10, 11]].tolist()
        == finder.picture_of[[0, 1, 2, 2, 2, 2]].tolist()
    )
    assert len(set(finder.picture_of)) == 6
    assert finder.unit_of[0] == finder.unit_of[1]
    assert finder.first.tolist() == [0, 2, 3, 4, 5]
    fresh = finder_of(pictures[[1, 3, 4, 5]]).find(pictures[[2]])[1]
    assert len(finder.usual) == 5
    assert finder.usual.max() < finder.limits[0]  # with another unit, though three are the same
    assert finder.usual[1] >= fresh - 1e-6


def test_of_many_real_pictures_only_some_are_sought_among_the_others():
    finder = finder_of(wounds([*range(7), 2]), most=3)
    assert finder.first.tolist() == [0, 3, 6]
    assert len(finder.usual) == 3
    assert finder.find(wounds([5]))[0] == [5]


def test_flat_pictures_are_no_copies_of_anything(finder):
    flat = torch.full((2, 3, 64, 64), 90, dtype=torch.uint8)
    assert (finder.find(flat)[1] == 0).all()
    assert (finder_of(flat).find(wounds([0]))[1] == 0).all()


def test_the_nearest_real_image_of_a_real_one_is_never_its_own_patient():
    distances = np.array([[0, 1, 5, 9], [1, 0, 6, 2], [5, 6, 0, 3], [9, 2, 3, 0.0]])
    index, distance = metrics.nearest(distances, metrics.same_unit(["p", "p", "", ""]))
    assert index.tolist() == [2, 3, 3, 1]
    assert distance.tolist() == [5, 2, 3, 2]


# ---------------------------------------------------------------- image against image


def test_ssim_has_scikit_images_values_and_the_closed_form_on_flat_images():
    r = np.random.RandomState(3)
    noisy_a = r.rand(64, 64)
    noisy_b = np.clip(noisy_a + 0.1 * r.randn(64, 64), 0, 1)
    y, x = np.mgrid[0:64, 0:64] / 63
    wave_a = 0.5 + 0.5 * np.sin(6 * x + 4 * y**2)
    wave_b = 0.5 + 0.5 * np.sin(6 * x + 4 * y**2 + 0.5)
    flat_a = np.full((64, 64), 0.4)
    flat_b = np.full((64, 64), 0.6)
    first = grey_pixels(noisy_a, wave_a, flat_a)
    second = grey_pixels(noisy_b, wave_b, flat_b)
    closed_form = (2 * 0.24 + 1e-4) / (0.52 + 1e-4)
    expected = [0.945086721714, 0.569492946633, closed_form]  # scikit-image 0.26, gaussian weights
    assert metrics.ssim_matrix(first, second).diagonal() == pytest.approx(expected, abs=2e-5)
    larger = first.repeat_interleave(3, 2).repeat_interleave(3, 3)  # of the same 64 pixels
    assert metrics.ssim_matrix(larger, second).diagonal() == pytest.approx(expected, abs=2e-5)


def grey_pixels(*pictures):
    """Pictures of numbers from 0 to 1 as uint8 pixels (N, 3, H, W)."""
    pixels = np.rint(255 * np.stack(pictures)).astype(np.uint8)
    return torch.from_numpy(pixels)[:, None].repeat(1, 3, 1, 1)


LPIPS_VALUES = {
    "alex": 0.027844432555,
    "vgg": 0.048296213661,
    "squeeze": 0.030263287327,
}  # lpips 0.1.4, float64


@needs_lpips
@pytest.mark.parametrize("net", LPIPS_VALUES)
def test_lpips_is_the_squared_distance_of_two_vectors(net):
    """On the trunk of research notes: seeded float64 weights, packaged linear layers."""
    kind, layers, (_, file) = metrics.LPIPS[net]
    rs = np.random.RandomState(7)
    with torch.device("meta"):
        shapes = getattr(torchvision.models, kind)().features.state_dict(prefix="features.")
    state = {}
    for name, value in shapes.items():
        state[name] = torch.zeros(value.shape, dtype=torch.float64)
        if value.ndim == 4:
            drawn = rs.randn(*value.shape) * np.sqrt(2 / value[0].numel())
            state[name] = torch.from_numpy(drawn)
    linear = metrics.load_weights(PACKAGED_LAYERS / file)
    assert metrics.content_hash(PACKAGED_LAYERS / file) == metrics.WEIGHTS[file][1]
    weights = [linear[f"lin{n}.model.1.weight"][0].double() for n in range(len(linear))]
    y, x = np.mgrid[0:64, 0:64] / 63
    images = []
    for a, b, c in ((0, 0, 0), (0.7, 0.3, 0.2)):
        waves = [np.sin(9 * x + 3 * y + a), np.cos(7 * y * x + b), np.sin(5 * x**2 + 8 * y + c)]
        images.append(np.stack(waves))
    images = torch.from_numpy(np.stack(images))
    one, other = metrics.lpips_vectors(images, metrics.trunk_of(kind, state), layers, weights)
    assert (one - other).square().sum().item() == pytest.approx(LPIPS_VALUES[net], abs=1e-8)


def test_the_lpips_matrix_is_symmetric_zero_for_copies_and_the_same_in_blocks():
    torch.manual_seed(0)
    state = torchvision.models.alexnet().state_dict()
    channels = (64, 192, 384, 256, 256)
    network = lpips_network("alex", state, [torch.full((n, 1, 1), 0.2) for n in channels])
    pixels = noise(6)
    pixels[5] = pixels[0]
    whole = metrics.lpips_matrix(pixels, network, "cpu")
    blocks = metrics.lpips_matrix(pixels, network, "cpu", batch_size=1, memory=4 * 70_000 * 2)
    cross = metrics.lpips_matrix(pixels[:2], network, "cpu", others=pixels)
    black = metrics.lpips_matrix(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), network, "cpu")
    assert (whole == whole.T).all()  # by construction, on any machine
    assert (blocks == blocks.T).all()
    # |a|^2 + |b|^2 - 2ab in fp32, batches of other sizes: 1e-5 where |a|^2 is about 1
    assert whole == pytest.approx(blocks, abs=1e-5)
    assert whole[:2] == pytest.approx(cross, abs=1e-5)
    assert whole[0, 5] == 0
    assert (whole[0, 1:5] > 1e-4).all()
    assert (black == 0).all()


# ---------------------------------------------------------------- features


def test_the_inception_has_every_patch_of_the_fid_network():
    net = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    state = net.double().state_dict()
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
    waves = [np.sin(9 * x + 3 * y), np.cos(7 * y * x), np.sin(5 * x**2 + 8 * y)]
    image = torch.from_numpy(0.5 + 0.5 * np.stack(waves))[None]
    big = torch.nn.functional.interpolate(image, (299, 299), mode="bilinear")
    pool3 = net(2 * big - 1)[0].numpy()
    # pytorch-fid 0.3.0's own classes in float64
    measured = (pool3.mean(), pool3.std(), pool3[2047])
    assert measured == pytest.approx((0.339946443, 0.447930402, 0.007591808), abs=1e-6)
    assert pool3.argmax() == 1913


def test_an_inception_of_other_weights_serves_but_is_not_called_published(tmp_path):
    net = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    path = str(tmp_path / "own.pth")
    torch.save(net.state_dict(), path)
    legacy = metrics.load_features(path, "cpu")
    clean = metrics.load_features(path, "cpu", "clean")
    vectors = metrics.extract(noise(2), legacy, "cpu")
    assert not legacy.published
    assert legacy.name.startswith("inception-")
    assert clean.name == legacy.name + "-clean"
    assert vectors.shape == (2, 2048)
    assert legacy.head.shape == (1008, 2048)
    assert not np.allclose(metrics.extract(noise(2), clean, "cpu"), vectors, rtol=1e-3, atol=0)


@needs_lpips
def test_lpips_takes_its_files_from_the_cache(cache, monkeypatch):
    cache.mkdir()
    trunk, layers = metrics.LPIPS["alex"][2]
    with torch.device("meta"):
        state = torchvision.models.alexnet().features.state_dict(prefix="features.")
    state = {name: torch.rand(value.shape) for name, value in state.items()}
    torch.save(state, cache / trunk)
    metrics.copy_file(PACKAGED_LAYERS / layers, cache / layers)
    entry = list(metrics.WEIGHTS[trunk])
    entry[1] = metrics.content_hash(cache / trunk)
    monkeypatch.setitem(metrics.WEIGHTS, trunk, entry)
    assert metrics.resolve_auto("texture", "auto") == ("texture", "alex")
    matrix = metrics.lpips_matrix(noise(3), metrics.load_lpips("alex", "cpu"), "cpu")
    assert (matrix[np.triu_indices(3, 1)] > 0).all()
    assert (matrix.diagonal() == 0).all()


def test_features_come_from_the_cache_and_a_torn_entry_is_computed_again(cache):
    calls = []

    def means(pixels):
        calls.append(len(pixels))
        return pixels.float().mean((2, 3))

    network = Network("means", means)
    pixels = noise(5)
    fresh = metrics.extract(pixels, network, "cpu", batch_size=2)
    assert calls == [2, 2, 1]
    assert fresh.shape == (5, 3)
    assert (metrics.extract(pixels, network, "cpu") == fresh).all()
    assert len(calls) == 3
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    assert len(files) == 5
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(b"")
    assert (metrics.extract(pixels, network, "cpu") == fresh).all()
    assert calls[3:] == [2]
    pixels[0, 0, 0, 0] += 1
    assert metrics.extract(pixels, network, "cpu")[0, 0] != fresh[0, 0]


def test_a_cache_that_cannot_be_written_costs_only_time(cache):
    cache.write_text("a file where the folder should be")
    network = Network("means", lambda pixels: pixels.float().mean((2, 3)))
    assert metrics.extract(noise(3), network, "cpu").shape == (3, 3)


def test_features_that_are_not_finite_are_refused(capsys):
    network = Network("broken", lambda pixels: pixels.float().mean((2, 3)) / 0)
    with pytest.raises(SystemExit):
        metrics.extract(noise(3), network, "cpu")
    assert "the features of broken are not finite" in capsys.readouterr().err


def test_features_of_another_precision_are_others_and_lie_elsewhere_in_the_cache():
    weights = torch.rand(3 * 64 * 64, 5, generator=metrics.generator(0))
    pixels = noise(4)
    network = Network("w", lambda pixels: pixels.float().flatten(1) / 255 @ weights)
    full = metrics.extract(pixels, network, "cpu")
    half = metrics.extract(pixels, network, "cpu", precision="bf16")
    exact = (pixels.double().flatten(1) / 255 @ weights.double()).numpy()
    assert 0 < np.abs(full - half).max() < 0.02 * full.max()
    assert full == pytest.approx(exact, rel=1e-5)  # sums of 12288 numbers in fp32


def test_a_weight_file_that_is_missing_damaged_or_another_is_refused_in_one_line(tmp_path, capsys):
    torn = tmp_path / "torn.pth"
    other = tmp_path / "other.pth"
    torn.write_bytes(b"PK not weights")
    torch.save({"a": torch.zeros(1)}, other)
    messages = {
        "inception": f"into {metrics.CACHE}",
        str(torn): "is damaged or not a PyTorch weight file",
        str(other): "does not hold the weights of FID",
        str(tmp_path / "missing.pth"): "no such weight file or vision model",
        str(tmp_path): "no such weight file or vision model",
    }
    for name, message in messages.items():
        with pytest.raises(SystemExit) as stop:
            metrics.load_features(name, "cpu")
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1
        assert message in lines[0]


# ---------------------------------------------------------------- the page


def test_a_page_escapes_its_texts_and_needs_no_network():
    table = metrics.table(["<i>"], [["<script>"]])
    curve = metrics.curve({"<u>": [(0, 1), (1, float("nan"))]}, "<s>")
    image = metrics.thumbnail(Image.new("RGB", (300, 200), "red"))
    text = metrics.page("<b>", table + curve + image)
    for unescaped in ("<script>", "<i>", "<u>", "<s>", "<b>", "http", 'src="/'):
        assert unescaped not in text
    assert "&lt;script&gt;" in text
    assert "<svg" in text
    assert "data:image/jpeg;base64," in text


def test_a_thumbnail_is_no_larger_than_asked_and_takes_pixels_or_pictures():
    import base64

    pixels = noise(1, size=64)[0]
    text = metrics.thumbnail(pixels, 32)
    data = base64.b64decode(text.split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(data)).size == (32, 32)
    assert text == metrics.thumbnail(metrics.picture(pixels), 32)


def test_a_pair_says_which_is_which_and_escapes_names():
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    generated, real = metrics.Row("", "<b>.png"), metrics.Row("", '"a.png', label="<i>")
    text = metrics.pair((pixels, generated), (pixels, real), "why & how")
    assert 'alt="generated: &lt;b&gt;.png"' in text
    assert 'alt="real: &quot;a.png"' in text
    assert "why &amp; how\ngenerated: &lt;b&gt;.png\nreal: &quot;a.png (&lt;i&gt;)<" in text


def test_a_dot_and_a_bar_that_are_off_the_axis_are_drawn_at_its_ends():
    header = ("name", "left", "", "right", "words")
    text = metrics.dot_lines(header, [("a", "b", -20, 40, 130, "title", "worse")])
    assert '<rect x="0.0%" width="40.0%"' in text
    assert '<circle cx="100.0%"' in text


def test_axes_name_the_ends_and_the_middle_of_what_is_drawn():
    text = metrics.curve({"loss": [(10, 0.5), (600, 0.1)]}, "step")
    for label in ("10", "305", "600", "0.1", "0.3", "0.5"):
        assert f">{label}</text>" in text
    assert 'points="60.0,35.0 60.0,35.0 410.0,215.0"' in text


def test_a_curve_without_a_finite_point_says_so_and_one_point_is_a_dot():
    assert "nothing to draw" in metrics.curve({"loss": [(0, float("nan"))]}, "step")
    assert 'points="60.0,215.0 60.0,215.0"' in metrics.curve({"loss": [(0, 1.0)]}, "step")
