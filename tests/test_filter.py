"""Filtering: what stays is like real images, what goes says why, and nothing is lost."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

import filter as filter_script
import metrics
import phantoms
from metrics import list_images, write_csv


def wound(seed):
    return Image.fromarray(phantoms.draw("inflammatory ulcer", seed, 96)[0])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(real, generated): 80 wounds; 30 fresh ones, 15 of no use, 6 copies and 3 near-equal pairs."""
    real, generated = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("generated")
    noise = np.random.RandomState(0)
    for i in range(80):
        wound(i).save(real / f"{i:02d}.png")
    for i in range(30):
        wound(1000 + i).save(generated / f"fresh-{i:02d}.png")
    for i in range(3):
        Image.fromarray(noise.randint(0, 255, (96, 96, 3)).astype(np.uint8)).save(
            generated / f"bad-noise-{i}.png"
        )
        Image.new("RGB", (96, 96), (80 + 40 * i,) * 3).save(generated / f"bad-grey-{i}.png")
        Image.fromarray(phantoms.draw("normal chest", i, 96)[0]).save(
            generated / f"bad-film-{i}.png"
        )
        wound(2000 + i).filter(ImageFilter.GaussianBlur(6)).save(generated / f"bad-blur-{i}.png")
        ImageOps.invert(wound(2000 + i)).save(generated / f"bad-negative-{i}.png")
        wound(i).save(generated / f"copy-exact-{i}.png")
        ImageOps.mirror(wound(40 + i)).save(generated / f"copy-mirror-{i}.jpg", quality=70)
        twin = wound(3000 + i)
        twin.save(generated / f"twin-{i}-a.png")
        twin.save(generated / f"twin-{i}-b.jpg", quality=95)
    return str(real), str(generated)


