"""evaluate.py as people type it: sets of smooth random pictures, fresh, copied, blurred, broken."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, needs_chromium, page_faults
from PIL import Image, ImageFilter, ImageOps
from scipy import stats

import evaluate
import metrics
import phantoms
import sample
from evaluate import METRICS, permutation_draws, yardstick
from metrics import text_key

ROOT = os.path.dirname(metrics.__file__)
A = np.random.RandomState(0)
REAL = A.randn(60, 16)
FAKE = 1.1 * A.randn(50, 16) + 0.2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(metrics, "PROBLEMS", [])
    monkeypatch.chdir(tmp_path)


def keep(image):
    return image


def blur(image):
    return image.filter(ImageFilter.GaussianBlur(2))


def darken(image):
    return image.point(lambda value: value // 3)


def draw(folder, count, seed, size=64, change=keep, name="{:03}.png"):
    """A folder of `count` smooth random pictures."""
    folder.mkdir()
    rough = torch.randn(count, 3, 8, 8, generator=metrics.generator(seed, "test"))
    smooth = torch.nn.functional.interpolate(rough, (size, size), mode="bicubic")
    smooth = smooth.mul(0.2).add(0.5).clamp(0, 1)
    for n, picture in enumerate((smooth * 255).byte().permute(0, 2, 3, 1).numpy()):
        change(Image.fromarray(picture)).save(folder / name.format(n))
    return str(folder)


def run(monkeypatch, *argv):
    """Call evaluate.py in this process and return what it wrote as --json."""
    flags = ["--json", "figures.json", "--permutations", "99"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv, *flags])
    evaluate.main(evaluate.parse_args())
    with open("figures.json") as file:
        return json.load(file)


def run_set(monkeypatch, *argv):
    """The JSON of the only generated set."""
    (entry,) = run(monkeypatch, *argv)["generated"]
    return entry


def row(label="", group="", file_name="", fields=None):
    return metrics.Row("", file_name, label=label, group=group, fields=fields or {})


# ---------------------------------------------------------------- the whole


def test_the_command_as_typed_prints_a_table_and_writes_a_report_and_figures(tmp_path):
    real = draw(tmp_path / "real", 24, 1)
    fake = draw(tmp_path / "fake", 20, 2, name="<b>{:03}.png")
    script = os.path.join(ROOT, "evaluate.py")
    flags = ["--json", "new/figures.json", "--permutations", "99"]
    done = subprocess.run(
        [sys.executable, script, real, fake, *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"MEDLORA_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()  # the tests run with HF_HUB_OFFLINE=1
    assert line.startswith("features texture, LPIPS none:")
    assert "evaluate.py --download" in line
    assert "reading 24 real images, and the generated ones, at 64 px" in done.stdout
    assert "not comparable with published values" in done.stdout
    assert f"report: {tmp_path / 'report.html'}" in done.stdout
    assert f"next: python {ROOT}/filter.py" in done.stdout

    figures = json.loads((tmp_path / "new/figures.json").read_text())
    assert list(figures) == ["format", "settings", "real", "generated", "run"]
    assert figures["format"] == 2
    assert figures["real"] == {"path": real, "n": 24}
    (entry,) = figures["generated"]
    keys = (
        "path n p metrics memorisation subgroups people by_label sentences marked searched findings"
    )
    assert list(entry) == keys.split()
    assert entry["findings"][0] in done.stdout
    assert 0.05 < entry["p"] <= 1
    assert (entry["path"], entry["n"]) == (fake, 20)
    usual = [name for name, (_, _, need) in METRICS.items() if need not in ("logits", "lpips")]
    assert list(entry["metrics"]) == usual
    for name, found in entry["metrics"].items():
        keys = "value null null_low null_high excess p_high p_low real_vs_real band"
        assert list(found) == keys.split()
        assert found["null_low"] <= found["null"] <= found["null_high"]
        has_band = name == "ssim_nearest"
        assert (found["band"] in ("excellent", "good", "fair", "poor")) == has_band
        assert found["excess"] == pytest.approx(found["value"] - found["null"])
        assert 0.02 <= min(found["p_high"], found["p_low"]), name
        assert np.isfinite(found["real_vs_real"]), name
    assert list(entry["memorisation"]) == ["likely_copies", "copies", "pairs"]
    assert len(entry["memorisation"]["pairs"]) == 12
    assert list(entry["memorisation"]["pairs"][0]) == ["generated", "train", "distance", "p"]

    report = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in report
    assert "<b>0" not in report
    assert not any(word in report for word in ("http:", "https:", "<script", "<link", "url("))
    assert report.count("<img") == 12 + 12 + 2 * 12
    assert "not comparable with published values" in report
    p = f"(p = {evaluate.digits(entry['p'], 2)} for all metrics together)"
    order = [evaluate.GUIDE, "by chance: median", evaluate.HALVES_GUIDE]
    in_order(done.stdout, [p, *order])
    in_order(html.unescape(report), ["? undecided", p, *order])
    in_order(report, ["What do they look like?", "Do they differ, and how?", "Are they copies?"])
    assert all(f'"{key}"' in evaluate.__doc__ for key in [*figures, *entry])


def test_help_lists_the_flags_before_the_form_of_the_json(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit):
        evaluate.parse_args()
    in_order(capsys.readouterr().out, ["for programs (--json).", "  --seed", '{"format": 2'])


def in_order(text, parts):
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_fresh_pictures_rank_before_blurred_ones_and_copies_are_called_copies(
    tmp_path, monkeypatch, capsys
):
    real = draw(tmp_path / "real", 30, 1)
    fresh = draw(tmp_path / "fresh", 30, 4)
    blurred = draw(tmp_path / "blurred", 30, 3, change=blur)
    copies = draw(tmp_path / "copies", 30, 1)
    entries = run(monkeypatch, real, blurred, fresh, copies)["generated"]
    found = {entry["path"]: entry["metrics"] for entry in entries}
    assert list(found) == [fresh, blurred, copies]
    assert found[fresh]["frechet"]["p_high"] > 0.05
    assert found[fresh]["frechet"]["p_low"] > 0.01
    assert found[blurred]["frechet"]["p_high"] == found[blurred]["kid"]["p_high"] == 0.01
    assert found[copies]["frechet"]["value"] < 1e-6
    for name in ("frechet", "kid", "ssim_nearest"):
        assert found[copies][name]["p_low"] == 0.01
    words = ("can be told", "cannot be told", "variety", "images are too good")
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line for line in lines if "for all metrics together" in line]
    said = [[word for word in words if word in line] for line in verdicts]
    assert said == [["can be told", "variety"], ["cannot be told"], ["images are too good"]]


def test_one_picture_again_and_again_is_told_apart(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 24, 1)
    fake = draw(tmp_path / "fake", 24, 2)
    for n in range(1, 24):
        shutil.copy(tmp_path / "fake" / "000.png", tmp_path / "fake" / f"{n:03}.png")
    found = run_set(monkeypatch, real, fake, "--metrics", "recall,coverage")
    assert found["p"] <= 0.05
    assert "variety" in capsys.readouterr().out


def test_generated_images_in_the_place_of_real_ones_are_noticed(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 9, 1)
    fake = draw(tmp_path / "fake", 9, 2)
    for path in (tmp_path / "fake").iterdir():
        sample.save_png(Image.open(path), path, "a wound")
    for folders, count in (((real, fake), 0), ((fake, real), 1)):
        run(monkeypatch, *folders, "--metrics", "kid")
        assert capsys.readouterr().err.count("are REAL and GENERATED swapped?") == count


def test_the_real_set_as_generated_is_called_copies(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 12, 1)
    found = run_set(monkeypatch, real, real + "/", "--metrics", "fid,kid")["metrics"]
    assert list(found) == ["frechet", "kid"]
    assert found["frechet"]["p_low"] == 0.01
    assert "images are too good" in capsys.readouterr().out


def test_of_a_large_set_some_are_drawn_and_only_the_frechet_value_is_of_all(
    tmp_path, monkeypatch, capsys
):
    real = draw(tmp_path / "real", 24, 1)
    fake = draw(tmp_path / "fake", 22, 2)
    names = ("--metrics", "frechet,kid")
    whole = run(monkeypatch, real, fake, *names)
    drawn = run(monkeypatch, real, fake, *names, "--max-images", "12")
    assert (whole["real"]["n"], whole["generated"][0]["n"]) == (24, 22)
    assert (drawn["real"]["n"], drawn["generated"][0]["n"]) == (12, 12)
    assert "12 of 22 images are picked" in capsys.readouterr().out
    before = whole["generated"][0]["metrics"]
    after = drawn["generated"][0]["metrics"]
    assert after["frechet"]["value"] == pytest.approx(before["frechet"]["value"], rel=1e-6)
    assert after["kid"]["value"] != pytest.approx(before["kid"]["value"], rel=1e-3)
    assert after["frechet"]["null"] > before["frechet"]["null"]
    assert "the Frechet value" in " ".join((tmp_path / "report.html").read_text().split())


def test_figures_do_not_depend_on_where_the_folders_are(tmp_path, monkeypatch):
    found = []
    for place in (tmp_path, tmp_path / "moved"):
        for name, seed in (("real", 0), ("new", 200)):  # two images of each patient
            phantoms.write(place / name, 24, seed=seed, kinds=["mpox lesion"], size=64)
        (entry,) = run(monkeypatch, str(place / "real"), str(place / "new"))["generated"]
        found.append(entry["metrics"])
    assert found[0] == found[1]


def test_figures_do_not_depend_on_batch_size_and_follow_the_seed(tmp_path, monkeypatch):
    real = draw(tmp_path / "real", 14, 1)
    fake = draw(tmp_path / "fake", 11, 2)
    names = ("--metrics", "frechet,coverage")
    first = run_set(monkeypatch, real, fake, *names, "--batch-size", "5")["metrics"]
    monkeypatch.setattr(metrics, "CACHE", tmp_path / "other cache")
    again = run_set(monkeypatch, real, fake, *names, "--batch-size", "32")["metrics"]
    other = run_set(monkeypatch, real, fake, *names, "--seed", "1")["metrics"]
    assert first["coverage"] == again["coverage"]
    for part in ("value", "null", "null_high", "p_high", "real_vs_real"):
        assert first["frechet"][part] == pytest.approx(again["frechet"][part], rel=1e-4)
    assert other["frechet"]["value"] == pytest.approx(first["frechet"]["value"], rel=1e-4)
    assert other["frechet"]["null_low"] != again["frechet"]["null_low"]


def test_sets_are_compared_at_the_generated_images_size(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 9, 1, size=80)
    fake = draw(tmp_path / "fake", 9, 2, size=96)
    usual = run(monkeypatch, real, fake, "--metrics", "kid")
    notes = capsys.readouterr().err
    smaller = run(monkeypatch, real, fake, "--metrics", "kid", "--resolution", "64")
    assert usual["settings"]["resolution"] == 96
    assert notes.count("9 of 9 real images are smaller than 96 px: enlarged") == 1
    assert smaller["settings"]["resolution"] == 64
    assert "enlarged" not in capsys.readouterr().err


def test_identical_pictures_give_numbers_not_a_crash(tmp_path, monkeypatch):
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
        for n in range(6):
            flat = Image.new("RGB", (64, 64), (90, 60, 30))
            flat.save(tmp_path / name / f"{n}.png")
    found = run_set(monkeypatch, str(tmp_path / "real"), str(tmp_path / "fake"))["metrics"]
    assert found["frechet"]["value"] == 0
    assert found["frechet"]["p_high"] == found["frechet"]["p_low"] == 1
    assert found["precision"]["value"] == 1
    assert found["ssim_pairs"]["value"] > 0.99999


def test_a_set_too_small_for_halves_has_none(tmp_path, monkeypatch):
    real = draw(tmp_path / "real", 3, 1)
    fake = draw(tmp_path / "fake", 3, 2)
    found = run_set(monkeypatch, real, fake, "--metrics", "kid")["metrics"]["kid"]
    assert found["real_vs_real"] is None
    assert np.isfinite(found["value"])


FLAGS_AND_ERRORS = [
    (["nowhere"], "nowhere: no such file or folder"),
    (["empty"], "no images"),
    (["one"], "at least 2"),
    (["broken"], "cannot be read"),
    (["fake", "--metrics", "kid,fud"], "'fud' is not a metric"),
    (["fake", "--metrics", "lpips-pairs", "--lpips", "none"], "only LPIPS"),
    (["fake", "--metrics", "lpips-pairs", "--lpips", "alex"], "needs alexnet-owt-7be5be79.pth"),
    (["--download"], "needs pt_inception-2015-12-05-6726825d.pth"),
    (["fake", "--features", "weights.pth"], "weights.pth"),
    (["fake", "--lpips", "best"], "--lpips"),
    (["fake", "--permutations", "5"], "from 99"),
    (["fake", "--resolution", "8"], "from 64"),
    (["fake", "--max-images", "5001"], "to 5000"),
    (["fake", "--group-column", "case"], "--group-column"),
    (["fake", "--device", "tpu"], "--device tpu"),
    (["fake", "--run", "one"], "one/args.json: missing or damaged: give the --out of a train.py"),
    (["fake", "--window", "sharp"], "--window sharp"),
    ([], "GENERATED"),
    (["fake", "--out", "real"], "real: is a folder"),
    (["--checkpoint", "bands.csv", "--steps", "0"], "--steps"),
    (["fake", "--bands", "real/000.png"], "000.png"),
    (["fake", "--metrics", "inception-score"], "--features inception"),
    (["fake", "--by", "sex"], "--by sex"),
    (["--checkpoint", "nowhere"], "nowhere: no such file or folder"),
    (["--checkpoint", "empty"], "no step-*.pt in it"),
    (["fake", "real", "--board", "board.html"], "--board: the page is about one set"),
    (["--checkpoint", "bands.csv", "--board", "board.html"], "--board: the page is about one set"),
    (["fake", "--board", "empty"], "empty: is a folder"),
    (["--checkpoint", "bands.csv"], "not a checkpoint"),
    (["fake", "--features", "one"], "one"),
]


@pytest.mark.parametrize("flags, said", FLAGS_AND_ERRORS)
def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, capsys, flags, said):
    draw(tmp_path / "real", 4, 1)
    draw(tmp_path / "fake", 4, 2)
    draw(tmp_path / "one", 1, 3)
    draw(tmp_path / "broken", 3, 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "001.png").write_bytes(b"")
    (tmp_path / "bands.csv").write_text("metric,excellent,good,fair\nfud,1,2,3\n")
    if "--metrics" not in flags:
        flags = [*flags, "--metrics", "kid"]
    if "--features" not in flags:
        flags = [*flags, "--features", "texture"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "real", *flags])
    with pytest.raises(SystemExit) as stop:
        metrics.run_script(evaluate.main, evaluate.parse_args)
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("skipped: ")]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]


# ---------------------------------------------------------------- what is compared


def test_what_a_run_held_out_is_the_reference(tmp_path, monkeypatch, capsys, make_run):
    real = draw(tmp_path / "real", 24, 1)
    fake = draw(tmp_path / "fake", 9, 2)
    folder = make_run({f"{n:03}.png": "train" if n % 3 else "val" for n in range(24)})
    found = run(monkeypatch, real, fake, "--metrics", "kid", "--run", folder)
    assert found["real"]["n"] == 8
    said = capsys.readouterr().out
    assert "8 images were held out, 16 were trained on" in said
    assert said.splitlines()[-1].endswith(f"--calibrate 0.05 --run {folder}")
    pairs = found["generated"][0]["memorisation"]["pairs"]
    assert {int(pair["train"][:3]) % 3 for pair in pairs} <= {1, 2}


@pytest.mark.parametrize(
    "splits, said",
    [
        ({"000.png": "train", "001.png": "train"}, "--val-split 0.4"),
        ({"000.png": "val", "001.png": "val"}, "--train-data"),
        ({"other.png": "val"}, "names none of these images"),
    ],
)
def test_a_run_that_does_not_fit_is_one_line(tmp_path, run, capsys, make_run, splits, said):
    folder = make_run(splits)
    draw(tmp_path / "real", 4, 1)
    draw(tmp_path / "fake", 4, 2)
    with pytest.raises(SystemExit) as stop:
        run(evaluate, "real", "fake", "--run", folder, "--metrics", "kid")
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def letterbox(image):
    """Of a wide picture, all of it on a black square."""
    return ImageOps.pad(image, (64, 64), Image.Resampling.LANCZOS)


def test_a_perfect_generator_of_padded_images_is_not_told_apart(tmp_path, monkeypatch, make_run):
    def wide(image):
        return image.resize((96, 48))

    real = draw(tmp_path / "real", 40, 1, change=wide)
    fake = draw(tmp_path / "fake", 20, 2, change=lambda image: letterbox(wide(image)))
    draw(tmp_path / "copies", 20, 1, change=lambda image: letterbox(wide(image)))
    shutil.copy(tmp_path / "copies" / "005.png", tmp_path / "fake" / "000.png")
    folder = make_run({f"{n:03}.png": "train" if n < 20 else "val" for n in range(40)}, crop="pad")
    names = ("--metrics", "frechet,colour,grain", "--run", folder)

    prepared = run_set(monkeypatch, real, fake, *names)
    cut = run_set(monkeypatch, real, fake, *names, "--crop", "center")

    for name in ("frechet", "colour", "grain"):
        assert prepared["metrics"][name]["p_high"] > 0.02
        assert cut["metrics"][name]["p_high"] == 0.01
    pair = prepared["memorisation"]["pairs"][0]
    assert (pair["generated"], pair["train"]) == ("000.png", "005.png")
    assert pair["distance"] < 0.1


def test_one_range_of_grey_values_serves_both_sides_of_a_split(tmp_path, monkeypatch, make_run):
    (tmp_path / "deep").mkdir()
    for n in range(8):
        deep = Image.fromarray(np.full((64, 64), 5000 * (n + 1), np.uint16))
        deep.save(tmp_path / "deep" / f"{n}.png")
    splits = {f"{n}.png": "val" if n < 4 else "train" for n in range(8)}
    for flags, ends in (({}, (5000, 40000)), ({"range": [0.0, 50000.0]}, (0, 50000))):
        folder = make_run(splits, **flags)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "deep", "deep", "--run", folder])
        rows, known, _ = evaluate.list_reference(evaluate.parse_args())
        assert len(rows) == len(known) == 4
        assert {row.value_range for row in rows + known} == {ends}


def make_checkpoints(folder, *steps, prompts=("a wound", "@b")):
    folder.mkdir(parents=True)
    for step in steps:
        state = {"format": 1, "args": {"val_prompts": list(prompts)}, "ema": {}}
        torch.save(state, folder / f"step-{step:08}.pt")


def stand_in_for_sample(tmp_path, asked, status=0):
    """A subprocess.run that draws better pictures from a later checkpoint, for each prompt."""

    def stand_in(words):
        flags = dict(zip(words[2::2], words[3::2], strict=True))
        asked.append((os.path.basename(words[1]), flags))
        folder = tmp_path / flags["--out"]
        late = "10" in flags["--checkpoint"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        draw(folder, 30, 2 + late, change=keep if late else blur)
        names = sorted(path.name for path in folder.iterdir())
        captions = ["a wound", "@b", "another run's"] * 10
        table = list(zip(names, captions, strict=True))
        metrics.write_csv(folder / "manifest.csv", ["file", "prompt"], table)
        return types.SimpleNamespace(returncode=status)

    return stand_in


def test_checkpoints_of_a_folder_are_drawn_from_and_ranked(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 20, 1)
    make_checkpoints(tmp_path / "run" / "checkpoints", 5, 10)
    asked = []
    monkeypatch.setattr(evaluate.subprocess, "run", stand_in_for_sample(tmp_path, asked))
    flags = ["--metrics", "frechet", "--checkpoint", "run", "--num-samples", "19"]
    found = run(monkeypatch, real, *flags, "--out", "new/rank.html")["generated"]
    assert [entry["n"] for entry in found] == [19, 19]
    assert [flags["--num-images"] for _, flags in asked] == ["10", "10"]
    folders = [f"new/rank-samples/run-step-000000{step}" for step in ("10", "05")]
    assert [entry["path"] for entry in found] == folders
    assert "worse" in capsys.readouterr().out
    for entry in found:  # every third image is another run's
        drawn = [int(pair["generated"][:3]) for pair in entry["memorisation"]["pairs"]]
        assert {n % 3 for n in drawn} == {0, 1}


def test_checkpoints_are_drawn_from_as_the_flags_have_it(tmp_path, monkeypatch):
    draw(tmp_path / "real", 4, 1)
    make_checkpoints(tmp_path / "run", 5, prompts=[""])
    asked = []
    monkeypatch.setattr(evaluate.subprocess, "run", stand_in_for_sample(tmp_path, asked, status=3))
    flags = "--guidance-scale 3 --steps 9 --seed 7 --num-samples 5 --batch-size 2 --device cpu"
    checkpoint = os.path.join("run", "step-00000005.pt")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "real", "--checkpoint", checkpoint, *flags.split())
    assert stop.value.code == 3
    ((script, words),) = asked
    assert script == "sample.py"
    assert words.pop("--out").startswith("report-samples/")
    expected = {"--checkpoint": checkpoint, "--num-images": "5", "--steps": "9", "--seed": "7"}
    expected |= {"--guidance-scale": "3.0", "--batch-size": "2", "--device": "cpu"}
    assert words == expected


def means_network(monkeypatch, function=None, **settings):
    """Let the features be the mean colours of a picture."""

    def mean_colours(pixels):
        return pixels.float().mean((2, 3))

    network = metrics.Network("means", function or mean_colours, published=True, **settings)
    monkeypatch.setattr(evaluate, "load_features", lambda *_: network)


def test_frechet_is_called_fid_only_on_the_published_inception(tmp_path, monkeypatch):
    real = draw(tmp_path / "real", 8, 1)
    fake = draw(tmp_path / "fake", 8, 2)
    means_network(monkeypatch, head=np.eye(3))
    found = run(monkeypatch, real, fake, "--metrics", "frechet")
    assert list(found["generated"][0]["metrics"]) == ["fid"]
    assert found["settings"]["comparable"]["features"]


@pytest.mark.parametrize(
    "flags, comparable, lower",
    [
        ([], True, False),
        (["--resolution", "64"], False, False),
        (["--precision", "bf16"], False, True),
    ],
)
def test_figures_of_resized_images_or_of_another_precision_are_not_comparable(
    tmp_path, monkeypatch, flags, comparable, lower
):
    real = draw(tmp_path / "real", 6, 1, size=80)
    fake = draw(tmp_path / "fake", 6, 2, size=80)
    seen = set()

    def function(pixels):
        seen.add(torch.is_autocast_enabled("cpu"))
        return pixels.float().mean((2, 3))

    means_network(monkeypatch, function)
    settings = run(monkeypatch, real, fake, "--metrics", "kid", *flags)["settings"]
    assert settings["comparable"]["features"] == comparable
    assert seen == {lower}


def test_the_resize_asked_for_reaches_the_network(tmp_path, monkeypatch):
    draw(tmp_path / "real", 4, 1)
    asked = []
    monkeypatch.setattr(evaluate, "load_features", lambda *words: asked.append(words))
    flags = ["--features", "texture", "--resize", "clean", "--metrics", "kid", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "real", "real", *flags])
    evaluate.load_tools(evaluate.parse_args())
    assert asked == [("texture", torch.device("cpu"), "clean")]


def test_download_needs_no_data_and_fetches_every_file(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "get_weights", lambda name: f"/cache/{name}")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--download"])
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args()
    assert not stop.value.code
    assert capsys.readouterr().out.split() == [f"/cache/{name}" for name in metrics.WEIGHTS]


def test_weights_of_metrics_that_are_not_asked_for_are_not_looked_for(monkeypatch, tmp_path):
    draw(tmp_path / "real", 4, 1)
    asked = []
    monkeypatch.setattr(metrics, "get_weights", asked.append)
    flags = ["--features", "texture", "--metrics", "kid", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "real", "real", *flags])
    evaluate.load_tools(evaluate.parse_args())
    assert asked == []


def test_lpips_comes_where_its_weights_are(tmp_path, monkeypatch):
    real = draw(tmp_path / "real", 5, 1)
    fake = draw(tmp_path / "fake", 5, 2)
    network = metrics.Network("alex", lambda pixels: pixels.float().mean((2, 3)) / 100)
    monkeypatch.setattr(metrics, "get_weights", lambda name: "alex" in name)
    monkeypatch.setattr(evaluate, "load_lpips", lambda *_: network)
    found = run(monkeypatch, real, fake, "--metrics", "kid,lpips-nearest,lpips-pairs")
    assert list(found["generated"][0]["metrics"]) == ["kid", "lpips_nearest", "lpips_pairs"]
    assert found["settings"]["lpips"] == "alex"


# ---------------------------------------------------------------- draws, null and halves


def test_draws_have_the_sets_sizes_and_swap_the_two_images_of_a_patient():
    groups = ["a", "b"] + [""] * 10 + ["a", ""] + [""] * 5 + ["b"]
    draws = permutation_draws(12, 8, 50, 0, groups)
    assert (draws[0] == [1] * 12 + [-1] * 8).all()
    assert ((draws == 1).sum(1) == 12).all()
    assert ((draws == -1).sum(1) == 8).all()
    assert (draws[:, [0, 1]] == -draws[:, [12, 19]]).all()
    assert len({row.tobytes() for row in draws}) > 45
    assert (draws == permutation_draws(12, 8, 50, 0, groups)).all()


def units(pixels, groups, seed=0):
    images = evaluate.ImageSet("set", [row(group=group) for group in groups], pixels)
    return images.finder.picture_of, evaluate.draw_units(images, seed)


def test_a_picture_stored_twice_or_cropped_is_one_unit_which_joins_patients(tmp_path, capsys):
    draw(tmp_path / "real", 16, 1)
    _, pixels = metrics.load_pixels(metrics.list_images(str(tmp_path / "real")), 64)
    pixels[1] = pixels[0]
    resize = torch.nn.functional.interpolate
    pixels[3] = resize(pixels[2:3, :, 3:61, 5:63].float(), (64, 64), mode="bilinear")[0].byte()
    pictures, drawn = units(pixels, ["a", "b", "", "", "a", "b"] + [""] * 10)
    assert pictures[0] == pictures[1]
    assert pictures[2] == pictures[3]
    assert len(set(pictures)) == 14
    assert drawn[[0, 1, 4, 5]].sum() == drawn[[2, 3]].sum() == 1
    assert drawn[6:].all()
    assert "12 of 16 images are compared, one of each patient" in capsys.readouterr().out


def test_of_few_patients_each_image_counts():
    _, drawn = units(random_set(30).pixels, [f"p{n % 9}" for n in range(30)])
    assert drawn.all()
    _, drawn = units(random_set(30).pixels, [f"p{n % 10}" for n in range(30)])
    assert drawn.sum() == 10


@pytest.mark.parametrize("repeats", [1, 3])
def test_repeats_of_generated_pictures_stay_where_the_real_set_has_fewer(repeats):
    parts = []
    for seed, times in ((0, 3), (1, repeats)):
        part = random_set(20 * times, seed)
        part.features = part.all_features = np.zeros((20 * times, 2))
        part.finder = types.SimpleNamespace(picture_of=np.arange(20 * times) % 20)
        part.drawn = np.arange(20 * times) < 20
        parts.append(part)
    assert [len(part.rows) for part in evaluate.pick_compared(*parts)] == [20, 20]
    real, fake = evaluate.pick_compared(*parts[::-1])
    assert (len(real.rows), len(fake.rows)) == (20, 20 if repeats == 3 else 60)
    assert len(fake.all_features) == 60


def test_a_real_set_of_each_picture_twice_is_not_told_from_fresh_ones(tmp_path, monkeypatch):
    real = draw(tmp_path / "real", 30, 1)
    fake = draw(tmp_path / "fake", 30, 2)
    for path in sorted((tmp_path / "real").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
    names = ("--metrics", "frechet,precision,density,coverage")
    found = run_set(monkeypatch, real, fake, *names)["metrics"]
    assert min(figure["p_high"] for figure in found.values()) > 0.05


def test_one_image_of_each_patient_is_compared(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 24, 1)
    fake = draw(tmp_path / "fake", 24, 2)
    lines = ["file_name,case"] + [f"{n:03}.png,{n // 2}" for n in range(24)]
    (tmp_path / "real" / "metadata.csv").write_text("\n".join(lines))
    names = ("--metrics", "frechet,kid")
    alone = run_set(monkeypatch, real, fake, *names)["metrics"]
    capsys.readouterr()
    whole = run_set(monkeypatch, real, fake, *names, "--group-column", "case")["metrics"]
    assert capsys.readouterr().out.count("12 of 24 images are compared, one of each patient") == 1
    assert whole["frechet"]["value"] == pytest.approx(alone["frechet"]["value"], rel=1e-6)
    assert whole["kid"]["value"] != alone["kid"]["value"]


def test_halves_of_the_real_set_are_compared_at_equal_sizes():
    real, fake = evaluate.half_draws(21, 30, 5, seed=0)
    for draws in (real, fake):
        assert ((draws == 1).sum(1) == 10).all()
        assert ((draws == -1).sum(1) == 10).all()
    assert (real[:, 21:] == 0).all()
    assert (fake[:, :21] != -1).all()


def test_each_part_of_both_sets_is_left_out_once():
    draws = evaluate.part_draws(45, 7, 20, seed=0)
    assert draws.shape == (20, 52)
    assert ((draws == 0).sum(0) == 1).all()
    assert set((draws[:, :45] == 0).sum(1)) == {2, 3}
    assert (draws[:, :45] >= 0).all() and (draws[:, 45:] <= 0).all()


def test_halves_are_random_whatever_the_order_of_the_files():
    real, _ = evaluate.half_draws(200, 50, 9, seed=0)
    for side in (1, -1):
        places = np.nonzero(real == side)[1]
        assert 80 < places.mean() < 120
        assert len(set(places)) > 100


def test_the_yardsticks_range_holds_95_of_100():
    figure = yardstick(np.append(50.0, np.arange(101.0)), True)
    assert (figure.null_low, figure.null, figure.null_high) == pytest.approx((2.5, 50, 97.5))
    assert figure.p_high == figure.p_low == 52 / 102


def test_draws_that_are_equal_but_for_rounding_are_ties():
    figure = yardstick(np.append(0.3, np.full(99, 0.3 - 1e-14)), True)
    assert figure.p_high == figure.p_low == 1


def test_of_many_figures_one_small_p_is_no_difference():
    r = np.random.RandomState(0)
    figures = {str(k): yardstick(np.append(0, r.randn(199)), True) for k in range(12)}
    figures["kid"] = yardstick(np.append(2.2, r.randn(199)), True)
    assert figures["kid"].p_high <= 0.02
    p, differences = evaluate.test_together(figures)
    assert p > 0.05
    assert differences == {}


def test_one_figure_far_outside_of_chance_is_a_difference_though_each_has_a_draw_of_its_lowest_p():
    r = np.random.RandomState(0)
    figures = {str(k): yardstick(np.append(0, r.randn(99)), True) for k in range(12)}
    figures["recall"] = yardstick(np.append(-20, r.randn(99)), False)
    figures["kid"] = yardstick(np.append(-9, r.randn(99)), True)
    p, differences = evaluate.test_together(figures)
    assert p == 0.01
    assert list(differences.items()) == [("recall", "worse"), ("kid", "too good")]


def test_a_permutation_p_is_uniform_when_both_sets_come_from_one_source():
    r = np.random.RandomState(0)
    small = {name: 0 for name, (_, _, need) in METRICS.items() if need == "features"}
    names = list(small)
    small["together"] = 0
    for trial in range(200):
        joint = evaluate.joint_matrices(r.randn(20, 30), r.randn(20, 30), standardise=True)
        draws = permutation_draws(20, 20, 39, seed=trial)
        figures = {}
        for name in names:
            figures[name] = evaluate.measure(name, {"features": joint}, draws)
            small[name] += figures[name].p_high <= 0.1
        small["together"] += evaluate.test_together(figures)[0] <= 0.1
    # 20 expected, + 3.3 standard deviations; those that take few values are cautious
    assert all(count <= 34 for count in small.values()), small
    assert small["frechet"] >= 8
    assert small["kid"] >= 8
    assert small["together"] >= 8


@pytest.mark.parametrize("kind", ["p_high", "p_low"])
def test_a_shift_is_called_worse_than_chance_and_copies_closer_than_chance(kind):
    r = np.random.RandomState(0)
    real = r.randn(40, 64)
    fake = {"p_high": r.randn(40, 64) + 0.4, "p_low": real + 0.01 * r.randn(40, 64)}[kind]
    joint = {"features": evaluate.joint_matrices(real, fake, standardise=True)}
    draws = permutation_draws(40, 40, 99, seed=0)
    for name in ("frechet", "kid"):
        assert getattr(evaluate.measure(name, joint, draws), kind) == 0.01


def test_a_set_of_one_picture_again_and_again_is_worse_than_chance_by_each_figure_of_variety():
    r = np.random.RandomState(0)
    real = r.randn(30, 40)
    fake = r.randn(1, 40) + 0.1 * r.randn(30, 40)
    features = evaluate.joint_matrices(real, fake, True)
    distance = np.sqrt(features["distance"])
    joint = {"features": features, "ssim": np.exp(-distance), "lpips": distance}
    draws = permutation_draws(30, 30, 99, 0)
    for name in ("recall", "coverage", "ssim_pairs", "lpips_pairs"):
        assert evaluate.measure(name, joint, draws).p_high <= 0.02, name


def test_the_last_columns_are_the_real_halves_and_as_many_generated_images(
    tmp_path, monkeypatch, capsys
):
    real = draw(tmp_path / "real", 12, 1)
    dark = draw(tmp_path / "dark", 12, 2, change=darken)
    found = run_set(monkeypatch, real, dark, "--metrics", "colour")["metrics"]["colour"]
    lines = capsys.readouterr().out.splitlines()
    cells = next(line for line in lines if line.startswith("colour")).split()
    assert float(cells[-2]) == pytest.approx(found["real_vs_real"], rel=0.01)
    assert float(cells[-1]) > 4 * float(cells[-2])


# ---------------------------------------------------------------- the metrics


def observed(real, fake):
    """The features' matrices and one draw: the sets as they are."""
    joint = evaluate.joint_matrices(real, fake, standardise=False)
    return joint, permutation_draws(len(real), len(fake), 0, seed=0)


