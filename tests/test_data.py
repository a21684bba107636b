"""Training data: balance, variants, augmentation, the cache on disk, and --preview."""

import csv
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage
from test_read_image import RAMP, dicom, write_dicom

import metrics
import train


@pytest.fixture
def flags(base, images):
    """A run of two steps on random weights."""
    return [
        "--base",
        base,
        "--data",
        images,
        "--prompt",
        "a {label} foot",
        "--steps",
        2,
        "--rank",
        2,
        "--val-samples",
        0,
        "--val-split",
        0.2,
    ]


@pytest.fixture
def photo():
    """Smooth colours with an edge, uint8 (3, 128, 128)."""
    y, x = np.mgrid[:128, :128] / 128
    planes = [np.sin(7 * x + 2 * y), np.cos(5 * x * y), np.hypot(x - 0.4, y - 0.6) < 0.3]
    smooth = [ndimage.gaussian_filter(127 + 90 * plane.astype(float), 2) for plane in planes]
    return torch.from_numpy(np.array(smooth).round().astype(np.uint8))


# ---------------------------------------------------------------- balance, variants


def test_balance_draws_classes_equally_often_and_their_images_in_turn():
    labels = ["A"] * 60 + ["A|B"] * 9 + ["B | C"] * 2 + [""] * 4
    rows = [metrics.Row(path="", file_name="", label=label) for label in labels]
    classes = train.rarest_labels(rows)
    # an image of several labels goes by its rarest
    assert Counter(classes) == {"A": 60, "B": 9, "C": 2, "": 4}
    for epoch in range(5):
        drawn = train.epoch_order(0, epoch, len(rows), classes)
        share = Counter(classes[i] for i in drawn)
        assert len(drawn) == 75 and set(share) == set(classes)
        assert max(share.values()) - min(share.values()) <= 1
        for name in share:  # no image again before each was drawn as often
            times = Counter(i for i in drawn if classes[i] == name)
            assert max(times.values()) <= -(-share[name] // classes.count(name))
    again = train.epoch_order.__wrapped__(0, 3, 75, classes)
    assert train.epoch_order(0, 3, 75, classes) == again != train.epoch_order(0, 4, 75, classes)


def test_a_balanced_run_draws_by_labels_and_needs_them(flags, tmp_path, run, refused, monkeypatch):
    for i in range(20):
        place = tmp_path / "data" / "ab"[i % 5 == 0]
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 99).save(place / f"{i}.png")
    streams = []
    monkeypatch.setattr(train, "fit", lambda _, data, *more: streams.extend(data) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(train, *flags, "--data", tmp_path / "data", "--balance", "--out", tmp_path / "run")
    assert list(streams[0].classes) == [row.label for row in streams[0].rows]
    flags += ["--data", tmp_path / "data" / "a", "--prompt", "x", "--val-split", 0, "--balance"]
    assert "--balance" in refused(train, *flags, "--out", tmp_path / "run")


def test_each_slot_of_a_batch_draws_a_variant_of_its_own(monkeypatch, tmp_path):
    flags = ["--data", str(tmp_path), "--augment", "noise", "--variants", "3", "--batch-size", "8"]
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    args = train.parse_args()
    mean = torch.arange(30.0).view(3, 10).T[..., None, None, None]  # variant v of image n: 10 v + n
    text = {"x": torch.arange(11)}
    fixed = (0 * mean, torch.zeros(10, 3, 6), text, torch.arange(10), torch.ones(10))
    data = train.Data([{}] * 10, mean, *fixed)

    def latents(step, slots):
        return train.make_batch([data], 1000, step, slots, args).latents.flatten().int()

    drawn = torch.cat([latents(step, range(8)) for step in range(40)])
    halves = []
    for step in range(40):
        halves += [latents(step, range(4)), latents(step, range(4, 8))]
    assert torch.equal(drawn, torch.cat(halves))  # whatever the processes
    assert set(drawn.tolist()) == set(range(30))
    for epoch in drawn.split(10):
        assert sorted((epoch % 10).tolist()) == list(range(10))
    args.prompt_dropout = 0
    batch = train.make_batch([data], 1000, 3, range(8), args)
    assert torch.equal(batch.latents.flatten().int() % 10, batch.text["x"])  # its caption


# ---------------------------------------------------------------- augmentation


def test_a_variant_is_drawn_by_its_key_alone_and_no_two_are_alike(photo):
    names = list(train.AUGMENT)
    torch.manual_seed(7)
    first, again, other = (train.augment(photo, names, (0, "x", variant)) for variant in (1, 1, 2))
    assert first.dtype == torch.uint8 and first.shape == photo.shape
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(train.augment(photo, [], (0, "x", 1)), photo)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))  # the global generator is left as it was