def decisions(out):
    with open(Path(out) / "decisions.csv", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def share_kept(out, start):
    kept = [row["kept"] == "1" for name, row in decisions(out).items() if name.startswith(start)]
    return sum(kept) / len(kept)


def test_the_calibrated_filter_keeps_fresh_images_and_refuses_what_is_not_like_them(
    sets, tmp_path, run, capsys
):
    run(
        filter_script,
        sets[1],
        "--reference",
        sets[0],
        "--calibrate",
        0.05,
        "--out",
        tmp_path / "kept",
    )
    assert (
        share_kept(tmp_path / "kept", "fresh") >= 0.8 and share_kept(tmp_path / "kept", "bad") == 0
    )
    assert "calibrated on 80 real images" in capsys.readouterr().out
    row = decisions(tmp_path / "kept")["bad-noise-0.png"]
    assert list(row)[:8] == [
        "file",
        "kept",
        "reason",
        "nearest",
        "distance",
        "sharpness",
        "contrast",
        "colour",
    ]
    assert (
        row["kept"] == "0"
        and "unlike the real images" in row["reason"]
        and row["nearest"].endswith(".png")
    )


def test_copies_and_duplicates_go_and_the_best_of_each_stays(sets, tmp_path, run):
    run(
        filter_script,
        sets[1],
        "--reference",
        sets[0],
        "--drop-copies",
        "--drop-duplicates",
        "--out",
        tmp_path / "kept",
    )
    assert (
        share_kept(tmp_path / "kept", "copy") == 0
        and share_kept(tmp_path / "kept", "fresh") >= 0.85
    )
    assert share_kept(tmp_path / "kept", "twin") == 0.5
    for i in range(3):
        reasons = sorted(
            decisions(tmp_path / "kept")[f"twin-{i}-{x}"]["reason"] for x in ("a.png", "b.jpg")
        )
        assert reasons[0] == "" and reasons[1].startswith(f"duplicate of twin-{i}-")


def test_a_fixed_threshold_says_what_share_of_real_images_it_would_refuse(
    sets, tmp_path, run, capsys
):
    run(
        filter_script,
        sets[1],
        "--reference",
        sets[0],
        "--min-ssim",
        0.9,
        "--out",
        tmp_path / "kept",
    )
    said = capsys.readouterr().out
    assert (
        "--min-ssim 0.9 would refuse 100% of the real images" in said
        and share_kept(tmp_path / "kept", "fresh") == 0
    )
    run(
        filter_script,
        sets[1],
        "--reference",
        sets[0],
        "--max-lpips",
        1e6,
        "--lpips",
        "random",
        "--out",
        tmp_path / "all",
    )
    assert "--max-lpips 1e+06 would refuse 0% of the real images" in capsys.readouterr().out
    assert share_kept(tmp_path / "all", "") == 1


def test_a_picture_that_is_twice_in_the_reference_does_not_hide_its_copies(sets, tmp_path, run):
    shutil.copytree(sets[0], tmp_path / "real")
    for i in range(5):
        shutil.copy(tmp_path / "real" / f"{60 + i}.png", tmp_path / "real" / f"again-{i}.png")
    run(
        filter_script,
        sets[1],
        "--reference",
        tmp_path / "real",
        "--drop-copies",
        "--drop-duplicates",
        "--out",
        tmp_path / "kept",
    )
    assert (
        share_kept(tmp_path / "kept", "copy") == 0 and share_kept(tmp_path / "kept", "twin") == 0.5
    )


def test_a_stray_thumbnail_does_not_make_a_set_of_thumbnails(tmp_path):
    for n in range(40):
        Image.new("RGB", (200, 150 if n else 20)).save(tmp_path / f"{n}.png")
    rows = list_images(str(tmp_path))
    assert (
        metrics.pick_resolution(rows) == 150 and metrics.pick_resolution(rows[:1]) == 64
    )  # 0.png is the first
    assert metrics.pick_resolution(rows[1:], rows[:5]) == 64 and metrics.pick_resolution([]) == 256


def test_filtering_again_by_other_rules_leaves_no_copy_of_what_is_refused_now(sets, tmp_path, run):
    flags = [sets[1], "--reference", sets[0], "--out", tmp_path / "kept"]
    run(filter_script, *flags, "--min-ssim", 0)
    run(filter_script, *flags, "--calibrate", 0.05)
    kept = {name for name, row in decisions(tmp_path / "kept").items() if row["kept"] == "1"}
    there = {path.name for path in (tmp_path / "kept").iterdir()}
    assert there == kept | {"metadata.csv", "decisions.csv", "filter.html"} and len(kept) < 57


def test_the_kept_folder_is_ready_for_training_and_nothing_is_deleted(sets, tmp_path, run):
    generated = tmp_path / "generated"
    shutil.copytree(sets[1], generated)
    rows = [[path.name, f"a caption, {path.stem}", "ulcer"] for path in sorted(generated.iterdir())]
    write_csv(generated / "manifest.csv", ["file", "prompt", "label"], rows)
    before = {path.name: path.read_bytes() for path in generated.iterdir()}
    flags = [generated, "--reference", sets[0], "--calibrate", 0.05, "--out", tmp_path / "kept"]
    run(filter_script, *flags)
    assert {path.name: path.read_bytes() for path in generated.iterdir()} == before
    kept = list_images(str(tmp_path / "kept"))
    assert {row["file_name"] for row in kept} == {
        n for n, row in decisions(tmp_path / "kept").items() if row["kept"] == "1"
    }
    assert kept[0]["label"] == "ulcer" and kept[0]["caption"].startswith("a caption, ")
    assert all(Path(row["path"]).read_bytes() == before[row["file_name"]] for row in kept)
    first = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    run(filter_script, *flags)  # the same command again: the same folder
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == first


def test_a_table_of_windows_that_names_a_file_twice_is_kept(sets, tmp_path, run):
    shutil.copytree(sets[1], tmp_path / "generated" / "img")
    names = sorted(path.name for path in (tmp_path / "generated" / "img").iterdir())
    rows = []
    for name in names:
        rows.append([f"img\\{name}", "one"])
        rows.append([f"img\\{name}", "two"])
    table = tmp_path / "generated" / "metadata.csv"
    write_csv(table, ["file_name", "text"], rows)
    kept = tmp_path / "kept"

    run(filter_script, table, "--reference", sets[0], "--calibrate", 0.05, "--out", kept)

    copied = {path.name for path in (kept / "img").iterdir()}
    assert len(copied) > 20
    assert len(list_images(str(kept))) == 2 * len(copied)


def test_links_in_a_set_are_followed_and_never_taken_for_copies_of_what_they_lead_to(
    sets, tmp_path, run, refused
):
    (tmp_path / "set").mkdir()
    shutil.copytree(sets[1], tmp_path / "store")
    for path in (tmp_path / "store").iterdir():
        (tmp_path / "set" / path.name).symlink_to(f"../store/{path.name}")
    before = contents(tmp_path / "store")
    flags = [tmp_path / "set", "--reference", sets[0], "--keep", 4]

    message = refused(filter_script, *flags, "--out", tmp_path / "store")
    run(filter_script, *flags, "--out", tmp_path / "deep" / "kept")

    assert "something else" in message
    rows = list_images(str(tmp_path / "deep" / "kept"))
    assert len(rows) == 4
    for row in rows:
        assert Path(row.path).is_file() and not Path(row.path).is_symlink()
    assert contents(tmp_path / "store") == before


def test_a_filtering_is_typed_again_however_its_tables_spell_paths(sets, tmp_path, run, capsys):
    tables = []
    for folder, how in zip(sets, ("{}", "./{}")):
        paths = sorted(Path(folder).iterdir())
        shutil.copytree(folder, tmp_path / Path(folder).name)
        tables.append(tmp_path / Path(folder).name / "metadata.csv")
        names = [how.format(path if how == "{}" else path.name) for path in paths]
        write_csv(tables[-1], ["file_name", "label"], [[name, "ulcer"] for name in names])
    flags = [
        tables[1],
        "--reference",
        sets[0],
        "--keep",
        4,
        "--mix",
        tables[0],
        "--out",
        tmp_path / "kept",
    ]
    for _ in range(2):
        run(filter_script, *flags)
        assert len(list_images(str(tmp_path / "kept"))) == 4 + len(os.listdir(sets[0]))
    assert "for real ones have labels and no captions" in capsys.readouterr().out


def test_names_that_lead_out_of_the_folder_are_refused_also_behind_a_link(
    sets, tmp_path, run, refused
):
    shutil.copytree(sets[1], tmp_path / "far" / "win" / "img")
    table = tmp_path / "far" / "win" / "metadata.csv"
    names = sorted(path.name for path in (tmp_path / "far" / "win" / "img").iterdir())
    write_csv(table, ["file_name"], [[f"img\\{name}"] for name in names])
    (tmp_path / "link").symlink_to(tmp_path / "far" / "win")
    run(
        filter_script,
        tmp_path / "link",
        "--reference",
        sets[0],
        "--keep",
        5,
        "--out",
        tmp_path / "kept",
    )
    assert len(list((tmp_path / "kept" / "img").iterdir())) == 5
    assert sorted(path.name for path in (tmp_path / "far" / "win" / "img").iterdir()) == names
    write_csv(table, ["file_name"], [[f"img\\..\\img\\{name}"] for name in names])
    assert "some with .." in refused(
        filter_script,
        tmp_path / "link",
        "--reference",
        sets[0],
        "--keep",
        5,
        "--out",
        tmp_path / "no",
    )


def test_a_copy_stands_beside_what_it_is_a_copy_of(sets, tmp_path, run):
    (tmp_path / "copies").mkdir()
    for i in range(12):
        crop = wound(i).crop((6, 2, 92, 88)).resize((96, 96))
        (ImageOps.mirror(crop) if i % 2 else crop).save(tmp_path / "copies" / f"{i:02d}.png")
    run(
        filter_script,
        tmp_path / "copies",
        "--reference",
        sets[0],
        "--drop-copies",
        "--dry-run",
        "--out",
        tmp_path / "kept",
    )
    copies = {
        name: row["nearest"]
        for name, row in decisions(tmp_path / "kept").items()
        if "copy" in row["reason"]
    }
    assert len(copies) > 9 and all(name == nearest for name, nearest in copies.items())


def test_a_reference_of_one_picture_is_refused(sets, tmp_path, refused):
    (tmp_path / "same").mkdir()
    for i in range(20):
        wound(0).save(tmp_path / "same" / f"{i}.png")
    assert "all its images are of one patient" in refused(
        filter_script,
        sets[1],
        "--reference",
        tmp_path / "same",
        "--drop-copies",
        "--out",
        tmp_path / "kept",
    )


def test_a_dry_run_copies_nothing_and_an_unreadable_image_is_a_decision(sets, tmp_path, run):
    generated = tmp_path / "generated"
    shutil.copytree(sets[1], generated)
    (generated / "torn.png").write_bytes(b"\x89PNG")
    run(
        filter_script,
        generated,
        "--reference",
        sets[0],
        "--calibrate",
        0.1,
        "--dry-run",
        "--out",
        tmp_path / "kept",
    )
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"decisions.csv", "filter.html"}
    assert decisions(tmp_path / "kept")["torn.png"]["reason"] == "unreadable"


