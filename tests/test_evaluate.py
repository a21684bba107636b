"""evaluate.py as people type it: sets of smooth random pictures, fresh, copied, blurred and broken."""

import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import evaluate
import metrics

ROOT = os.path.dirname(metrics.__file__)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def draw(folder, count, seed, size=64, change=lambda image: image, name="{:03}.png"):
    """A folder of `count` smooth random pictures."""
    folder.mkdir()
    rough = torch.randn(count, 3, 8, 8, generator=metrics.generator(seed, "test"))
    smooth = (
        torch.nn.functional.interpolate(rough, (size, size), mode="bicubic")
        .mul(0.2)
        .add(0.5)
        .clamp(0, 1)
    )
    for n, picture in enumerate((smooth * 255).byte().permute(0, 2, 3, 1).numpy()):
        change(Image.fromarray(picture)).save(folder / name.format(n))
    return str(folder)


def run(monkeypatch, *argv):
    """Call evaluate.py in this process and return what it wrote as --json."""
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *argv, "--json", "figures.json", "--permutations", "99"]
    )
    evaluate.main(evaluate.parse_args())
    with open("figures.json") as file:
        return json.load(file)


def test_the_command_as_typed_prints_a_table_and_writes_a_report_and_figures(tmp_path):
    real, fake = draw(tmp_path / "real", 24, 1), draw(tmp_path / "fake", 20, 2, name="<b>{:03}.png")
    done = subprocess.run(
        [
            sys.executable,
            os.path.join(ROOT, "evaluate.py"),
            real,
            fake,
            "--json",
            "new/figures.json",
            "--permutations",
            "99",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"MEDLORA_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0 and done.stderr == ""
    assert (
        "24 real images at 64 px" in done.stdout
        and "not comparable with published figures" in done.stdout
    )
    assert (
        f"report: {tmp_path / 'report.html'}" in done.stdout
        and f"next: python {ROOT}/filter.py" in done.stdout
    )
    figures = json.loads((tmp_path / "new/figures.json").read_text())
    assert list(figures) == ["format", "settings", "real", "generated"] and figures["format"] == 1
    assert figures["real"] == {"path": real, "n": 24}
    (entry,) = figures["generated"]
    assert list(entry) == ["path", "n", "metrics", "memorisation"] and (
        entry["path"],
        entry["n"],
    ) == (fake, 20)
    assert list(entry["metrics"]) == [
        name for name, row in evaluate.METRICS.items() if row[2] not in ("logits", "lpips")
    ]
    for name, found in entry["metrics"].items():
        assert list(found) == [
            "value",
            "null",
            "null_low",
            "null_high",
            "excess",
            "p_high",
            "p_low",
            "real_vs_real",
            "band",
        ]
        assert found["null_low"] <= found["null"] <= found["null_high"]
        assert found["band"] in (
            ("excellent", "good", "fair", "poor") if name == "ssim_nearest" else (None,)
        )
        assert found["excess"] == pytest.approx(found["value"] - found["null"])
        assert 0.02 <= min(found["p_high"], found["p_low"]) and np.isfinite(
            found["real_vs_real"]
        ), name
    report = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in report and "<b>0" not in report
    assert not any(word in report for word in ("http:", "https:", "<script", "<link", "url("))
    assert (
        report.count("<img") == 24 + 20 + 2 * 12 + 2 * 8 * 2
        and "not comparable with published figures" in report
    )
    assert report.count("<circle") == 44 and "<script" not in report
    assert (
        list(entry["memorisation"]) == ["likely_copies", "pairs"]
        and len(entry["memorisation"]["pairs"]) == 12
    )
    assert list(entry["memorisation"]["pairs"][0]) == ["generated", "train", "distance", "p"]


def test_fresh_pictures_rank_before_blurred_ones_and_copies_are_called_copies(
    tmp_path, monkeypatch, capsys
):
    real = draw(tmp_path / "real", 30, 1)
    fresh = draw(tmp_path / "fresh", 30, 2)
    blurred = draw(
        tmp_path / "blurred", 30, 3, change=lambda image: image.filter(ImageFilter.GaussianBlur(2))
    )
    copies = draw(tmp_path / "copies", 30, 1)
    said = run(monkeypatch, real, blurred, fresh, copies)
    found = {entry["path"]: entry["metrics"] for entry in said["generated"]}
    assert [entry["path"] for entry in said["generated"]] == [fresh, blurred, copies]
    assert found[fresh]["frechet"]["p_high"] > 0.05 and found[fresh]["frechet"]["p_low"] > 0.01
    assert found[blurred]["frechet"]["p_high"] == found[blurred]["kid"]["p_high"] == 0.01
    assert found[copies]["frechet"]["value"] < 1e-6
    for name in ("frechet", "kid", "ssim_nearest"):
        assert found[copies][name]["p_low"] == 0.01
    said = [
        [
            text
            for text in ("can be told", "cannot be told", "less variety", "may be copies")
            if text in line
        ]
        for line in capsys.readouterr().out.splitlines()
        if "real ones" in line
    ]
    assert said == [["can be told", "less variety"], ["cannot be told"], ["may be copies"]]


def test_the_real_set_as_generated_is_said_to_be_so(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 12, 1)
    found = run(monkeypatch, real, real + "/", "--metrics", "fid,kid")["generated"][0]["metrics"]
    assert list(found) == ["frechet", "kid"] and found["frechet"]["p_low"] == 0.01
    assert "is the REAL set itself" in capsys.readouterr().out


def test_bands_stand_beside_the_values_and_a_table_replaces_them(tmp_path, monkeypatch):
    assert [evaluate.band(evaluate.BANDS["fid"], value, True) for value in (10, 50, 70, 101)] == [
        "excellent",
        "good",
        "fair",
        "poor",
    ]
    assert [
        evaluate.band(evaluate.BANDS["inception_score"], value, False) for value in (3.1, 2, 1.6, 1)
    ] == ["excellent", "good", "fair", "poor"]
    real, fake = draw(tmp_path / "real", 9, 1), draw(tmp_path / "fake", 9, 2)
    (tmp_path / "bands.csv").write_text("metric,excellent,good,fair\nkid,-9,9e9,9e9\n")
    found = run(monkeypatch, real, fake, "--metrics", "kid,recall", "--bands", "bands.csv")[
        "generated"
    ][0]["metrics"]
    assert (found["kid"]["band"], found["recall"]["band"]) == ("good", None)


def test_copies_of_training_images_are_counted_and_shown(tmp_path, monkeypatch, capsys):
    real, train, fake = (
        draw(tmp_path / "real", 30, 1),
        draw(tmp_path / "train", 60, 2),
        draw(tmp_path / "fake", 20, 3),
    )
    for n in range(5):  # five mirrored training images among the generated ones
        Image.open(tmp_path / "train" / f"{n:03}.png").transpose(
            Image.Transpose.FLIP_LEFT_RIGHT
        ).save(tmp_path / "fake" / f"{n:03}.png")
    found = run(monkeypatch, real, fake, "--metrics", "kid", "--train-data", train)["generated"][0][
        "memorisation"
    ]
    assert 5 <= found["likely_copies"] <= 7
    assert {(pair["generated"], pair["train"]) for pair in found["pairs"][:5]} == {
        (f"{n:03}.png",) * 2 for n in range(5)
    }
    assert "of 60 training images" in capsys.readouterr().out


def labelled(folder, count, seed):
    """Pictures of two labels, half each, two of a case: the bright ones have a spot."""
    draw(folder, count, seed)
    rows = ["file_name,label,case,age"]
    for n in range(count):
        path, label = folder / f"{n:03}.png", ("dark", "bright")[n % 2]
        pixels = np.array(Image.open(path)).astype(int)
        pixels[20:40, 20:40] += 60 * (n % 2)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        rows.append(f"{path.name},{label},{seed}-{n // 2},{20 + 30 * (n % 3)}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return str(folder)


def test_the_utility_of_generated_images_is_measured_on_held_out_ones(tmp_path, monkeypatch):
    real, fake = labelled(tmp_path / "real", 60, 1), labelled(tmp_path / "fake", 60, 2)
    monkeypatch.setattr(evaluate, "SEEDS", 1)
    fit = evaluate.small_cnn
    monkeypatch.setattr(
        evaluate, "small_cnn", lambda images, targets, steps, seed: fit(images, targets, 20, seed)
    )
    found = run(monkeypatch, real, fake, "--metrics", "kid", "--utility", "--by", "age")[
        "generated"
    ][0]
    assert [row["share"] for row in found["utility"]] == [
        0,
        10,
        25,
        50,
        100,
    ]  # there are not enough for 200 %
    assert list(found["utility"][0]) == ["share", "auroc", "low", "high"]
    assert all(
        row["low"] <= row["auroc"] <= row["high"] and row["auroc"] > 0.6 for row in found["utility"]
    )
    assert set(found["classifiers"]) == {"linear probe", "small CNN"}
    assert [row["group"] for row in found["subgroups"]] == ["20–29", "50–59", "80–89"]
    report = (tmp_path / "report.html").read_text()
    assert (
        "Do they help a classifier?" in report
        and "<td>80–89</td>" in report
        and "no --split" in report
    )


def test_a_gain_is_seen_where_there_is_one_and_not_where_labels_are_wrong(monkeypatch):
    r = np.random.RandomState(0)

    def part(count, wrong=False):
        labels = r.rand(count, 1) < 0.5
        features = r.randn(count, 40) + 0.5 * labels * (np.arange(40) < 8)
        return {
            "rows": [{"group": ""}] * count,
            "features": features,
            "small": torch.zeros(count, 1),
            "targets": (r.permutation(labels) if wrong else labels).astype(float),
        }

    args = types.SimpleNamespace(seed=0, by=None)
    monkeypatch.setattr(evaluate, "small_cnn", lambda *_: lambda images: np.zeros((len(images), 1)))
    for wrong in (False, True):
        monkeypatch.setattr(
            evaluate, "utility_parts", lambda *_: ([part(40), part(300), part(80, wrong)], ["ill"])
        )
        probe, cnn = evaluate.utility(None, None, None, None, args, "cpu")["said"]
        assert (
            ("AUROC rises" in probe) != wrong and ("no gain" in probe) == wrong and "no gain" in cnn
        )


def test_aurocs_are_scikit_learns_and_the_dose_sentence_says_gain_no_gain_and_stop():
    score = pytest.importorskip("sklearn.metrics").roc_auc_score
    r = np.random.RandomState(5)
    y, s = r.rand(80) < 0.4, np.round(r.randn(80), 1)
    order = (s[y][:, None] > s[~y]) + 0.5 * (s[y][:, None] == s[~y])
    weights = np.stack([np.ones(80), r.randint(0, 3, 80)])
    expected = [score(y, s), score(y, s, sample_weight=weights[1])]
    assert evaluate.aurocs([order], y[:, None].astype(float), weights) == pytest.approx(
        expected, abs=1e-12
    )
    balanced = pytest.importorskip("sklearn.metrics").balanced_accuracy_score
    expected = [balanced(y, s > 0), balanced(y, s > 0, sample_weight=weights[1])]
    hits, targets = ((s > 0) == y)[None].astype(float), y[:, None].astype(float)
    assert evaluate.balanced_accuracies(hits, targets, weights) == pytest.approx(
        expected, abs=1e-12
    )
    alone = weights[:1] * y  # no negative: nothing is known, and another class alone counts
    assert np.isnan(evaluate.aurocs([order], targets, alone)) and np.isnan(
        evaluate.balanced_accuracies(hits, targets, alone)
    )
    both = np.stack([y, np.arange(80) % 2 == 0], 1).astype(float)
    assert evaluate.aurocs([order, np.ones((40, 40))], both, alone) == pytest.approx(1)

    def said(*gains):
        boots = {
            share: 0.7 + gain + 0.01 * r.randn(500) * (share > 0)
            for share, gain in zip((0, 50, 100, 200), gains)
        }
        rows = [
            {
                "share": share,
                "auroc": 0.7 + gain,
                "gain": gain,
                "gain_low": np.quantile(boots[share] - boots[0], 0.005),
                "gain_high": np.quantile(boots[share] - boots[0], 0.995),
            }
            for share, gain in zip(boots, gains)
        ]
        return evaluate.dose_sentence(rows, boots)

    assert said(0, 0.001, 0.005, -0.002).startswith("no gain")
    assert "do harm" in said(0, -0.01, -0.1, -0.2) and "from 100 % on" in said(0, -0.01, -0.1, -0.2)
    assert "stop at 100 %" in said(0, 0.08, 0.2, 0.202) and "stop at" not in said(
        0, 0.08, 0.14, 0.2
    )


def test_the_split_of_the_run_makes_held_out_images_the_reference(tmp_path, monkeypatch, capsys):
    real, fake = draw(tmp_path / "real", 24, 1), draw(tmp_path / "fake", 9, 2)
    rows = [f"{n:03}.png,,{'val' if n % 3 == 0 else 'train'}" for n in range(24)]
    (tmp_path / "split.csv").write_text("\n".join(["file_name,group,split", *rows]))
    found = run(monkeypatch, real, fake, "--metrics", "kid", "--split", "split.csv")
    assert found["real"]["n"] == 8 and "16 were trained on" in capsys.readouterr().out
    assert {
        int(pair["train"][:3]) % 3 for pair in found["generated"][0]["memorisation"]["pairs"]
    } <= {1, 2}


def test_checkpoints_of_a_folder_are_drawn_from_and_ranked(tmp_path, monkeypatch, capsys):
    import sample

    real, drawn = draw(tmp_path / "real", 20, 1), []
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for step in (5, 10):
        torch.save(
            {"format": 1, "args": {"val_prompts": ["a wound", "@b"]}, "ema": {}},
            tmp_path / "run" / "checkpoints" / f"step-{step:08}.pt",
        )

    def stand_in(args):  # better pictures from the later checkpoint
        drawn.append(args)
        os.makedirs(os.path.dirname(args.out), exist_ok=True)
        late = "10" in args.checkpoint
        draw(
            tmp_path / args.out,
            30,
            2 + late,
            change=lambda image: image if late else image.filter(ImageFilter.GaussianBlur(3)),
        )
        names = sorted(
            name for name in os.listdir(args.out) if name.endswith(".png")
        )  # a third was another run's
        metrics.write_csv(
            f"{args.out}/manifest.csv",
            ["file", "prompt"],
            list(zip(names, ["a wound", "@b", "a stranger's"] * 10)),
        )

    monkeypatch.setattr(sample, "main", stand_in)
    found = run(
        monkeypatch,
        real,
        "--metrics",
        "frechet",
        "--checkpoint",
        "run",
        "--num-samples",
        "19",
        "--out",
        "new/rank.html",
    )
    assert [entry["n"] for entry in found["generated"]] == [19, 19]
    assert [(a.prompt, a.num_images, a.steps) for a in drawn] == [(["a wound", "@b"], 10, 50)] * 2
    assert [entry["path"] for entry in found["generated"]] == [
        f"new/rank-samples/run-step-000000{n}" for n in ("10", "05")
    ]
    assert (
        "worse" in capsys.readouterr().out
        and "stranger" not in (tmp_path / "new" / "rank.html").read_text()
    )


def test_one_range_of_grey_values_serves_both_sides_of_a_split(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for n in range(8):
        Image.fromarray(np.full((64, 64), 5000 * (n + 1), np.uint16)).save(
            tmp_path / "deep" / f"{n}.png"
        )
    (tmp_path / "split.csv").write_text(
        "\n".join(
            [
                "file_name,group,split",
                *(f"{n}.png,,{'val' if n < 4 else 'train'}" for n in range(8)),
            ]
        )
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["evaluate.py", str(tmp_path / "deep"), "x", "--split", str(tmp_path / "split.csv")],
    )
    rows, known = evaluate.list_real(evaluate.parse_args())
    assert {row["range"] for row in rows + known} == {(0, 40000)} and len(rows) == len(known) == 4


def test_copies_in_a_large_set_are_counted_among_those_that_were_drawn():
    found = {"likely_copies": 300, "chance": 1e-9, "m": 1000}
    entry = {
        "metrics": {"kid": {"p_low": 0.9, "p_high": 0.001, "excess": 3.0, "null": 1.0}},
        "memorisation": found,
        "n": 10_000,
        "real_n": 10_000,
    }
    assert evaluate.are_copies(entry)
    found |= {"limit": 0.01, "expected": 10, "n": 1000, "is_real": False}
    assert "Too many of these images lie closer to a real one" in evaluate.verdict(
        {**entry, "copies": True}
    )


def test_a_subgroup_is_a_finding_or_a_decade_of_age():
    def row(text):
        return {"label": text, "fields": {"Age": text}}

    assert evaluate.values_of(row("A | B"), "label") == ["A", "B"]
    assert [evaluate.values_of(row(age), "Age") for age in ("067Y", "65-70", "unknown", "9.5")] == [
        ["60–69"]
    ] * 2 + [[], ["0–9"]]


def test_copies_are_sought_among_all_real_images(tmp_path, monkeypatch):
    real, fake = draw(tmp_path / "real", 24, 1), draw(tmp_path / "fake", 9, 2)
    run(monkeypatch, real, fake, "--metrics", "kid", "--max-images", "12")
    report = (tmp_path / "report.html").read_text()
    assert "of 24 real images" in report and "training image" not in report


def test_the_difference_of_two_samples_of_one_source_is_called_noise(tmp_path, monkeypatch, capsys):
    real, *others = (draw(tmp_path / str(n), 24, n) for n in range(3))
    run(monkeypatch, real, *others, "--metrics", "frechet")
    assert "noise: not told apart from the first" in capsys.readouterr().out


def test_the_report_fits_a_phone_in_a_real_browser(tmp_path, monkeypatch):
    browser = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if browser is None:
        pytest.skip("no chromium here")
    run(
        monkeypatch,
        draw(tmp_path / "real", 9, 1),
        draw(tmp_path / "fake", 9, 2),
        "--metrics",
        "frechet,colour",
    )
    page = (tmp_path / "report.html").read_text()
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth, innerWidth, [...document.images].every(i => i."
        "complete && i.naturalWidth), document.querySelectorAll('circle').length].join(' ')</script>"
    )
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe + "</body>"))
    shown = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=500,900",
            "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"file://{tmp_path / 'probe.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    width, room, pictures, dots = re.search(r"<title>(.*?)</title>", shown)[1].split()
    assert int(width) <= int(room) and pictures == "true" and dots == "18"


def test_jpeg_is_seen_in_the_files_as_stored_though_resizing_hides_it(
    tmp_path, monkeypatch, capsys
):
    real, fake = (
        draw(tmp_path / name, 24, seed, size=200) for seed, name in enumerate(("real", "fake"))
    )
    for path in (tmp_path / "fake").iterdir():  # their content tells, not the suffix
        Image.open(path).save(path, "JPEG", quality=85)
    found = run(monkeypatch, real, fake, "--metrics", "grain", "--resolution", "64")["generated"][
        0
    ]["metrics"]
    assert found["grain"]["p_high"] == 0.01
    seen, _ = metrics.load_pixels(metrics.list_images(fake), 64, measure=lambda image: image.size)
    assert {row["measured"] for row in seen} == {(200, 200)}
    assert "JPEG blocks as stored differ" in capsys.readouterr().out


def test_figures_do_not_depend_on_batch_size_and_follow_the_seed(tmp_path, monkeypatch):
    real, fake = draw(tmp_path / "real", 14, 1), draw(tmp_path / "fake", 11, 2)
    names = ("--metrics", "frechet,coverage")
    first = run(monkeypatch, real, fake, *names, "--batch-size", "5")["generated"]
    monkeypatch.setattr(metrics, "CACHE", tmp_path / "other cache")
    again = run(monkeypatch, real, fake, *names, "--batch-size", "32")["generated"]
    assert first[0]["metrics"]["coverage"] == again[0]["metrics"]["coverage"]
    for part in ("value", "null", "null_high", "p_high", "real_vs_real"):
        assert first[0]["metrics"]["frechet"][part] == pytest.approx(
            again[0]["metrics"]["frechet"][part], rel=1e-4
        )
    other = run(monkeypatch, real, fake, *names, "--seed", "1")["generated"]
    assert other[0]["metrics"]["frechet"]["value"] == pytest.approx(
        first[0]["metrics"]["frechet"]["value"], rel=1e-4
    )
    assert other[0]["metrics"]["frechet"]["null_low"] != again[0]["metrics"]["frechet"]["null_low"]


def test_sets_of_other_sizes_are_compared_at_the_smallest_stored_one(tmp_path, monkeypatch):
    real, fake = draw(tmp_path / "real", 9, 1, size=80), draw(tmp_path / "fake", 12, 2, size=96)
    settings = run(monkeypatch, real, fake, "--metrics", "kid", "--max-images", "10")
    assert settings["settings"]["resolution"] == 80
    assert (settings["real"]["n"], settings["generated"][0]["n"]) == (9, 10)
    assert (
        run(monkeypatch, real, fake, "--metrics", "kid", "--resolution", "64")["settings"][
            "resolution"
        ]
        == 64
    )


def test_patients_are_permuted_whole(tmp_path, monkeypatch):
    real, fake = draw(tmp_path / "real", 24, 1), draw(tmp_path / "fake", 24, 2)
    table = "file_name,case\n" + "".join(f"{n:03}.png,{n // 4}\n" for n in range(24))
    (tmp_path / "real" / "metadata.csv").write_text(table)
    alone = run(monkeypatch, real, fake, "--metrics", "kid")["generated"][0]["metrics"]["kid"]
    whole = run(monkeypatch, real, fake, "--metrics", "kid", "--group-column", "case")["generated"][
        0
    ]["metrics"]["kid"]
    assert whole["value"] == alone["value"] and whole["null_high"] != alone["null_high"]


def test_frechet_is_called_fid_only_on_the_published_inception(tmp_path, monkeypatch):
    real, fake = draw(tmp_path / "real", 8, 1), draw(tmp_path / "fake", 8, 2)
    network = dict(
        name="means",
        function=lambda pixels: pixels.float().mean((2, 3)),
        standardise=False,
        published=True,
        head=np.eye(3),
    )
    monkeypatch.setattr(evaluate, "load_features", lambda *_: network)
    said = run(monkeypatch, real, fake, "--metrics", "frechet")
    assert (
        list(said["generated"][0]["metrics"]) == ["fid"]
        and said["settings"]["comparable"]["features"]
    )


def test_identical_pictures_give_numbers_not_a_crash(tmp_path, monkeypatch):
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
        for n in range(6):
            Image.new("RGB", (64, 64), (90, 60, 30)).save(tmp_path / name / f"{n}.png")
    found = run(monkeypatch, str(tmp_path / "real"), str(tmp_path / "fake"))["generated"][0][
        "metrics"
    ]
    assert (
        found["frechet"]["value"] == 0
        and found["precision"]["value"] == 1
        and found["ssim_pairs"]["value"] > 0.99999
    )
    assert found["frechet"]["p_high"] == found["frechet"]["p_low"] == 1


@pytest.mark.parametrize(
    "flags, said",
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["empty"], "no images"),
        (["one"], "at least 2"),
        (["broken"], "cannot be read"),
        (["fake", "--metrics", "kid,fud"], "no metric 'fud'"),
        (["fake", "--features", "weights.pth"], "weights.pth: no such weight file"),
        (["fake", "--lpips", "best"], "--lpips"),
        (["fake", "--permutations", "5"], "from 99"),
        (["fake", "--resolution", "8"], "from 64"),
        (["fake", "--group-column", "case"], "--group-column"),
        (["fake", "--device", "tpu"], "--device tpu"),
        ([], "GENERATED"),
        (["fake", "--out", "real"], "directory"),
        (["fake", "--bands", "bands.csv"], "no metric 'fud'"),
        (["fake", "--checkpoint", "x", "--steps", "0"], "--steps 0"),
        (["fake", "--bands", "real/000.png"], "000.png"),
        (["fake", "--metrics", "inception-score"], "--features inception"),
        (["fake", "--utility"], "--utility: no label"),
        (["fake", "--by", "sex"], "--by sex"),
        (["--checkpoint", "nowhere"], "no checkpoint there"),
        (["fake", "--features", "one"], "cannot be loaded"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, capsys, flags, said):
    (
        draw(tmp_path / "real", 4, 1),
        draw(tmp_path / "fake", 4, 2),
        draw(tmp_path / "one", 1, 3),
        draw(tmp_path / "broken", 3, 4),
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "001.png").write_bytes(b"")
    (tmp_path / "bands.csv").write_text("metric,excellent,good,fair\nfud,1,2,3\n")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "real",
            *flags,
            *(["--metrics", "kid"] if "--metrics" not in flags else []),
        ],
    )
    with pytest.raises(SystemExit) as stop:
        metrics.run_script(evaluate.main, evaluate.parse_args)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("skipped: ")
    ]
    assert (
        stop.value.code == 2
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and said in lines[0]
    )