def test_flips_mirror_half_of_the_variants_and_only_where_named(photo):
    for name, axis in (("hflip", 2), ("vflip", 1)):
        variants = [train.augment(photo, [name], (0, n)) for n in range(40)]
        turned = sum(torch.equal(variant, photo.flip(axis)) for variant in variants)
        kept = sum(torch.equal(variant, photo) for variant in variants)
        assert 10 <= turned <= 30 and turned + kept == 40
    others = [name for name in train.AUGMENT if "flip" not in name]
    mirrored = photo.flip(2).float()
    for n in range(10):
        variant = train.augment(photo, others, (0, n)).float()
        assert (variant - photo).abs().mean() < (variant - mirrored).abs().mean()


@pytest.mark.parametrize("name", [name for name in train.AUGMENT if "flip" not in name])
def test_each_augmentation_changes_the_picture_but_mildly(name, photo):
    grain = torch.randint(60, photo.shape, generator=metrics.generator(0))  # which blur takes
    photo = photo // 2 + grain
    variants = [train.augment(photo, [name], (0, n)) for n in range(12)]
    changes = [(variant.float() - photo.float()).abs().mean().item() for variant in variants]
    assert max(changes) > 0.2 and max(changes) < 40
    grey = train.augment(photo[:1].expand(3, -1, -1), [name], (0, 3))
    assert torch.equal(grey, grey[:1].expand(3, -1, -1))  # grey stays grey


def test_what_is_moved_into_the_picture_is_no_black_border():
    names = ["rotate", "shift", "scale", "elastic"]
    white = torch.full((3, 128, 128), 255, dtype=torch.uint8)
    for n in range(60):
        assert train.augment(white, names, (0, n)).min() >= 254


def test_clahe_equals_its_definition_pixel_by_pixel(photo):
    values, tiles, limit = photo[0].numpy(), 8, 2.0
    side = len(values) // tiles
    maps = np.zeros((tiles, tiles, 256))
    for row in range(tiles):
        for column in range(tiles):
            region = values[row * side : (row + 1) * side, column * side : (column + 1) * side]
            counts = np.bincount(region.ravel(), minlength=256).astype(float)
            most = limit * side * side / 256
            excess = np.maximum(counts - most, 0).sum()
            maps[row, column] = np.cumsum(np.minimum(counts, most) + excess / 256) * 255 / side**2
    wanted = np.zeros(values.shape)
    for y in range(len(values)):
        for x in range(len(values)):
            down, across = y / side - 0.5, x / side - 0.5
            corners = []
            for row in (int(np.floor(down)), int(np.floor(down)) + 1):
                for column in (int(np.floor(across)), int(np.floor(across)) + 1):
                    weight = (1 - abs(down - row)) * (1 - abs(across - column))
                    corners.append(
                        weight * maps[min(max(row, 0), 7), min(max(column, 0), 7), values[y, x]]
                    )
            wanted[y, x] = sum(corners)
    ours = train.clahe(photo[0].float() / 255, limit) * 255
    assert np.abs(ours.numpy() - wanted).max() < 0.01


def test_clahe_equals_opencvs_where_regions_are_large(photo):
    cv2 = pytest.importorskip(
        "cv2"
    )  # in small regions its rounding of the excess, all to the dark side, shows
    large = np.asarray(Image.fromarray(photo[0].numpy()).resize((1024, 1024)))
    ours = (train.clahe(torch.from_numpy(large.copy()).float() / 255, 2.0) * 255).round()
    assert np.abs(ours.numpy() - cv2.createCLAHE(2.0, (8, 8)).apply(large)).max() <= 2


@pytest.mark.parametrize(
    "change, said",
    [
        (["--augment", "hflop"], "--augment hflop"),
        (["--variants", 3], "--variants 3"),
        (["--augment", "blur", "--variants", 1], "--variants 1"),
        (["--range", "5,1"], "--range"),
        (["--range", "high"], "--range"),
        (["--window", "thorax"], "--window thorax"),
        (["--slices", "some"], "--slices"),
    ],
)
def test_data_flags_that_make_no_sense_are_one_line(change, said, flags, tmp_path, refused):
    assert said in refused(train, *flags, "--out", tmp_path / "run", *change)