def test_patients_are_not_compared_with_themselves(tmp_path):
    """Two films of one patient lie close; leaving only the film itself out would call every fresh image unlike."""
    draw = np.random.RandomState(0)
    centres = draw.randn(40, 1, 8) * 5
    points = (centres + draw.randn(40, 2, 8) * 0.1).reshape(80, 8)
    groups = [str(i // 2) for i in range(80)]
    distances = np.sqrt(metrics.squared_distances(points, points))
    alone = metrics.nearest(distances, metrics.same_unit([""] * 80))[1]
    apart = metrics.nearest(distances, metrics.same_unit(groups))[1]
    assert np.median(alone) < 1 < 4 < np.median(apart)


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "nothing to filter by"),
        (["--calibrate", "2"], "--calibrate 2"),
        (["--calibrate", "0.05", "--features", "no-such-file"], "no-such-file"),
        (["--calibrate", "0.001"], "needs at least 999 real images"),
        (["--min-ssim", "nan"], "--min-ssim nan"),
        (["--calibrate", "0.05", "--batch-size", "0"], "--batch-size 0"),
        (["--drop-copies", "--group-column", "patient"], "--group-column patient"),
        (["--drop-copies", "--share", "30"], "--share: needs --mix"),
        (["--drop-copies", "--blind", "x"], "--blind: needs --rating-page"),
        (["--drop-copies", "--force"], "--force: needs --fit"),
    ],
)
def test_bad_flags_are_one_line(flags, said, sets, tmp_path, refused):
    assert said in refused(
        filter_script, sets[1], "--reference", sets[0], "--out", tmp_path / "kept", *flags
    )
    assert not (tmp_path / "kept").exists()