@pytest.mark.parametrize("features", [16, 128])  # fewer than images, and more
def test_the_gram_matrix_gives_the_frechet_distance_of_the_features(features):
    r = np.random.RandomState(1)
    real = r.randn(60, features)
    fake = 1.2 * r.randn(50, features) + 0.1
    joint, draws = observed(real + 100, fake + 100)
    expected = metrics.frechet(real, fake)
    assert evaluate.frechet_draws(joint, draws)[0] == pytest.approx(expected, rel=1e-9)


def test_kid_of_the_joint_kernel_is_kid():
    joint, draws = observed(REAL, FAKE)
    expected = metrics.kid(REAL, FAKE)[0]
    assert evaluate.kid_draws(joint, draws)[0] == pytest.approx(expected, rel=1e-10)


def test_precision_recall_density_and_coverage_of_the_joint_distances_are_prdcs():
    joint, draws = observed(REAL, FAKE)
    names = ("precision", "recall", "density", "coverage")
    found = [METRICS[name][0](joint, draws)[0] for name in names]
    assert found == pytest.approx([0.7, 0.7833333333333, 0.716, 0.9], abs=1e-12)  # prdc 0.2


def test_identical_images_give_clear_numbers():
    same = np.repeat(REAL[:1], 20, 0)
    joint, draws = observed(same, same)
    found = {}
    for name, (function, _, need) in METRICS.items():
        if need == "features":
            found[name] = function(joint, draws)[0]
    expected = {"frechet": 0, "kid": 0, "precision": 1, "recall": 1, "density": 4, "coverage": 1}
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_inception_score_has_the_reference_values():
    logits = np.random.RandomState(2).randn(100, 1008) * 2
    order = np.random.RandomState(2020).permutation(100)
    splits = np.zeros((10, 100))
    for n in range(10):
        splits[n, order[10 * n : 10 * n + 10]] = -1
    whole = evaluate.inception_draws(logits, -np.ones((1, 100)))[0]
    found = evaluate.inception_draws(logits, splits)
    assert whole == pytest.approx(6.196864017596, abs=1e-9)  # torch-fidelity 0.4.0
    assert found.mean() == pytest.approx(3.759963656667, abs=1e-9)
    assert found.std() == pytest.approx(0.146130318331, abs=1e-9)


