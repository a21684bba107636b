"""README's commands and the scripts under tests/ run as they are typed, on small stand-ins."""

import os
import re
import shlex
import subprocess

import pytest
from conftest import ROOT
from PIL import Image
from test_house import MAY_IMPORT

import evaluate
import filter as filter_script
import lora
import metrics
import phantoms
import sample
import train

SCRIPTS = {"train": train, "sample": sample, "evaluate": evaluate, "filter": filter_script}
INSTALLS = ("python3 -m venv", "pip install", "ruff ", "python -m pytest")  # .ci/run types these
SMALLER = {  # flags that override what a command asks for
    "train": ["--steps", "2", "--resolution", "64", "--val-samples", "0"],
    "sample": ["--num-images", "4", "--steps", "2"],
    "evaluate": ["--permutations", "99"],
    "filter": [],
}


def readme_commands():
    """The commands of README's fenced blocks, without those that install or check."""
    text = (ROOT / "README.md").read_text()
    commands = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith(INSTALLS):
                commands.append(line)
    return commands


def write_data(folder, kinds):
    """A small data set with labels and patients."""
    phantoms.write(folder, count=48, seed=100, kinds=kinds, size=64)


def write_ratings(folder, path):
    """Ratings of pictures in `folder`: drawings are good, noise is bad."""
    lines = ["image_path,rating,prompt"]
    for i, picture in enumerate(sorted(folder.glob("*.png"))):
        lines.append(f"{picture},3,a{i}")
    for i in range(24):
        noise = folder / f"noise-{i}.png"
        Image.effect_noise((64, 64), 30 + 5 * i).convert("RGB").save(noise)
        lines.append(f"{noise},1,b{i}")
    path.write_text("\n".join(lines))


