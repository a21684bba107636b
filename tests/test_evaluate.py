"""evaluate.py as people type it: sets of smooth random pictures, fresh, copied, blurred and broken."""
import json
import os
import subprocess
import sys

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
    smooth = torch.nn.functional.interpolate(rough, (size, size), mode="bicubic").mul(0.2).add(0.5).clamp(0, 1)
    for n, picture in enumerate((smooth * 255).byte().permute(0, 2, 3, 1).numpy()):
        change(Image.fromarray(picture)).save(folder / name.format(n))
    return str(folder)


def run(monkeypatch, *argv):
    """Call evaluate.py in this process and return what it wrote as --json."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv, "--json", "figures.json", "--permutations", "99"])
    evaluate.main(evaluate.parse_args())
    with open("figures.json") as file:
        return json.load(file)


def test_the_command_as_typed_prints_a_table_and_writes_a_report_and_figures(tmp_path):
    real, fake = draw(tmp_path / "real", 24, 1), draw(tmp_path / "fake", 20, 2, name="<b>{:03}.png")
    done = subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), real, fake, "--json", "new/figures.json",
                           "--permutations", "99"], capture_output=True, text=True,
                          env=os.environ | {"MEDLORA_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0 and done.stderr == ""
    assert "24 real images at 64 px" in done.stdout and "not comparable with published figures" in done.stdout
    assert f"report: {tmp_path / 'report.html'}" in done.stdout and "next: python filter.py" in done.stdout
    figures = json.loads((tmp_path / "new/figures.json").read_text())
    assert list(figures) == ["format", "settings", "real", "generated"] and figures["format"] == 1
    assert figures["real"] == {"path": real, "n": 24}
    entry, = figures["generated"]
    assert list(entry) == ["path", "n", "metrics"] and (entry["path"], entry["n"]) == (fake, 20)
    assert list(entry["metrics"]) == list(metrics.METRICS)
    for name, found in entry["metrics"].items():
        assert list(found) == ["value", "null", "null_low", "null_high", "excess", "p_high", "p_low", "real_vs_real", "band"]
        assert found["null_low"] <= found["null"] <= found["null_high"] and found["band"] is None
        assert found["excess"] == pytest.approx(found["value"] - found["null"])
        assert 0.02 <= min(found["p_high"], found["p_low"]) and np.isfinite(found["real_vs_real"]), name
    report = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in report and "<b>0" not in report
    assert not any(word in report for word in ("http:", "https:", "<script", "<link", "url("))
    assert report.count("<img") == 24 + 20 + 2 * 12 and "not comparable with published figures" in report


def test_fresh_pictures_rank_before_blurred_ones_and_copies_are_called_copies(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 30, 1)
    fresh = draw(tmp_path / "fresh", 30, 2)
    blurred = draw(tmp_path / "blurred", 30, 3, change=lambda image: image.filter(ImageFilter.GaussianBlur(2)))
    copies = draw(tmp_path / "copies", 30, 1)
    said = run(monkeypatch, real, blurred, fresh, copies)
    found = {entry["path"]: entry["metrics"] for entry in said["generated"]}
    assert [entry["path"] for entry in said["generated"]] == [fresh, blurred, copies]
    assert found[fresh]["frechet"]["p_high"] > 0.05 and found[fresh]["frechet"]["p_low"] > 0.01
    assert found[blurred]["frechet"]["p_high"] == found[blurred]["kid"]["p_high"] == 0.01
    assert found[copies]["frechet"]["value"] < 1e-6 and found[copies]["lpips_nearest"]["value"] == 0
    for name in ("frechet", "kid", "ssim_nearest", "lpips_nearest"):
        assert found[copies][name]["p_low"] == 0.01
    said = [[text for text in ("can be told", "cannot be told", "less variety", "may be copies") if text in line]
            for line in capsys.readouterr().out.splitlines() if "real ones" in line]
    assert said == [["can be told", "less variety"], ["cannot be told"], ["may be copies"]]


def test_the_real_set_as_generated_is_said_to_be_so(tmp_path, monkeypatch, capsys):
    real = draw(tmp_path / "real", 12, 1)
    found = run(monkeypatch, real, real + "/", "--metrics", "fid,kid")["generated"][0]["metrics"]
    assert list(found) == ["frechet", "kid"] and found["frechet"]["p_low"] == 0.01
    assert "is the REAL set itself" in capsys.readouterr().out


def test_figures_do_not_depend_on_batch_size_and_follow_the_seed(tmp_path, monkeypatch):
    real, fake = draw(tmp_path / "real", 14, 1), draw(tmp_path / "fake", 11, 2)
    names = ("--metrics", "frechet,coverage")
    first = run(monkeypatch, real, fake, *names, "--batch-size", "5")["generated"]
    monkeypatch.setattr(metrics, "CACHE", tmp_path / "other cache")
    again = run(monkeypatch, real, fake, *names, "--batch-size", "32")["generated"]
    assert first[0]["metrics"]["coverage"] == again[0]["metrics"]["coverage"]
    for part in ("value", "null", "null_high", "p_high", "real_vs_real"):
        assert first[0]["metrics"]["frechet"][part] == pytest.approx(again[0]["metrics"]["frechet"][part], rel=1e-4)
    other = run(monkeypatch, real, fake, *names, "--seed", "1")["generated"]
    assert other[0]["metrics"]["frechet"]["value"] == pytest.approx(first[0]["metrics"]["frechet"]["value"], rel=1e-4)
    assert other[0]["metrics"]["frechet"]["null_low"] != again[0]["metrics"]["frechet"]["null_low"]


def test_sets_of_other_sizes_are_compared_at_the_smallest_stored_one(tmp_path, monkeypatch):
    real, fake = draw(tmp_path / "real", 9, 1, size=80), draw(tmp_path / "fake", 12, 2, size=96)
    settings = run(monkeypatch, real, fake, "--metrics", "kid", "--max-images", "10")
    assert settings["settings"]["resolution"] == 80
    assert (settings["real"]["n"], settings["generated"][0]["n"]) == (9, 10)
    assert run(monkeypatch, real, fake, "--metrics", "kid", "--resolution", "64")["settings"]["resolution"] == 64


def test_patients_are_permuted_whole(tmp_path, monkeypatch):
    real, fake = draw(tmp_path / "real", 24, 1), draw(tmp_path / "fake", 24, 2)
    table = "file_name,case\n" + "".join(f"{n:03}.png,{n // 4}\n" for n in range(24))
    (tmp_path / "real" / "metadata.csv").write_text(table)
    alone = run(monkeypatch, real, fake, "--metrics", "kid")["generated"][0]["metrics"]["kid"]
    whole = run(monkeypatch, real, fake, "--metrics", "kid", "--group-column", "case")["generated"][0]["metrics"]["kid"]
    assert whole["value"] == alone["value"] and whole["null_high"] != alone["null_high"]


def test_frechet_is_called_fid_only_on_the_published_inception(tmp_path, monkeypatch):
    real, fake = draw(tmp_path / "real", 8, 1), draw(tmp_path / "fake", 8, 2)
    network = dict(name="means", function=lambda pixels: pixels.float().mean((2, 3)), standardise=False, published=True)
    monkeypatch.setattr(evaluate, "load_features", lambda *_: network)
    said = run(monkeypatch, real, fake, "--metrics", "frechet")
    assert list(said["generated"][0]["metrics"]) == ["fid"] and said["settings"]["comparable"]["features"]


def test_identical_pictures_give_numbers_not_a_crash(tmp_path, monkeypatch):
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
        for n in range(6):
            Image.new("RGB", (64, 64), (90, 60, 30)).save(tmp_path / name / f"{n}.png")
    found = run(monkeypatch, str(tmp_path / "real"), str(tmp_path / "fake"))["generated"][0]["metrics"]
    assert found["frechet"]["value"] == 0 and found["precision"]["value"] == 1 and found["ssim_pairs"]["value"] > 0.99999
    assert found["frechet"]["p_high"] == found["frechet"]["p_low"] == 1


@pytest.mark.parametrize("flags, said", [
    (["nowhere"], "nowhere: no such file or folder"), (["empty"], "no images"), (["one"], "at least 2"),
    (["broken"], "cannot be read"), (["fake", "--metrics", "kid,fud"], "no metric 'fud'"),
    (["fake", "--features", "weights.pth"], "weights.pth: no such weight file"),
    (["fake", "--lpips", "best"], "--lpips"), (["fake", "--permutations", "5"], "from 99"),
    (["fake", "--resolution", "8"], "from 64"), (["fake", "--group-column", "case"], "--group-column"),
    (["fake", "--device", "tpu"], "--device tpu"), ([], "GENERATED"), (["fake", "--out", "real"], "directory")])
def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, capsys, flags, said):
    draw(tmp_path / "real", 4, 1), draw(tmp_path / "fake", 4, 2), draw(tmp_path / "one", 1, 3), draw(tmp_path / "broken", 3, 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "001.png").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "real", *flags, *(["--metrics", "kid"] if "--metrics" not in flags else [])])
    with pytest.raises(SystemExit) as stop:
        metrics.guarded(evaluate.main, evaluate.parse_args())
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("skipped: ")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