def fake_set(n, groups, seed=0):
    pixels = torch.randint(
        0, 255, (n, 3, 64, 64), generator=metrics.generator(seed, "set"), dtype=torch.uint8
    )
    return {
        "pixels": pixels,
        "rows": [
            {"group": g, "file_name": str(i), "label": "", "fields": {}}
            for i, g in enumerate(groups)
        ],
    }


def test_what_chance_gives_of_copies_is_counted_of_the_generated_ones():
    known, fake = fake_set(50, [""] * 50), fake_set(20, [""] * 20, 1)
    fake["pixels"][:2] = known["pixels"][:2]
    found = evaluate.memorisation(known, fake, False)
    assert found["likely_copies"] == 2 and found["expected"] == pytest.approx(20 * 2 / 51)
    assert found["chance"] == pytest.approx(
        1 - (1 - 2 / 51) ** 20 - 20 * 2 / 51 * (1 - 2 / 51) ** 19
    )


def test_films_of_one_patient_do_not_excuse_copies():
    known = fake_set(40, [f"p{n // 2}" for n in range(40)])
    known["pixels"][1::2] = (
        0.7 * known["pixels"][::2] + 0.3 * known["pixels"][1::2]
    ).byte()  # two alike films each
    fake = fake_set(10, [""] * 10, 1)
    fake["pixels"][:5] = (0.7 * known["pixels"][:10:2] + 0.3 * fake["pixels"][:5]).byte()
    assert evaluate.memorisation(known, fake, False)["likely_copies"] >= 5


