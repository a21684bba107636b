"""The quick start, with few steps: on phantoms, and on a user's own images and base."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import before_after
from metrics import Row

ROOT = Path(__file__).resolve().parent.parent


def start(out, **settings):
    """Run the quick start; returns what it prints."""
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    how["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(out), **settings}
    ended = subprocess.run(["sh", "tests/quickstart.sh"], **how)
    assert ended.returncode == 0, ended.stderr
    listed = re.findall(f"  {out}/(\\S+)  ", ended.stdout)
    assert len(listed) == 5
    for name in listed:
        assert (out / name).stat().st_size > 1000
    return ended.stdout


def manifest(folder):
    with open(folder / "manifest.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def settings_of(folder):
    return json.loads((folder / "args.json").read_text())["args"]


def test_phantoms_are_taught_drawn_before_and_after_evaluated_and_their_labels_checked(tmp_path):
    out = tmp_path / "out"
    settings = {"COUNT": "40", "STEPS": "2", "TRAIN": "--resolution 64", "SAMPLE": "--steps 2"}
    said = start(out, **settings)
    checked = "labels are checked: inflammatory ulcer, mpox lesion, normal chest, normal fundus"
    assert said.count(checked) == 2
    assert settings_of(out / "train")["lr"] == 3e-3
    before, after = manifest(out / "before"), manifest(out / "after")
    assert len(before) > 10
    for old, new in zip(before, after, strict=True):
        assert old["prompt"] == new["prompt"]
        assert old["seed"] == new["seed"]
        assert Image.open(out / "before" / old["file"]).size == (64, 64)
    assert {old["sha256"] for old in before}.isdisjoint(new["sha256"] for new in after)
    sets = json.loads((out / "report.json").read_text())["generated"]
    assert {each["path"] for each in sets} == {str(out / "before"), str(out / "after")}
    assert Image.open(out / "before-after.png").size == (8 * 164 + 4, 3 * 212)


def test_it_takes_a_users_images_base_prompt_and_numbers(base, images, tmp_path):
    out = tmp_path / "out"
    settings = {"DATA": images, "BASE": base, "PROMPT": "a sore foot", "NUM_IMAGES": "8"}
    settings |= {"STEPS": "3", "VAL_SPLIT": "0.15", "TRAIN": "--rank 2", "SAMPLE": "--steps 2"}
    start(out, **settings)
    args = settings_of(out / "train")
    assert (args["data"], args["base"], args["prompt"]) == (images, base, "a sore foot")
    assert (args["steps"], args["val_split"], args["rank"], args["lr"]) == (3, 0.15, 2, 1e-4)
    assert not (out / "data").exists()
    for name in ("before", "after"):
        assert [row["prompt"] for row in manifest(out / name)] == ["a sore foot"] * 8


@pytest.mark.parametrize("data, offline", [("", "1"), ("wounds/", "unset")])
def test_without_data_of_ones_own_nothing_is_downloaded(data, offline, tmp_path):
    python = tmp_path / "python"  # says for each command whether it may ask the network
    python.write_text('#!/bin/sh\necho "$1 ${HF_HUB_OFFLINE-unset}"\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": data, "PROMPT": "x"}
    how = {"cwd": ROOT, "capture_output": True, "text": True, "check": True, "env": environment}
    said = subprocess.run(["sh", "tests/quickstart.sh"], **how).stdout
    asked = dict(re.findall(r"^(\w+\.py) (\w+)$", said, re.MULTILINE))
    assert asked == dict.fromkeys(["train.py", "sample.py", "evaluate.py", "filter.py"], offline)


def test_the_picture_shows_many_captions_and_real_images_of_the_same():
    rows = [Row("", "", caption) for caption in ["red"] * 9 + ["blue", "green"]]
    assert before_after.pick(rows) == [0, 9, 10, 1, 2, 3, 4, 5]
    rows = [Row("", "", f"caption {number}") for number in range(20)]
    assert before_after.pick(rows) == [0, 2, 4, 6, 8, 10, 12, 14]
    reals = [Row("a", "", "red", "x"), Row("b", "", "grey", "y"), Row("c", "", "blue", "z")]
    wanted = [Row("", "", "blue", "z"), Row("", "", "blue", "y"), Row("", "", "blue", "z")]
    found = before_after.find_real(reals, [*wanted, *wanted])
    assert [real.path for real in found] == ["c", "b", "a"]  # by caption, by label, what is left