# ---------------------------------------------------------------- the cache on disk


@pytest.fixture
def encoded(monkeypatch):
    """The batches that are encoded, in a list."""
    batches, encode = [], train.encode

    def counted(base, pixels):
        batches.append(len(pixels))
        return encode(base, pixels)

    monkeypatch.setattr(train, "encode", counted)
    return batches


def test_a_second_run_reads_its_latents(flags, tmp_path, run, encoded, monkeypatch):
    flags = [*flags, "--augment", "hflip,noise", "--variants", 2, "--cache", tmp_path / "cache"]
    run(train, *flags, "--out", tmp_path / "a")
    files = list((tmp_path / "cache").iterdir())
    assert encoded and [path.suffix for path in files] == [".safetensors"]
    latents = load_file(files[0])
    split = Counter(row["split"] for row in metrics.read_table(tmp_path / "a" / "split.csv"))
    # what is validated on stays plain
    assert latents["train latents"].shape[:2] == (split["train"], 2)
    assert latents["val latents"].shape[:2] == (split["val"], 1)
    encoded.clear()
    monkeypatch.setattr(train, "load_real", None)  # nothing is read
    run(train, *flags, "--out", tmp_path / "b")
    a, b = ((tmp_path / name / "lora.safetensors").read_bytes() for name in "ab")
    assert not encoded and a == b and list((tmp_path / "cache").iterdir()) == files


def test_a_set_with_an_unreadable_image_is_read_each_time(flags, images, tmp_path, run, encoded):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "calm" / "broken.png").write_bytes(b"no image")
    flags += ["--data", tmp_path / "data", "--cache", tmp_path / "cache"]
    run(train, *flags, "--out", tmp_path / "a")
    encoded.clear()
    run(train, *flags, "--out", tmp_path / "b")
    assert encoded and not list(tmp_path.glob("cache/*"))


def test_other_pixels_vaes_and_variants_have_latents_of_their_own(flags, sd21, tmp_path, run):
    def count(*more):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run(train, *flags, "--cache", tmp_path / "cache", "--steps", 1, "--out", out, *more)
        return len(list((tmp_path / "cache").iterdir()))

    assert count() == count("--seed", 1) == 1  # plain pictures do not depend on the seed
    assert count("--crop", "pad") == 2
    assert count("--crop", "pad", "--range", "0,9") == 3
    assert count("--augment", "noise", "--variants", 2) == 4
    assert count("--augment", "noise", "--variants", 2, "--seed", 1) == 5
    vae = next(Path(sd21, "vae").glob("*.safetensors"))
    before = vae.read_bytes()
    try:
        vae.write_bytes(before[:-4] + b"\0\0\0\0")
        assert count("--base", sd21) == 6
    finally:
        vae.write_bytes(before)


def test_a_run_goes_on_only_with_the_same_data_flags(flags, tmp_path, run, refused):
    run(train, *flags, "--augment", "blur", "--variants", 2, "--out", tmp_path / "run")
    said = refused(
        train,
        *flags,
        "--augment",
        "noise",
        "--balance",
        "--crop",
        "pad",
        "--out",
        tmp_path / "run",
        "--steps",
        4,
    )
    assert all(
        word in said
        for word in ("--augment: blur", "--variants: 2", "--balance: False", "--crop: center")
    )


@dicom
def test_the_window_asked_for_is_the_one_that_is_learnt_from(tmp_path, monkeypatch):
    write_dicom(tmp_path / "a", RAMP, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024)
    flags = ["--data", tmp_path, "--resolution", 64, "--window", "lung", "--val-split", 0]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags)])
    args = train.parse_args()
    rows, pixels = train.load_rows(train.list_data(args), args)
    values = RAMP[0, 32:96] - 1024.0
    expected = np.clip((values + 600.5) / 1499 + 0.5, 0, 1) * 255  # centre -600, width 1500
    assert np.abs(pixels[0, 0, 0].numpy() - expected).max() <= 1


# ---------------------------------------------------------------- preview and doctor