def test_every_command_of_readme_runs_as_typed(run, base, tmp_path, monkeypatch):
    write_data(tmp_path / "wounds", ["inflammatory ulcer", "remodelling ulcer"])
    write_data(tmp_path / "xray", ["normal chest", "pleural effusion"])
    write_data(tmp_path / "rated", ["inflammatory ulcer"])
    write_ratings(tmp_path / "rated", tmp_path / "ratings-anna.csv")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    given = {path.name for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert len(commands) >= 9
    for command in commands:
        command = re.sub(r"\b(sd15|sd21-base|sd21|sdxl)\b", base, command)
        words = shlex.split(command)
        if words[0] == "python":
            script = words[1].removesuffix(".py")
            run(SCRIPTS[script], *words[2:], *SMALLER[script])
        else:
            shorter = re.sub(r"(STEPS|NUM_IMAGES)=\d+", r"\1=2", command)
            shorter = shorter.replace("OUT=", f"OUT={tmp_path}/").replace(
                "DATA=", f"DATA={tmp_path}/"
            )
            environment = {**os.environ, "SAMPLE": "--steps 2", "TRAIN": "--val-samples 0"}
            subprocess.run(shorter, shell=True, check=True, cwd=ROOT, env=environment)
    here = {path.name for path in tmp_path.iterdir()}
    assert here - given == {"runs", "selector.safetensors"}  # what may show patients is in runs/


def next_command(printed):
    """The script and words of the last line that begins with "next: ", as a shell reads them."""
    line = re.findall(r"^next: (.*)$", printed, re.MULTILINE)[-1]
    _, path, *words = shlex.split(line)
    return os.path.basename(path).removesuffix(".py"), words


@pytest.mark.parametrize("how", ["--val-data", "--caption-column"])
def test_each_script_prints_a_next_command_that_runs(how, run, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "real", ["mpox lesion"])
    phantoms.write(tmp_path / "its val", 24, seed=300, kinds=["mpox lesion"], size=64)
    value = "its val"
    if how == "--caption-column":
        value = "befund"
        table = tmp_path / "real" / "metadata.csv"
        table.write_text(table.read_text().replace("text", value, 1))
    flags = ["--base", base, "--data", "real", how, value, "--out", "a run", "--seed", 1]
    run(train, *flags, *SMALLER["train"])
    for expected in ("sample", "evaluate", "filter"):
        script, words = next_command(capsys.readouterr().out)
        assert script == expected
        run(SCRIPTS[script], *words, *SMALLER[script])


def test_a_next_command_names_how_images_are_read(monkeypatch):
    def flags_of(*words):
        monkeypatch.setattr("sys.argv", ["evaluate.py", str(ROOT), str(ROOT), *words])
        return evaluate.parse_args()

    words = "--group-column center --range -5,9.5 --window 40,80 --crop pad".split()
    words += ["--image-column", "a b"]
    args = flags_of(*words, "--allow-burned-in")
    assert flags_of(*metrics.reading_words(args)) == args
    assert metrics.reading_words(flags_of()) == []


def test_git_ignores_what_evaluate_writes_and_readmes_folder():
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    names = ["report.html", "report.json", "runs/board.html"]
    assert subprocess.run(["git", "check-ignore", *names], **how).stdout.split() == names


def test_every_flag_that_readme_names_is_one_of_the_scripts():
    known = set()
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        known |= set(re.findall(r'"(--[a-z][a-z0-9-]+)"', text))
    known |= set(re.findall(r'"(--[a-z][a-z0-9-]+)"', (ROOT / "metrics.py").read_text()))
    known |= {f"--{role}-column" for role in metrics.COLUMNS}
    elsewhere = {"--help", "--nproc_per_node", "--config", "--local-dir"}  # the last is hf's
    named = set(re.findall(r"--[a-z][a-z0-9_-]+", (ROOT / "README.md").read_text()))
    assert named - known - elsewhere == set()


@pytest.mark.parametrize("script", [*SCRIPTS.values(), lora], ids=[*SCRIPTS, "lora"])
def test_every_flag_and_file_that_a_docstring_names_is_there(script):
    text = (ROOT / f"{script.__name__}.py").read_text() + (ROOT / "metrics.py").read_text()
    flags = set(re.findall(r'"(--[a-z][a-z0-9-]+)"', text))
    flags |= {f"--{role}-column" for role in metrics.COLUMNS}
    words = script.__doc__.replace("\\\n", " ")
    for line in re.findall(rf"{script.__name__}\.py\b.*", words):
        assert set(re.findall(r"(?<=\s)--[a-z][a-z0-9-]+", line)) - flags == set()
    for path in re.findall(r"tests/[\w/.-]*\w", script.__doc__ + (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path


def test_readme_names_the_imports_the_licences_and_the_download_as_they_are():
    text = (ROOT / "README.md").read_text()
    for name, ours in MAY_IMPORT.items():
        (named,) = re.findall(rf"^{name}\.py  .*?(?:  from (.*))?$", text, re.MULTILINE)
        assert set(named.split(", ")) - {""} == ours
    rows = re.findall(r"^\| `([\w-]+)` .* \| ([\w +-]+) \| (?:\d+ )?\|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == ["tiny", "sd15", "sd21-base", "sd21", "sdxl"]
    for name, licence in rows:
        licences = [text for part, text in metrics.BASE_LICENCES.items() if re.search(part, name)]
        assert licences == [licence]
    _, _, megabytes, _ = metrics.WEIGHTS[metrics.FID_WEIGHTS]
    assert f"a download of {megabytes:.0f} MB" in text
    assert f"over {100 * metrics.BAD_SHARE:g} % fail" in text


def test_what_is_not_typed_is_as_readme_and_help_say(images, tmp_path, monkeypatch):
    (tmp_path / "a.csv").touch()

    def flags_of(script, *words):
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, words)])
        return script.parse_args()

    plain = flags_of(train, "--data", images)
    assert (plain.base, plain.val_split, plain.crop) == ("sd21-base", 0.15, "center")
    assert (plain.augment, plain.variants, plain.alpha) == ("", 1, plain.rank)
    assert flags_of(train, "--data", images, "--augment", "hflip").variants == 4
    assert not flags_of(train, "--data", images, "--strict", "--skip-bad").strict
    assert flags_of(evaluate, images, images).permutations == 999
    assert (
        flags_of(filter_script, images, "--drop-copies", "--reference", images).out == "runs/kept"
    )
    assert flags_of(filter_script, "--fit", tmp_path / "a.csv").out == "selector.safetensors"


@pytest.mark.parametrize("name", ["quickstart", "wounds", "films", "refine"])
@pytest.mark.parametrize("word, status", [("--help", 0), ("--steps", 2)])
def test_a_script_with_an_argument_shows_its_settings_and_starts_nothing(name, word, status):
    how = {"cwd": ROOT, "capture_output": True, "text": True, "env": {"PATH": os.environ["PATH"]}}
    ended = subprocess.run(["sh", f"tests/{name}.sh", word], **how)
    assert (ended.returncode, ended.stderr) == (status, "")
    header = re.match(r"#!/bin/sh\n((?:#.*\n)+)set -eu\n", (ROOT / f"tests/{name}.sh").read_text())
    assert ended.stdout == re.sub(r"^# ?", "", header[1], flags=re.MULTILINE)


@pytest.mark.parametrize("name, report", [("wounds", "utility.html"), ("films", "report.html")])
def test_the_scripts_go_from_images_to_a_mixed_set(name, report, base, tmp_path):
    settings = {
        "BASE": base,
        "OUT": str(tmp_path),
        "PHANTOMS": "28",
        "NUM_IMAGES": "2",
        "TRAIN": "--steps 2 --resolution 64 --val-samples 0 --batch-size 4",
        "SAMPLE": "--steps 2",
        "OMP_NUM_THREADS": "1",
    }
    how = {"cwd": ROOT, "capture_output": True, "text": True, "env": {**os.environ, **settings}}
    ended = subprocess.run(["sh", f"tests/{name}.sh"], **how)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / report).exists()
    assert list((tmp_path / "kept").rglob("metadata.csv"))
    is_mixed = any((tmp_path / "kept").rglob("generated/*"))
    assert ("no generated image was kept" in ended.stdout) != is_mixed
