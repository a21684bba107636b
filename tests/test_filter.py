"""Filtering: what stays is like real images, what goes says why, and nothing is lost."""

import base64
import io
import json
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, needs_chromium, page_faults
from conftest import write_selector
from PIL import Image, ImageFilter, ImageOps

import filter as filter_script
import metrics
import phantoms
from metrics import Row, list_images, load_pixels, read_table, write_csv


def wound(seed, size=96):
    return Image.fromarray(phantoms.draw("inflammatory ulcer", seed, size)[0])


def as_pixels(images):
    arrays = [np.array(image.convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(real, generated): 80 wounds; 30 fresh ones, 15 of no use, 6 copies, 3 near-equal pairs."""
    real = tmp_path_factory.mktemp("real")
    generated = tmp_path_factory.mktemp("generated")
    draw = np.random.RandomState(0)
    for i in range(80):
        wound(i).save(real / f"{i:02d}.png")
    for i in range(30):
        wound(1000 + i).save(generated / f"fresh-{i:02d}.png")
    for i in range(3):
        noise = Image.fromarray(draw.randint(0, 255, (96, 96, 3)).astype(np.uint8))
        noise.save(generated / f"bad-noise-{i}.png")
        grey = (80 + 40 * i,) * 3
        Image.new("RGB", (96, 96), grey).save(generated / f"bad-grey-{i}.png")
        film = Image.fromarray(phantoms.draw("normal chest", i, 96)[0])
        film.save(generated / f"bad-film-{i}.png")
        blurred = wound(2000 + i).filter(ImageFilter.GaussianBlur(6))
        blurred.save(generated / f"bad-blur-{i}.png")
        ImageOps.invert(wound(2000 + i)).save(generated / f"bad-negative-{i}.png")
        wound(i).save(generated / f"copy-exact-{i}.png")
        ImageOps.mirror(wound(40 + i)).save(generated / f"copy-mirror-{i}.jpg", quality=70)
        twin = wound(3000 + i)
        twin.save(generated / f"twin-{i}-a.png")
        twin.save(generated / f"twin-{i}-b.jpg", quality=95)
    return str(real), str(generated)


@pytest.fixture
def few(sets, tmp_path):
    """Of both folders each third image."""
    folders = []
    for name, source in zip(("real", "generated"), sets, strict=True):
        (tmp_path / name).mkdir()
        for path in sorted(Path(source).iterdir())[::3]:
            shutil.copy(path, tmp_path / name)
        folders.append(str(tmp_path / name))
    return folders


@pytest.fixture
def filtered(run, tmp_path):
    """filtered(sets, flag, …): filter into tmp_path/kept; returns that folder."""

    def call(sets, *flags):
        out = tmp_path / "kept"
        run(filter_script, sets[1], "--reference", sets[0], "--out", out, *flags)
        return out

    return call


def decisions(out):
    return {row["file"]: row for row in read_table(Path(out) / "decisions.csv")}


def share_kept(out, start):
    kept = []
    for name, row in decisions(out).items():
        if name.startswith(start):
            kept.append(row["kept"] == "1")
    return sum(kept) / len(kept)


# ---------------------------------------------------------------- the judgement


def test_the_calibrated_filter_keeps_fresh_images_and_refuses_what_is_unlike_the_real_ones(
    sets, filtered, capsys
):
    out = filtered(sets, "--calibrate", 0.05)

    assert share_kept(out, "fresh") >= 0.8
    assert share_kept(out, "bad") == 0
    assert "calibrated on 80 real images" in capsys.readouterr().out
    row = decisions(out)["bad-noise-0.png"]
    columns = ["file", "kept", "reason", "nearest", "texture", "colour", "grain", "quality"]
    assert list(row) == columns
    assert row["kept"] == "0"
    assert row["reason"].endswith(" unlike the real images")
    assert row["nearest"].endswith(".png")


def test_where_nothing_is_kept_it_says_what_to_look_at(sets, filtered, capsys):
    films = Path(sets[1]).parent / "films"
    films.mkdir()
    for i in range(3):
        Image.fromarray(phantoms.draw("normal chest", i, 96)[0]).save(films / f"{i}.png")

    filtered((sets[0], films), "--calibrate", 0.05, "--dry-run")

    assert "nothing is kept: is --reference of the same kind?" in capsys.readouterr().out


def test_copies_and_duplicates_go_and_the_best_of_each_stays(sets, filtered):
    out = filtered(sets, "--drop-copies", "--drop-duplicates")

    assert share_kept(out, "copy") == 0
    assert share_kept(out, "fresh") >= 0.85
    assert share_kept(out, "twin") == 0.5
    for i in range(3):
        reasons = [decisions(out)[f"twin-{i}-{end}"]["reason"] for end in ("a.png", "b.jpg")]
        first, second = sorted(reasons)
        assert first == ""
        assert second.startswith(f"duplicate of twin-{i}-")


def test_a_fixed_limit_says_what_share_of_real_images_it_would_refuse(sets, filtered, capsys):
    out = filtered(sets, "--min-ssim", 0.9)

    assert "--min-ssim 0.9 would refuse 100% of the real images" in capsys.readouterr().out
    assert share_kept(out, "fresh") == 0


def test_lpips_limits_and_joins_the_scores_where_its_network_is_there(monkeypatch):
    """Any distance serves for LPIPS, whose weights no test has: here the difference of means."""
    real = as_pixels([wound(i, 64) for i in range(24)])
    rows = [Row("", "")] * 24
    dark = real[:2] // 4

    def means_apart(pixels, network, device, batch_size, others):
        means = pixels.float().mean((1, 2, 3))
        return (means[:, None] - others.float().mean((1, 2, 3))).abs().numpy()

    monkeypatch.setattr(filter_script, "load_lpips", lambda net, device: net)
    monkeypatch.setattr(filter_script, "lpips_matrix", means_apart)
    reference = filter_script.measure_reference(rows, real, "cpu", max_lpips=40)
    reasons, scores = reference.judge(torch.cat([real[:2], dark]), rows[:4])

    assert reasons == ["", "", "--max-lpips 40", "--max-lpips 40"]
    assert "lpips" in reference.real_scores
    assert (scores["lpips"][:2] == 0).all()


@pytest.mark.parametrize("is_there", [True, False])
def test_lpips_auto_is_alex_where_it_can_be_had_and_else_one_line(is_there, monkeypatch, capsys):
    real = as_pixels([wound(i, 64) for i in range(24)])
    if is_there:
        monkeypatch.setattr("metrics.PROBLEMS", [])
        monkeypatch.setattr("metrics.get_weights", lambda name: name)
    monkeypatch.setattr(filter_script, "load_lpips", lambda net, device: net)
    monkeypatch.setattr(filter_script, "lpips_matrix", lambda pixels, **_: np.eye(24))
    reference = filter_script.measure_reference([Row("", "")] * 24, real, "cpu")
    assert ("lpips" in reference.real_scores) == is_there
    assert capsys.readouterr().err.count("LPIPS none") == (not is_there)


def test_a_picture_that_is_twice_in_the_reference_does_not_hide_its_copies(
    sets, filtered, tmp_path
):
    shutil.copytree(sets[0], tmp_path / "real")
    for i in range(5):
        shutil.copy(tmp_path / "real" / f"{60 + i}.png", tmp_path / "real" / f"again-{i}.png")

    out = filtered((tmp_path / "real", sets[1]), "--drop-copies", "--drop-duplicates")

    assert share_kept(out, "copy") == 0
    assert share_kept(out, "twin") == 0.5


def test_a_copy_stands_next_to_what_it_is_a_copy_of(few, filtered, tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    for i in range(0, 36, 3):
        crop = wound(i).crop((6, 2, 92, 88)).resize((96, 96))
        if i % 2:
            crop = ImageOps.mirror(crop)
        crop.save(copies / f"{i:02d}.png")

    out = filtered((few[0], copies), "--drop-copies", "--dry-run")

    found = [row for row in decisions(out).values() if row["reason"].startswith("copy")]
    assert len(found) > 9
    for row in found:
        assert row["file"] == row["nearest"]


def test_a_reference_of_one_picture_is_refused(sets, tmp_path, refused):
    same = tmp_path / "same"
    same.mkdir()
    for i in range(20):
        wound(0).save(same / f"{i}.png")

    message = refused(
        filter_script, sets[1], "--reference", same, "--drop-copies", "--out", tmp_path / "kept"
    )

    assert "all images are of one patient" in message


def test_images_judged_a_few_at_a_time_are_judged_as_the_whole_folder(few, filtered):
    flags = ["--calibrate", 0.1, "--min-ssim", 0.2, "--drop-copies", "--dry-run"]
    whole = decisions(filtered(few, *flags))
    real_rows, real = load_pixels(list_images(few[0]), 96)
    rows, pixels = load_pixels(list_images(few[1]), 96)

    limits = {"calibrate": 0.1, "min_ssim": 0.2, "drop_copies": True}
    reference = filter_script.measure_reference(real_rows, real, "cpu", **limits)

    for start in range(0, len(rows), 7):
        part = rows[start : start + 7]
        reasons, _ = reference.judge(pixels[start : start + 7], part)
        assert reasons == [whole[row.file_name]["reason"] for row in part]


def test_a_grey_photograph_among_the_real_ones_does_not_excuse_grey_ones():
    colour = [wound(n) for n in range(70)]
    grey = as_pixels([image.convert("L") for image in colour])
    pixels = as_pixels(colour)
    rows = [Row("", "")] * 41
    real = torch.cat([pixels[:40], grey[40:41]])

    reference = filter_script.measure_reference(rows, real, "cpu", calibrate=0.1)
    fresh, _ = reference.judge(pixels[42:], rows[:28])
    fresh_grey, _ = reference.judge(grey[42:], rows[:28])

    assert fresh.count("") >= 20
    assert fresh_grey.count("") == 0


def test_a_corner_that_is_nearly_black_in_all_real_images_does_not_outweigh_the_rest():
    pixels = as_pixels([wound(n) for n in range(41)])
    pixels[:40, :, 72:, 72:] = (torch.arange(40) % 2).byte()[:, None, None, None]
    rows = [Row("", "")] * 40

    reference = filter_script.measure_reference(rows, pixels[:40], "cpu", calibrate=0.1)
    _, scores = reference.judge(pixels[40:], rows[:1])

    assert scores["texture"][0] < 10 * np.median(reference.real_scores["texture"])


def test_patients_are_not_compared_with_themselves():
    """Two films of one patient lie close; leaving one out alone would call all others unlike."""
    pixels = as_pixels([wound(n, 64) for n in range(20)])
    twice = pixels.repeat_interleave(2, 0)
    twice[1::2] = (twice[1::2].float() * 0.98).byte()
    together = [Row("", "", group=str(n // 2)) for n in range(40)]
    apart = [Row("", "") for _ in range(40)]

    by_patient = filter_script.measure_reference(together, twice, "cpu")
    by_image = filter_script.measure_reference(apart, twice, "cpu")

    patients = np.arange(40) // 2
    assert (nearest_of_the_reference(by_patient, twice) // 2 != patients).all()
    assert (nearest_of_the_reference(by_image, twice) // 2 == patients).mean() > 0.9


def nearest_of_the_reference(reference, pixels):
    vectors = {name: block.real for name, block in reference.blocks.items()}
    _, nearest = reference.score(pixels, vectors, reference.same_patient)
    return nearest


def test_the_threshold_is_the_conformal_quantile():
    ranks = np.arange(1, 20) / 20

    assert filter_script.conformal_threshold(ranks, 0.05) == 0.95  # the largest of 19
    assert filter_script.conformal_threshold(ranks, 0.5) == 0.5
    assert filter_script.conformal_threshold(ranks[:18], 0.05) == float("inf")


def test_95_of_100_unseen_images_pass_all_scores_together():
    draw = np.random.RandomState(0)
    passed = []
    for _ in range(200):
        values = draw.randn(3, 80)
        real = {str(name): row[:60] for name, row in enumerate(values)}
        reference = filter_script.Reference(None, {}, {}, {}, real_scores=real)
        filter_script.set_threshold(reference, 0.05)
        worst = reference.rank({str(name): row[60:] for name, row in enumerate(values)}).max(0)
        passed.append(np.mean(worst <= reference.threshold))
    assert np.mean(passed) == pytest.approx(0.95, abs=0.02)


# ---------------------------------------------------------------- what stays, and what is written


@needs_chromium
def test_the_page_counts_shows_the_best_first_and_names_other_limits(sets, filtered, tmp_path):
    generated = tmp_path / "generated"
    shutil.copytree(sets[1], generated)
    hostile = "<img src=x onerror=x>.png"
    shutil.copy(generated / "fresh-00.png", generated / hostile)

    out = filtered((sets[0], generated), "--calibrate", 0.05, "--drop-copies", "--dry-run")

    assert page_faults(out / "filter.html", tmp_path / "phone") == []
    page = (out / "filter.html").read_text()
    found = decisions(out)
    kept = [name for name, row in found.items() if row["kept"] == "1"]
    assert f"Kept {len(kept)} of {len(found)} generated images." in page
    assert hostile not in page
    captions = re.findall("<figcaption>(.*?), quality (.*?)\ngenerated: (.*?)\nreal: ", page)
    assert len(captions) > 50
    for good in (True, False):
        values = [float(value) for reason, value, _ in captions if (reason == "kept") == good]
        assert values == sorted(values, reverse=True)
    limits = dict(re.findall("<tr><td>(0[.0-9]+)<td>.*?<td>([0-9]+) of", page))
    passing = sum(
        row["reason"] in ("", "copy") or "copy" in row["reason"] for row in found.values()
    )
    assert len(kept) <= int(limits["0.05"]) <= passing
    assert int(limits["0.05"]) >= int(limits["0.1"]) >= int(limits["0.5"])
    assert "This limit alone: labels, copies, duplicates, colours or other flags may refuse" in page
    assert "stands to the left of the real image nearest in texture, or" in page


def test_two_images_of_one_name_are_refused(sets, tmp_path, refused):
    folder = tmp_path / "set"
    folder.mkdir()
    twin = folder / str(tmp_path)[1:]  # ./tmp/…/x.png and /tmp/…/x.png
    twin.mkdir(parents=True)
    wound(1).save(tmp_path / "x.png")
    wound(2).save(twin / "x.png")
    names = [[str(tmp_path / "x.png")], [str(tmp_path / "x.png")[1:]]]
    write_csv(folder / "metadata.csv", ["file_name"], names)
    flags = ["--min-ssim", -1, "--out", tmp_path / "kept"]

    message = refused(filter_script, folder, "--reference", sets[0], *flags)

    assert "another image would also be called" in message


def test_a_dry_run_leaves_the_copies_of_an_earlier_filtering(sets, filtered):
    first = contents(filtered(sets, "--min-ssim", 0))
    second = contents(filtered(sets, "--calibrate", 0.1, "--dry-run"))

    assert second.keys() == first.keys()
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"decisions.csv", "filter.html"}


def test_filtering_again_by_other_rules_leaves_no_copy_of_what_is_refused_now(sets, filtered):
    filtered(sets, "--min-ssim", 0)
    out = filtered(sets, "--calibrate", 0.05)

    kept = {name for name, row in decisions(out).items() if row["kept"] == "1"}
    assert {path.name for path in out.iterdir()} == kept | {
        "metadata.csv",
        "decisions.csv",
        "filter.html",
        "README.md",
    }
    assert len(kept) < 57


def test_the_kept_folder_is_ready_for_training_and_nothing_is_deleted(sets, filtered, tmp_path):
    generated = tmp_path / "generated"
    shutil.copytree(sets[1], generated)
    rows = [[path.name, f"a caption, {path.stem}", "ulcer"] for path in sorted(generated.iterdir())]
    write_csv(generated / "manifest.csv", ["file", "prompt", "label"], rows)
    before = contents(generated)

    out = filtered((sets[0], generated), "--calibrate", 0.05)
    first = contents(out)
    filtered((sets[0], generated), "--calibrate", 0.05)  # the same again: the same folder

    assert contents(generated) == before
    assert contents(out) == first
    kept = list_images(str(out))
    names = {name for name, row in decisions(out).items() if row["kept"] == "1"}
    assert {row.file_name for row in kept} == names
    for row in kept:
        assert row.label == "ulcer"
        assert row.caption.startswith("a caption, ")
        assert first[row.file_name] == before[row.file_name]
        assert 0 < float(row.fields["quality"]) <= 1


def test_a_table_of_windows_that_names_a_file_twice_is_kept(sets, filtered, tmp_path):
    shutil.copytree(sets[1], tmp_path / "generated" / "img")
    rows = []
    for path in sorted((tmp_path / "generated" / "img").iterdir()):
        rows.append([f"img\\{path.name}", "one"])
        rows.append([f"img\\{path.name}", "two"])
    table = tmp_path / "generated" / "metadata.csv"
    write_csv(table, ["file_name", "text"], rows)

    out = filtered((sets[0], table), "--calibrate", 0.05)

    copied = {path.name for path in (out / "img").iterdir()}
    assert len(copied) > 20
    assert len(list_images(str(out))) == 2 * len(copied)
    assert len(read_table(out / "decisions.csv")) == len(rows)


def test_links_in_a_set_are_followed_and_what_they_lead_to_is_left_alone(
    sets, tmp_path, filtered, refused
):
    shutil.copytree(sets[1], tmp_path / "store")
    (tmp_path / "set").mkdir()
    for path in (tmp_path / "store").iterdir():
        (tmp_path / "set" / path.name).symlink_to(f"../store/{path.name}")
    before = contents(tmp_path / "store")
    flags = [tmp_path / "set", "--reference", sets[0], "--keep", 4]

    message = refused(filter_script, *flags, "--out", tmp_path / "store")
    out = filtered((sets[0], tmp_path / "set"), "--keep", 4)

    assert "files that filter.py did not write" in message
    rows = list_images(str(out))
    assert len(rows) == 4
    for row in rows:
        assert Path(row.path).is_file() and not Path(row.path).is_symlink()
    assert contents(tmp_path / "store") == before


def test_a_filtering_is_typed_again_however_its_tables_spell_paths(sets, filtered, tmp_path):
    tables = []
    for folder, spelling in zip(sets, ("{}", "./{}"), strict=True):
        copied = tmp_path / Path(folder).name
        shutil.copytree(folder, copied)
        names = []
        for path in sorted(Path(folder).iterdir()):
            names.append([spelling.format(path if spelling == "{}" else path.name), "ulcer"])
        write_csv(copied / "metadata.csv", ["file_name", "label"], names)
        tables.append(copied / "metadata.csv")

    for _ in range(2):
        out = filtered((sets[0], tables[1]), "--keep", 4, "--mix", tables[0])

        assert len(list_images(str(out))) == 4 + len(os.listdir(sets[0]))


def test_absolute_names_are_copied_below_the_folder(sets, filtered, tmp_path):
    before = contents(sets[1])
    table = tmp_path / "metadata.csv"
    write_csv(table, ["file_name"], [[str(Path(sets[1], name))] for name in sorted(before)])

    out = filtered((sets[0], table), "--keep", 5)

    rows = list_images(str(out))
    assert len(rows) == 5
    for row in rows:
        assert out in Path(row.path).parents
    assert contents(sets[1]) == before


def test_a_dry_run_copies_nothing_and_an_unreadable_image_is_a_decision(
    sets, filtered, tmp_path, capsys
):
    generated = tmp_path / "generated"
    shutil.copytree(sets[1], generated)
    (generated / "torn.png").write_bytes(b"\x89PNG")

    out = filtered((sets[0], generated), "--calibrate", 0.1, "--dry-run")

    assert set(os.listdir(out)) == {"decisions.csv", "filter.html"}
    assert "next:" not in capsys.readouterr().out
    assert decisions(out)["torn.png"]["reason"] == "unreadable"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "no limit to filter by"),
        (["--calibrate", "2"], "--calibrate: 2: give a number"),
        (["--calibrate", "0.05", "--features", "no-such-file"], "no-such-file"),
        (["--calibrate", "0.001"], "80 real images, needs 999"),
        (["--min-ssim", "nan"], "--min-ssim: nan"),
        (["--max-lpips", "0.3", "--lpips", "none"], "--max-lpips"),
        (["--calibrate", "0.05", "--batch-size", "0"], "--batch-size: 0"),
        (["--drop-copies", "--group-column", "patient"], "--group-column patient"),
        (["--drop-copies", "--share", "30"], "--share: needs --mix"),
        (["--drop-copies", "--blind", "."], "--blind: needs --rating-page"),
        (["--drop-copies", "--good", "2"], "--good: needs --fit"),
        (["--drop-copies", "--selector", "no-such-file"], "no such file"),
        (["--rating-page", "x.html", "--agreement", __file__], "not allowed with"),
    ],
)
def test_bad_flags_are_one_line(flags, message, sets, tmp_path, refused):
    out = tmp_path / "kept"

    assert message in refused(filter_script, sets[1], "--reference", sets[0], "--out", out, *flags)
    assert not out.exists()


def test_folders_that_do_not_serve_are_refused(sets, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "kept"
    flags = ["--calibrate", 0.05, "--out"]
    inside = Path(sets[1]) / "kept"

    message = refused(filter_script, tmp_path / "empty", "--reference", sets[0], *flags, out)
    assert "no images" in message
    message = refused(filter_script, sets[1], "--reference", tmp_path / "absent", *flags, out)
    assert "no such file" in message
    message = refused(filter_script, sets[1], "--reference", sets[0], *flags, inside)
    assert "in it: give another folder" in message


def test_a_folder_that_holds_other_files_is_left_as_it_is(sets, tmp_path, refused):
    shutil.copytree(sets[1], tmp_path / "all" / "generated")
    folder = tmp_path / "all" / "generated"
    table = folder / "metadata.csv"
    write_csv(table, ["file_name"], [[path.name] for path in sorted(folder.iterdir())])
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "fresh-00.png").write_bytes(b"precious")  # the name of a generated image
    flags = ["--reference", sets[0], "--calibrate", 0.05, "--out"]

    for data, out in ((table, folder), (table, tmp_path), (folder, folder), (folder, "all")):
        message = refused(filter_script, data, *flags, tmp_path / out)
        assert "in it: give another folder" in message
    message = refused(filter_script, sets[1], *flags, kept)

    assert "files that filter.py did not write" in message
    assert contents(kept) == {"fresh-00.png": b"precious"}


def test_keeping_n_takes_the_best_of_each_cluster():
    draw = np.random.RandomState(0)
    vectors = np.repeat(draw.randn(5, 8) * 3, 4, axis=0) + draw.randn(20, 8) * 0.05
    quality = draw.uniform(0.2, 1, 20)

    chosen = filter_script.best_and_diverse(vectors, quality, 6)

    best = [4 * cluster + quality[4 * cluster :][:4].argmax() for cluster in range(5)]
    assert sorted(chosen[:5]) == best
    assert chosen[0] == quality.argmax()


def test_keeping_n_takes_no_image_twice_where_many_are_equal():
    equal = filter_script.best_and_diverse(np.zeros((7, 3)), np.ones(7), 7)
    repeated = np.tile(np.random.RandomState(1).randn(1, 9), (80, 1))
    different = np.random.RandomState(2).randn(20, 9) * 5

    chosen = filter_script.best_and_diverse(np.vstack([repeated, different]), np.ones(100), 20)

    assert len(set(equal)) == 7
    assert len(set(chosen) - set(range(80))) >= 19


def small_sets(folder, count=8):
    """Folders of 64-pixel wounds: generated with captions, labels, seeds; real with patients."""
    for name, first in (("new", 500), ("real", 0)):
        (folder / name).mkdir()
        for i in range(count):
            wound(first + i, 64).save(folder / name / f"{i}.png")
    paths = ["/home/mueller/base", "/home/mueller/lora.safetensors:1"]
    rows = [[f"{i}.png", f"wound {i}", "ulcer", 7 + i, *paths] for i in range(count)]
    header = ["file", "prompt", "label", "seed", "base", "lora"]
    write_csv(folder / "new" / "manifest.csv", header, rows)
    rows = [[f"{i}.png", "a real one", f"p{i}"] for i in range(count)]
    write_csv(folder / "real" / "metadata.csv", ["file_name", "text", "patient_id"], rows)
    return folder / "real", folder / "new"


def test_without_a_selector_the_best_are_those_most_like_the_real_images(tmp_path, filtered):
    real, new = small_sets(tmp_path, 10)
    random = np.random.default_rng(0)
    for i in range(5):
        noise = random.normal(128, 90, (64, 64)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(new / f"{i}.png")
        shutil.copy(real / f"{5 + i}.png", new)

    out = filtered((real, new), "--keep", 5, "--dry-run")

    kept = {name for name, row in decisions(out).items() if row["kept"] == "1"}
    assert kept == {f"{i}.png" for i in range(5, 10)}


def test_with_a_selector_the_best_are_those_that_it_likes(tmp_path, filtered):
    real, new = small_sets(tmp_path)
    likes_bright = write_selector(tmp_path / "s.safetensors")
    bright = Image.open(new / "3.png").point(lambda value: 128 + value // 2)
    bright.save(new / "3.png")

    for flags, best in (([], False), (["--selector", likes_bright, "--min-quality", 0], True)):
        out = filtered((real, new), "--keep", 1, "--dry-run", *flags)
        assert (decisions(out)["3.png"]["kept"] == "1") == best


def test_fewer_than_are_to_be_kept_are_counted(tmp_path, filtered, capsys):
    filtered(small_sets(tmp_path), "--keep", 20, "--dry-run")
    assert "--keep 20: only 8 images pass the other limits" in capsys.readouterr().out


def test_a_filtering_that_is_killed_and_typed_again_ends_the_same(tmp_path, filtered, monkeypatch):
    real, new = small_sets(tmp_path)
    before = contents(new)
    out = filtered((real, new), "--keep", 5)
    whole = contents(out)
    shutil.rmtree(out)
    copied = []

    def copy_two(source, target):
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(target)
        metrics.copy_file(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(filter_script, "copy_file", copy_two)
        filtered((real, new), "--keep", 5)
    filtered((real, new), "--keep", 5)

    assert contents(out) == whole
    assert contents(new) == before


@pytest.mark.parametrize("share", [["--share", 25], []])
def test_a_mix_has_the_share_asked_for_with_captions_patients_and_provenance(
    share, tmp_path, filtered, make_run, capsys
):
    real, new = small_sets(tmp_path)
    folder = make_run({f"{i}.png": ("test", "val", "train")[min(i, 2)] for i in range(8)})

    out = filtered((real, new), "--mix", real, "--run", folder, *share)

    assert f"of 8 images, 6 are used: {folder} was trained on them" in capsys.readouterr().err

    rows = list_images(str(out))
    made = [row for row in rows if row.fields["synthetic"] == "1"]
    true = [row for row in rows if row.fields["synthetic"] == "0"]
    assert (len(made), len(true)) == (2, 6)  # 6 real ones that were trained on, a quarter generated
    for row in made:
        assert row.caption.startswith("wound ")
        assert row.label == "ulcer"
        assert row.fields["seed"]
        assert row.fields["quality"]
        assert Path(row.path).read_bytes() == (new / Path(row.file_name).name).read_bytes()
    assert {row.group for row in true} == {f"p{i}" for i in range(2, 8)}
    for row in true:
        assert row.fields["quality"] == ""
        assert Path(row.path).read_bytes() == (real / Path(row.file_name).name).read_bytes()
    assert "mueller" not in (out / "metadata.csv").read_text()  # paths as typed may name somebody


# ---------------------------------------------------------------- labels, grey kinds


def phantom(kind, seed, size=64):
    return Image.fromarray(phantoms.draw(kind, seed, size)[0])


def write_labelled(folder, images):
    """Write [(PIL image, label)] with metadata.csv into a folder; returns it as a text."""
    folder.mkdir()
    rows = []
    for n, (image, label) in enumerate(images):
        image.save(folder / f"{n:02d}.png")
        rows.append([f"{n:02d}.png", label])
    write_csv(folder / "metadata.csv", ["file_name", "label"], rows)
    return str(folder)


@pytest.fixture
def labelled_sets(tmp_path):
    """(real, generated): wounds and films; of the generated ones 0 to 2 have the other's label."""
    real = []
    generated = []
    for n in range(12):
        for kind, label in (("inflammatory ulcer", "Wound"), ("normal chest", "film")):
            real.append((phantom(kind, n), label))
            generated.append((phantom(kind, 500 + n), label.upper()))
    for n, label in ((0, "film"), (1, "wound"), (2, "film"), (23, "ct"), (22, "")):
        generated[n] = (generated[n][0], label)
    return write_labelled(tmp_path / "r", real), write_labelled(tmp_path / "g", generated)


def test_what_looks_like_another_label_is_refused(labelled_sets, filtered, capsys):
    out = filtered(labelled_sets, "--keep", 24)

    rows = decisions(out)
    refused = [name for name, row in rows.items() if row["kept"] == "0"]
    assert refused == ["00.png", "01.png", "02.png"]
    assert re.fullmatch(r"looks like wound, not film \(p 0\.0\d+\)", rows["00.png"]["reason"])
    assert float(rows["00.png"]["label_p"]) <= 0.04 < float(rows["03.png"]["label_p"])
    printed = capsys.readouterr().out
    assert "labels are checked: film, wound" in printed
    assert "2 of 24 images have no label that is checked" in printed


def test_labels_are_not_checked_where_that_is_typed(labelled_sets, filtered):
    out = filtered(labelled_sets, "--keep", 24, "--no-label-check")

    assert {row["kept"] for row in decisions(out).values()} == {"1"}


def labels_and_features(draw, count, distance):
    """Rows of three labels, two of a patient, and features that lie so far apart."""
    numbers = np.arange(3 * count) % 3
    rows = [
        Row("", f"{n}", label="abc"[n % 3], group=str(n // 6 * 3 + n % 3))
        for n in range(len(numbers))
    ]
    return rows, [draw.randn(len(rows), 10) + distance * np.eye(10)[numbers]]


def test_swapped_labels_are_found_and_few_right_ones_refused():
    draw = np.random.RandomState(0)
    check = metrics.LabelCheck(*labels_and_features(draw, 40, 4), 0)
    rows, blocks = labels_and_features(draw, 300, 4)
    swapped = [Row("", "", label="abc"["bca".index(row.label)]) for row in rows]

    own, looks, p, is_other = check.judge(blocks, rows)

    assert np.mean(looks == own) > 0.95
    assert is_other.mean() <= 0.03
    assert np.mean(p <= 0.5) == pytest.approx(0.5, abs=0.1)  # a fresh image's p is uniform
    assert check.judge(blocks, swapped)[3].mean() >= 0.9
    assert check.sentences == []


def test_where_real_images_cannot_be_told_apart_nothing_is_refused():
    draw = np.random.RandomState(0)
    check = metrics.LabelCheck(*labels_and_features(draw, 12, 0), 0)

    *_, is_other = check.judge(*reversed(labels_and_features(draw, 100, 0)))

    assert not is_other.any()
    assert len(check.sentences) == 3
    assert (
        'Real images of "a" and "b" cannot be told apart reliably (AUROC 0.' in check.sentences[0]
    )


def test_a_label_of_seven_images_is_not_checked():
    rows, (features,) = labels_and_features(np.random.RandomState(0), 8, 4)

    assert metrics.LabelCheck(rows, [features], 0).names == ["a", "b", "c"]
    assert metrics.LabelCheck(rows[:-1], [features[:-1]], 0).names == ["a", "b"]


def grey_films(first, count):
    return as_pixels([phantom("normal chest", first + n).convert("L") for n in range(count)])


def with_chroma(pixels, level):
    noise = level * np.random.RandomState(0).randn(*pixels.shape)
    noise -= noise.mean(1, keepdims=True)
    return (pixels + torch.from_numpy(noise)).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("tinted", [0, 2])
def test_a_chroma_that_no_eye_sees_changes_nothing_of_a_grey_kind(tinted):
    real = grey_films(0, 40)
    real[:tinted, 0] = real[:tinted, 0] // 2
    rows = [Row("", str(n)) for n in range(40)]
    reference = filter_script.measure_reference(rows, real, "cpu", calibrate=0.1, lpips="none")
    fresh = grey_films(100, 20)
    plain, _ = reference.judge(fresh, rows[:20])

    assert reference.judge(with_chroma(fresh, 1), rows[:20])[0] == plain
    assert plain.count("") >= 14


def test_of_a_grey_kind_what_shows_a_colour_is_refused_and_the_reason_says_what_to_do():
    rows = [Row("", str(n)) for n in range(40)]
    measure = partial(filter_script.measure_reference, rows, grey_films(0, 40), "cpu", lpips="none")
    red = grey_films(100, 5)
    red[:, 0, 20:30, 20:30] = 255

    calibrated, _ = measure(calibrate=0.05).judge(red, rows[:5])
    others, _ = measure(drop_copies=True).judge(red, rows[:5])

    assert set(calibrated) == {"in colour, but the real images are grey (sample.py --grey)"}
    assert set(others) == {""}


def letterbox(image):
    """A picture made wide, and all of that on a black square."""
    return ImageOps.pad(image.resize((192, 96)), (96, 96), Image.Resampling.LANCZOS)


def test_images_of_a_run_are_judged_as_it_prepared_its_own(tmp_path, filtered, make_run):
    real = tmp_path / "real"
    new = tmp_path / "new"
    real.mkdir()
    new.mkdir()
    for i in range(60):
        wound(i).resize((192, 96)).save(real / f"{i}.png")
    for i in range(20):
        letterbox(wound(100 + i)).save(new / f"fresh-{i}.png")
        letterbox(wound(i)).save(new / f"copy-{i}.png")
        letterbox(wound(40 + i)).save(new / f"unseen-{i}.png")
    folder = make_run({f"{i}.png": "train" if i < 40 else "test" for i in range(60)}, crop="pad")
    flags = ["--calibrate", 0.05, "--drop-copies", "--run", folder]

    out = filtered((real, new), *flags)

    assert share_kept(out, "fresh") >= 0.8
    assert share_kept(out, "unseen") >= 0.8  # it is no copy of what the generator saw
    assert share_kept(out, "copy") == 0
    filtered((real, new), *flags, "--crop", "center")  # what is typed counts more
    assert share_kept(out, "fresh") == 0


# ---------------------------------------------------------------- ratings and the selector

HEADER = ["image_path", "rating", "modality", "expert_level", "prompt", "group"]


def spoil(image, degree, number):
    """A phantom made worse: blurred, noisy, compressed, washed out or tinted; not by degree 0."""
    if not degree:
        return image
    way = number % 5
    if way == 0:
        return image.filter(ImageFilter.GaussianBlur(1.5 * degree))
    pixels = np.asarray(image).astype(float)
    if way == 1:
        pixels += np.random.RandomState(number).randn(*pixels.shape) * 16 * degree
    elif way == 2:
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=18 // degree**2)
        return Image.open(packed).convert("RGB")
    elif way == 3:
        pixels += 0.35 * degree * (150 - pixels)
    else:
        pixels[..., number % 3] += 25 * degree
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """600 phantoms of two kinds with truth.csv; ratings.csv of the first 200, 15 % wrong."""
    folder = tmp_path_factory.mktemp("rated")
    draw = np.random.RandomState(0)
    truths = []
    ratings = []
    for i in range(600):
        kind = ("inflammatory ulcer", "normal chest")[i % 2]
        modality = phantoms.KINDS[kind]
        truth = int(draw.randint(1, 4))
        image = Image.fromarray(phantoms.draw(kind, 4000 + i, 64)[0])
        spoil(image, 3 - truth, i // 2).save(folder / f"{i:03d}.png")
        rating = truth
        if draw.rand() < 0.15:
            rating = int(draw.choice([other for other in (1, 2, 3) if other != truth]))
        truths.append([f"{i:03d}.png", kind, modality, truth])
        ratings.append([f"{i:03d}.png", rating, modality, 1 + i % 3, kind, f"g{i // 4}"])
    header = ["file_name", "label", "modality", "truth"]
    write_csv(folder / "truth.csv", header, truths)
    write_csv(folder / "real.csv", header, [row for row in truths if row[3] == 3])
    write_csv(folder / "ratings.csv", HEADER, ratings[:200])
    shuffled = []
    for row, rating in zip(ratings, draw.permutation([r[1] for r in ratings[:200]]), strict=False):
        shuffled.append([row[0], rating, *row[2:]])
    write_csv(folder / "shuffled.csv", HEADER, shuffled)
    return folder


def fit(*flags):
    filter_script.main(filter_script.parse_args(["--fit", *map(str, flags)]))


@pytest.fixture(scope="module")
def selector(rated):
    """A selector fitted on those ratings, with the unspoilt images as the real ones."""
    path = rated / "selector.safetensors"
    fit(rated / "ratings.csv", "--reference", rated / "real.csv", "--out", path)
    return str(path)


def test_a_selector_from_200_noisy_ratings_tells_good_from_bad_on_unseen_images(rated, selector):
    from sklearn.metrics import roc_auc_score

    loaded = filter_script.load_selector(selector)
    rows, pixels = load_pixels(list_images(str(rated / "truth.csv"))[200:], 64)
    truth = np.array([int(row.fields["truth"]) for row in rows])

    reasons, scores = loaded.judge(pixels, rows)

    quality = scores["quality"]
    assert roc_auc_score(truth == 3, quality) >= 0.9
    assert roc_auc_score(truth >= 2, quality) >= 0.8
    assert quality[truth == 3].mean() > 0.5 > quality[truth == 1].mean()
    assert [reason == "" for reason in reasons] == (quality >= 0.5).tolist()
    low, high = loaded.measured["interval"]
    assert low < loaded.measured["auroc"] < high
    assert loaded.measured["p"] <= 0.01


def test_the_probabilities_are_those_of_the_ratings(rated, selector):
    loaded = filter_script.load_selector(selector)
    rows, pixels = load_pixels(list_images(str(rated / "truth.csv"))[200:], 64)
    truth = np.array([int(row.fields["truth"]) for row in rows])

    _, scores = loaded.judge(pixels, rows)

    # of good images 85 % were called good, of the others 15 % / 2
    expected = np.where(truth == 3, 0.85, 0.075)
    assert scores["quality"].mean() == pytest.approx(expected.mean(), abs=0.1)


def test_pictures_of_noise_are_not_good(selector):
    noise = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8)

    _, scores = filter_script.load_selector(selector).judge(noise, [Row("", "")] * 4)

    assert (scores["quality"] < 0.2).all()


def test_alignment_is_high_for_the_right_label_and_low_for_the_wrong_one(rated, selector):
    loaded = filter_script.load_selector(selector)
    rows, pixels = load_pixels(list_images(str(rated / "truth.csv"))[200:], 64)
    other = {"normal chest": "inflammatory ulcer", "inflammatory ulcer": "normal chest"}
    wrong = [Row("", "", label=other[row.label]) for row in rows]
    by_caption = [Row("", "", caption=row.label.upper()) for row in rows]
    unknown = [Row("", "", label="a fracture")] * len(rows)

    _, right_scores = loaded.judge(pixels, rows)
    wrong_reasons, wrong_scores = loaded.judge(pixels, wrong, min_quality=0, min_alignment=0.5)
    _, caption_scores = loaded.judge(pixels, by_caption)
    unknown_reasons, unknown_scores = loaded.judge(pixels, unknown, 0, 0.5)

    assert right_scores["alignment"].mean() > 0.8
    assert wrong_scores["alignment"].mean() < 0.2
    assert sum(reason.startswith("alignment") for reason in wrong_reasons) > 90
    assert (caption_scores["alignment"] == right_scores["alignment"]).all()
    assert np.isnan(unknown_scores["alignment"]).all()
    assert "" not in unknown_reasons


def test_a_label_that_the_selector_does_not_know_is_one_line(selector, capsys):
    loaded = filter_script.load_selector(selector)
    known = Row("", "", label="normal chest")
    other = Row("", "", label="drusen")

    loaded.check_rows([known], 0.5)
    loaded.check_rows([other], None)
    with pytest.raises(SystemExit):
        loaded.check_rows([known, other], 0.5)

    assert '"drusen"' in capsys.readouterr().err


def test_the_filter_keeps_what_the_selector_finds_good(rated, selector, filtered, refused):
    table = rated / "truth.csv"
    flags = ["--selector", selector, "--min-alignment", 0.3]

    out = filtered((rated / "real.csv", table), *flags)
    message = refused(
        filter_script, table, "--reference", table, *flags, "--resolution", 128, "--out", out / "x"
    )

    rows = list_images(str(out))
    assert np.mean([row.fields["truth"] == "3" for row in rows]) > 0.7
    assert len(rows) > 30
    row = decisions(out)["000.png"]
    assert 0 <= float(row["quality"]) <= 1
    assert 0 <= float(row["alignment"]) <= 1
    assert "the selector needs 64 px" in message


def test_a_selector_is_written_with_the_same_bytes_each_time_and_names_no_paths(selector, tmp_path):
    before = Path(selector).read_bytes()

    filter_script.save_selector(tmp_path / "again", filter_script.load_selector(selector))

    assert (tmp_path / "again").read_bytes() == before
    assert b".png" not in before
    assert str(tmp_path.parent).encode() not in before


def test_a_file_that_is_no_selector_is_refused(selector, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    arrays = load_file(selector)
    save_file(arrays, tmp_path / "without settings")
    save_file(arrays, tmp_path / "broken settings", {filter_script.FORMAT: "{"})
    save_file(arrays, tmp_path / "other settings", {filter_script.FORMAT: '{"size": 64}'})
    save_file(arrays, tmp_path / "deep settings", {filter_script.FORMAT: "[" * 3000})
    save_file({"other": arrays["weights"]}, tmp_path / "few", {filter_script.FORMAT: "{}"})
    (tmp_path / "torn").write_bytes(Path(selector).read_bytes()[:1000])
    (tmp_path / "text").write_text("hello")
    names = os.listdir(tmp_path)

    for name in [*names, "absent"]:
        with pytest.raises(SystemExit):
            filter_script.load_selector(tmp_path / name)

    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == len(names) + 1
    for line in lines:
        assert line.startswith("error: ")
        assert "is not a selector" in line


def test_a_selector_learns_from_generated_images_alone(rated, tmp_path, run, capsys):
    """Real ones that the doctor calls good, and that are not there, change nothing."""
    lines = [[*row.values(), 0, 1] for row in read_table(rated / "ratings.csv")]
    lines[0][-1] = 0
    header = [*HEADER, "real", "shows"]
    write_csv(rated / "blind.csv", header, lines)
    real_lines = [[f"gone-{i}.png", 3, "x-ray", 3, "real", f"r{i}", 1, ""] for i in range(30)]
    write_csv(rated / "both.csv", header, lines + real_lines)
    flags = ["--reference", rated / "real.csv", "--out"]

    run(filter_script, "--fit", rated / "blind.csv", *flags, tmp_path / "blind")
    capsys.readouterr()
    run(filter_script, "--fit", rated / "both.csv", *flags, tmp_path / "both")
    output, errors = capsys.readouterr()

    assert (tmp_path / "both").read_bytes() == (tmp_path / "blind").read_bytes()
    assert "30 ratings are skipped: their images are real\n" in errors
    assert re.search(r"it picks the good one in \d+% of cases \(AUROC 0\.\d+, 95 %: 0\.", output)
    assert "1 of 200 ratings say that the label is not shown" in output
    words = f"{rated} --reference {rated / 'real.csv'} --selector {tmp_path / 'both'}"
    assert output.endswith(f"filter.py {words}\n")


def test_ratings_of_real_images_alone_teach_nothing(tmp_path, refused):
    write_csv(tmp_path / "r.csv", ["image_path", "rating", "real"], [["a.png", 3, "1"]])

    assert "all rated images are real" in refused(filter_script, "--fit", tmp_path / "r.csv")


def test_from_shuffled_ratings_no_selector_is_written(rated, tmp_path, refused):
    out = tmp_path / "s.safetensors"

    message = refused(filter_script, "--fit", rated / "shuffled.csv", "--out", out)

    assert "predicts ratings no better than chance" in message
    assert not out.exists()


def write_wounds(folder, count):
    for i in range(count):
        wound(i).save(folder / f"{i}.png")


def test_ratings_that_repeat_the_experts_level_are_refused_by_that_name(tmp_path, refused):
    write_wounds(tmp_path, 15)
    rows = []
    for i in range(15):
        modality = ("OCT", "Fundus", "CT")[i // 5]
        rows.append([f"{i}.png", 3 - i % 3, modality, 3 - i % 3, f"text {i}", ""])
    write_csv(tmp_path / "r.csv", HEADER, rows)
    out = tmp_path / "s.safetensors"

    message = refused(filter_script, "--fit", tmp_path / "r.csv", "--out", out)

    assert "follow expert_level" in message
    assert "follow prompt" not in message
    assert "30 are needed" in message
    assert not out.exists()


@pytest.mark.parametrize("column", ["modality", "prompt", "expert"])
def test_ratings_that_repeat_what_was_rated_or_who_rated_are_refused(column, tmp_path, refused):
    write_wounds(tmp_path, 40)
    rows = [[f"{i}.png", 1 + i % 3, f"kind {i % 3}"] for i in range(40)]
    write_csv(tmp_path / "r.csv", ["image_path", "rating", column], rows)

    message = refused(filter_script, "--fit", tmp_path / "r.csv", "--out", tmp_path / "s")

    assert f"may follow {column}, not quality" in message


def test_too_few_good_images_are_refused(tmp_path, refused):
    write_wounds(tmp_path, 40)
    rows = [[f"{i}.png", 1 + i % 2] for i in range(40)]
    write_csv(tmp_path / "r.csv", ["image_path", "rating"], rows)

    message = refused(filter_script, "--fit", tmp_path / "r.csv", "--out", tmp_path / "s")

    assert "0 images are good and 40 are not: 8 of each are needed" in message


@pytest.mark.parametrize(
    "rating, level, message",
    [
        (4, 3, "row 3: rating must be 1 (bad), 2 (usable) or 3 (good), not '4'"),
        (2.5, 3, "row 3: rating must be 1 (bad)"),
        ("gut", 3, "3 (good), not 'gut'; divide"),
        (2, 0, "row 3: expert_level must be a number of at least 1"),
        (2, "senior", "not 'senior'"),
    ],
)
def test_a_rating_that_is_none_is_refused_with_its_row(rating, level, message, tmp_path, refused):
    rows = [["a.png", 1, 3], ["b.png", rating, level]]
    write_csv(tmp_path / "r.csv", ["image_path", "rating", "expert_level"], rows)

    assert message in refused(filter_script, "--fit", tmp_path / "r.csv")


@pytest.mark.parametrize("whole", [0, 1])
def test_a_rating_without_a_picture_is_counted_and_skipped(whole, tmp_path, capsys):
    lines = ['{"rating": "3"}', '{"image_path": "a.png", "rating": "1"}']
    (tmp_path / "r.jsonl").write_text(f"{lines[whole]}\n{lines[1 - whole]}\n")

    (rating,) = filter_script.read_ratings([tmp_path / "r.jsonl"])

    assert rating.image == "a.png"
    assert "1 of 2 rows are skipped: no rating or no image" in capsys.readouterr().err


def test_ratings_in_brackets_without_end_are_refused(tmp_path, refused):
    (tmp_path / "r.jsonl").write_text('{"rating": ' + "[" * 3000)

    assert "not a JSON object" in refused(filter_script, "--fit", tmp_path / "r.jsonl")


def test_rated_images_that_are_not_there_are_refused(tmp_path, refused):
    write_csv(tmp_path / "r.csv", ["image_path", "rating"], [["a.png", 1], ["b.png", 2]])

    message = refused(filter_script, "--fit", tmp_path / "r.csv")

    assert "2 of 2 rated images are missing or changed" in message
    assert "a.png, b.png: give the folder that holds them" in message


def test_several_experts_of_one_image_weigh_by_their_level(tmp_path):
    write_wounds(tmp_path, 1)
    for name, rating, level in (("anna", 3, 3), ("ben", 1, 1)):
        header = ["image_path", "rating", "expert_level"]
        write_csv(tmp_path / f"{name}.csv", header, [["0.png", rating, level]])
    ratings = filter_script.read_ratings([tmp_path / "anna.csv", tmp_path / "ben.csv"])

    rated = filter_script.gather(ratings, good=3)

    assert rated.labels == pytest.approx(np.array([[0.75]]))
    assert rated.weights == pytest.approx([4])


def test_usable_is_good_where_that_is_asked_for(rated, tmp_path):
    ratings = filter_script.read_ratings([rated / "ratings.csv"])
    values = [rating.rating for rating in ratings]

    fit(rated / "ratings.csv", "--good", 2, "--out", tmp_path / "s")

    assert filter_script.load_selector(tmp_path / "s").good == 2
    assert filter_script.gather(ratings, good=3).labels.sum() == values.count(3)
    assert filter_script.gather(ratings, good=2).labels.sum() == 200 - values.count(1)


# ---------------------------------------------------------------- the statistics


@pytest.mark.parametrize("penalty", [0.1, 1, 30])
def test_the_logistic_regression_is_that_of_scikit_learn(penalty):
    from sklearn.linear_model import LogisticRegression

    draw = np.random.RandomState(0)
    x = draw.randn(60, 80) / 9
    labels = draw.rand(60, 3) < 0.4
    weights = draw.uniform(0.3, 1, 60)

    fitted = filter_script.fit_logistic(x, labels, weights, penalty)

    for column in range(3):
        known = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000)
        known.fit(x, labels[:, column], sample_weight=weights / weights.mean())
        assert fitted[:-1, column] == pytest.approx(known.coef_[0], abs=5e-3)
        assert fitted[-1, column] == pytest.approx(known.intercept_[0], abs=5e-3)


def test_a_share_of_good_ratings_is_as_so_many_ratings():
    draw = np.random.RandomState(0)
    x = draw.randn(30, 4)
    shares = draw.choice([0, 0.25, 0.5, 1], (30, 1))
    twice = np.vstack([x, x])
    labels = np.vstack([np.ones((30, 1)), np.zeros((30, 1))])
    weights = np.concatenate([shares[:, 0], 1 - shares[:, 0]])

    by_share = filter_script.fit_logistic(x, shares, np.ones(30), 1.0)
    by_rating = filter_script.fit_logistic(twice, labels, 2 * weights, 2.0)

    # as many ratings of weight 1 in all: weights of mean 1 count each of 60 rows twice
    assert by_share == pytest.approx(by_rating, abs=1e-3)


def test_kappa_and_auroc_are_those_of_scikit_learn():
    from sklearn.metrics import cohen_kappa_score, roc_auc_score

    draw = np.random.RandomState(0)
    a, b = draw.randint(1, 4, (2, 50))
    good = draw.rand(50, 1) < 0.4
    scores = draw.randn(50, 1).round(1)

    known_kappa = cohen_kappa_score(a, b, weights="quadratic")
    assert filter_script.kappa(a, b) == pytest.approx(known_kappa)
    known_auroc = roc_auc_score(good[:, 0], scores[:, 0])
    assert metrics.auroc(scores[:, 0], good[:, 0])[0] == pytest.approx(known_auroc)
    no_pairs_within_a_stratum = metrics.auroc(scores[:, 0], good[:, 0], strata=good[:, 0])
    assert np.isnan(no_pairs_within_a_stratum[0])


def test_a_group_is_never_predicted_from_itself():
    """Each group has a feature of its own: seen in training, it would tell the label."""
    groups = np.repeat(np.arange(20), 4)
    x = np.repeat(np.eye(20), 4, axis=0)
    labels = (np.random.RandomState(0).rand(20, 1) < 0.5).astype(float)[groups]

    logits, _ = filter_script.cross_validate(x, labels, np.ones(80), groups, 0)

    for fold_logits in (logits[groups == group] for group in range(20)):
        assert np.ptp(fold_logits) == pytest.approx(0, abs=1e-9)
    assert metrics.auroc(logits[:, 0], labels[:, 0] > 0)[0] < 0.6


def rated_by(labels, groups):
    count = len(labels)
    rows = [Row("", "")] * count
    return filter_script.Rated(rows, labels, np.ones(count), groups, np.array([""] * count))


def test_the_interval_of_the_auroc_resamples_groups_with_all_their_images():
    x = np.tile([[1.0], [2], [3], [4]], (10, 1))  # ten times the same group
    labels = np.tile([[0.0], [1], [0], [1]], (10, 1))

    _, measured = filter_script.fit_quality(x, rated_by(labels, np.repeat(np.arange(10), 4)), 0)

    assert measured["auroc"] == 0.75
    assert measured["interval"] == [0.75, 0.75]


def test_a_few_good_groups_are_enough_where_the_features_tell_them():
    groups = np.repeat(np.arange(10), 5)
    labels = np.isin(groups, (2, 7)).astype(float)[:, None]  # some resamples have none
    x = np.hstack([np.repeat(np.eye(10), 5, axis=0), 9 * labels])

    _, measured = filter_script.fit_quality(x, rated_by(labels, groups), 0)

    assert measured["auroc"] == 1
    assert measured["interval"][0] > 0.9
    assert measured["p"] <= 0.05


def test_random_features_are_called_better_than_chance_in_few_cases():
    draw = np.random.RandomState(0)
    p_values = []
    for _ in range(12):
        labels = (draw.rand(30, 1) < 0.4).astype(float)
        rated = rated_by(labels, np.arange(30))
        _, measured = filter_script.fit_quality(draw.randn(30, 8) / 3, rated, 0)
        p_values.append(measured["p"])
    assert sum(p <= 0.05 for p in p_values) <= 2
    assert 0.2 < np.mean(p_values) < 0.8


# ---------------------------------------------------------------- experts rate


def test_suggestions_are_unsure_and_unlike_one_another():
    draw = np.random.RandomState(0)
    vectors = np.repeat(draw.randn(10, 8) * 3, 4, axis=0) + draw.randn(40, 8) * 0.05
    worth = np.tile([0.5, 0.6, 1.0, 0.7], 10)

    chosen = filter_script.best_and_diverse(vectors, worth, 8)

    assert len({i // 4 for i in chosen}) == 8
    assert {i % 4 for i in chosen} == {2}


def test_a_rating_page_leaves_out_what_is_rated_and_asks_where_the_selector_doubts(
    sets, selector, tmp_path, run, refused
):
    names = sorted(os.listdir(sets[1]))
    rows = [[str(Path(sets[1], name)), 2] for name in names[10:]]
    write_csv(tmp_path / "done.csv", ["image_path", "rating"], rows)
    page = tmp_path / "rate.html"
    flags = [sets[1], "--rating-page", page, "--rated", tmp_path / "done.csv"]

    run(filter_script, *flags, "--suggest", 6, "--selector", selector)
    write_csv(
        tmp_path / "all.csv", ["image_path", "rating"], [[sets[1] + "/" + n, 2] for n in names]
    )
    message = refused(filter_script, *flags[:-1], tmp_path / "all.csv")

    facts = json.loads(base64.b64decode(re.search('const FACTS = "(.*)"', page.read_text())[1]))
    assert len(facts) == 6
    assert {Path(fact[0]).name for fact in facts} < set(names[:10])
    assert "0 images to rate" in message


def test_real_images_of_a_blind_page_are_prepared_as_typed(sets, tmp_path, run, monkeypatch):
    shown = []
    real = tmp_path / "real"
    real.mkdir()
    for i in range(4):
        Image.new("RGB", (160, 80), "white").save(real / f"{i}.png")
    monkeypatch.setattr(filter_script, "thumbnail", lambda image, *_, **how: shown.append(image))
    flags = ["--suggest", 10, "--blind", real, "--crop", "pad"]
    run(filter_script, sets[1], "--rating-page", tmp_path / "rate.html", *flags)
    white = [image for image in shown if image.getpixel((48, 48)) == (255, 255, 255)]
    assert len(white) == 2
    for image in white:
        assert image.size == (96, 96)
        assert image.getpixel((48, 4)) == (0, 0, 0)  # the border


def made_page(path):
    """What a rating page holds: the facts of each image, see facts_of, and the images."""
    text = Path(path).read_text()
    facts = json.loads(base64.b64decode(re.search('const FACTS = "(.*)"', text)[1]))
    images = []
    for tag in json.loads(re.search(r"const IMAGES = (\[.*\]);", text)[1]):
        data = base64.b64decode(re.search('base64,([^"]*)', tag)[1])
        images.append(Image.open(io.BytesIO(data)))
    return facts, images


def test_the_page_shows_pictures_as_stored_up_to_768_pixels(tmp_path, run):
    (tmp_path / "new").mkdir()
    for name, size in (("film", (300, 200)), ("large", (1536, 1024)), ("small", (40, 64))):
        wound(1, 64).resize(size).save(tmp_path / "new" / f"{name}.png")

    run(filter_script, tmp_path / "new", "--rating-page", tmp_path / "rate.html")

    facts, images = made_page(tmp_path / "rate.html")
    sizes = {Path(fact[0]).stem: image.size for fact, image in zip(facts, images, strict=True)}
    assert sizes == {"film": (300, 200), "large": (768, 512), "small": (40, 64)}


def test_a_real_image_among_generated_ones_is_told_by_neither_size_nor_file(tmp_path, run):
    """Small real ones are not shown: neither are they enlarged, nor all others made as small."""
    for name, sides in (("new", [128] * 16), ("real", [40, *[300] * 9, 90, 80])):
        (tmp_path / name).mkdir()
        for i, side in enumerate(sides):
            image = wound(i, 64).resize((side + 60 * (name == "real"), side))
            image.save(tmp_path / name / (f"{i}.jpg" if name == "real" else f"{i}.png"))
    page = tmp_path / "rate.html"

    run(filter_script, tmp_path / "new", "--rating-page", page, "--blind", tmp_path / "real")

    facts, images = made_page(page)
    assert sum(fact[4] for fact in facts) == 4
    assert {Path(fact[0]).name for fact in facts if fact[4]} < {f"{i}.jpg" for i in range(1, 10)}
    assert {image.size for image in images} == {(128, 128)}
    assert len({str(image.quantization) for image in images}) == 1


def test_of_real_images_a_blind_page_asks_for_labels_of_generated_ones_alone():
    rows = [Row("", "", label="Ulcer"), Row("", "", caption="a burn"), Row("", "")]
    real_rows = [Row("", "", label="ulcer"), Row("", "", label="scar", caption="x"), Row("", "")]

    assert filter_script.labels_to_ask(rows, []) == ["Ulcer", "a burn", ""]
    blind = filter_script.labels_to_ask(rows, real_rows)
    assert blind[:2] == ["Ulcer", "a burn"]
    assert blind[3] == "Ulcer"
    assert {blind[2], *blind[4:]} <= {"Ulcer", "a burn"}
    assert filter_script.labels_to_ask(rows[2:], real_rows) == [""] * 4


@pytest.fixture
def browse(tmp_path):
    """browse(page, width, height): it in a browser, always of one profile, killed in the end."""
    started = []

    def start(page, *size):
        started.append(Browser(page, tmp_path / "profile", *size))
        started[-1].wait("!document.getElementById('start').hidden")
        return started[-1]

    yield start
    for browser in started:
        browser.kill()


def begin_as(browser, name):
    browser.evaluate(f"$('name').value = {json.dumps(name)}")
    browser.evaluate("document.querySelector('#start button').click()")
    browser.wait("!$('rate').hidden && $('picture').firstChild.complete")


def press(browser, keys):
    """Press keys, each when the page has done what the one before it asked for."""
    for key in keys:
        browser.press(*key)
        browser.evaluate("work")


def saved_ratings(browser, folder):
    """The ratings of the file that the page saves."""
    folder.mkdir(exist_ok=True)
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    browser.evaluate("$('save').click()")
    end = time.monotonic() + 20
    while not (found := list(folder.glob("*.csv"))):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found[0]


AZERTY = {"1": ("&", "Digit1"), "2": ("é", "Digit2"), "3": ('"', "Digit3")}
CZECH = {"1": ("+", "Digit1"), "2": ("ě", "Digit2"), "3": ("š", "Digit3")}
NUMPAD = {"1": ("End", "Numpad1"), "2": ("2", "Numpad2"), "3": ("PageDown", "Numpad3")}
CYRILLIC = {"r": ("к", "KeyR"), "g": ("п", "KeyG"), "y": ("н", "KeyY"), "n": ("т", "KeyN")}


@needs_chromium
def test_answers_outlive_a_killed_browser_and_are_saved_by_rater(sets, tmp_path, run, browse):
    page = tmp_path / "rate.html"
    table = tmp_path / "new.csv"
    rows = [[str(path), "ulcer"] for path in sorted(Path(sets[1]).iterdir())]
    write_csv(table, ["file_name", "label"], rows)
    flags = ["--suggest", 15, "--blind", sets[0]]
    run(filter_script, table, "--rating-page", page, *flags, "--resolution", 64)
    facts, _ = made_page(page)

    browser = browse(page)
    begin_as(browser, 'Dr. "A", Ünal')
    for i in range(9):
        layout = (AZERTY, CZECH, NUMPAD)[i % 3]
        guess, shows = ("r", "n") if i % 2 else ("g", "y")
        press(browser, [CYRILLIC[guess], (shows, ""), layout["123"[i % 3]]])
    browser.kill()  # within milliseconds of the last key
    run(filter_script, table, "--rating-page", page, *flags)  # again, larger
    again = browse(page)
    assert again.evaluate("$('name').value") == 'Dr. "A", Ünal'
    again.press("Enter", "Enter")
    again.wait("!$('rate').hidden")
    assert again.evaluate("$('where').textContent") == "10 of 15, 9 rated"
    press(again, ["s", "3", ("Backspace",), *"tsoft", ("Enter", "Enter"), "1"])
    press(again, "c")
    begin_as(again, "Ben")
    press(again, ["2"])
    assert again.evaluate("[$('rater').textContent, at]") == ["Ben", 1]
    press(again, "c")
    begin_as(again, 'dr. "a", Ünal')
    press(again, "2222")
    assert again.evaluate("!$('end').hidden && $('file').textContent") == "ratings-dr-a-Ünal.csv"
    said = "The end, 14 rated, real or generated guessed for 9 of 15; to see the skipped ones"
    assert again.evaluate("$('where').textContent").startswith(said)
    press(again, ["u"])
    assert again.evaluate("answers[facts[at][5]].rating") == "2"  # going back unmarks nothing
    press(again, ["s"])
    saved = saved_ratings(again, tmp_path / "downloads")

    assert all(url.startswith(("file:", "data:", "blob:")) for url in again.requests)
    assert saved.name == "ratings-dr-a-Ünal.csv"
    assert saved.read_bytes().startswith(b"\xef\xbb\xbf")  # or Excel takes it for another code
    shutil.copy(saved, tmp_path)
    ratings = filter_script.read_ratings([tmp_path / saved.name])
    assert [rating.rating for rating in ratings] == [1, 2, 3] * 3 + [1] + [2] * 4
    for i, rating in enumerate(ratings):
        fact = facts[i + (i > 8)]  # one was skipped
        assert rating.path == os.path.normpath(tmp_path / fact[0])
        assert rating.sha256 == metrics.content_hash(rating.path)
        assert rating.real == str(fact[4])
        assert rating.expert == 'dr. "a", ünal'
        answers = (["generated", "1"], ["real", "0"])[i % 2] if i < 9 else ["", ""]
        assert [rating.guess, rating.shows] == answers
    lines = read_table(saved)
    assert {line["label"] for line in lines} == {"ulcer"}
    assert [line["comment"] for line in lines].count("soft") == 1


HOSTILE = '</script><img src=x onerror="hacked=1"><script>hacked=1</script>{0}${hacked=1}`"\''


@needs_chromium
@pytest.mark.parametrize("size", [(390, 844), (844, 390), (1280, 900)])
def test_a_page_of_any_size_shows_the_marks_and_runs_nothing_of_what_it_shows(
    size, tmp_path, run, browse
):
    wound(1, 64).resize((512, 512)).save(tmp_path / "<b>&.png")
    row = ["<b>&.png", HOSTILE, HOSTILE + "label", HOSTILE]
    write_csv(tmp_path / "new.csv", ["file_name", "text", "label", "modality"], [row])
    (tmp_path / "scale.txt").write_text(HOSTILE)
    page = tmp_path / "rate.html"
    flags = ["--rating-page", page, "--scale-text", tmp_path / "scale.txt"]

    run(filter_script, tmp_path / "new.csv", *flags)
    browser = browse(page, *size)
    scale = browser.evaluate("$('scale').textContent")
    begin_as(browser, HOSTILE)
    shown = browser.evaluate("[$('rater'), $('question'), $('text')].map(e => e.textContent)")
    below = browser.evaluate(
        "Math.max(...['picture', 'marks'].map(id => $(id).getBoundingClientRect().bottom))"
    )
    browser.evaluate(
        "$('picture').onwheel({preventDefault() {}, deltaY: -500, clientX: 0, clientY: 0})"
    )
    zoomed = browser.evaluate("$('shown').textContent")
    press(browser, ["0"])
    plain = browser.evaluate("$('shown').textContent")
    press(browser, ["1", "c"])
    saved = read_table(saved_ratings(browser, tmp_path / "downloads"))

    assert scale == HOSTILE
    assert shown == [HOSTILE, f"Shows: {HOSTILE}label?", HOSTILE]
    assert below <= size[1]
    assert re.fullmatch(r"512 × 512 pixels, enlarged [\d.]+ times", zoomed)
    assert plain == "512 × 512 pixels" + ("" if size[0] == 1280 else plain[16:])
    assert [saved[0][name] for name in ("expert", "prompt", "modality")] == [HOSTILE] * 3
    assert browser.evaluate("typeof hacked") == "undefined"
    assert all(url.startswith(("file:", "data:", "blob:")) for url in browser.requests)


def write_agreement(folder, name, rows):
    header = ["image_path", "rating", "expert", "guess", "real"]
    write_csv(folder / f"{name}.csv", header, [[row[0], row[1], name, *row[2:]] for row in rows])
    return folder / f"{name}.csv"


def test_agreement_prints_kappa_and_who_took_real_for_generated(tmp_path, run, capsys):
    paths = []
    for name, shift in (("anna", 0), ("ben", 1)):
        rows = []
        for i in range(12):
            rating = 1 + (i + shift * (i < 3)) % 3
            rows.append([f"{i}.png", rating, "real" if i % 4 else "generated", i % 2])
        paths.append(write_agreement(tmp_path, name, rows))

    run(filter_script, "--agreement", *paths)

    output = capsys.readouterr().out
    assert "anna, ben: weighted kappa 0.29" in output
    said = "on 6 shared images; 0: as by chance, 1: always equal (Cohen 1968)\n"
    assert said in output  # the real ones are left out
    expected = "anna: of real images 6 called real, 0 generated; "
    assert expected + "of generated images 3 called real, 3 generated" in output


def test_agreement_says_how_sure_it_is(tmp_path, run, capsys):
    draw = np.random.RandomState(0)
    a = draw.randint(1, 4, 60)
    b = np.where(draw.rand(60) < 0.5, a, draw.randint(1, 4, 60))
    guesses = np.repeat(["real", "generated"], (9, 3)).repeat(5)
    paths = []
    for name, ratings in (("anna", a), ("ben", b)):
        rows = []
        for i in range(60):
            guess = guesses[i] if i % 5 == 0 else ""
            rows.append([f"{i}.png", ratings[i], guess, int(i < 30)])
        paths.append(write_agreement(tmp_path, name, rows))

    run(filter_script, "--agreement", *paths)

    output = capsys.readouterr().out
    draws = draw.randint(30, 60, size=(1000, 30))  # the first 30 are real
    resampled = [filter_script.kappa(a[i], b[i]) for i in draws]
    interval = [float(x) for x in re.search(r"95 %: (\S+) to (\S+)\)", output).groups()]
    assert interval == pytest.approx(np.percentile(resampled, (2.5, 97.5)), abs=0.05)
    # of 6 real all, of 6 generated 3 taken for real: 2 * 20 / 220
    assert output.count("p 0.18 against guessing") == 2


def test_agreement_of_raters_who_give_one_rating_alone_has_no_kappa(tmp_path, run, capsys):
    for name in ("carl", "dora"):
        write_csv(
            tmp_path / f"{name}.csv", ["image_path", "rating"], [[f"{i}.png", 2] for i in range(5)]
        )

    run(filter_script, "--agreement", tmp_path / "carl.csv", tmp_path / "dora.csv")

    assert (
        "no kappa: the 5 images that both rated all have the same rating" in capsys.readouterr().out
    )


def test_one_rater_without_guesses_has_nothing_to_compare(tmp_path, refused):
    write_csv(tmp_path / "a.csv", ["image_path", "rating"], [["x.png", 2], ["y.png", 3]])

    assert "nothing to compare" in refused(filter_script, "--agreement", tmp_path / "a.csv")


def test_paths_of_ratings_are_relative_to_their_file_also_those_of_windows(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "0.png").touch()
    write_csv(tmp_path / "r.csv", ["image_path", "rating"], [["sub\\0.png", 2]])

    (rating,) = filter_script.read_ratings([tmp_path / "r.csv"])

    assert rating.path == str(tmp_path / "sub" / "0.png")
    assert rating.expert == str(tmp_path / "r.csv")


# ---------------------------------------------------------------- ratings of spreadsheets


def write_ratings(path, text, encoding="utf-8"):
    """A ratings file of these lines, and empty images img/0.png to img/3.png next to it."""
    (path.parent / "img").mkdir(exist_ok=True)
    for i in range(4):
        (path.parent / "img" / f"{i}.png").write_bytes(bytes([i]))
    path.write_bytes(text.encode(encoding))
    return path


SPREADSHEETS = {
    "semicolons and decimal commas": (
        "\ufeffimage_path;rating;expert_level\r\nimg/0.png;2,0;2,5\r\nimg/1.png;3,0;2,5\r\n"
    ),
    "quoted decimal commas": (
        'image_path,rating,expert_level\nimg/0.png,"2,00","2,5"\nimg/1.png,"3,00","2,5"\n'
    ),
    "mixed case": "Image_Path,RATING,Expert_Level\nimg/0.png,2,2.5\nimg/1.png,3,2.5\n",
    "spaces": "image path, rating ,expert  level\nimg/0.png,2,2.5\nimg/1.png,3,2.5\n",
    "one word": "FileName,Rating,ExpertLevel\nimg/0.png,2,2.5\nimg/1.png,3,2.5\n",
    "hyphens": "image-path,rating,expert-level\nimg/0.png,2,2.5\nimg/1.png,3,2.5\n",
    "as a data table's": "file_name,rating,level\nimg/0.png,2,2.5\nimg/1.png,3,2.5\n",
    "Excel's first line": (
        "sep=;\r\nimage_path;rating;expert_level\r\nimg/0.png;2;2,5\r\nimg/1.png;3;2,5\r\n"
    ),
    "empty columns and rows": (
        "image_path,rating,expert_level,,\nimg/0.png,2,2.5,,\n,,,,\n"
        "img/1.png,3,2.5,,\n , ,,,\n,,,,\n"
    ),
    "every cell quoted": (
        '"image_path"\t"rating"\t"expert_level"\n"img/0.png"\t"2"\t"2.5"\n"img/1.png"\t"3"\t"2.5"\n'
    ),
    "Windows paths": (
        "image_path;rating;expert_level\r\nimg\\0.png;2;2,5\r\nC:\\a\\img\\1.png;3;2,5\r\n"
    ),
    "another column of file names": (
        "image_path,file,rating,level\nimg/0.png,x,2,2.5\nimg/1.png,y,3,2.5\n"
    ),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_ratings_are_read_as_spreadsheets_leave_them(kind, encoding, tmp_path):
    path = write_ratings(tmp_path / "r.csv", SPREADSHEETS[kind].lstrip("\ufeff"), encoding)
    if SPREADSHEETS[kind].startswith("\ufeff") and encoding == "utf-8":
        path.write_text(SPREADSHEETS[kind])

    ratings = filter_script.read_ratings([path])

    assert [rating.path for rating in ratings] == [f"{tmp_path}/img/{i}.png" for i in (0, 1)]
    assert [rating.rating for rating in ratings] == [2, 3]
    assert [rating.expert_level for rating in ratings] == [2.5, 2.5]


def test_unrated_rows_are_counted_and_skipped(tmp_path, capsys):
    lines = ["image_path,rating,expert_level", "img/0.png,,senior", "img/1.png,2,", "img/2.png,NA,"]
    path = write_ratings(tmp_path / "r.csv", "\n".join(lines) + "\nimg/3.png,1,n/a\n")

    ratings = filter_script.read_ratings([path])

    assert [(rating.rating, rating.expert_level) for rating in ratings] == [(2, 3), (1, 3)]
    expected = f"{path}: 2 of 4 rows are skipped: no rating or no image\n"
    assert capsys.readouterr().err == expected


def test_a_file_in_which_nothing_is_rated_is_refused(tmp_path, refused):
    path = write_ratings(tmp_path / "r.csv", "image_path,rating\nimg/0.png,\nimg/1.png,-\n")

    with_columns = refused(filter_script, "--fit", path)
    path.write_text("Bild,Note\nimg/0.png,2\n")
    without = refused(filter_script, "--fit", path)

    assert "holds no ratings" in with_columns
    assert without.endswith("the columns image_path and rating; this one has Bild, Note")


@pytest.mark.parametrize(
    "values", ["1 2 3 4 5", "0 1", "1 1,5 2 3", "-1 0 1", "good bad 2", "1 inf"]
)
def test_ratings_on_another_scale_are_refused_with_how_to_write_them(values, tmp_path, refused):
    rows = [f"{i}.png;{value}" for i, value in enumerate(values.split())]
    (tmp_path / "r.csv").write_text("\n".join(["image_path;rating", *rows]))

    message = refused(filter_script, "--agreement", tmp_path / "r.csv")

    start = r"r\.csv: row \d+: rating must be 1 \(bad\), 2 \(usable\) or 3 \(good\), not '"
    assert re.search(start, message)
    assert message.endswith("divide other scales into thirds")


def test_of_an_experts_ratings_of_an_image_the_last_counts(tmp_path):
    text = "image_path,rating,expert\nimg/0.png,1,anna\nimg/0.png,2,ben\nimg/0.png,3,anna\n"
    path = write_ratings(tmp_path / "r.csv", text)

    ratings = filter_script.read_ratings([path])

    assert {rating.expert: rating.rating for rating in ratings} == {"anna": 3, "ben": 2}


def test_raters_whose_files_have_the_same_name_are_told_apart_and_compared(tmp_path, run, capsys):
    """The page calls each rater's file ratings.csv; no image needs to be there."""
    for name in ("anna", "ben"):
        (tmp_path / name).mkdir()
        rows = [f"img/{i}.png,{1 + i % 3}\n" for i in range(9)]
        (tmp_path / name / "ratings.csv").write_text("image_path,rating\n" + "".join(rows))

    run(filter_script, "--agreement", *tmp_path.glob("*/ratings.csv"))

    assert "weighted kappa 1.00 (95 %: 1.00 to 1.00) on 9 shared" in capsys.readouterr().out


def test_real_and_guess_are_read_from_spreadsheets(tmp_path, run, capsys):
    rows = ["a.png;2,0;1,0;Real\n", "b.png;2,0;0,0;Generated\n"]
    (tmp_path / "r.csv").write_text("image_path;rating;Real;Guess\n" + "".join(rows))

    run(filter_script, "--agreement", tmp_path / "r.csv")

    expected = (
        "real images 1 called real, 0 generated; of generated images 0 called real, 1 generated"
    )
    assert expected in capsys.readouterr().out


# ---------------------------------------------------------------- ratings outlive a move


def page_ratings(page):
    """The text that a page saves where each image is rated 2, with names from macOS to Windows."""
    facts = json.loads(base64.b64decode(re.search('const FACTS = "(.*)"', page.read_text())[1]))
    lines = [f'"{fact[0]}",2,anna,{fact[5]}\n' for fact in facts]
    return "\ufeffimage_path,rating,expert,sha256\n" + "".join(lines), facts


@pytest.fixture
def project(tmp_path, run):
    """A folder project/ with images in new/ and real/, and ratings.csv of 5 and 1 of them."""
    folder = tmp_path / "project"
    folder.mkdir()
    small_sets(folder)
    os.remove(folder / "new" / "manifest.csv")
    os.remove(folder / "real" / "metadata.csv")
    page = folder / "rate.html"
    flags = ["--suggest", 6, "--blind", folder / "real", "--resolution", 64]
    run(filter_script, folder / "new", "--rating-page", page, *flags)
    (folder / "ratings.csv").write_text(page_ratings(page)[0])
    return folder


def test_the_page_names_images_relative_to_itself(project):
    text, facts = page_ratings(project / "rate.html")

    assert {os.path.dirname(fact[0]) for fact in facts} == {"new", "real"}
    for fact in facts:
        assert fact[5] == metrics.content_hash(project / fact[0])


@pytest.mark.parametrize("saved_in", ["moved", ".", "elsewhere"])
def test_a_project_that_was_moved_keeps_its_ratings(saved_in, project, tmp_path, run, monkeypatch):
    """Wherever the browser saved the file: next to the page, or where a folder is to be named."""
    project.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved" / "ratings.csv").rename(tmp_path / saved_in / "saved.csv")
    monkeypatch.chdir(tmp_path)

    new = tmp_path / "moved" / "new"
    flags = ["--blind", tmp_path / "moved" / "real", "--rated", tmp_path / saved_in / "saved.csv"]
    run(filter_script, new, "--rating-page", tmp_path / "more.html", *flags)

    _, before = page_ratings(tmp_path / "moved" / "rate.html")
    _, facts = page_ratings(tmp_path / "more.html")
    assert sum(fact[4] == 0 for fact in facts) == 8 - 5
    assert not {fact[5] for fact in before} & {fact[5] for fact in facts}


def test_absolute_paths_of_a_project_that_was_moved_are_found_by_their_ends(tmp_path, monkeypatch):
    """As the page of earlier versions wrote them, without a hash."""
    path = write_ratings(tmp_path / "r.csv", "image_path,rating\n/old/p/img/0.png,2\n")
    (tmp_path / "sub").mkdir()
    path.rename(tmp_path / "sub" / "r.csv")

    (lost,) = filter_script.read_ratings([tmp_path / "sub" / "r.csv"])
    (named,) = filter_script.read_ratings(
        [tmp_path / "sub" / "r.csv"], folders=[str(tmp_path / "img"), None]
    )
    monkeypatch.chdir(tmp_path)
    (near,) = filter_script.read_ratings([tmp_path / "sub" / "r.csv"])

    assert lost.path == ""
    assert named.path == near.path == str(tmp_path / "img" / "0.png")


def test_ratings_are_read_after_a_move_where_the_folder_is_named(tmp_path, refused):
    (tmp_path / "before").mkdir()
    write_wounds(tmp_path / "before", 12)
    rows = [[f"{tmp_path}/before/{i}.png", 1 + i % 3] for i in range(12)]
    (tmp_path / "away").mkdir()
    write_csv(tmp_path / "away" / "r.csv", ["image_path", "rating"], rows)
    (tmp_path / "before").rename(tmp_path / "after")
    flags = ["--fit", tmp_path / "away" / "r.csv", "--out", tmp_path / "s"]

    lost = refused(filter_script, *flags)
    found = refused(filter_script, tmp_path / "after", *flags)

    assert "12 of 12 rated images are missing or changed" in lost
    assert "12 images are rated: 30 are needed" in found


def test_rated_images_that_were_copied_and_renamed_are_known_by_their_content(
    project, tmp_path, run, refused
):
    shutil.copytree(project / "new", tmp_path / "copied")
    for path in sorted((tmp_path / "copied").iterdir()):
        path.rename(path.with_name(f"renamed-{path.name}"))
    flags = ["--blind", project / "real", "--rated", project / "ratings.csv"]

    run(filter_script, tmp_path / "copied", "--rating-page", tmp_path / "more.html", *flags)
    shutil.rmtree(project / "new")
    run(filter_script, tmp_path / "copied", "--rating-page", tmp_path / "again.html", *flags)

    for page in ("more.html", "again.html"):
        _, facts = page_ratings(tmp_path / page)
        assert sum(fact[4] == 0 for fact in facts) == 8 - 5


def test_another_picture_at_a_rated_path_is_not_what_was_rated(project, refused):
    for i in range(8):
        wound(900 + i, 64).save(project / "new" / f"{i}.png")

    message = refused(filter_script, "--fit", project / "ratings.csv")

    assert "5 of 6 rated images are missing or changed" in message
    assert "without the column sha256 they are found by name alone" in message


def test_a_file_that_the_paths_of_two_images_end_in_is_taken_for_neither(tmp_path):
    """calm/0.png and sore/0.png: without their content only the whole folder tells them apart."""
    rows = "/old/calm/0.png,1\n/old/sore/0.png,2\n"
    path = write_ratings(tmp_path / "r.csv", "image_path,rating\n" + rows)
    for name in ("calm", "sore"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_text(name)

    both = filter_script.read_ratings([path], folders=[str(tmp_path / "data")])
    one = filter_script.read_ratings([path], folders=[str(tmp_path / "data" / "calm")])

    expected = [str(tmp_path / "data" / name / "0.png") for name in ("calm", "sore")]
    assert [rating.path for rating in both] == expected
    assert [rating.path for rating in one] == ["", ""]


def test_names_that_macos_takes_apart_are_found(tmp_path):
    path = write_ratings(tmp_path / "r.csv", "image_path,rating\nimg/Fu\u00df-\u00fc.png,2\n")
    (tmp_path / "img" / "away").mkdir()
    image = tmp_path / "img" / "Fu\u00df-u\u0308.png"
    image.touch()

    (here,) = filter_script.read_ratings([path])
    path.rename(tmp_path / "img" / "away" / "r.csv")
    (moved,) = filter_script.read_ratings(
        [tmp_path / "img" / "away" / "r.csv"], folders=[str(tmp_path / "img")]
    )

    assert here.path == moved.path == str(image)


def test_a_few_rated_images_may_be_missing_and_are_named_once(tmp_path, capsys):
    path = write_ratings(tmp_path / "r.csv", "")
    names = [f"img/{i % 4}.png" for i in range(38)] + ["img/gone.png", "img/gone.png"]
    for i in range(4, 38):
        (tmp_path / "img" / f"{i}.png").touch()
        names[i] = f"img/{i}.png"
    rows = [[name, 2, f"rater {i}"] for i, name in enumerate(names)]
    write_csv(path, ["image_path", "rating", "expert"], rows)

    ratings = filter_script.drop_missing(filter_script.read_ratings([path]))

    assert len(ratings) == 38
    expected = (
        "1 of 39 rated images are missing or changed: img/gone.png: their ratings are skipped\n"
    )
    assert capsys.readouterr().err == expected


def test_rated_images_that_are_lost_are_not_suggested_again_without_a_word(
    project, tmp_path, refused
):
    """Neither their names nor their content are among what is to be rated."""
    small_sets(tmp_path)
    shutil.rmtree(project / "new")
    for i in range(8):
        wound(900 + i, 64).save(tmp_path / "new" / f"other-{i}.png")
        os.remove(tmp_path / "new" / f"{i}.png")
    os.remove(tmp_path / "new" / "manifest.csv")
    flags = ["--rating-page", tmp_path / "more.html", "--rated", project / "ratings.csv"]

    message = refused(filter_script, tmp_path / "new", *flags)

    assert "5 of 6 rated images are missing or changed: new/" in message