def test_the_higher_the_better_ranks_so():
    entries = [{"copies": False, "metrics": {"coverage": {"excess": e}}} for e in (-0.4, -0.1)]
    assert sorted(entries, key=evaluate.rank_key)[0]["metrics"]["coverage"]["excess"] == -0.1


def test_a_subgroup_meets_the_generated_images_of_its_own():
    r, rows = np.random.RandomState(0), [{"label": label, "fields": {}} for label in "ab" * 12]
    shift = 3 * (np.arange(24) % 2)[:, None]
    joint = {"features": np.concatenate([r.randn(24, 4) + shift, r.randn(24, 4) + shift])}
    found = evaluate.subgroups(
        joint, {"rows": rows}, {"rows": rows}, types.SimpleNamespace(by=None)
    )
    for k, row in enumerate(found):
        assert row["kid"] == pytest.approx(
            metrics.kid(joint["features"][k:24:2], joint["features"][24 + k :: 2])[0]
        )
        assert row["real_vs_rest"] == pytest.approx(
            metrics.kid(joint["features"][k:24:2], joint["features"][1 - k : 24 : 2])[0]
        )
        assert (row["real"], row["generated"]) == (12, 12)


def test_resamples_draw_whole_patients():
    counts = evaluate.resamples(
        [{"group": f"p{n // 3}"} for n in range(30)], types.SimpleNamespace(seed=0)
    )
    assert (
        (counts[0] == 1).all()
        and (counts[:, ::3] == counts[:, 1::3]).all()
        and len(np.unique(counts[1:])) > 2
    )