def test_of_which_figures_less_is_better():
    less = {name for name, (_, lower_is_better, _) in METRICS.items() if lower_is_better}
    assert less == {"frechet", "kid", "colour", "grain", "ssim_pairs", "lpips_nearest"}


def test_jpeg_is_seen_in_the_files_as_stored_though_resizing_hides_it(
    tmp_path, monkeypatch, capsys
):
    real = draw(tmp_path / "real", 24, 0, size=200)
    fake = draw(tmp_path / "fake", 24, 1, size=200)
    for path in (tmp_path / "fake").iterdir():  # their content tells, not the suffix
        Image.open(path).save(path, "JPEG", quality=85)
    flags = ("--metrics", "grain", "--resolution", "64")
    found = run_set(monkeypatch, real, fake, *flags)["metrics"]
    assert found["grain"]["p_high"] == 0.01
    assert "sharpness or noise" in capsys.readouterr().out


@pytest.mark.parametrize(
    "limits, lower_is_better, values",
    [
        (evaluate.BANDS["fid"], True, (30, 31, 50, 51, 100, 101)),
        (evaluate.BANDS["inception_score"], False, (3, 2.9, 2, 1.9, 1.5, 1.4)),
        (evaluate.BANDS["ssim_nearest"], False, (0.8, 0.79, 0.7, 0.69, 0.6, 0.59)),
        (evaluate.BANDS["lpips_nearest"], True, (0.2, 0.21, 0.3, 0.31, 0.4, 0.41)),
    ],
)
def test_a_value_falls_into_one_of_four_bands(limits, lower_is_better, values):
    words = []
    for value in values:
        figure = types.SimpleNamespace(value=value, lower_is_better=lower_is_better)
        words.append(evaluate.band(limits, figure))
    assert words == ["excellent", "good", "good", "fair", "fair", "poor"]


