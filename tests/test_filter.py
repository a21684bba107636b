"""Filtering: what stays is like real images, what goes says why, and nothing is lost."""
import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

import filter as filter_script
import phantoms
from metrics import list_images


def wound(seed):
    return Image.fromarray(phantoms.draw("inflammatory ulcer", seed, 96)[0])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(real, generated): 80 wounds; 30 fresh ones, 12 of no use, 6 copies and 3 near-equal pairs."""
    real, generated = tmp_path_factory.mktemp("real"), tmp_path_factory.mktemp("generated")
    noise = np.random.RandomState(0)
    for i in range(80):
        wound(i).save(real / f"{i:02d}.png")
    for i in range(30):
        wound(1000 + i).save(generated / f"fresh-{i:02d}.png")
    for i in range(3):
        Image.fromarray(noise.randint(0, 255, (96, 96, 3)).astype(np.uint8)).save(generated / f"bad-noise-{i}.png")
        Image.new("RGB", (96, 96), (80 + 40 * i,) * 3).save(generated / f"bad-grey-{i}.png")
        Image.fromarray(phantoms.draw("normal chest", i, 96)[0]).save(generated / f"bad-film-{i}.png")
        wound(2000 + i).filter(ImageFilter.GaussianBlur(6)).save(generated / f"bad-blur-{i}.png")
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


def test_the_calibrated_filter_keeps_fresh_images_and_refuses_what_is_not_like_them(sets, tmp_path, run, capsys):
    run(filter_script, sets[1], "--reference", sets[0], "--calibrate", 0.05, "--out", tmp_path / "kept")
    assert share_kept(tmp_path / "kept", "fresh") >= 0.8 and share_kept(tmp_path / "kept", "bad") == 0
    assert "calibrated on 80 real images" in capsys.readouterr().out
    row = decisions(tmp_path / "kept")["bad-noise-0.png"]
    assert list(row)[:8] == ["file", "kept", "reason", "nearest", "distance", "sharpness", "contrast", "colour"]
    assert row["kept"] == "0" and "unlike the real images" in row["reason"] and row["nearest"].endswith(".png")


def test_copies_and_duplicates_go_and_the_best_of_each_stays(sets, tmp_path, run):
    run(filter_script, sets[1], "--reference", sets[0], "--drop-copies", "--drop-duplicates", "--out", tmp_path / "kept")
    assert share_kept(tmp_path / "kept", "copy") == 0 and share_kept(tmp_path / "kept", "fresh") >= 0.85
    assert share_kept(tmp_path / "kept", "twin") == 0.5
    for i in range(3):
        reasons = sorted(decisions(tmp_path / "kept")[f"twin-{i}-{x}"]["reason"] for x in ("a.png", "b.jpg"))
        assert reasons[0] == "" and reasons[1].startswith(f"duplicate of twin-{i}-")


def test_a_fixed_threshold_says_what_share_of_real_images_it_would_refuse(sets, tmp_path, run, capsys):
    run(filter_script, sets[1], "--reference", sets[0], "--min-ssim", 0.9, "--out", tmp_path / "kept")
    said = capsys.readouterr().out
    assert "--min-ssim 0.9 would refuse 100% of the real images" in said and share_kept(tmp_path / "kept", "fresh") == 0
    run(filter_script, sets[1], "--reference", sets[0], "--max-lpips", 1e6, "--lpips", "random", "--out", tmp_path / "all")
    assert "--max-lpips 1e+06 would refuse 0% of the real images" in capsys.readouterr().out
    assert share_kept(tmp_path / "all", "") == 1


def test_a_picture_that_is_twice_in_the_reference_does_not_hide_its_copies(sets, tmp_path, run):
    shutil.copytree(sets[0], tmp_path / "real")
    for i in range(5):
        shutil.copy(tmp_path / "real" / f"{60 + i}.png", tmp_path / "real" / f"again-{i}.png")
    run(filter_script, sets[1], "--reference", tmp_path / "real", "--drop-copies", "--drop-duplicates", "--out",
        tmp_path / "kept")
    assert share_kept(tmp_path / "kept", "copy") == 0 and share_kept(tmp_path / "kept", "twin") == 0.5


def test_filtering_again_by_other_rules_leaves_no_copy_of_what_is_refused_now(sets, tmp_path, run):
    flags = [sets[1], "--reference", sets[0], "--out", tmp_path / "kept"]
    run(filter_script, *flags, "--min-ssim", 0)
    run(filter_script, *flags, "--calibrate", 0.05)
    kept = {name for name, row in decisions(tmp_path / "kept").items() if row["kept"] == "1"}
    there = {path.name for path in (tmp_path / "kept").iterdir()}
    assert there == kept | {"metadata.csv", "decisions.csv", "filter.html"} and len(kept) < 54


def test_the_kept_folder_is_ready_for_training_and_nothing_is_deleted(sets, tmp_path, run):
    generated = tmp_path / "generated"
    shutil.copytree(sets[1], generated)
    rows = [[path.name, f"a caption, {path.stem}", "ulcer"] for path in sorted(generated.iterdir())]
    filter_script.write_csv(generated / "manifest.csv", ["file", "prompt", "label"], rows)
    before = {path.name: path.read_bytes() for path in generated.iterdir()}
    flags = [generated, "--reference", sets[0], "--calibrate", 0.05, "--out", tmp_path / "kept"]
    run(filter_script, *flags)
    assert {path.name: path.read_bytes() for path in generated.iterdir()} == before
    kept = list_images(str(tmp_path / "kept"))
    assert {row["file_name"] for row in kept} == {n for n, row in decisions(tmp_path / "kept").items() if row["kept"] == "1"}
    assert kept[0]["label"] == "ulcer" and kept[0]["caption"].startswith("a caption, ")
    assert all(Path(row["path"]).read_bytes() == before[row["file_name"]] for row in kept)
    first = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    run(filter_script, *flags)   # the same command again: the same folder
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == first


def test_a_dry_run_copies_nothing_and_an_unreadable_image_is_a_decision(sets, tmp_path, run):
    generated = tmp_path / "generated"
    shutil.copytree(sets[1], generated)
    (generated / "torn.png").write_bytes(b"\x89PNG")
    run(filter_script, generated, "--reference", sets[0], "--calibrate", 0.1, "--dry-run", "--out", tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"decisions.csv", "filter.html"}
    assert decisions(tmp_path / "kept")["torn.png"]["reason"] == "unreadable"


def test_patients_are_not_compared_with_themselves(tmp_path):
    """Two films of one patient lie close; leaving only the film itself out would call every fresh image unlike."""
    draw = np.random.RandomState(0)
    centres = draw.randn(40, 1, 8) * 5
    points = (centres + draw.randn(40, 2, 8) * 0.1).reshape(80, 8)
    groups = [str(i // 2) for i in range(80)]
    distances = np.sqrt(filter_script.squared_distances(points, points))
    alone = filter_script.nearest(distances, filter_script.same_unit([""] * 80))[1]
    apart = filter_script.nearest(distances, filter_script.same_unit(groups))[1]
    assert np.median(alone) < 1 < 4 < np.median(apart)


@pytest.mark.parametrize("flags, said", [
    ([], "nothing to filter by"),
    (["--calibrate", "2"], "--calibrate 2"),
    (["--calibrate", "0.05", "--features", "no-such-file"], "no-such-file"),
    (["--calibrate", "0.001"], "needs at least 999 real images"),
    (["--min-ssim", "nan"], "--min-ssim nan"),
    (["--calibrate", "0.05", "--batch-size", "0"], "--batch-size 0"),
    (["--drop-copies", "--group-column", "patient"], "--group-column patient"),
])
def test_bad_flags_are_one_line(flags, said, sets, tmp_path, refused):
    assert said in refused(filter_script, sets[1], "--reference", sets[0], "--out", tmp_path / "kept", *flags)
    assert not (tmp_path / "kept").exists()


def test_folders_that_do_not_serve_are_refused(sets, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    flags = ["--calibrate", 0.05, "--out", tmp_path / "kept"]
    assert "no images" in refused(filter_script, tmp_path / "empty", "--reference", sets[0], *flags)
    assert "no such file" in refused(filter_script, sets[1], "--reference", tmp_path / "absent", *flags)
    assert "would be read again" in refused(filter_script, sets[1], "--reference", sets[0], "--calibrate", 0.05, "--out",
                                            Path(sets[1]) / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.png").write_bytes(b"precious")
    assert "mine.png" in refused(filter_script, sets[1], "--reference", sets[0], *flags)
    assert (tmp_path / "kept" / "mine.png").read_bytes() == b"precious"