def test_a_probe_is_right_half_of_the_time_on_either_side_of_its_middle():
    r = np.random.RandomState(0)
    y = (np.arange(200) < 20).astype(float)[:, None]
    scores = evaluate.linear_probe(r.randn(200, 5) + 4 * y, y)(r.randn(200, 5) + 4 * y)
    assert ((scores > 0) == (y > 0)).mean() > 0.98


def test_figures_are_comparable_only_where_no_image_was_resized(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (80, 64)).save(tmp_path / "b.png")
    assert [evaluate.has_side({"path": tmp_path / name}, 64) for name in ("a.png", "b.png")] == [
        True,
        False,
    ]


def test_the_resize_asked_for_reaches_the_network(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "load_features", lambda *given: asked.append(given) or {})
    evaluate.load_networks(
        types.SimpleNamespace(features="texture", lpips="none", resize="clean"), ["kid"], "cpu"
    )
    assert asked == [("texture", "cpu", "clean")]


def test_figures_of_resized_images_or_of_another_precision_are_not_comparable(
    tmp_path, monkeypatch
):
    real, fake, seen = (
        draw(tmp_path / "real", 6, 1, size=80),
        draw(tmp_path / "fake", 6, 2, size=80),
        [],
    )
    network = dict(
        name="means",
        standardise=False,
        published=True,
        function=lambda pixels: (
            seen.append(torch.is_autocast_enabled("cpu")) or pixels.float().mean((2, 3))
        ),
    )
    monkeypatch.setattr(evaluate, "load_features", lambda *_: network)
    for flags, comparable, lower in (
        ([], True, False),
        (["--resolution", "64"], False, False),
        (["--precision", "bf16"], False, True),
    ):
        settings = run(monkeypatch, real, fake, "--metrics", "kid", *flags)["settings"]
        assert settings["comparable"]["features"] == comparable and set(seen) == {lower}
        seen.clear()