def test_a_table_replaces_the_bands(tmp_path, monkeypatch):
    real = draw(tmp_path / "real", 9, 1)
    fake = draw(tmp_path / "fake", 9, 2)
    (tmp_path / "bands.csv").write_text("metric,excellent,good,fair\nkid,-9,9e9,9e9\n")
    flags = ("--metrics", "kid,recall", "--bands", "bands.csv")
    found = run_set(monkeypatch, real, fake, *flags)["metrics"]
    assert found["kid"]["band"] == "good"
    assert found["recall"]["band"] is None


# ---------------------------------------------------------------- labels


def compared(real, fake):
    """How many images of each label are compared, of {label: images}, and what is said of it."""
    sets = []
    for counts in (real, fake):
        rows = []
        for label, count in counts.items():
            rows += [row(label=label)] * count
        sets.append(evaluate.ImageSet("x", rows, np.zeros(len(rows)), np.zeros(len(rows))))
    real, fake, labels, sentences = evaluate.match_labels(*sets, 0)
    assert len(labels) == len(real.rows) + len(fake.rows)
    sides = [Counter(text_key(image.label) for image in side.rows) for side in (real, fake)]
    return *sides, sentences


def test_another_mix_of_labels_is_compared_at_the_real_one_whatever_the_case():
    real = {"wound": 30, "Chest film": 120}
    real, fake, (sentence,) = compared(real, {"chest  FILM": 75, "Wound ": 75})
    assert real == {"wound": 30, "chest film": 120}
    assert fake == {"wound": 19, "chest film": 75}
    assert "94 generated and 150 real images" in sentence


def test_labels_of_few_images_do_not_use_up_a_set():
    rare = {f"rare{k}": 1 for k in range(20)}
    real = {"a": 40, **rare, "b": 40}
    fake = {"a": 80, **rare, "b": 80}
    assert compared(real, fake) == (real, fake, [])


def test_a_label_that_is_hardly_generated_does_not_use_up_a_set():
    real, fake, _ = compared({"a": 50, "b": 50}, {"a": 100, "b": 10})
    assert real == {"a": 50, "b": 5}
    assert fake == {"a": 100, "b": 10}


def test_labels_of_one_set_alone_are_listed_and_their_images_stay():
    real, fake, sentences = compared({"a": 20, "b": 5}, {"a": 20, "c": 5, "": 2})
    assert (real.total(), fake.total()) == (25, 27)
    assert sentences == [
        "Only the real set has these labels: b.",
        "Only the generated set has these labels: c.",
    ]


def test_a_set_without_labels_is_compared_as_it_is():
    real, fake, sentences = compared({"a": 20, "b": 5}, {"": 7})
    assert (real.total(), fake.total()) == (25, 7)
    assert sentences == []


def test_draws_keep_each_label():
    labels = np.array(["a", "a", "b", "b", "b", "b"] * 10)
    groups = ["p"] + [""] * 29 + ["p"] + [""] * 29
    draws = permutation_draws(30, 30, 50, 0, groups, labels)
    assert (draws[0] == np.repeat([1, -1], 30)).all()
    assert ((draws[:, labels == "a"] == 1).sum(1) == 10).all()
    assert ((draws == 1).sum(1) == 30).all()
    assert (draws[:, 0] == -draws[:, 30]).all()
    assert len(np.unique(draws, axis=0)) > 40