def speckled(seed, side=96):
    """A smooth picture of its own."""
    values = ndimage.gaussian_filter(np.random.RandomState(seed).rand(side, side), 6)
    return Image.fromarray(((values - values.min()) / np.ptp(values) * 180).astype(np.uint8))


@pytest.fixture
def planted(tmp_path):
    """A data set with one of each: a copy, a mirrored and a saved again one, a broken file."""
    folder, cells = tmp_path / "planted", []
    folder.mkdir()
    for i in range(30):
        speckled(i).save(folder / f"{i}.png")
        cells.append(
            [
                f"{i}.png",
                "a left lung" if i == 4 else "a lung",
                "rare" if i in (8, 9) else "common",
                f"p{i}" * (i < 20),
            ]
        )
    (folder / "copy.png").write_bytes((folder / "3.png").read_bytes())
    speckled(5).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "mirror.png")
    speckled(6).convert("RGB").resize((150, 150)).save(folder / "again.jpg", quality=85)
    (folder / "broken.png").write_bytes(b"\x89PNG not really")
    cells += [
        [name, "a lung", "common", f"q{name}"]
        for name in ("copy.png", "mirror.png", "again.jpg", "broken.png")
    ]
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "text", "label", "patient_id"], *cells])
    return folder


def warnings_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_the_doctor_names_every_planted_fault_without_a_base(
    planted, tmp_path, run, capsys, monkeypatch
):
    monkeypatch.setattr(train, "load_base", None)
    val = tmp_path / "val"
    val.mkdir()
    speckled(50).save(val / "new.png")
    speckled(7).save(val / "seen.png")
    lines = ["file_name,text,label,patient_id", "new.png,a lung,common,p2"]
    lines.append("seen.png,a lung,common,z")
    (val / "metadata.csv").write_text("\n".join(lines))
    flags = ["--data", planted, "--val-data", val, "--resolution", 64, "--augment", "hflip"]
    run(train, *flags, "--preview", tmp_path / "out")
    printed = capsys.readouterr()
    warnings = [line for line in printed.out.splitlines() if line.startswith("warning: ")]

    def is_named_once(*words):
        return sum(all(word in line for word in words) for line in warnings) == 1

    assert is_named_once("patients on both sides of the split: 1 (p2)")
    assert is_named_once("duplicates: 3", "3.png = copy.png")
    assert is_named_once("duplicates", "5.png = mirror.png", "6.png = again.jpg")
    assert is_named_once("images on both sides of the split", "7.png = seen.png")
    assert is_named_once("captions that say left", "(4.png)")
    assert "skipped: " in printed.err and "broken.png" in printed.err
    assert "common" in printed.out and "patients: 24" in printed.out
    assert "33 to train on, 2 for validation" in printed.out


def test_the_doctor_has_nothing_to_say_of_sound_data(tmp_path, run, capsys):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            speckled(ord(label) * 100 + i).save(tmp_path / "data" / label / f"{i}.png")
    flags = ["--data", tmp_path / "data", "--prompt", "{label}", "--resolution", 64]
    run(train, *flags, "--preview", tmp_path / "out")
    assert not warnings_of(capsys)


def film(seed, side=128):
    """A grey picture that is like the others of its kind: a bright spine between two lungs."""
    x = np.linspace(-1, 1, side)
    noise = ndimage.gaussian_filter(np.random.RandomState(seed).randn(side, side), 4)
    return np.clip(130 + 60 * np.cos(2 * np.pi * x) + 60 * x[:, None] + 120 * noise, 0, 255)


def look_at(folder, pictures, run, capsys, *flags):
    """The doctor's warnings about pictures that are saved as 0.png, 1.png, …."""
    folder.mkdir()
    for i, values in enumerate(pictures):
        Image.fromarray(np.asarray(values).astype(np.uint8)).save(folder / f"{i}.png")
    flags = [*flags, "--data", folder, "--resolution", 128, "--val-split", 0]
    run(train, *flags, "--preview", folder.with_name("look"))
    return [line for line in warnings_of(capsys) if "duplicates" not in line]  # all are alike


def test_the_doctor_finds_an_image_unlike_all_others(tmp_path, run, capsys):
    pictures = [film(i) for i in range(30)]
    pictures[3] = np.rot90(pictures[3])
    pictures[5] = np.stack([pictures[5] * 0.6, pictures[5] * 0.8, pictures[5]], 2)
    pictures[7] = pictures[7].repeat(4, 0).repeat(4, 1)
    lines = look_at(tmp_path / "data", pictures, run, capsys)
    assert len(lines) == 3
    assert "a size unlike all others: 1 (7.png)" in lines[0]
    assert "a tint unlike all others: 1 (5.png)" in lines[1]
    assert "a layout unlike all others: 1 (3.png)" in lines[2]