def test_doses_are_shares_of_the_real_images_and_gains_have_99_percent(monkeypatch):
    r, sizes, args = np.random.RandomState(0), [], types.SimpleNamespace(seed=0, by=None)

    def part(count):
        labels = (np.arange(count) % 4 == 0)[:, None].astype(float)
        return {
            "rows": [{"group": ""}] * count,
            "features": r.randn(count, 2) + labels * (0.5, 1),
            "targets": labels,
            "small": torch.zeros(count, 1),
        }

    train, test, fake = part(20), part(80), part(40)
    monkeypatch.setattr(
        evaluate, "SEEDS", 1
    )  # a stand-in that looks at the second feature once images were added
    monkeypatch.setattr(
        evaluate,
        "linear_probe",
        lambda x, _: sizes.append(len(x)) or (lambda seen: seen[:, [int(len(x) > 20)]] - 1),
    )
    monkeypatch.setattr(evaluate, "small_cnn", lambda *_: lambda images: np.zeros((len(images), 1)))
    monkeypatch.setattr(evaluate, "utility_parts", lambda *_: ([train, test, fake], ["ill"]))
    row = evaluate.utility(None, None, None, None, args, "cpu")["rows"]["linear probe"][-1]
    assert sizes == [20, 22, 25, 30, 40, 60]  # 0, 10, 25, 50, 100 and 200 %
    weights, y = evaluate.resamples(test["rows"], args), test["targets"][:, 0] > 0
    auroc, right = zip(
        *(
            (
                evaluate.aurocs([s[y][:, None] > s[~y]], test["targets"], weights),
                (
                    (weights[:, y] @ (s > 0)[y]) / weights[:, y].sum(1)
                    + (weights[:, ~y] @ (s <= 0)[~y]) / weights[:, ~y].sum(1)
                )
                / 2,
            )
            for s in test["features"].T - 1
        )
    )
    for which, (before, after) in (("", auroc), ("balanced_", right)):
        assert [row[which + end] for end in ("gain", "gain_low", "gain_high")] == pytest.approx(
            [after[0] - before[0], *np.quantile((after - before)[1:], (0.005, 0.995))]
        )
    assert (row["auroc"], row["balanced_accuracy"]) == pytest.approx((auroc[1][0], right[1][0]))