def test_folders_that_do_not_serve_are_refused(sets, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    flags = ["--calibrate", 0.05, "--out", tmp_path / "kept"]
    assert "no images" in refused(filter_script, tmp_path / "empty", "--reference", sets[0], *flags)
    assert "no such file" in refused(
        filter_script, sets[1], "--reference", tmp_path / "absent", *flags
    )
    assert "would be read again" in refused(
        filter_script,
        sets[1],
        "--reference",
        sets[0],
        "--calibrate",
        0.05,
        "--out",
        Path(sets[1]) / "kept",
    )
    shutil.copytree(sets[1], tmp_path / "all" / "generated")
    table = tmp_path / "all" / "generated" / "metadata.csv"
    write_csv(table, ["file_name"], [[p.name] for p in sorted(table.parent.iterdir())])
    for data, out in (
        (table, table.parent),
        (table, tmp_path),
        (table.parent, table.parent),
        (table.parent, tmp_path / "all"),
    ):
        assert "what is refused would be taken" in refused(
            filter_script, data, "--reference", sets[0], "--calibrate", 0.05, "--out", out
        )
    (tmp_path / "kept").mkdir()
    for name in (
        "mine.png",
        "fresh-00.png",
    ):  # of another name than any generated image, and of the same
        (tmp_path / "kept" / name).write_bytes(b"precious")
        assert name in refused(filter_script, sets[1], "--reference", sets[0], *flags)
        assert (tmp_path / "kept" / name).read_bytes() == b"precious"
        (tmp_path / "kept" / name).unlink()


# ------------------------------------------------------------------------------------- what stays, how it is left


def test_keeping_n_takes_the_best_of_each_cluster_as_the_determinant_says():
    draw = np.random.RandomState(0)
    vectors = np.repeat(draw.randn(5, 8) * 3, 4, axis=0) + draw.randn(20, 8) * 0.05
    quality = draw.uniform(0.2, 1, 20)
    chosen = filter_script.best_and_diverse(vectors, quality, 6)
    assert sorted(i // 4 for i in chosen[:5]) == [0, 1, 2, 3, 4]
    squares = filter_script.squared_distances(vectors, vectors)
    kernel = np.outer(quality, quality) * np.exp(-squares / (2 * np.median(squares)))
    for t, i in enumerate(chosen):  # each step takes the largest determinant there is
        gains = [
            np.linalg.slogdet(kernel[np.ix_(chosen[:t] + [j], chosen[:t] + [j])])[1]
            for j in range(20)
            if j not in chosen[:t]
        ]
        mine = np.linalg.slogdet(kernel[np.ix_(chosen[: t + 1], chosen[: t + 1])])[1]
        assert mine == pytest.approx(max(gains), abs=1e-3)
    assert (
        len(set(filter_script.best_and_diverse(np.zeros((7, 3)), np.ones(7), 7))) == 7
    )  # all equal: none twice
    many = np.concatenate(
        [
            np.tile(np.random.RandomState(1).randn(1, 9), (80, 1)),
            np.random.RandomState(2).randn(20, 9) * 5,
        ]
    )
    assert (
        len(set(filter_script.best_and_diverse(many, np.ones(100), 20)) - set(range(80))) >= 19
    )  # most are equal


def test_images_judged_a_few_at_a_time_are_judged_as_the_whole_folder(sets, tmp_path, run):
    flags = dict(alpha=0.1, min_ssim=0.2, copies=True)
    run(
        filter_script,
        sets[1],
        "--reference",
        sets[0],
        "--calibrate",
        0.1,
        "--min-ssim",
        0.2,
        "--drop-copies",
        "--dry-run",
        "--out",
        tmp_path / "kept",
    )
    real, new = (list_images(folder) for folder in sets)
    reference = filter_script.measure_reference(*metrics.load_pixels(real, 96), "cpu", **flags)
    rows, pixels = metrics.load_pixels(new, 96)
    for start in range(0, len(rows), 20):
        few = slice(start, start + 20)
        reasons = filter_script.refusals(
            reference, filter_script.score(reference, pixels[few])[0], rows[few]
        )
        assert reasons == [
            decisions(tmp_path / "kept")[row["file_name"]]["reason"] for row in rows[few]
        ]


def test_a_grey_photograph_among_the_real_ones_does_not_excuse_grey_ones():
    pixels = torch.stack([torch.from_numpy(np.array(wound(n))).permute(2, 0, 1) for n in range(70)])
    grey = (metrics.to_grey(pixels) * 255).byte().expand(-1, 3, -1, -1)
    real, rows = torch.cat([pixels[:40], grey[40:41]]), [{"group": "", "label": ""}] * 28
    reference = filter_script.measure_reference([{"group": "", "label": ""}] * 41, real, "cpu", 0.1)
    kept = [
        [
            not why
            for why in filter_script.refusals(
                reference, filter_script.score(reference, x[42:])[0], rows
            )
        ]
        for x in (pixels, grey)
    ]
    assert np.mean(kept[0]) >= 0.7 and np.mean(kept[1]) == 0


def test_a_corner_that_is_nearly_black_in_all_real_images_does_not_outweigh_the_rest():
    pixels = torch.stack([torch.from_numpy(np.array(wound(n))).permute(2, 0, 1) for n in range(41)])
    pixels[:40, :, 72:, 72:] = (torch.arange(40) % 2).byte()[:, None, None, None]
    reference = filter_script.measure_reference(
        [{"group": "", "label": ""}] * 40, pixels[:40], "cpu", 0.1
    )
    assert filter_script.score(reference, pixels[40:])[0]["distance"][0] < 10 * np.median(
        reference["own"]["distance"]
    )


def test_a_label_with_enough_real_images_has_its_own_threshold():
    own = {"blur": np.concatenate([np.arange(30.0), 100 + np.arange(30.0)])}
    real = [{"label": "sharp"}] * 30 + [{"label": "Soft "}] * 30
    thresholds = filter_script.label_thresholds(own, real, 0.05)
    reference = {"own": own, "limits": [], "thresholds": thresholds}
    rows = [{"label": x} for x in ("sharp", "soft", "rare", "")]
    reasons = filter_script.refusals(reference, {"blur": np.array([90.0, 90, 90, 90])}, rows)
    assert list(thresholds) == ["", "sharp", "soft"] and reasons == [
        "blur unlike the real images",
        "",
        "",
        "",
    ]


def small_sets(folder, count=8):
    """Two folders of 64-pixel wounds: (generated with captions, labels and provenance, real with patients)."""
    for name, first in (("new", 500), ("real", 0)):
        (folder / name).mkdir()
        for i in range(count):
            Image.fromarray(phantoms.draw("inflammatory ulcer", first + i, 64)[0]).save(
                folder / name / f"{i}.png"
            )
    write_csv(
        folder / "new" / "manifest.csv",
        ["file", "prompt", "label", "seed"],
        [[f"{i}.png", f"wound {i}", "ulcer", 7 + i] for i in range(count)],
    )
    write_csv(
        folder / "real" / "metadata.csv",
        ["file_name", "text", "patient_id"],
        [[f"{i}.png", "a real one", f"p{i}"] for i in range(count)],
    )
    return folder / "new", folder / "real"


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_without_a_selector_the_best_are_those_most_like_the_real_images(tmp_path, run):
    new, real = small_sets(tmp_path, 10)
    for i in range(5):
        Image.effect_noise((64, 64), 90).save(new / f"{i}.png")
        shutil.copy(real / f"{5 + i}.png", new)
    run(
        filter_script,
        new,
        "--reference",
        real,
        "--keep",
        5,
        "--dry-run",
        "--out",
        tmp_path / "kept",
    )
    kept = {name for name, row in decisions(tmp_path / "kept").items() if row["kept"] == "1"}
    assert kept == {f"{i}.png" for i in range(5, 10)}


def test_a_mix_has_the_share_asked_for_with_captions_patients_and_provenance(tmp_path, run):
    new, real = small_sets(tmp_path)
    write_csv(
        tmp_path / "split.csv",
        ["file_name", "group", "split"],
        [[f"{i}.png", f"p{i}", "test" if i < 2 else "train"] for i in range(8)],
    )
    run(
        filter_script,
        new,
        "--reference",
        real,
        "--mix",
        real,
        "--split",
        tmp_path / "split.csv",
        "--share",
        25,
        "--out",
        tmp_path / "mixed",
    )
    rows = list_images(str(tmp_path / "mixed"))
    made = [row for row in rows if row["fields"]["synthetic"] == "1"]
    assert (
        len(rows) == 8 and len(made) == 2
    )  # 6 real ones that no test needs, and a quarter generated
    assert all(
        row["caption"][:6] == "wound " and row["label"] == "ulcer" and row["fields"]["seed"]
        for row in made
    )
    assert {row["group"] for row in rows if row not in made} == {f"p{i}" for i in range(2, 8)}
    for row in rows:
        source = (new if row in made else real) / Path(row["file_name"]).name
        assert Path(row.path).read_bytes() == source.read_bytes()


# ------------------------------------------------------------------------------------- ratings


def spoil(image, degree, number):
    """A phantom made worse: degree 0 leaves it, 1 and 2 blur, add noise, compress or wash it out."""
    if not degree:
        return image
    if number % 4 == 0:
        return image.filter(ImageFilter.GaussianBlur(1.5 * degree))
    if number % 4 == 1:
        noise = np.random.RandomState(number).randn(*np.shape(image)) * 16 * degree
        return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    if number % 4 == 2:
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=18 // degree**2)
        return Image.open(packed).convert("RGB")
    return Image.blend(image, Image.new("RGB", image.size, (150, 150, 150)), 0.35 * degree)


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """A folder of 300 phantoms of two kinds with truth.csv, and ratings.csv of the first 200 with 15 % mistakes."""
    folder, draw = tmp_path_factory.mktemp("rated"), np.random.RandomState(0)
    rows = []
    for i in range(300):
        kind = ("inflammatory ulcer", "normal chest")[i % 2]
        truth = int(draw.randint(1, 4))
        spoil(Image.fromarray(phantoms.draw(kind, 4000 + i, 64)[0]), 3 - truth, i).save(
            folder / f"{i:03d}.png"
        )
        said = (
            truth if draw.rand() > 0.15 else int(draw.choice([r for r in (1, 2, 3) if r != truth]))
        )
        rows.append(
            [f"{i:03d}.png", said, phantoms.KINDS[kind], 1 + i % 3, kind, f"g{i // 4}", truth]
        )
    header = ["image_path", "rating", "modality", "expert_level", "prompt", "group"]
    write_csv(folder / "ratings.csv", header, [row[:6] for row in rows[:200]])
    shuffled = draw.permutation([row[1] for row in rows[:200]])
    write_csv(
        folder / "shuffled.csv",
        header,
        [[row[0], r, *row[2:6]] for row, r in zip(rows[:200], shuffled)],
    )
    write_csv(
        folder / "truth.csv",
        ["file_name", "label", "modality", "truth"],
        [[row[0], row[4], row[2], row[6]] for row in rows],
    )
    return folder


@pytest.fixture(scope="module")
def selector(rated):
    """A selector fitted on those ratings, with the unspoilt images as the real ones."""
    with open(rated / "truth.csv", newline="") as file:
        real = [row for row in csv.DictReader(file) if row["truth"] == "3"]
    write_csv(rated / "real.csv", list(real[0]), [list(row.values()) for row in real])
    filter_script.fit(
        SimpleNamespace(
            fit=[str(rated / "ratings.csv")],
            reference=str(rated / "real.csv"),
            out=str(rated / "selector.safetensors"),
            split=None,
            seed=0,
            group_column=None,
            resolution=None,
            device="cpu",
            force=False,
            good=3,
        )
    )
    return str(rated / "selector.safetensors")


def test_a_selector_from_200_noisy_ratings_tells_good_from_bad_on_unseen_images(rated, selector):
    from sklearn.metrics import roc_auc_score

    loaded = filter_script.load_selector(selector)
    rows, pixels = metrics.load_pixels(list_images(str(rated / "truth.csv"))[200:], 64)
    given = filter_script.apply_selector(
        loaded, filter_script.quality_features(pixels, "cpu"), rows
    )
    truth = np.array([int(row["fields"]["truth"]) for row in rows])
    assert (
        roc_auc_score(truth == 3, given["quality"]) >= 0.9
        and roc_auc_score(truth >= 2, given["quality"]) >= 0.85
    )
    assert np.mean(given["quality"][truth == 3]) > 0.5 > np.mean(given["quality"][truth == 1])
    measured = loaded["spec"]["cv"]
    assert measured["ci"][0] < measured["auroc"] < measured["ci"][1] and measured["perm_p"] <= 0.01
    assert measured["alignment"]["easy"] > 0.9 and measured["real_pass"] > 0.6
    right = [row | {"caption": ""} for row in rows]
    wrong = [
        row | {"label": {"normal chest": "inflammatory ulcer"}.get(row["label"], "normal chest")}
        for row in right
    ]
    features = filter_script.quality_features(pixels, "cpu")
    assert filter_script.apply_selector(loaded, features, right)["alignment"].mean() > 0.8
    assert filter_script.apply_selector(loaded, features, wrong)["alignment"].mean() < 0.2
    nothing = filter_script.quality_features(
        torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8), "cpu"
    )
    assert (filter_script.apply_selector(loaded, nothing, rows[:4])["quality"] < 0.2).all()


def test_from_shuffled_ratings_no_selector_is_written(rated, tmp_path, refused, run):
    flags = ["--fit", rated / "shuffled.csv", "--out", tmp_path / "s.safetensors"]
    assert "do not predict quality better than chance" in refused(filter_script, *flags)
    assert not (tmp_path / "s.safetensors").exists()
    run(filter_script, *flags, "--force")
    assert (
        "better than chance"
        in filter_script.load_selector(str(tmp_path / "s.safetensors"))["spec"]["warnings"][0]
    )


def test_ratings_that_repeat_the_experts_level_are_refused_by_that_name(tmp_path, refused):
    (tmp_path / "oct").mkdir()
    rows = [
        [f"oct/{i}.jpg", 3 - i % 3, ("OCT", "Fundus", "CT")[i // 5], 3 - i % 3, f"text {i}"]
        for i in range(15)
    ]
    for name, *_ in rows:
        wound(0).save(tmp_path / name)
    flags = ["--fit", tmp_path / "r.csv", "--out", tmp_path / "s.safetensors"]
    header = ["image_path", "rating", "modality", "expert_level", "prompt"]
    write_csv(tmp_path / "r.csv", header, rows)
    said = refused(filter_script, *flags)
    assert "encode expert_level" in said and "fewer than 30" in said and "encode prompt" not in said
    assert not (tmp_path / "s.safetensors").exists()
    write_csv(tmp_path / "r.csv", header, [rows[0], [*rows[1][:1], 4, *rows[1][2:]]])
    assert "row 3: rating must be 1, 2 or 3" in refused(filter_script, *flags)


def test_the_statistics_are_those_of_scikit_learn_and_of_the_definitions():
    from sklearn.linear_model import Ridge
    from sklearn.metrics import cohen_kappa_score, roc_auc_score

    draw = np.random.RandomState(0)
    x, y, weights = draw.randn(20, 30), draw.randn(20), draw.uniform(0.3, 1, 20)
    inner, share = filter_script.ridge(x, weights, 0.7)
    known = Ridge(alpha=0.7 * weights.mean()).fit(x, y, sample_weight=weights)
    assert inner @ y == pytest.approx(known.coef_, abs=1e-9)
    assert share @ (y - x @ inner @ y) == pytest.approx(known.intercept_)
    a, b = draw.randint(1, 4, (2, 50))
    assert filter_script.kappa(a, b) == pytest.approx(cohen_kappa_score(a, b, weights="quadratic"))
    good, scores = draw.rand(50, 1) < 0.4, draw.randn(50, 1).round(1)
    assert filter_script.auroc(scores, good, np.zeros(50))[0] == pytest.approx(
        roc_auc_score(good[:, 0], scores[:, 0])
    )
    assert (
        filter_script.auroc(scores + 5 * good, good, good[:, 0])[0] == 0
    )  # no pairs within a stratum
    assert np.isnan(filter_script.auroc(scores + 5 * good, good, good[:, 0], np.nan)[0])
    assert (
        filter_script.cramers_v(a, a) == pytest.approx(1) and filter_script.cramers_v(a, b) < 0.25
    )
    groups = draw.randint(0, 9, 20)
    maps = filter_script.out_of_fold(x, weights, groups, 0)
    assert (maps[:, groups[:, None] == groups] == 0).all() and maps.sum(2) == pytest.approx(
        1
    )  # none from its group
    x, groups = (
        np.repeat(np.eye(10), 5, 0),
        np.repeat(np.arange(10), 5),
    )  # a few good groups: resamples may have none
    y = np.where(np.isin(groups, (2, 7)), 3.0, 1.0)
    x = np.hstack([x, y[:, None] * 9])
    measured, _, _ = filter_script.cross_validate(x, y, np.ones(50), y > 2, groups, np.zeros(50), 0)
    assert measured["auroc"] == 1 and measured["ci"][0] > 0.9


def test_the_filter_keeps_what_the_selector_finds_good(rated, selector, tmp_path, run, refused):
    flags = [rated / "truth.csv", "--reference", rated / "real.csv", "--selector", selector]
    run(filter_script, *flags, "--min-alignment", 0.3, "--out", tmp_path / "kept")
    rows = list_images(str(tmp_path / "kept"))
    assert np.mean([row["fields"]["truth"] == "3" for row in rows]) > 0.7 and len(rows) > 30
    row = decisions(tmp_path / "kept")["000.png"]
    assert 0 <= float(row["quality"]) <= 1 and 0 <= float(row["alignment"]) <= 1
    assert "judges at 64 pixels" in refused(
        filter_script, *flags, "--resolution", 128, "--out", tmp_path / "no"
    )


def test_a_selector_is_written_with_the_same_bytes_each_time(selector, tmp_path):
    loaded = filter_script.load_selector(selector)
    filter_script.save_selector(tmp_path / "again", loaded.pop("spec"), loaded)
    assert (tmp_path / "again").read_bytes() == Path(selector).read_bytes()


def test_a_selector_file_that_is_not_whole_is_refused(selector, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(selector, "np") as file:
        metadata = file.metadata()
    tensors = load_file(selector)
    assert not any(
        str(tmp_path.parent) in text or ".png" in text for text in metadata.values()
    )  # no paths
    damaged = [
        (tensors | {"head.weight": tensors["head.weight"] * np.nan}, metadata),
        (tensors | {"more": np.zeros(1, np.float32)}, metadata),
        (tensors, {}),
        (tensors | {"head.weight": tensors["head.weight"][:9]}, metadata),
        (tensors, metadata | {"version": "2"}),
        *(
            (tensors, metadata | {"spec": metadata["spec"].replace(part, other)})
            for part, other in (
                ('"size": 64', '"size": -1'),
                ('"good"', '"goods"'),
                ('"warnings": []', '"warnings": [1]'),
            )
        ),
    ]
    for n, (values, said) in enumerate(damaged):
        save_file(values, tmp_path / f"{n}.safetensors", said)
        with pytest.raises(SystemExit):
            filter_script.load_selector(str(tmp_path / f"{n}.safetensors"))
    (tmp_path / "torn").write_bytes(Path(selector).read_bytes()[:1000])
    with pytest.raises(SystemExit):
        filter_script.load_selector(str(tmp_path / "torn"))
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.strip().splitlines())


def test_suggestions_are_half_unsure_half_far_apart_and_never_rated_before():
    draw = np.random.RandomState(0)
    vectors, quality = draw.randn(60, 4), np.linspace(0, 1, 60)
    vectors[[3, 4]] += 50
    chosen = filter_script.suggest(vectors, quality, [29, 4], 10)
    assert sorted(chosen[:5]) == [27, 28, 30, 31, 32]
    assert (
        3 not in chosen and not {29, 4} & set(chosen) and len(set(chosen)) == 10
    )  # 3 lies beside 4, which is rated
    assert filter_script.suggest(vectors, None, [], 2)[0] in (3, 4)


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = """<script>
const key = k => document.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true, cancelable: true}));
const log = JSON.parse(sessionStorage.getItem("log") || "[]");
const rate = (k, guess) => { if (guess) key(guess); log.push([$("picture").innerHTML, k, guess]); key(k); };
addEventListener("load", () => {
  if (!log.length) {
    $("name").value = 'Dr. "A", Ünal'; $("start").requestSubmit();
    for (let n = 0; n < 8; n++) rate("123"[n % 3], n % 2 ? "r" : "g");
    key("2"); key("u");  // a slip, taken back
    $("note").value = 'soft, "very"'; $("note").dispatchEvent(new Event("input"));
    rate("1", "r"); key("s");  // and one is skipped
    sessionStorage.setItem("log", JSON.stringify(log)); location.reload();
  } else {
    for (let n = 0; n < 10; n++) n % 2 ? rate("321"[n % 3]) : document.querySelector('[data-key="2"]').click();
    window.Blob = function (parts) { this.text = parts.join(""); };  // read at once: headless Chromium does not wait
    URL.createObjectURL = blob => { document.body.replaceChildren(Object.assign(document.createElement("pre"), {id: "out",
      textContent: btoa(unescape(encodeURIComponent(JSON.stringify({text: blob.text, log}))))})); return "#"; };
    $("save").click();
  }
});
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here to open the rating page in")
def test_the_rating_page_saves_what_was_pressed_across_a_reload(sets, tmp_path, run):
    run(
        filter_script,
        sets[1],
        "--rating-page",
        tmp_path / "rate.html",
        "--suggest",
        20,
        "--blind",
        sets[0],
        "--resolution",
        64,
    )
    text = (tmp_path / "rate.html").read_text()
    facts = json.loads(base64.b64decode(re.search('const FACTS = "(.*)"', text)[1]))
    images = json.loads(re.search(r"const IMAGES = (\[.*\]);", text)[1])
    assert len(facts) == len(images) == 20 and sum(fact[4] for fact in facts) == 4
    assert (
        str(tmp_path.parent) not in text and "http:" not in text and "https:" not in text
    )  # no name in clear, no server
    (tmp_path / "driven.html").write_text(text + DRIVER)
    for attempt in range(
        3
    ):  # on a busy machine Chromium may show the page as it was before the reload
        shown = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path}/profile-{attempt}",
                "--virtual-time-budget=20000",
                "--dump-dom",
                f"file://{tmp_path}/driven.html",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        output = re.search('<pre id="out">(.*?)</pre>', shown)
        if output:
            break
    found = json.loads(base64.b64decode(output[1]))
    (tmp_path / "ratings.csv").write_text(found["text"])
    rows = {row["path"]: row for row in filter_script.read_ratings([str(tmp_path / "ratings.csv")])}
    assert len(rows) == 19  # one was skipped
    for picture, rating, *guess in found["log"]:
        path, _, _, _, is_real = facts[images.index(picture)]
        row = rows[path]
        assert (
            row["rating"] == int(rating)
            and row["real"] == str(is_real)
            and row["expert"] == 'Dr. "A", Ünal'
        )
        assert row["guess"] == (
            {"r": "real", "g": "generated"}[guess[0]] if guess and guess[0] else ""
        )
    assert [row["comment"] for row in rows.values()].count('soft, "very"') == 1


def test_agreement_prints_kappa_and_who_took_real_for_generated(tmp_path, run, capsys):
    header = filter_script.RATING_COLUMNS.split(",")
    for name, shift in (("anna", 0), ("ben", 1)):
        write_csv(
            tmp_path / f"{name}.csv",
            header,
            [
                [
                    f"{i}.png",
                    1 + (i + shift * (i < 3)) % 3,
                    "",
                    3,
                    "",
                    "",
                    "",
                    "",
                    "real" if i % 4 else "generated",
                    i % 2,
                ]
                for i in range(12)
            ],
        )
    run(filter_script, "--agreement", tmp_path / "anna.csv", tmp_path / "ben.csv")
    said = capsys.readouterr().out
    assert "anna, ben: weighted kappa 0.6" in said and "12 shared images" in said
    assert (
        "anna: real taken for real 6, for generated 0; generated taken for real 3, for generated 3"
        in said
    )
    for name in ("carl", "dora"):
        write_csv(
            tmp_path / f"{name}.csv",
            ["image_path", "rating"],
            [[f"sub\\{i}.png", 2] for i in range(5)],
        )
    run(filter_script, "--agreement", tmp_path / "carl.csv", tmp_path / "dora.csv")
    assert "one and the same rating for all 5" in capsys.readouterr().out
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "0.png").touch()
    assert filter_script.read_ratings([tmp_path / "carl.csv"])[0]["path"] == str(
        tmp_path / "sub" / "0.png"
    )  # written on Windows
    (tmp_path / "torn.csv").write_text("image_path,rating\na\0b.png,2\n")
    assert not os.path.exists(
        os.path.realpath(filter_script.read_ratings([tmp_path / "torn.csv"])[0]["path"])
    )


def test_ratings_of_one_image_are_refused_even_by_force(tmp_path, refused, run):
    Image.new("RGB", (64, 64), (90, 30, 20)).save(tmp_path / "a.png")
    write_csv(tmp_path / "r.csv", ["image_path", "rating"], [["a.png", "3"]])
    assert "one image or group alone" in refused(
        filter_script, "--fit", tmp_path / "r.csv", "--force", "--out", tmp_path / "s"
    )
    for i in range(12):
        wound(i).save(tmp_path / f"{i}.png")
    write_csv(tmp_path / "r.csv", ["image_path", "rating"], [[f"{i}.png", "3"] for i in range(12)])
    run(filter_script, "--fit", tmp_path / "r.csv", "--force", "--out", tmp_path / "s")
    assert (
        filter_script.load_selector(tmp_path / "s")["spec"]["cv"]["spearman"] is None
        and b"NaN" not in (tmp_path / "s").read_bytes()
    )


@pytest.mark.parametrize("whole", [0, 1])
def test_a_rating_without_a_picture_is_refused_in_whatever_row(whole, tmp_path, run, refused):
    lines = ['{"rating": "3"}', '{"image_path": "a.png", "rating": "1"}']
    (tmp_path / "r.jsonl").write_text("\n".join([lines[whole], lines[1 - whole]]) + "\n")
    assert "at least the columns image_path and rating" in refused(
        filter_script, "--fit", tmp_path / "r.jsonl"
    )


def test_several_experts_of_one_image_weigh_by_their_level(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for name, rating, level in (("anna", 3, 3), ("ben", 1, 1)):
        metrics.write_csv(
            tmp_path / f"{name}.csv",
            ["image_path", "rating", "expert_level"],
            [["a.png", rating, level]],
        )
    _, means, weights, _, _ = filter_script.gather(
        filter_script.read_ratings([tmp_path / "anna.csv", tmp_path / "ben.csv"])
    )
    assert means == pytest.approx([2.5]) and weights == pytest.approx([4 / 3])


def test_reliability_is_its_definition():
    brier, error = filter_script.reliability(
        np.array([0.95, 0.95, 0.15, 0.15]), np.array([True, False, False, False])
    )
    assert brier == pytest.approx((0.0025 + 0.9025 + 2 * 0.0225) / 4) and error == pytest.approx(
        (0.9 + 0.3) / 4
    )


def test_usable_is_good_where_that_is_asked_for(tmp_path, run):
    for i in range(12):
        wound(i).save(tmp_path / f"{i}.png")
    metrics.write_csv(
        tmp_path / "r.csv", ["image_path", "rating"], [[f"{i}.png", 1 + i % 3] for i in range(12)]
    )
    for flags, good, count, cut in (((), 3, 4, 1), (("--good", 2), 2, 8, 0)):
        run(filter_script, "--fit", tmp_path / "r.csv", *flags, "--force", "--out", tmp_path / "s")
        selector = filter_script.load_selector(tmp_path / "s")
        assert (selector["spec"]["good"], selector["spec"]["n"]["good"]) == (good, count)
        assert selector["cal.platt"][1] == selector["head.cut"][cut]


def test_the_share_of_real_images_that_pass_is_of_those_that_the_selector_finds_good(
    rated, selector
):
    loaded = filter_script.load_selector(selector)
    rows, pixels = metrics.load_pixels(list_images(str(rated / "real.csv")), 64)
    given = filter_script.apply_selector(
        loaded, filter_script.quality_features(pixels, "cpu"), rows
    )
    assert loaded["spec"]["cv"]["real_pass"] == np.mean(given["quality"] >= 0.5) < 1


def test_the_interval_of_the_auroc_resamples_groups_with_all_their_images():
    x, groups = (
        np.tile([[1.0], [2], [3], [4]], (10, 1)),
        np.repeat(np.arange(10), 4),
    )  # ten times the same group
    y = np.tile([1.0, 3, 1, 3], 10)
    measured, _, _ = filter_script.cross_validate(x, y, np.ones(40), y > 2, groups, np.zeros(40), 0)
    assert measured["auroc"] == 0.75 and measured["ci"] == [0.75, 0.75]


def test_agreement_says_how_sure_it_is(tmp_path, run, capsys):
    r = np.random.RandomState(0)
    a, guess = r.randint(1, 4, 60), np.repeat(["real", "generated"], (9, 3)).repeat(5)
    b = np.where(r.rand(60) < 0.5, a, r.randint(1, 4, 60))
    for name, given in (("anna", a), ("ben", b)):
        metrics.write_csv(
            tmp_path / f"{name}.csv",
            ["image_path", "rating", "expert", "guess", "real"],
            [
                [f"{i}.png", given[i], name, guess[i] if i % 5 == 0 else "", int(i < 30)]
                for i in range(60)
            ],
        )
    run(filter_script, "--agreement", tmp_path / "anna.csv", tmp_path / "ben.csv")
    said = capsys.readouterr().out
    again = [filter_script.kappa(a[i], b[i]) for i in r.randint(60, size=(1000, 60))]
    found = [float(x) for x in re.search(r"95 % (\S+) to (\S+),", said).groups()]
    assert found == pytest.approx(np.percentile(again, (2.5, 97.5)), abs=0.05)
    assert (
        said.count("p 0.18 of guessing") == 2
    )  # of 6 real all, of 6 generated 3 taken for real: 2 * 20 / 220