def test_the_doctor_finds_a_mark_at_the_same_place(tmp_path, run, capsys):
    pictures = [film(i) for i in range(30)]
    for values in pictures[:15]:
        values[10:18, 100:102] = values[16:18, 100:106] = 255  # an L
    lines = look_at(tmp_path / "data", pictures, run, capsys)
    assert len(lines) == 1
    assert (
        "places with the same mark in many images: 1 (80 % from the left, 11 % from the top)"
        in lines[0]
    )


@pytest.mark.parametrize(
    "value, crop, count", [(0, "center", 1), (255, "center", 1), (0, "pad", 0)]
)
def test_the_doctor_finds_straight_borders(value, crop, count, tmp_path, run, capsys):
    pictures = [film(i) for i in range(12)]
    for values in pictures[:9]:
        values[:, :12] = value
    lines = look_at(tmp_path / "data", pictures, run, capsys, "--crop", crop)
    assert len(lines) == count
    assert all("a black or white border: 9" in line for line in lines)


def test_a_disc_in_the_dark_has_no_border(tmp_path, run, capsys):
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    pictures = [film(i) * (x**2 + y**2 < 0.8) for i in range(24)]
    assert look_at(tmp_path / "data", pictures, run, capsys) == []


def test_the_doctor_reads_captions(tmp_path, run, capsys):
    (tmp_path / "data").mkdir()
    lines = ["file_name,text,label"]
    for i in range(24):
        speckled(i).save(tmp_path / "data" / f"{i}.png")
        lines.append(f"{i}.png,a film with {'' if i == 2 else 'hepatitis A'},{'ab'[i % 2]}")
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(lines))
    flags = ["--data", tmp_path / "data", "--resolution", 64, "--preview", tmp_path / "look"]
    run(train, *flags)
    assert ["seem incomplete: 1 (2.png)" in line for line in warnings_of(capsys)] == [True]
    run(train, *flags, "--prompt", "a film")
    assert ["share one caption: 2 (a, b)" in line for line in warnings_of(capsys)] == [True]


def test_images_below_the_resolution_are_counted(tmp_path, run, capsys):
    (tmp_path / "data").mkdir()
    for i in range(12):
        values = film(i)[:, :90].astype(np.uint8)
        Image.fromarray(values).save(tmp_path / "data" / f"{i}.png")
    flags = ["--data", tmp_path / "data", "--resolution", 128, "--preview", tmp_path / "look"]
    run(train, *flags)
    assert "12 of 12 real images are smaller than 128 px" in capsys.readouterr().err
    run(train, *flags, "--crop", "pad")
    assert "real images are smaller" not in capsys.readouterr().err


def test_the_doctor_shows_what_the_vae_keeps_and_goes_on_without_one(
    base, tmp_path, run, capsys, monkeypatch
):
    part = "diffusers.models.modeling_utils"
    monkeypatch.setattr(f"{part}.is_accelerate_available", lambda: False)
    monkeypatch.setattr(f"{part}.logger.warning", lambda text: pytest.fail(text))
    pictures = [film(i) for i in range(12)]
    look_at(tmp_path / "data", pictures, run, capsys)
    assert not (tmp_path / "look" / "vae.png").exists()
    assert (tmp_path / "look" / "grid.png").exists()
    flags = ["--data", tmp_path / "data", "--resolution", 72, "--base", base]
    run(train, *flags, "--preview", tmp_path / "look")
    told = capsys.readouterr()
    assert re.search(r"keeps PSNR \d+\.\d dB, SSIM 0\.\d+", told.out)
    assert Image.open(tmp_path / "look" / "vae.png").size == (2 * 72, 3 * 72)


def test_many_unreadable_images_end_the_doctor_as_they_end_training(tmp_path, refused):
    (tmp_path / "data").mkdir()
    for i in range(6):
        speckled(i).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"bad{i}.png").write_bytes(b"\x89PNG not really")
    flags = ["--data", tmp_path / "data", "--resolution", 64, "--val-split", 0]
    line = refused(train, *flags, "--preview", tmp_path / "look")
    assert "6 of 12 images cannot be read" in line