def test_another_mix_of_labels_is_no_difference_of_the_pictures(tmp_path, monkeypatch):
    for name, dark, light in (("real", 5, 45), ("fake", 25, 25)):
        (tmp_path / name).mkdir()
        for label, count, change in (("dark", dark, darken), ("light", light, keep)):
            draw(tmp_path / name / label, count, (name, label), change=change)
    flags = ("--metrics", "kid,colour,ssim-pairs,frechet")
    assert run_set(monkeypatch, "real", "fake", *flags)["p"] > 0.05
    (tmp_path / "fake" / "light").rename(tmp_path / "fake" / "bright")
    (tmp_path / "fake" / "dark").rename(tmp_path / "fake" / "dim")
    assert run_set(monkeypatch, "real", "fake", *flags)["p"] <= 0.05


# ---------------------------------------------------------------- copies


def test_copies_of_training_images_are_named_and_shown(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 30, 1)
    train = draw(tmp_path / "train", 60, 2)
    fake = draw(tmp_path / "fake", 20, 3)
    for n in range(5):  # five mirrored training images among the generated ones
        image = Image.open(tmp_path / "train" / f"{n:03}.png")
        mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored.save(tmp_path / "fake" / f"{n:03}.png")
    flags = ("--metrics", "kid", "--train-data", train)
    found = run_set(monkeypatch, real, fake, *flags)["memorisation"]
    assert found["likely_copies"] == 5
    assert {copy["kind"] for copy in found["copies"]} == {"mirrored"}
    for copies in (found["copies"], found["pairs"][:5]):
        nearest = {(copy["generated"], copy["train"]) for copy in copies}
        assert nearest == {(f"{n:03}.png",) * 2 for n in range(5)}
    out = capsys.readouterr().out
    assert "5 of 20 generated images are copies of one of 60 training images: " in out
    assert "001.png of 001.png (mirrored)" in out
    assert "2 more" in out
    assert "no sign of copying" not in out
    assert "mirrored" in (tmp_path / "report.html").read_text()


def test_copies_are_sought_among_all_real_images(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 24, 1)
    fake = draw(tmp_path / "fake", 9, 2)
    run(monkeypatch, real, fake, "--metrics", "kid", "--max-images", "12")
    assert "of 24 real images" in capsys.readouterr().out


ARGS = types.SimpleNamespace(run=None, train_data=None)


def random_set(n, seed=0, **how):
    gen = metrics.generator(seed, "set")
    rough = torch.rand(n, 3, 16, 16, generator=gen) * 255
    pixels = torch.nn.functional.interpolate(rough, (64, 64), mode="bicubic").clamp(0, 255).byte()
    rows = [row(file_name=f"{i}.png", **how) for i in range(n)]
    return evaluate.ImageSet("set", rows, pixels)


def test_one_copy_among_many_is_found_and_said_with_its_label():
    known = random_set(12, label="mpox")
    fake = random_set(16, seed=1)
    fake.pixels[10] = known.pixels[7]
    found = evaluate.find_copies(known, fake, ARGS)
    (copy,) = found.copies
    assert copy["similarity"] > 0.99
    assert found.pairs[0]["distance"] < 0.01
    assert found.pairs[0]["p"] == 1 / 13
    assert copy["label"] == "mpox"
    assert found.numbers[0] == (10, 7)
    assert "1 of 16 generated images are copies" in found.sentence
    assert "10.png of 7.png (as it is)" in found.sentence
    assert "By label: mpox 1." in found.sentence
    assert "no sign" not in found.sentence


def test_no_sign_of_copying_is_said_of_fresh_images():
    found = evaluate.find_copies(random_set(16), random_set(12, seed=1), ARGS)
    assert len(found.copies) == 0
    assert found.sentence.startswith("No generated image is a copy of one of 16 real images")
    assert found.sentence.endswith("no sign of copying.")


@pytest.mark.parametrize("n, m", [(40, 100), (300, 150)])
def test_the_alarm_of_near_images_is_as_frequent_as_it_says(n, m):
    draws = np.random.RandomState(n)
    chances = []
    for _ in range(3000):
        chances.append(evaluate.count_near(draws.rand(n), draws.rand(m))[0])
    for level in (0.1, 0.03):  # of counts, so that not every level is met
        assert 0.6 * level < np.mean(np.array(chances) <= level) < 1.2 * level


def test_what_is_stored_twice_counts_once_among_the_near_ones():
    known = random_set(20)
    known.pixels[1::2] = known.pixels[::2]
    found = evaluate.find_copies(known, random_set(20, seed=1), ARGS)
    assert "no sign of copying" in found.sentence


def test_images_nearer_than_chance_gives_are_counted():
    usual = np.linspace(0.1, 0.4, 100)
    for near in (15, 25):
        similarity = np.append(np.full(near, 0.5), np.full(100 - near, 0.2))
        chance, words = evaluate.count_near(usual, similarity)
        exact = stats.betabinom.sf(near - 1, 100, 10, 91)
        assert chance == pytest.approx(exact, abs=4 * (exact / 9999) ** 0.5)  # of 9,999 draws
        what = f"{near} of 100 are as close to one of these as the closest 10% are to another"
        assert words.startswith(what)
    assert evaluate.count_near(np.ones(5000), np.zeros(5000))[0] == 1


def figure(excess=1.0, lower_is_better=True, without_part=np.nan):
    found = yardstick(np.append(excess, np.zeros(99)), lower_is_better)
    found.without_part = without_part
    return found


def entry(figures, n=60, copies=None):
    if copies is None:
        copies = evaluate.Copies("")
    rows = [row() for _ in range(n)]
    images = evaluate.ImageSet("x", rows, None)
    p, differences = evaluate.test_together(figures)
    words = [], {}, [], {}, "", [], []  # nothing on labels, subgroups, utility, people
    sets = images, images, images, (n, n)
    return evaluate.Entry(*sets, figures, p, differences, copies, *words)


def test_many_copies_make_a_set_the_last():
    found = entry({"kid": figure(1)}, 1000, evaluate.Copies("300 copies.", [{}] * 300))
    assert evaluate.may_be_copies(found)
    assert evaluate.verdict(found).endswith("300 copies.")
    few = entry({"kid": figure(1)}, 1000, evaluate.Copies("30 copies.", [{}] * 30))
    assert not evaluate.may_be_copies(few)
    assert evaluate.may_be_copies(entry({"kid": figure(-1)}))


# ---------------------------------------------------------------- subgroups and utility


