"""Training data: classes in balance, variants, the cache on disk, and what --preview writes and finds."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
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


# ------------------------------------------------------------------------------------------------- balance, variants


def test_balance_draws_classes_equally_often_and_their_images_in_turn():
    rows = [{"label": label} for label in ["A"] * 60 + ["A|B"] * 9 + ["B | C"] * 2 + [""] * 4]
    classes = train.classes_of(rows)
    assert Counter(classes) == {
        "A": 60,
        "B": 9,
        "C": 2,
        "": 4,
    }  # an image of several labels goes by its rarest
    for epoch in range(5):
        drawn = train.order(0, epoch, len(rows), classes)
        share = Counter(classes[i] for i in drawn)
        assert (
            len(drawn) == 75
            and set(share) == set(classes)
            and max(share.values()) - min(share.values()) <= 1
        )
        for (
            name
        ) in share:  # no image twice before each was drawn once, no two apart by more than one
            times = Counter(i for i in drawn if classes[i] == name)
            assert max(times.values()) <= -(-share[name] // classes.count(name))
    assert (
        train.order(0, 3, 75, classes)
        == train.order.__wrapped__(0, 3, 75, classes)
        != train.order(0, 4, 75, classes)
    )


def test_a_balanced_run_shows_the_weights_and_needs_labels(flags, tmp_path, run, refused, capsys):
    for i in range(20):
        (tmp_path / "data" / "ab"[i % 5 == 0]).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 99).save(tmp_path / "data" / "ab"[i % 5 == 0] / f"{i}.png")
    run(train, *flags, "--data", tmp_path / "data", "--balance", "--out", tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("balance: ")]
    assert len(lines) == 2 and all("times an epoch" in line for line in lines)
    shares = [float(line.split("drawn ")[1].split()[0]) * int(line.split()[2]) for line in lines]
    assert shares[0] == pytest.approx(shares[1], rel=0.05)
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (64, 64)).save(flat / "1.png")
    flags += ["--data", flat, "--prompt", "x", "--val-split", 0, "--balance"]
    assert "--balance" in refused(train, *flags, "--out", tmp_path / "run")


def test_each_slot_of_a_batch_draws_a_variant_of_its_own(monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        ["train.py", "--data", "x", "--augment", "noise", "--variants", "3", "--batch-size", "8"],
    )
    args = train.parse_args()
    mean = torch.arange(30.0).view(30, 1, 1, 1)  # variant v of image n is 10 v + n
    data = train.Data(
        [{}] * 10, mean, torch.zeros(30, 1, 1, 1), {"x": torch.arange(11)}, torch.arange(10), False
    )
    whole = [train.make_batch(data, step, range(8), args)[0].flatten().int() for step in range(40)]
    parts = [
        torch.cat(
            [train.make_batch(data, step, range(k, k + 4), args)[0].flatten().int() for k in (0, 4)]
        )
        for step in range(40)
    ]
    assert torch.equal(torch.stack(whole), torch.stack(parts))  # whatever the processes
    drawn = torch.stack(whole).flatten()
    assert set(drawn.tolist()) == set(range(30))
    assert all(
        sorted((drawn[k : k + 10] % 10).tolist()) == list(range(10)) for k in range(0, 320, 10)
    )  # epochs stay whole
    args.prompt_dropout = 0
    latents, _, _, text, _ = train.make_batch(data, 3, range(8), args)
    assert torch.equal(latents.flatten().int() % 10, text["x"])  # and captions with their image


# ------------------------------------------------------------------------------------------------- augmentation


def test_a_variant_is_drawn_by_its_key_alone_and_no_two_are_alike(photo):
    names = list(train.AUGMENT)
    a, b, c = (train.augmented(photo, names, 0, "x", variant) for variant in (1, 1, 2))
    assert (
        a.dtype == torch.uint8
        and a.shape == photo.shape
        and torch.equal(a, b)
        and not torch.equal(a, c)
    )
    assert torch.equal(train.augmented(photo, [], 0, "x", 1), photo)
    only = train.augmented(
        photo, ["noise"], 0, "x", 1
    ).int()  # one name's draw does not hang on the others named
    assert not torch.equal(only, train.augmented(photo, ["noise"], 1, "x", 1).int())


def test_flips_mirror_half_of_the_variants_and_only_where_named(photo):
    for name, axis in (("hflip", 2), ("vflip", 1)):
        turned = [
            torch.equal(train.augmented(photo, [name], 0, n), photo.flip(axis)) for n in range(40)
        ]
        kept = [torch.equal(train.augmented(photo, [name], 0, n), photo) for n in range(40)]
        assert 10 <= sum(turned) <= 30 and sum(turned) + sum(kept) == 40
    others = [name for name in train.AUGMENT if "flip" not in name]
    mirrored = photo.flip(2).float()
    for n in range(10):
        variant = train.augmented(photo, others, 0, n).float()
        assert (variant - photo).abs().mean() < (variant - mirrored).abs().mean()


@pytest.mark.parametrize("name", [name for name in train.AUGMENT if "flip" not in name])
def test_each_augmentation_changes_the_picture_but_mildly(name, photo):
    photo = photo // 2 + torch.randint(
        60, photo.shape, generator=metrics.generator(0)
    )  # with grain, which blur takes
    change = [
        (train.augmented(photo, [name], 0, n).float() - photo.float()).abs().mean().item()
        for n in range(12)
    ]
    assert max(change) > 0.2 and max(change) < 40
    grey = train.augmented(photo[:1].expand(3, -1, -1), [name], 0, 3)
    assert torch.equal(grey, grey[:1].expand(3, -1, -1))  # grey stays grey


def test_an_elastic_displacement_equals_scipys(photo):
    field = torch.nn.functional.interpolate(
        torch.randn(1, 2, 4, 4, generator=metrics.generator(0)) * 0.04,
        (128, 128),
        mode="bicubic",
        align_corners=True,
    )
    grid = torch.nn.functional.affine_grid(
        torch.eye(2, 3)[None], (1, 3, 128, 128), align_corners=False
    )
    ours = train.displaced(photo[None].float() / 255, grid + field.permute(0, 2, 3, 1))[0] * 255
    y, x = np.mgrid[:128, :128]
    (dx, dy), planes = field[0].numpy() * 64, photo.numpy().astype(float)  # a grid's side is 2
    assert np.abs((dx, dy)).max() > 3
    for plane, found in zip(planes, ours.numpy()):
        assert (
            np.abs(
                found - ndimage.map_coordinates(plane, [y + dy, x + dx], order=3, mode="reflect")
            ).max()
            <= 2
        )


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
        (["--augment", "blur", "--variants", 1], "plain"),
        (["--range", "5,1"], "--range"),
        (["--range", "high"], "--range"),
        (["--window", "thorax"], "--window thorax"),
        (["--slices", "some"], "--slices"),
    ],
)
def test_data_flags_that_make_no_sense_are_one_line(change, said, flags, tmp_path, refused):
    assert said in refused(train, *flags, "--out", tmp_path / "run", *change)


# ------------------------------------------------------------------------------------------------- the cache on disk


def test_a_second_run_reads_its_latents_and_mends_damaged_ones(flags, tmp_path, run, monkeypatch):
    flags = [*flags, "--augment", "hflip,noise", "--variants", 2, "--cache", tmp_path / "cache"]
    run(train, *flags, "--out", tmp_path / "a")
    files, result = (
        sorted((tmp_path / "cache").rglob("*.safetensors")),
        (tmp_path / "a" / "lora.safetensors").read_bytes(),
    )
    split = Counter(row["split"] for row in csv.DictReader((tmp_path / "a" / "split.csv").open()))
    assert len(files) == 2 * split["train"] + split["val"]  # what is validated on stays plain
    encoded, encode = [], train.encode
    monkeypatch.setattr(
        train, "encode", lambda base, pixels: encoded.append(len(pixels)) or encode(base, pixels)
    )
    run(train, *flags, "--out", tmp_path / "b")
    assert not encoded and (tmp_path / "b" / "lora.safetensors").read_bytes() == result
    whole = [path.read_bytes() for path in files]
    files[3].write_bytes(
        whole[3][:-7] + bytes([whole[3][-7] ^ 64]) + whole[3][-6:]
    )  # the disk forgot a bit
    files[-5].write_bytes(whole[-5][:90])
    run(train, *flags, "--out", tmp_path / "c")
    assert encoded and (tmp_path / "c" / "lora.safetensors").read_bytes() == result
    assert [path.read_bytes() for path in files] == whole
    encoded.clear()
    run(
        train, *flags, "--out", tmp_path / "d", "--seed", 1
    )  # other variants, the same plain pictures
    assert (
        encoded
        and len(list((tmp_path / "cache").rglob("*.safetensors"))) == len(files) + split["train"]
    )
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_other_vaes_and_crops_and_ranges_have_latents_of_their_own(flags, sd21, tmp_path, run):
    def kept(*more):
        run(train, *flags, "--cache", tmp_path / "cache", "--steps", 1, *more)
        return len(list((tmp_path / "cache").rglob("*.safetensors")))

    assert [
        kept("--out", tmp_path / "a"),
        kept("--out", tmp_path / "b", "--crop", "pad", "--range", "0,9"),
    ] == [24, 48]
    vae = next(Path(sd21, "vae").glob("*.safetensors"))
    before = vae.read_bytes()
    try:
        vae.write_bytes(before[:-4] + b"\0\0\0\0")
        assert kept("--out", tmp_path / "c", "--base", sd21) == 72
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
        for word in ("--augment blur", "--variants 2", "--balance False", "--crop center")
    )


@dicom
def test_the_window_asked_for_is_the_one_that_is_learnt_from(tmp_path):
    write_dicom(tmp_path / "a", RAMP, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024)
    args = train.argparse.Namespace(
        resolution=64,
        crop="center",
        strict=True,
        window="lung",
        range=None,
        seed=0,
        allow_burned_in=False,
    )
    rows, pixels = train.load(train.add_facts(metrics.list_images(str(tmp_path)), args), args)
    expected = (
        np.clip((RAMP[0, 32:96] - 1024.0 + 600.5) / 1499 + 0.5, 0, 1) * 255
    )  # centre -600, width 1500
    assert np.abs(pixels[0, 0, 0].numpy() - expected).max() <= 1
    assert train.name_of(rows[0], 0, args) != train.name_of(
        rows[0], 0, train.changed(args, window="soft")
    )


# ------------------------------------------------------------------------------------------------- preview and doctor


def speckled(seed, side=96):
    """A smooth picture of its own."""
    values = ndimage.gaussian_filter(np.random.RandomState(seed).rand(side, side), 6)
    return Image.fromarray(((values - values.min()) / np.ptp(values) * 180).astype(np.uint8))


@pytest.fixture
def planted(tmp_path):
    """A data set with one of each: doubles, a class of two, a side in a caption, a broken file."""
    folder, cells = tmp_path / "planted", []
    folder.mkdir()
    for i in range(30):
        speckled(i).save(folder / f"{i}.png")
        cells.append(
            [
                f"{i}.png",
                "the left lung" if i == 4 else "a lung",
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
    (val / "metadata.csv").write_text(
        "file_name,text,label,patient_id\nnew.png,a lung,common,p2\nseen.png,a lung,common,z\n"
    )
    run(
        train,
        "--data",
        planted,
        "--val-data",
        val,
        "--resolution",
        64,
        "--augment",
        "hflip",
        "--preview",
        tmp_path / "out",
    )
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("warning: ")]

    def one(*words):
        assert len([line for line in lines if all(word in line for word in words)]) == 1, (
            words,
            lines,
        )

    one("patients on both sides of the split: 1 (p2)")
    one("exact duplicates: 2 (", "3.png = copy.png")
    one("mirrored", "5.png = mirror.png")
    one("re-saved", "6.png = again.jpg")
    one("pictures on both sides of the split", "7.png = seen.png")
    one("captions that say left", "(4.png)")
    one("fewer than 10", "1 (rare: 2)")
    one("cannot be read", "broken.png")
    assert (
        "common" in said and "patients: 24" in said and "33 to train on, 2 for validation" in said
    )


def test_the_doctor_has_nothing_to_say_of_sound_data(tmp_path, run, capsys):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            speckled(ord(label) * 100 + i).save(tmp_path / "data" / label / f"{i}.png")
    run(
        train,
        "--data",
        tmp_path / "data",
        "--prompt",
        "{label}",
        "--resolution",
        64,
        "--preview",
        tmp_path / "out",
    )
    assert not warnings_of(capsys)


def test_the_doctor_tells_of_twelve_bits_and_of_films_that_are_turned(tmp_path, run, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(12):
        deep = np.asarray(speckled(i)).astype(np.uint16) * 20
        Image.fromarray(deep).save(folder / f"{i}.png")
    run(train, "--data", folder, "--resolution", 64, "--preview", tmp_path / "a")
    assert any("12-bit" in line and "--range 0,4095" in line for line in warnings_of(capsys))
    run(
        train,
        "--data",
        folder,
        "--resolution",
        64,
        "--range",
        "0,4095",
        "--preview",
        tmp_path / "b",
    )
    assert not warnings_of(capsys)
    pydicom = pytest.importorskip("pydicom")
    for i in range(12, 15):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID, data.SOPClassUID = (
            "1.2.840.10008.1.2.1",
            "1.2.840.10008.5.1.4.1.1.7",
        )
        data.PatientName, data.PatientID = "MUSTERMANN^ERIKA", str(i)
        data.set_pixel_data(np.asarray(speckled(i)), "MONOCHROME1" if i == 12 else "MONOCHROME2", 8)
        data.SOPInstanceUID = f"1.2.{i}"
        pydicom.dcmwrite(folder / f"{i}.dcm", data, enforce_file_format=True)
    run(
        train,
        "--data",
        folder,
        "--resolution",
        64,
        "--range",
        "0,4095",
        "--preview",
        tmp_path / "c",
    )
    said = capsys.readouterr()
    assert (
        "MONOCHROME1" in said.out
        and "(12.dcm)" in said.out
        and "MUSTERMANN" not in said.out + said.err
    )
    assert "MUSTERMANN" not in (tmp_path / "c" / "metadata.csv").read_text()


def test_a_preview_is_the_augmented_data_set_and_goes_on_where_it_stopped(planted, tmp_path, run):
    flags = [
        "--data",
        planted,
        "--resolution",
        64,
        "--augment",
        "vflip,noise",
        "--variants",
        3,
        "--preview",
        tmp_path / "out",
    ]
    run(train, *flags)
    rows = metrics.list_images(tmp_path / "out")
    assert len(rows) == 3 * 33 and Counter(row["fields"]["source"] for row in rows)["0.png"] == 3
    assert {row["label"] for row in rows} == {"rare", "common"} and all(
        row["caption"] and row["group"] for row in rows
    )
    assert list(rows[0]["fields"]) == [
        "file_name",
        "text",
        "label",
        "patient_id",
        "source",
        "synthetic",
    ]
    sides = {}
    metrics.split_rows(rows, 0.3)
    for row in rows:
        sides.setdefault(row["fields"]["source"], set()).add(row["split"])
    assert all(
        len(parts) == 1 for parts in sides.values()
    )  # variants of a picture never meet across the split
    plain = np.asarray(Image.open(next((tmp_path / "out").glob("0-*-0.png"))))
    assert np.array_equal(
        plain, np.asarray(metrics.fit_square(metrics.read_image(planted / "0.png"), 64))
    )
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "out").glob("*-*.png")
    }
    gone = sorted(before)[::4]
    for path in gone:
        path.unlink()
    run(train, *flags)
    after = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "out").glob("*-*.png")
    }
    assert {path: content for path, (_, content) in after.items()} == {
        path: content for path, (_, content) in before.items()
    }
    assert all(after[path][0] == before[path][0] for path in before if path not in gone)
    assert Image.open(tmp_path / "out" / "grid.png").width > 900


def test_a_preview_never_overwrites_a_data_set(planted, tmp_path, refused):
    before = (planted / "metadata.csv").read_bytes()
    assert "lies in --data" in refused(train, "--data", planted, "--preview", planted)
    assert "lies in --data" in refused(train, "--data", planted, "--preview", planted / "look")
    (tmp_path / "flat").mkdir()
    speckled(1).save(tmp_path / "flat" / "1.png")
    assert "another data set" in refused(
        train, "--data", tmp_path / "flat", "--val-split", 0, "--preview", planted
    )
    assert (planted / "metadata.csv").read_bytes() == before


def test_processes_share_a_preview_out(planted, tmp_path, run, monkeypatch):
    written = []
    monkeypatch.setattr(train, "start_processes", lambda args: None)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(train, "WORLD", 2)
    for rank in (1, 0):
        monkeypatch.setattr(train, "RANK", rank)
        run(train, "--data", planted, "--resolution", 64, "--preview", tmp_path / "out")
        written.append(len(list((tmp_path / "out").glob("*-0.png"))))
    assert written == [17, 33] and (tmp_path / "out" / "metadata.csv").exists()


def test_random_crops_differ_between_variants_and_the_first_is_kept(tmp_path, run):
    (tmp_path / "data").mkdir()
    for i in range(4):
        speckled(i, 192).crop((0, 0, 192, 64)).save(tmp_path / "data" / f"{i}.png")
    flags = [
        "--data",
        tmp_path / "data",
        "--resolution",
        64,
        "--crop",
        "random",
        "--val-split",
        0,
        "--preview",
    ]
    run(train, *flags, tmp_path / "a")
    run(train, *flags, tmp_path / "b")
    a, b = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*-*.png")}
        for name in "ab"
    )
    assert a == b and len(a) == 16 and len(set(a.values())) == 16