def test_a_rare_finding_weighs_as_much_as_a_common_one_in_the_network():
    images = torch.randn(1, 3, 16, 16, generator=metrics.generator(0)).repeat(
        64, 1, 1, 1
    )  # that tell nothing
    targets = (torch.arange(64) % 4 == 0).float()[:, None]
    assert abs(evaluate.small_cnn(images, targets, 60, 0)(images[:1])).item() < 0.5


def test_the_ranking_compares_sets_by_the_same_halves_of_the_real_one():
    r = np.random.RandomState(0)
    noise, other = r.randn(2, evaluate.HALVES)

    def note(gap, spread):
        entries = [
            {
                "path": "x",
                "n": 9,
                "copies": False,
                "metrics": {"kid": {"excess": excess}},
                "halves": (0, steps),
            }
            for excess, steps in ((0, noise), (gap, noise + spread * other))
        ]
        return evaluate.compare(entries, ["kid"])[1][1][3]

    assert note(0.5, 0.1) == "worse" and note(0.1, 0.1).startswith("noise")


def test_the_last_columns_are_the_real_halves_and_as_many_generated_images(
    tmp_path, monkeypatch, capsys
):
    real = draw(tmp_path / "real", 12, 1)
    dark = draw(
        tmp_path / "dark", 12, 2, change=lambda image: image.point(lambda value: value // 3)
    )
    found = run(monkeypatch, real, dark, "--metrics", "colour")["generated"][0]["metrics"]["colour"]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("colour"))
    halves, same_size = map(float, row.split()[-2:])
    assert halves == pytest.approx(found["real_vs_real"], rel=0.01) and same_size > 4 * halves