def kinds_as_set(labels, drawn, first):
    """An ImageSet of phantoms: wound or film as drawn, labelled as labels says."""
    kinds = {"wound": "inflammatory ulcer", "film": "normal chest"}
    images = [phantoms.draw(kinds[name], first + n, 64)[0] for n, name in enumerate(drawn)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    features = metrics.texture(pixels).double().numpy()
    rows = [metrics.Row(f"{n}", f"{n}", label=label) for n, label in enumerate(labels)]
    return evaluate.ImageSet("x", rows, pixels, features)


def test_labels_that_the_generator_does_not_reach_are_named():
    names = ["wound", "film"] * 10
    real = kinds_as_set(names, names, 0)
    fake = kinds_as_set(names, ["film"] * 20, 500)

    found = evaluate.check_labels(real, fake, 0)

    films, _, wounds, real_wounds = found["table"]
    assert films == {
        "label": "film",
        "set": "generated",
        "images": 10,
        "looks_like": {"film": 10},
    }
    assert wounds["looks_like"] == {"film": 10}
    assert real_wounds["looks_like"]["wound"] >= 9
    (sentence,) = found["sentences"]
    assert "images of wound look like other labels: 0 of 10 look like it" in sentence


def test_labels_that_are_reached_or_missing_say_nothing():
    names = ["wound", "film"] * 10
    real = kinds_as_set(names, names, 0)

    assert evaluate.check_labels(real, kinds_as_set(names, names, 500), 0)["sentences"] == []
    assert evaluate.check_labels(kinds_as_set([""] * 20, names, 0), real, 0) == {}


def test_a_report_shows_what_labels_look_like(tmp_path, monkeypatch):
    folders = []
    for name, first in (("real", 0), ("fake", 500)):
        kinds = ["inflammatory ulcer", "normal chest"]
        phantoms.write(tmp_path / name, 20, first, kinds, 64)
        folders.append(str(tmp_path / name))

    entry = run_set(monkeypatch, *folders, "--metrics", "kid", "--out", str(tmp_path / "r.html"))

    report = (tmp_path / "r.html").read_text()
    assert len(entry["labels"]["table"]) == 4
    assert "Do they show their labels?" in report
    assert re.search("<td>normal chest<td>real<td>10<td>normal chest: \\d", report)


def test_of_a_grey_kind_a_chroma_that_no_eye_sees_is_no_difference(tmp_path, monkeypatch, capsys):
    draw = np.random.RandomState(0)
    for name, first, level in (("real", 0, 0), ("faint", 500, 1.5), ("tinted", 900, 0)):
        (tmp_path / name).mkdir()
        for n in range(20):
            grey = phantoms.draw("normal chest", first + n, 64)[0].mean(2, keepdims=True)
            colours = grey + level * draw.randn(64, 64, 3) + [30 * (name == "tinted"), 0, 0]
            image = Image.fromarray(colours.round().clip(0, 255).astype(np.uint8))
            image.save(tmp_path / name / f"{n}.png")
    figures = {}
    for name in ("faint", "tinted"):
        flags = "--metrics", "colour", "--out", str(tmp_path / "r.html")
        entry = run_set(monkeypatch, str(tmp_path / "real"), str(tmp_path / name), *flags)
        figures[name] = entry["metrics"]["colour"]["p_high"]

    assert figures["faint"] > 0.05 > figures["tinted"]
    printed = capsys.readouterr().out
    said = "20 of 20 images show colours, but the real images are grey: see sample.py --grey"
    assert printed.count(said) == 1


def test_a_subgroup_is_a_finding_or_a_decade_of_age():
    assert list(evaluate.subgroup_masks([row(label="A | B")], "label")) == ["A", "B"]
    rows = [row(fields={"Age": age}) for age in ("067Y", "65-70", "unknown", "9.5")]
    masks = evaluate.subgroup_masks(rows, "Age")
    assert list(masks) == ["0–9", "60–69", "unknown"]
    assert masks["60–69"].tolist() == [True, True, False, False]
    assert masks["unknown"].tolist() == [False, False, True, False]


@pytest.mark.parametrize("fake_has_labels", [True, False])
def test_a_subgroup_meets_the_generated_images_of_its_own(fake_has_labels):
    r = np.random.RandomState(0)
    rows = [row(label=label) for label in "ab" * 12]
    fake_rows = rows if fake_has_labels else [row()] * 24
    shift = 3 * (np.arange(24) % 2)[:, None]
    real = r.randn(24, 4) + shift
    fake = r.randn(24, 4) + shift
    found = evaluate.measure_subgroups(np.concatenate([real, fake]), rows, fake_rows, "label")
    assert [subgroup["group"] for subgroup in found] == ["a", "b"]
    for k, subgroup in enumerate(found):
        own = real[k::2]
        met = fake[k::2] if fake_has_labels else fake
        rest = real[1 - k :: 2]
        assert (subgroup["real"], subgroup["generated"]) == (12, len(met))
        assert subgroup["compared_with"] == ("its own" if fake_has_labels else "all generated")
        assert subgroup["kid"] == pytest.approx(metrics.kid(own, met)[0])
        assert subgroup["real_vs_rest"] == pytest.approx(metrics.kid(own, rest)[0])


def test_images_of_unknown_subgroup_are_one_and_few_have_no_kid():
    rows = [row(label=label) for label in ["a"] * 12 + [""] * 12 + ["b"] * 2]
    features = np.random.RandomState(0).randn(52, 4)
    found = evaluate.measure_subgroups(features, rows, rows, "label")
    assert [subgroup["group"] for subgroup in found] == ["a", "b", "unknown"]
    assert found[2]["real"] == found[2]["generated"] == 12
    assert found[2]["kid"] == pytest.approx(metrics.kid(features[12:24], features[38:50])[0])
    assert found[1]["kid"] is None


def people_of(entry, by):
    """The records of a JSON's people of one kind, by group."""
    return {record["group"]: record for record in entry["people"] if record["by"] == by}


def test_who_is_in_each_split_is_counted_with_what_is_missing(tmp_path, monkeypatch, make_run):
    fake = draw(tmp_path / "fake", 9, 2)
    draw(tmp_path / "real", 24, 1)
    lines = ["file_name,label,patient_id,gender,Patient Age"]
    for n in range(24):
        label = ("ulcer", "Ulcer|burn", "")[n % 3]
        group = f"p{n // 2}" if n < 22 else ""
        lines.append(f"{n:03}.png,{label},{group},{'FM'[n % 2]},{n if n else ''}")
    (tmp_path / "real" / "metadata.csv").write_text("\n".join(lines))
    splits = {f"{n:03}.png": ("train", "train", "val", "test")[n % 4] for n in range(24)}
    names = ("--metrics", "kid", "--run", make_run(splits))
    entry = run_set(monkeypatch, str(tmp_path / "real"), fake, *names)

    everyone = people_of(entry, "")["all"]
    assert [everyone[f"{name} images"] for name in ("train", "val", "test")] == [12, 6, 6]
    # the last two images have no patient
    assert [everyone[f"{name} patients"] for name in ("train", "val", "test")] == [6, 5, 5]
    assert (everyone["generated images"], everyone["generated patients"]) == (9, None)
    assert people_of(entry, "patient")["unknown"]["val images"] == 1
    labels = people_of(entry, "label")
    assert list(labels) == ["burn", "ulcer", "unknown"]
    assert [labels[name]["train images"] for name in labels] == [4, 8, 4]
    assert labels["unknown"]["generated images"] == 9
    sexes = people_of(entry, "sex")
    assert (sexes["female"]["train images"], sexes["male"]["train images"]) == (6, 6)
    ages = people_of(entry, "age")
    assert list(ages) == ["0–9", "10–19", "20–29", "unknown"]
    assert ages["unknown"]["train images"] == 1
    (sentence,) = entry["sentences"]
    assert sentence.startswith(
        "Fewer than 10 patients, or images of unknown patients, show burn (4)"
    )
    assert "Who is in the sets" in (tmp_path / "report.html").read_text()


def test_without_a_run_the_real_set_is_counted_as_one(tmp_path, monkeypatch):
    real = labelled(tmp_path / "real", 24, 1)
    fake = labelled(tmp_path / "fake", 24, 2)
    entry = run_set(monkeypatch, real, fake, "--metrics", "kid", "--utility")
    assert people_of(entry, "")["all"]["real images"] == 24
    other = run_set(monkeypatch, real, fake, "--metrics", "kid", "--train-data", fake)
    everyone = people_of(other, "")["all"]
    assert (everyone["train images"], everyone["real images"]) == (24, 24)


def test_labels_of_ten_images_on_both_sides_have_precision_and_recall():
    names = ["Good"] * 12 + ["bad"] * 12 + ["few"] * 9
    rows = [row(label=name) for name in names]
    images = evaluate.ImageSet("x", rows, None)
    real = np.random.RandomState(0).randn(33, 4)
    fake = np.random.RandomState(1).randn(33, 4)
    fake[12:24] += 20
    joint = {"features": evaluate.joint_matrices(real, fake, False)}
    labels = np.unique(names * 2, return_inverse=True)[1]
    draws = permutation_draws(33, 33, 199, 0, labels=labels)

    found = evaluate.figures_by_label(images, images, joint, draws)

    assert set(found) == {"good", "bad"}
    alone = observed(real[:12], fake[:12])
    for which, name in enumerate(("precision", "recall")):
        assert found["good"][name] == evaluate.neighbour_draws(which, *alone)[0]
        assert found["good"][name] >= found["good"][f"{name} by chance"] > 0
        assert found["bad"][name] == 0 < found["bad"][f"{name} by chance"]


def test_copies_are_counted_by_label_and_rare_labels_are_named():
    members = []
    for n in range(30):
        label = "A|B" if n < 6 else "B"
        members.append(("train", row(label=label, group=f"p{n // 2}")))
    members += [("generated", row(label="b"))] * 5
    copies = evaluate.Copies("", [{"label": "A | b"}, {"label": "B"}])

    figures = {"b": {"recall": 0.5}}
    _, (a, b), (sentence,) = evaluate.describe_people(members, copies, figures)

    assert (a["label"], a["copies"], a["recall"]) == ("a", 1, None)
    assert (b["label"], b["copies"], b["recall"]) == ("b", 2, 0.5)
    assert "show a (3): the model is most likely to repeat these images" in sentence
    assert evaluate.describe_people(members[6:], copies, {})[2] == []


def test_what_is_unknown_of_all_images_has_no_row_and_no_column():
    members = [("train", row()), ("generated", row())]
    copies = evaluate.Copies("")
    for is_known in (False, True):
        if is_known:
            members.append(("train", row(label="a", group="p")))
        people, by_label, _ = evaluate.describe_people(members, copies, {})
        found = types.SimpleNamespace(people=people, by_label=by_label)
        who, labels = evaluate.people_tables(found)
        assert ("<td>unknown" in who) == ("train patients" in who) == bool(labels) == is_known
        assert "generated patients" not in who
        assert "<td>age" not in who
        assert f"<td>all<td>{1 + is_known}" in who


# ---------------------------------------------------------------- the page for a board


def page_text(page):
    """What a page shows, also what it says of a dot."""
    text = re.sub("<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub("<[^>]*>", " ", text))


NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"


def numbers_in(value):
    """Every number of a JSON, in each form in which a page may print it."""
    if isinstance(value, str):
        return set(re.findall(NUMBER, value))
    if isinstance(value, dict):
        value = list(value.values()) + list(value)
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    if value is None:
        return set()
    size = abs(value)
    return {str(size), evaluate.digits(size), evaluate.digits(size, 2)}


def unknown_numbers(page, results):
    return set(re.findall(NUMBER, page_text(page))) - numbers_in(results)


AUDIT = (
    "Someone who has this adapter can tell training images from others with AUROC 0.58 "
    "(95 %: 0.51 to 0.65, p 0.012); the base alone gives AUROC 0.49 (95 %: 0.42 to 0.57, p 0.6)."
)


@pytest.fixture
def board(tmp_path, monkeypatch, make_run):
    """board(flag, …): the page, the report and the JSON of a set; names are planted everywhere."""
    place = tmp_path / "real"
    draw(place, 48, 1, name="jane_doe_{:03}.png")
    lines = ["file_name,label,patient_id,sex,age,name,born"]
    for n in range(48):
        person = f"DOE-{n // 2},{'MF'[n % 2]},{30 + n},Jane Doe,1957-03-12"
        lines.append(f"jane_doe_{n:03}.png,{('<i>dark', 'bright')[n % 2]},{person}")
    (place / "metadata.csv").write_text("\n".join(lines))
    drawn = tmp_path / "drawn"
    draw(drawn, 24, 2, name="jane_doe_{:03}.png")
    shutil.copy(place / "jane_doe_000.png", drawn / "jane_doe_000.png")
    for n in range(4, 24):
        path = drawn / f"jane_doe_{n:03}.png"
        sample.save_png(Image.open(path), path, f"John Roe, {n}")
    lines = ["file_name,label"]
    lines += [f"jane_doe_{n:03}.png,{('<i>dark', 'bright')[n % 2]}" for n in range(24)]
    (drawn / "metadata.csv").write_text("\n".join(lines))
    splits = {f"jane_doe_{n:03}.png": "train" if n < 24 else "val" for n in range(48)}
    folder = Path(make_run(splits, base="/home/roe/sd15", method="lora", steps=1234))
    (folder / "audit.json").write_text(json.dumps({"adapter": {"auroc": 0.58}, "sentence": AUDIT}))
    monkeypatch.setattr(evaluate, "SEEDS", 1)
    monkeypatch.setattr(evaluate, "small_cnn", lambda *_: lambda x: torch.zeros(len(x), 2))

    def make(*flags):
        flags = [*flags, "--metrics", "frechet,kid,recall", "--board", "board.html"]
        results = run(monkeypatch, str(place), str(drawn), *flags)
        texts = [(tmp_path / name).read_text() for name in ("board.html", "report.html")]
        return *texts, results

    make.run = str(folder)
    return make


def test_a_page_for_a_board_answers_in_order_and_has_no_figure_of_its_own(board):
    page, _, results = board("--run", board.run, "--utility", "--contact", "<Ethics office>")

    text = " ".join(page_text(page).split())
    in_order(
        text,
        [
            "24 generated images (drawn). The model that generated them is sd15, "
            "trained further (method lora) for 1234 steps.",
            "From whom were they made?",
            "20 of 24 files carry a mark that says they are synthetic.",
            "1 of 24 are copies of one of 24 real images",
            AUDIT,
            "not differentially private",
            "How do they differ from real images?",
            "for all metrics together",
            "frechet, lower is better",
            "recall by chance",
            "Do they help?",
            "linear probe: ",
            "What are the known limits?",
            "Whom to ask <Ethics office>",
        ],
    )
    assert unknown_numbers(page, results) == set()
    planted = page.replace("</body>", "<p>31337 images, p = 0.0313</p></body>")
    assert unknown_numbers(planted, results) == {"31337", "0.0313"}


def test_a_page_for_a_board_says_what_was_not_measured(board):
    page, _, results = board()

    text = page_text(page)
    assert "The model that generated them is unknown" in " ".join(text.split())
    assert "No membership audit: --run is not given or has none." in text
    assert "Not measured (--utility)." in text
    assert "_" * 40 in text
    assert unknown_numbers(page, results) == set()


def test_nothing_personal_is_on_the_page_for_a_board_or_in_its_tables(board):
    page, report, results = board("--run", board.run, "--utility")

    (entry,) = results["generated"]
    who = re.search("<summary>Who is in the sets.*?</details>", report, re.DOTALL)[0]
    for text in (page, who, json.dumps([entry["people"], entry["by_label"], results["run"]])):
        assert re.findall("doe[^s]|jane|roe|1957|/home", text.replace("/home/roe/sd15", "")) == []
        assert "bright" in text or "steps" in text
    assert "/home" not in page
    assert "<i>" not in page and "&lt;i&gt;dark" in page


@needs_chromium
def test_the_page_for_a_board_has_no_fault_in_a_real_browser(board, tmp_path):
    board("--run", board.run)
    assert page_faults(tmp_path / "board.html", tmp_path / "phone") == []


def labelled(folder, count, seed):
    """Pictures of two labels, half each, two of a case: the bright ones have a spot."""
    draw(folder, count, seed)
    lines = ["file_name,label,case,age"]
    for n in range(count):
        path = folder / f"{n:03}.png"
        pixels = np.array(Image.open(path)).astype(int)
        pixels[20:40, 20:40] += 60 * (n % 2)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        label = ("dark", "bright")[n % 2]
        lines.append(f"{path.name},{label},{seed}-{n // 2},{20 + 30 * (n % 3)}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return str(folder)


def test_the_utility_of_generated_images_is_measured_on_held_out_ones(tmp_path, monkeypatch):
    real = labelled(tmp_path / "real", 60, 1)
    fake = labelled(tmp_path / "fake", 60, 2)
    fit = evaluate.small_cnn
    monkeypatch.setattr(evaluate, "SEEDS", 1)
    monkeypatch.setattr(evaluate, "small_cnn", lambda stages, seed: fit(stages, seed, steps=20))
    found = run_set(monkeypatch, real, fake, "--metrics", "kid", "--utility", "--by", "age")
    shares = [dose["share"] for dose in found["utility"]]
    assert shares == [0, 10, 25, 50, 100]  # there are not enough for 200 %
    keys = "share auroc low high gain gain_low gain_high"
    assert list(found["utility"][0]) == keys.split()
    for dose in found["utility"]:
        assert dose["low"] <= dose["auroc"] <= dose["high"]
        assert dose["auroc"] > 0.6
    assert found["findings"][-1].startswith("A small CNN, ")
    classifiers = ["linear probe", "small CNN", "small CNN, generated first"]
    assert list(found["classifiers"]) == classifiers
    assert [subgroup["group"] for subgroup in found["subgroups"]] == ["20–29", "50–59", "80–89"]
    report = (tmp_path / "report.html").read_text()
    assert "Do they help a classifier?" in report
    assert "<td>80–89<" in report
    assert "The generator may have seen the images that classifiers are tested on" in report
    assert "upper bound" in report


@pytest.mark.parametrize("count", [8, 0])
def test_utility_says_what_it_lacks_and_the_rest_is_measured(tmp_path, monkeypatch, capsys, count):
    folders = []
    for seed, name in enumerate(("real", "fake")):
        if count:
            folders.append(labelled(tmp_path / name, count, seed))
        else:
            folders.append(draw(tmp_path / name, 8, seed))
    found = run_set(monkeypatch, *folders, "--metrics", "kid", "--utility")
    assert "utility" not in found
    assert "kid" in found["metrics"]
    for text in (capsys.readouterr().out, (tmp_path / "report.html").read_text()):
        assert "It takes a label" in text
        assert "--val-split 0.4" in text


def test_on_held_out_images_of_a_run_utility_is_no_upper_bound(tmp_path, monkeypatch, make_run):
    real = labelled(tmp_path / "real", 48, 1)
    fake = labelled(tmp_path / "fake", 24, 2)
    monkeypatch.setattr(evaluate, "SEEDS", 1)
    monkeypatch.setattr(evaluate, "small_cnn", lambda *_: lambda x: torch.zeros(len(x), 2))
    splits = {f"{n:03}.png": "train" if n < 24 else "test" for n in range(48)}
    names = ("--metrics", "kid", "--utility", "--run", make_run(splits))
    assert len(run_set(monkeypatch, real, fake, *names)["utility"]) == 5
    report = (tmp_path / "report.html").read_text()
    assert "images that the generator never saw" in report
    assert "upper bound" not in report


def utility_part(features, targets):
    """What the classifiers read; the small CNN sees nothing."""
    return torch.tensor(features), torch.zeros(len(targets), 1), torch.tensor(targets).double()


def measure_utility(monkeypatch, *parts):
    """The doses of classifiers for the training, the test and the generated part."""
    monkeypatch.setattr(evaluate, "shared_classes", lambda *_: ["a"])
    monkeypatch.setattr(evaluate, "small_cnn", lambda *_: lambda x: torch.zeros(len(x), 1))
    train, test, fake = parts
    test_set = types.SimpleNamespace(rows=[row() for _ in test[0]])
    monkeypatch.setattr(evaluate, "real_parts", lambda *_: (train, test_set, ""))
    monkeypatch.setattr(evaluate, "prepare", lambda part, *_: test if part is test_set else part)
    tools = types.SimpleNamespace(args=types.SimpleNamespace(seed=0))
    return evaluate.measure_utility(None, None, fake, tools)[0]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_gain_is_seen_where_there_is_one_and_not_where_labels_are_wrong(monkeypatch, wrong):
    r = np.random.RandomState(0)

    def part(count, shuffled=False):
        labels = r.rand(count, 1) < 0.5
        features = r.randn(count, 40) + 0.5 * labels * (np.arange(40) < 8)
        return utility_part(features, r.permutation(labels) if shuffled else labels)

    found = measure_utility(monkeypatch, part(40), part(300), part(80, wrong))
    probe = evaluate.dose_sentence(found["linear probe"])
    cnn = evaluate.dose_sentence(found["small CNN"])
    assert ("no gain" in probe) == wrong
    assert "no gain" in cnn


def test_aurocs_are_scikit_learns():
    score = pytest.importorskip("sklearn.metrics").roc_auc_score
    r = np.random.RandomState(5)
    y = r.rand(80) < 0.4
    s = np.round(r.randn(80), 1)
    targets = y[:, None].astype(float)
    weights = np.stack([np.ones(80), r.randint(0, 3, 80)])
    expected = [score(y, s), score(y, s, sample_weight=weights[1])]
    assert evaluate.aurocs(s[:, None], targets, weights) == pytest.approx(expected, abs=1e-12)


def test_a_class_without_negatives_says_nothing_of_the_auroc():
    y = np.arange(80) % 5 < 2
    other = np.arange(80) % 2 == 0
    alone = (y * 1.0)[None]
    both = np.stack([y, other], 1)
    assert np.isnan(evaluate.aurocs(both[:, :1] * 0.7, y[:, None], alone)).all()
    assert evaluate.aurocs(both * 1.0, both, alone) == pytest.approx(1)


@pytest.mark.parametrize(
    "gains, said, not_said",
    [
        ((0, 0.001, 0.005, -0.002), "no gain", "gained less"),
        ((0, 0.08, 0.2, 0.15), "from 0.700 to 0.900 with 100 %", "no gain"),
        ((0, 0.08, 0.2, 0.15), "gained less", "no gain"),
        ((0, 0.08, 0.14, 0.2), "a gain, AUROC from 0.700", "gained less"),
    ],
)
def test_the_dose_sentence_says_gain_no_gain_and_stop(gains, said, not_said):
    doses = []
    for share, gain in zip((0, 50, 100, 200), gains, strict=True):
        interval = {"gain_low": gain - 0.03, "gain_high": gain + 0.03}
        doses.append({"share": share, "auroc": 0.7 + gain, "gain": gain} | interval)
    text = evaluate.dose_sentence(doses)
    assert said in text
    assert not_said not in text


def test_doses_are_shares_of_the_real_images_and_gains_have_99_percent(monkeypatch):
    r = np.random.RandomState(0)
    sizes = []

    def part(count):
        labels = (np.arange(count) % 4 == 0)[:, None]
        return utility_part(r.randn(count, 2) + labels * (0.5, 1), labels)

    def probe(features, targets):  # looks at the second feature once images were added
        sizes.append(len(features))
        weights = torch.zeros(2, 1).double()
        weights[int(len(features) > 20)] = 1
        return weights

    train, test, fake = part(20), part(80), part(40)
    monkeypatch.setattr(evaluate, "SEEDS", 1)
    monkeypatch.setattr(evaluate, "linear_probe", probe)
    doses = measure_utility(monkeypatch, train, test, fake)["linear probe"]
    assert sizes == [20, 22, 25, 30, 40, 60]  # 0, 10, 25, 50, 100 and 200 %
    weights = evaluate.resamples([""] * 80, 0)
    features, _, targets = test
    aurocs = []
    for scores in features.numpy().T:
        aurocs.append(evaluate.aurocs(scores[:, None], targets.numpy(), weights))
    gain = aurocs[1] - aurocs[0]
    low, high = np.quantile(gain[1:], (0.005, 0.995))
    found = [doses[-1][key] for key in ("auroc", "gain", "gain_low", "gain_high")]
    assert found == pytest.approx([aurocs[1][0], gain[0], low, high])


def test_resamples_draw_whole_patients():
    counts = evaluate.resamples([f"p{n // 3}" for n in range(30)], 0)
    assert (counts[0] == 1).all()
    assert (counts[:, ::3] == counts[:, 1::3]).all()
    assert (counts.sum(1) == 30).all()
    assert len(np.unique(counts[1:])) > 2


def test_a_probe_ranks_images_by_their_finding():
    r = np.random.RandomState(0)
    y = (np.arange(200) < 20).astype(float)[:, None]
    train, test = torch.tensor(r.randn(2, 200, 5) + 4 * y)
    scores = (test @ evaluate.linear_probe(train, torch.tensor(y))).numpy()
    assert scores[:20].min() > np.quantile(scores[20:], 0.98)


def test_the_network_is_the_same_each_time_and_leaves_the_global_seed_alone():
    images = torch.randn(8, 3, 64, 64, generator=metrics.generator(0))
    targets = (torch.arange(8) % 2).double()[:, None]
    state = torch.get_rng_state()
    first = evaluate.small_cnn([(images, targets)], 0, steps=2)(images)
    again = evaluate.small_cnn([(images, targets)], 0, steps=2)(images)
    other = evaluate.small_cnn([(images, targets)], 1, steps=2)(images)
    assert (first == again).all()
    assert (first != other).any()
    assert (torch.get_rng_state() == state).all()


def test_the_network_learns_from_the_first_stage_and_then_from_the_last():
    gen = metrics.generator(0)
    images = torch.randn(64, 3, 16, 16, generator=gen)
    targets = (images.mean((1, 2, 3)) > 0).double()[:, None]
    stages = [(images, targets), (images[:1], targets[:1])]
    learnt = evaluate.small_cnn(stages, 0, steps=60)(images)
    turned = evaluate.small_cnn([(images, 1 - targets), stages[0]], 0, steps=60)(images)
    one = np.ones((1, 64))
    assert evaluate.aurocs(learnt.numpy(), targets.numpy(), one) > 0.8
    assert evaluate.aurocs(turned.numpy(), targets.numpy(), one) > 0.8


# ---------------------------------------------------------------- ranking and words


def test_the_higher_the_better_ranks_so():
    far = entry({"coverage": figure(-0.4, False)})
    near = entry({"coverage": figure(-0.1, False)})
    assert sorted([far, near], key=evaluate.rank_key)[0] is near


@pytest.mark.parametrize("gap, note", [(1.2, "worse"), (0.6, "not told apart")])
def test_the_ranking_compares_sets_by_the_same_parts_of_the_real_one(gap, note):
    noise, other = np.random.RandomState(0).randn(2, evaluate.PARTS)
    first = entry({"kid": figure(0, without_part=noise)})
    second = entry({"kid": figure(gap, without_part=noise + 0.1 * other)})
    _, rows = evaluate.ranking([first, second])
    assert rows[0][3] == "the first"
    assert rows[1][3].startswith(note)


def test_the_error_of_the_ranking_is_that_of_fresh_samples():
    random = np.random.default_rng(0)
    gaps = []
    errors = []
    for trial in range(60):
        real, first, second = random.standard_normal((3, 80, 1))
        values = []
        figures = []
        for fake in (first[:50], second[:50] + 1):
            points = {"points": np.concatenate([real, fake])}
            draws = evaluate.part_draws(80, 50, evaluate.PARTS, trial)
            whole = evaluate.permutation_draws(80, 50, 0, trial)
            values.append(evaluate.frechet_draws(points, whole)[0])
            figures.append(figure(without_part=evaluate.frechet_draws(points, draws)))
        gaps.append(values[1] - values[0])
        errors.append(evaluate.gap_error(*figures))
    assert np.mean(errors) == pytest.approx(np.std(gaps), rel=0.2)


def test_a_set_that_is_clearly_worse_is_called_so(tmp_path, monkeypatch, capsys):
    folders = [str(tmp_path / name) for name in ("real", "wrong", "right")]
    kinds = ["mpox lesion", "normal fundus", "mpox lesion"]
    for number, (folder, kind) in enumerate(zip(folders, kinds, strict=True)):
        phantoms.write(folder, 80, seed=1000 * number, kinds=[kind], size=64)
    run(monkeypatch, *folders, "--metrics", "frechet")  # of each 40 patients
    _, _, first, second, *_ = capsys.readouterr().out.split("ranking, the best")[1].splitlines()
    assert first.startswith(folders[2]) and first.endswith("the first")
    assert second.startswith(folders[1]) and second.endswith("worse")


def test_the_difference_of_two_samples_of_one_source_is_called_noise(tmp_path, monkeypatch, capsys):
    folders = [draw(tmp_path / str(n), 24, n) for n in range(3)]
    run(monkeypatch, *folders, "--metrics", "frechet")
    assert "not told apart from the first" in capsys.readouterr().out


def random_table(seed):
    """Figures of random families that are far or little worse than chance, too good, or neither."""
    r = np.random.RandomState(seed)
    shifts = {}
    figures = {}
    for name, plain_name in evaluate.PLAIN_NAMES.items():
        shift = r.choice([0, 0, 0, 2, -2, 9, -9]) * (seed % 5 > 0)
        shift = shifts.setdefault(plain_name, shift)
        lower_is_better = METRICS["frechet" if name == "fid" else name][1]
        values = np.append(shift + 0.3 * r.randn(), r.randn(599))
        figures[name] = yardstick(values, lower_is_better)
    return entry(figures)


@pytest.mark.parametrize("seed", range(100))
def test_no_sentence_of_the_verdict_contradicts_a_row_of_the_table(seed):
    found = random_table(seed)
    text = evaluate.verdict(found)
    rows = {cells[0]: cells[3] for cells in evaluate.figure_rows(found)}
    assert ("cannot be told from" in text) == (found.p > 0.05)
    assert ("can be told from" in text) == ("worse" in rows.values())
    assert set(rows.values()) == {"–"} if found.p > 0.05 else rows.values() != {"–"}
    for kind, intro in (("worse", r"clearest first\)"), ("too good", "They are too good in")):
        said = re.findall(f"{intro}: (.*?)[.]", text)
        names = [name for name, difference in rows.items() if difference == kind]
        expected = dict.fromkeys(evaluate.PLAIN_NAMES[name] for name in names)
        assert len(said) == bool(names)
        assert {name for name in expected if name in "".join(said)} == set(expected)
        for name in names:
            figure = found.metrics[name]
            assert {"worse": figure.p_high, "too good": figure.p_low}[kind] <= 0.05


def test_random_tables_are_of_each_kind():
    tables = [random_table(seed) for seed in range(100)]
    kinds = {frozenset(table.differences.values()) for table in tables}
    assert kinds == {
        frozenset(kind) for kind in ([], ["worse"], ["too good"], ["worse", "too good"])
    }
    small = [table for table in tables if table.p > 0.05]
    lowest = [min(figure.p_high for figure in table.metrics.values()) for table in small]
    assert min(lowest) <= 0.01  # what once stood below "cannot be told"


def test_figures_in_words_have_their_digits():
    words = [evaluate.digits(value) for value in (None, np.nan, 0.0, 1e-12, 2e-5, 0.01234, 12345.6)]
    assert words == ["–", "–", "0", "0", "0.00002", "0.0123", "12300"]
    assert evaluate.digits(1234) == "1234"  # a number of images
    assert evaluate.digits(0.5, sign=True) == "+0.5"


@needs_chromium
def test_the_report_has_no_fault_in_a_real_browser_whatever_names_say(tmp_path, monkeypatch):
    hostile = "'\"><img src=x onerror=document.title=1>&lt;{:03}.png"
    real = draw(tmp_path / "real", 24, 1, name=hostile)
    fake = draw(tmp_path / "<i onclick=x>", 24, 2, change=blur, name=hostile)
    for folder in (real, fake):
        lines = []
        for n in range(24):
            name = hostile.format(n).replace('"', '""')
            lines.append(f'"{name}","{("<b>one</b>", "</figure>")[n % 2]}"')
        Path(folder, "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    monkeypatch.setattr(evaluate, "SEEDS", 1)
    run(monkeypatch, real, fake, real, "--metrics", "frechet,colour", "--utility")
    path = tmp_path / "report.html"
    assert page_faults(path, tmp_path / "phone") == []
    shown = Browser(path, tmp_path / "again", width=390)
    try:
        assert shown.evaluate("document.querySelectorAll('.badge').length") >= 2
        assert shown.evaluate(
            "document.querySelector('figcaption').innerText.includes('</figure>')"
        )
        shown.evaluate("document.querySelector('.zoom summary').focus()")
        width = "document.querySelector('.zoom img').clientWidth"
        before = shown.evaluate(width)
        shown.press("Enter", "Enter")
        assert shown.evaluate(width) > 1.5 * before
    finally:
        shown.kill()


def test_the_badge_says_what_the_verdict_says_and_that_copies_may_be_there():
    same = evaluate.verdict_box(entry({"kid": figure(0)}))
    far = evaluate.verdict_box(entry({"kid": figure(1)}))
    near = evaluate.verdict_box(entry({"kid": figure(-1)}))
    assert "not told apart" in same and "may be copies" not in same
    assert "✗ told apart" in far and "may be copies" not in far
    assert "! too good" in near and "may be copies" in near
    assert "p = 0.01 for all metrics" in far


def test_below_50_images_there_is_no_tick_and_the_verdict_says_so():
    for n, is_few in ((49, True), (50, False)):
        for excess in (0, 1):
            box = evaluate.verdict_box(entry({"kid": figure(excess)}, n))
            assert ("Only 49 real and 49 generated images were compared" in box) == is_few
        same = evaluate.verdict_box(entry({"kid": figure(0)}, n))
        assert ("? undecided" in same, "✓" in same) == (is_few, not is_few)


def test_permutations_that_cannot_tell_are_no_likeness():
    # the true division came up again, and each figure has draws that are rarer by it alone
    figures = {}
    for shift, name in enumerate(list(evaluate.PLAIN_NAMES)[:10]):
        values = np.append([9, 9], np.random.RandomState(shift).randn(98))
        figures[name] = yardstick(values, True)
    found = entry(figures)

    assert found.p > 0.05 and figures["kid"].p_high == 0.02
    mark, text = evaluate.findings(found)
    assert mark == "? undecided"
    said = f"99 permutations are too few to tell: type --permutations 999 (p = {found.p:.2g}"
    assert text[0].startswith(said)
    assert "cannot be told" not in evaluate.verdict(found)


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_the_dot_is_in_the_bar_where_chance_is_and_to_the_right_where_worse(lower_is_better):
    null = np.linspace(0, 1, 199)
    places = []
    for value in (0.5, 0.975, 3, 100, -100):
        found = yardstick(np.append(value, null), lower_is_better)
        places.append(evaluate.place(found))
    if not lower_is_better:
        places = [100 - place for place in places]
    assert places[:2] == pytest.approx([50, 60], abs=0.1)
    assert 60 < places[2] < places[3]
    assert places[4] < 0  # drawn at the end of the axis