def test_a_preview_is_the_augmented_data_set_and_names_no_patient(planted, tmp_path, run):
    flags = ["--data", planted, "--resolution", 64, "--augment", "vflip,noise", "--variants", 3]
    run(train, *flags, "--preview", tmp_path / "out")
    rows = metrics.list_images(tmp_path / "out")
    sources = Counter(row.fields["source"] for row in rows)
    assert set(sources.values()) == {3} and len(sources) == 33
    assert {row.label for row in rows} == {"rare", "common"}
    assert all(row.caption and row.group for row in rows)
    assert list(rows[0].fields) == train.PREVIEW_COLUMNS
    metrics.split_rows(rows, 0.3)
    splits = {(row.fields["source"], row.split) for row in rows}
    assert len(splits) == len(sources)  # variants of a picture stay on one side of the split
    plain = Image.open(next((tmp_path / "out").glob("*-0-0.png")))
    expected = metrics.fit_square(metrics.read_image(planted / "0.png"), 64)
    assert np.array_equal(np.asarray(plain), np.asarray(expected))
    assert Image.open(tmp_path / "out" / "grid.png").width > 900
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*-*.png")}
    for path in sorted(before)[::4]:
        path.unlink()
    run(train, *flags, "--preview", tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").glob("*-*.png")}


def test_a_preview_never_overwrites_a_data_set(planted, tmp_path, refused):
    before = (planted / "metadata.csv").read_bytes()
    assert "lies in --data" in refused(train, "--data", planted, "--preview", planted)
    assert "lies in --data" in refused(train, "--data", planted, "--preview", planted / "look")
    assert "lies in --data" in refused(train, "--data", planted, "--out", planted / "run")
    assert not (planted / "run").exists()
    (tmp_path / "flat").mkdir()
    speckled(1).save(tmp_path / "flat" / "1.png")
    flags = ["--data", tmp_path / "flat", "--val-split", 0, "--resolution", 64]
    assert "another data set" in refused(train, *flags, "--preview", planted)
    assert (planted / "metadata.csv").read_bytes() == before


def test_what_is_kept_for_a_test_is_counted_and_not_written(tmp_path, run, capsys):
    (tmp_path / "data").mkdir()
    for i in range(12):
        speckled(i).save(tmp_path / "data" / f"{i}.png")
    flags = ["--data", tmp_path / "data", "--resolution", 64, "--test-split", 0.4]
    run(train, *flags, "--preview", tmp_path / "look")
    printed, notes = capsys.readouterr()
    kept = int(re.search(r"(\d+) for a test", printed)[1])
    assert 0 < kept < 12
    assert len(metrics.list_images(tmp_path / "look")) == 12 - kept
    said = rf"wrote {12 - kept} images, 64 pixels a side, values from \d\d? to 1\d\d\n"
    assert re.search(said, printed)
    assert notes.count("all captions are empty: ") == 1  # it would train without any


def test_a_mix_of_which_nothing_is_held_out_is_trained_on_all_the_same(tmp_path, run, capsys):
    (tmp_path / "data").mkdir()
    lines = ["file_name,text,synthetic"]
    for i in range(8):
        speckled(i).save(tmp_path / "data" / f"{i}.png")
        lines.append(f"{i}.png,a film,{i % 2}")
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(lines))
    flags = ["--data", tmp_path / "data", "--resolution", 64, "--val-split", 1e-6]
    run(train, *flags, "--preview", tmp_path / "look")
    printed, notes = capsys.readouterr()
    assert "8 images: 8 to train on, 0 for validation" in printed
    assert "no validation images: the mixed set leaves no real ones" in notes


def test_random_crops_differ_between_variants(tmp_path, run):
    (tmp_path / "data").mkdir()
    for i in range(4):
        speckled(i, 192).crop((0, 0, 192, 64)).save(tmp_path / "data" / f"{i}.png")
    flags = ["--data", tmp_path / "data", "--resolution", 64, "--crop", "random", "--val-split", 0]
    pictures = []
    for name in "ab":
        run(train, *flags, "--preview", tmp_path / name)
        files = (tmp_path / name).glob("*-*.png")
        pictures.append({path.name: path.read_bytes() for path in files})
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == len(set(pictures[0].values())) == 16