@pytest.mark.parametrize(
    "name, said", [("precision", "look like no real image"), ("coverage", "less variety")]
)
def test_the_verdict_says_what_is_worse_than_chance_and_nothing_else(name, said):
    figures = {
        key: {
            "excess": 1.0,
            "null": 1.0,
            "p_high": 0.01 if key in ("kid", name) else 0.5,
            "p_low": 0.5,
        }
        for key in ("kid", "precision", "coverage", "recall")
    }
    found = evaluate.verdict(
        {
            "metrics": figures,
            "copies": False,
            "memorisation": {"likely_copies": None},
            "n": 60,
            "real_n": 60,
        }
    )
    assert [text for text in ("look like no real image", "less variety") if text in found] == [said]


def test_checkpoints_are_drawn_from_as_the_flags_have_it(tmp_path, monkeypatch):
    import sample

    torch.save({"format": 1, "args": {}, "ema": {}}, "step-00000005.pt")
    asked = []
    monkeypatch.setattr(sample, "main", lambda args: asked.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(
            monkeypatch,
            draw(tmp_path / "real", 4, 1),
            "--checkpoint",
            "step-00000005.pt",
            "--guidance-scale",
            "3",
            "--steps",
            "9",
            "--seed",
            "7",
            "--num-samples",
            "5",
            "--batch-size",
            "2",
        )
    (a,) = asked
    assert (a.guidance_scale, a.steps, a.seed, a.num_images, a.batch_size, a.prompt) == (
        3.0,
        9,
        7,
        5,
        2,
        [""],
    )
