"""Kill, starve and mislead every script at random, and see that nothing is lost.

    python tests/torture.py                      200 kills, 60 full disks, 1000 bad inputs
    python tests/torture.py --kills 50           one of the three alone, or --disks, --inputs
    python tests/torture.py --seed 1             the same with other draws

Kills: a job is killed at a random moment, or just before its k-th change on the disk, up to three
times in a row. No file may then be torn, and the same command must end with the same files as a
job that was left alone. Full disks: a job runs on a file system with too little room, or without
root under a limit on the size of its files; it must say so in one line, tear nothing, and end with
those same files once there is room. Bad inputs: a file that a job reads is damaged; it must end
with status 0, or with status 2 and one line, within two minutes of the processor and 1 GB more of
memory. Jobs are forks of this process, so that a try takes a second. Prints a line for each job and
each fault; exit status 1 if there was any.
"""

import csv
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork would wait for threads it does not have
import conftest  # puts the scripts on the path and keeps the Hub offline
import nibabel
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_read_image import write_dicom
from tqdm import tqdm

import evaluate
import filter
import lora
import metrics
import sample
import train

SCRIPTS = {module.__name__: module for module in (train, sample, evaluate, filter, lora)}
TRAIN = (
    'train --base base --data images --prompt "a {label} foot" --rank 2 --val-steps 1 '
    "--val-samples 1 --seed 3 --out out"
)
QUICK = f"{TRAIN} --steps 1 --batch-size 2"
# What is killed and starved. Each job leaves its files in the folder it runs in.
JOBS = {
    "train": f"{TRAIN} --steps 30 --save-every 7 --validate-every 20 --dropout 0.1",
    "train, accumulate": f"{TRAIN} --steps 8 --batch-size 2 --accumulate 4 --save-every 3",
    "train, save each step": f"{TRAIN} --steps 15 --save-every 1 --keep-last 2",
    "train, validate each step": f"{TRAIN} --steps 8 --save-every 5 --validate-every 1",
    "train, full": f"{TRAIN} --steps 15 --method full --save-every 4 --validate-every 10",
    "train, text": f"{TRAIN} --steps 15 --text-lora --save-every 6 --ema 0.9 --cache cache",
    "train, preview": "train --data images --preview look --augment rotate --resolution 64",
    "sample": "sample --lora run/lora.safetensors --labels-from table --steps 2 --grid --out out",
    "evaluate": "evaluate images new --permutations 99 --json report.json",
    "filter": "filter new --reference images --calibrate 0.1 --out out",
    "filter, mix": "filter new --reference images --keep 8 --mix images --share 20 --out out",
    "filter, fit": "filter --fit ratings.csv --out fitted.safetensors",
    "rating page": "filter new --rating-page rate.html --blind images",
    "lora merge": (
        "lora merge run/lora.safetensors run/lora-last.safetensors:0.5 --out merged.safetensors"
    ),
    "lora convert": "lora convert run/lora.safetensors --to kohya --out kohya.safetensors",
}
SAMPLE = "sample --num-images 1 --steps 1"
RATING_PAGE = "filter new --rating-page r.html"
INTO_RUN = QUICK.replace("--out out", "--out run")
CONVERT = "lora convert FILE --out converted.safetensors --to"
# A file that is damaged, and a job that reads it; FILE stands for its path.
DAMAGED = [
    ("images/*/*", QUICK),
    ("images/*/*", JOBS["train, preview"]),
    ("images/*/*", JOBS["evaluate"]),
    ("images/*/*", JOBS["filter"]),
    ("images/*/*", JOBS["rating page"]),
    ("new/*.png", JOBS["evaluate"]),
    ("new/*.png", JOBS["filter"]),
    ("table/metadata.csv", QUICK.replace("images", "table")),
    ("table/metadata.csv", JOBS["sample"]),
    ("table/metadata.csv", "evaluate table new --permutations 99 --by sex"),
    ("lines/metadata.jsonl", QUICK.replace("images", "lines")),
    ("lines/metadata.jsonl", "filter new --reference lines --keep 3 --drop-copies"),
    ("new/manifest.csv", JOBS["evaluate"]),
    ("new/manifest.csv", JOBS["filter, mix"]),
    ("new/manifest.csv", "sample --base base --labels-from new --steps 1"),
    ("run/lora.safetensors", JOBS["lora merge"]),
    ("run/lora.safetensors", JOBS["lora convert"]),
    ("run/lora.safetensors", "lora info run/lora.safetensors"),
    ("run/lora.safetensors", f"{SAMPLE} --lora run/lora.safetensors --prompt x"),
    ("run/lora.safetensors", f"{QUICK} --init-lora run/lora.safetensors"),
    ("kohya.safetensors", "lora info kohya.safetensors"),
    ("full/model/unet/*.safetensors", f"{SAMPLE} --base full/model --prompt x"),
    ("run/checkpoints/latest.pt", f"{SAMPLE} --checkpoint run/checkpoints/latest.pt"),
    ("run/checkpoints/latest.pt", INTO_RUN),
    ("run/checkpoints/latest.pt", f"{QUICK} --resume run/checkpoints/latest.pt"),
    ("run/split.csv", "evaluate images new --run run --permutations 99"),
    ("run/split.csv", "filter new --reference images --keep 3 --run run"),
    ("run/args.json", "filter new --reference images --keep 3 --run run"),
    ("run/args.json", INTO_RUN),
    ("run/log.jsonl", INTO_RUN.replace("--steps 1", "--steps 4 --lr-schedule constant")),
    ("selector.safetensors", f"{JOBS['filter']} --selector selector.safetensors"),
    ("selector.safetensors", f"{RATING_PAGE} --suggest 4 --selector selector.safetensors"),
    ("ratings.csv", JOBS["filter, fit"]),
    ("ratings.csv", "filter --agreement ratings.csv"),
    ("ratings.csv", f"{RATING_PAGE} --rated ratings.csv"),
    ("spreadsheets/*.csv", "filter new --fit FILE --out fitted.safetensors"),
    ("spreadsheets/*.csv", "filter --agreement FILE ratings.csv"),
    ("spreadsheets/*.csv", f"{RATING_PAGE} --rated FILE"),
    ("odd/*", "train --data odd --preview look --resolution 64"),
    ("odd/*", "train --data odd --preview look --resolution 64 --range 0,4095 --slices all"),
    ("odd/*", "train --data FILE --preview look --resolution 64"),
    ("odd/*", "evaluate odd new --permutations 99"),
    ("foreign/*/*.safetensors", "lora info FILE"),
    ("foreign/*/*.safetensors", f"{CONVERT} kohya"),
    ("foreign/*/*.safetensors", f"{CONVERT} diffusers"),
    ("foreign/*/*.safetensors", "lora merge FILE FILE:0.5 --out merged.safetensors"),
    ("foreign/peft/*", "lora info foreign/peft/adapter_model.safetensors"),
    ("foreign/peft/*", f"{SAMPLE} --base base --lora foreign/peft --prompt x"),
    ("kept/decisions.csv", "filter new --reference images --keep 3 --out kept"),
    ("bands.csv", "evaluate images new --permutations 99 --bands bands.csv"),
    ("prompts.txt", f"{SAMPLE} --base base --prompts prompts.txt"),
    ("flags.txt", f"{QUICK} @flags.txt"),
    ("flags.txt", f"{SAMPLE} --base base --prompt x @flags.txt"),
    ("flags.txt", "evaluate images new --permutations 99 @flags.txt"),
    ("flags.txt", "filter new --reference images --keep 3 @flags.txt"),
    ("base/*/*.json", QUICK),
    ("base/*/*.json", f"{SAMPLE} --base base --prompt x"),
]


# ---------------------------------------------------------------- one try of a job

MOST_MEMORY = 2**30  # bytes that a job may take beyond what this process has


@dataclass
class Result:
    """How a try of a job ended."""

    status: int  # the exit status, or minus the number of the signal that ended it
    errors: str  # what it printed on stderr
    seconds: float
    changes: int  # how often it changed something on the disk
    memory: int  # bytes at its peak beyond those of this process at its start


def attempt(command, place, kill_after=None, kill_before=None, room=None):
    """Run a job in the folder `place`, in a fork of this process.

    kill_after: seconds; kill_before: number of a change on the disk; room: bytes for each file.
    """
    errors = tempfile.TemporaryFile("w+")
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    start = time.time()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    pid = os.fork()
    if pid == 0:
        os.dup2(errors.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(run_job(command, place, write_end, kill_before, room))
    os.close(write_end)
    status, peak = wait_for(pid, start + (kill_after or 600))
    seconds = time.time() - start
    errors.seek(0)
    with errors, os.fdopen(read_end) as changes:
        return Result(status, errors.read(), seconds, len(changes.read()), peak - before)


def wait_for(pid, deadline):
    """The exit status of a process, which is killed at the deadline, and its most bytes."""
    while time.time() < deadline:
        ended, code, use = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code), use.ru_maxrss * 1024
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    _, _, use = os.wait4(pid, 0)
    return -signal.SIGKILL, use.ru_maxrss * 1024


def run_job(command, place, counter, kill_before, room):
    """The job itself, in the fork: write a byte to `counter` for each change on the disk."""
    changes = 0

    def watch(event, args):
        nonlocal changes
        is_change = event in ("os.rename", "os.remove", "os.link", "os.mkdir")
        if event == "open" and str(args[1])[0] in "wxa":
            is_change = True
        if is_change:
            changes += 1
            os.write(counter, b".")
            if changes == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30, -1))
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        os.chdir(place)
        metrics.CACHE = Path("features").resolve()
        script, *flags = shlex.split(command)
        sys.argv = [f"{script}.py", *flags]
        tqdm.set_lock(threading.RLock())  # forks share its own: who is killed in it keeps it
        sys.addaudithook(watch)
        metrics.run_script(SCRIPTS[script].main, SCRIPTS[script].parse_args)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def faults_of(result, allowed=(0, 2)):
    """What is wrong with how a job ended, as a list; small inputs never fill the memory."""
    fine = result.status in allowed
    if result.status == 2 and len(re.findall("^error: ", result.errors, re.M)) != 1:
        fine = False
    if "Traceback" in result.errors or "memory is full" in result.errors:
        fine = False
    if result.memory > MOST_MEMORY:
        fine = False
    if fine:
        return []
    size = f"{result.memory / 2**20:.0f} MB"
    return [f"status {result.status}, {result.seconds:.0f} s, {size}: {result.errors[-600:]}"]


def torn_files(place):
    """The files below a folder that are not whole, as a list of faults."""
    checks = {
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".safetensors": lambda path: safe_open(path, "pt").keys(),
        ".png": lambda path: Image.open(path).load(),
        ".json": lambda path: json.loads(path.read_text()),
        ".csv": lambda path: path.read_bytes().rstrip(b"\0")[-1:].index(b"\n"),  # UTF-16, too
        ".html": lambda path: path.read_text().index("</html>"),
    }
    faults = []
    for path in Path(place).rglob("[!.]*.*"):
        try:
            if path.suffix in checks:
                checks[path.suffix](path)
        except Exception as why:  # whatever it is, it is the fault this looks for
            faults.append(f"torn: {path.relative_to(place)}: {why!r}")
    return faults


def read_outcome(place):
    """{file: content} of what a job leaves, except for what depends on the time it took."""
    outcome = {}
    for path in Path(place).rglob("[!.]*.*"):
        name = path.relative_to(place).as_posix()
        if not path.is_file() or name.startswith(
            ("features", "out/checkpoints", "out/report.html")
        ):
            continue
        content = path.read_bytes()
        if name == "out/log.jsonl":
            keys = ("step", "loss", "val_loss", "grad_norm")
            lines = [json.loads(line) for line in content.splitlines()]
            content = [[line.get(key) for key in keys] for line in lines]
        elif name.endswith("drawn.jsonl"):  # the last line of a picture counts
            lines = [json.loads(line) for line in content.splitlines()]
            content = {line["stem"]: line for line in lines}
        elif path.suffix == ".safetensors":  # the order of several header keys is random
            end = 8 + int.from_bytes(content[:8], "little")
            content = (json.loads(content[8:end]), content[end:])
        outcome[name] = content
    return outcome


def differences(expected, place):
    """The files that are not as a job left alone leaves them, as a list of faults."""
    outcome = read_outcome(place)
    faults = []
    for name in sorted(expected.keys() | outcome.keys()):
        if expected.get(name) != outcome.get(name):
            faults.append(f"differs: {name}")
    return faults


def refill(place, good):
    """Empty a folder and fill it with the inputs of the jobs."""
    for path in Path(place).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(good, place, dirs_exist_ok=True)


# ---------------------------------------------------------------- what jobs need


def make_inputs(place):
    """A base, 30 images of all kinds, tables of them, and what the scripts make of these."""
    conftest.save_base(place / "base")
    make_images(place)
    (place / "bands.csv").write_text("metric,excellent,good,fair\nfrechet,1,2,3\nkid,1,2.5,3\n")
    (place / "prompts.txt").write_text("a calm foot\na sore foot\n")
    (place / "flags.txt").write_text("# a recipe\n--seed 3\n--batch-size 2\n--out out\n")
    prepare(place, QUICK.replace("--out out", "--out run").replace("--steps 1", "--steps 3"))
    prepare(place, QUICK.replace("--out out", "--out full --method full"))
    prepare(
        place,
        "sample --lora run/lora.safetensors --labels-from images --prompt {label} --num-images 8 "
        "--out new",
    )
    prepare(place, "lora convert run/lora.safetensors --to kohya --out kohya.safetensors")
    prepare(place, "filter new --reference images --keep 4 --out kept")
    header = ["image_path", "rating", "modality", "expert_level", "prompt", "expert"]
    with open(place / "new" / "manifest.csv", newline="") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    ratings = []
    for i, name in enumerate(names[:12]):  # the others are still to be rated
        for expert in ("anna", "bert"):
            ratings.append([f"new/{name}", i % 3 + 1, "photo", 3, name[:6], expert])
    draw = np.random.RandomState(1)
    (place / "rated").mkdir()
    for i in range(40):  # the brighter, the better: a selector can learn it
        pixels = draw.randint(0, 70, (64, 64, 3)) + 60 * (i % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(place / "rated" / f"{i}.png")
        for expert in ("anna", "bert"):
            ratings.append([f"rated/{i}.png", i % 3 + 1, "photo", 3, f"foot {i}", expert])
    metrics.write_csv(place / "ratings.csv", header, ratings)
    prepare(place, JOBS["filter, fit"].replace("fitted", "selector"))
    make_spreadsheets(place, names)
    make_odd_images(place / "odd")
    make_foreign_adapters(place)


def make_images(place):
    """images/ with class folders, table/ with metadata.csv and lines/ with metadata.jsonl."""
    draw = np.random.RandomState(0)
    kinds = ["png", "jpg", "png", "tif", "dcm", "nii.gz", "webp", "bmp", "gif", "png"]
    rows = []
    for i in range(30):
        label = ("calm", "sore")[i % 2]
        name = f"{i}.{kinds[i % 10]}"
        pixels = draw.randint(0, 255, (6, 6, 3)).astype(np.uint8)
        path = place / "images" / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, Image.fromarray(pixels).resize((70, 64)))
        for folder in ("table", "lines"):
            (place / folder).mkdir(exist_ok=True)
            shutil.copy(path, place / folder)
        row = {"file_name": name, "text": f"a foot, number {i % 4}", "label": label}
        row |= {"patient_id": f"p{i // 2}", "sex": "fm"[i // 2 % 2]}
        rows.append(row)
    metrics.write_csv(place / "table/metadata.csv", list(rows[0]), [row.values() for row in rows])
    lines = [json.dumps(row) + "\n" for row in rows]
    (place / "lines" / "metadata.jsonl").write_text("".join(lines))


def write_image(path, image):
    """Write a PIL image by the suffix of its path; TIFF, DICOM and NIfTI with 16 bits."""
    grey = np.asarray(image)[..., 0].astype(np.uint16) * 16
    if path.suffix == ".dcm":
        write_dicom(path, grey)
    elif path.suffix == ".gz":
        nibabel.save(nibabel.Nifti1Image(grey.astype(np.int16)[..., None], np.eye(4)), path)
    elif path.suffix == ".tif":
        Image.fromarray(grey).save(path)
    else:
        image.save(path)


def make_spreadsheets(place, names):
    """Ratings files as spreadsheets and the rating page leave them."""
    folder = place / "spreadsheets"
    folder.mkdir()
    german = "sep=;\r\nImage Path;Rating;Expert Level;;\r\n"
    saved = "\ufeffimage_path,rating,expert,sha256\n"
    old = "file_name\trating\n"
    for i, name in enumerate(names[:12]):
        german += f"..\\new\\{name};{i % 3 + 1},0;2,5;;\r\n"
        digest = metrics.content_hash(place / "new" / name)
        saved += f'"moved/{name}",{i % 3 + 1},"Dr. ""A"", Ünal",{digest}\n'
        old += f"/gone/new/{name}\t{i % 3 + 1}\n"
    (folder / "german.csv").write_bytes(german.encode())
    (folder / "saved.csv").write_bytes(saved.encode())
    (folder / "old.csv").write_bytes(old.encode("utf-16"))


def make_odd_images(folder):
    """Images with more than 8 bits a channel, of several channels or frames, and captions."""
    folder.mkdir()
    ramp = np.arange(40 * 48 * 4, dtype=np.uint16).reshape(40, 48, 4) % 4096
    for channels, colour in ((2, 4), (3, 2), (4, 6)):
        (folder / f"deep-{channels}.png").write_bytes(deep_png(ramp[..., :channels], colour))
    (folder / "deep.tif").write_bytes(deep_tiff(ramp[..., :3]))
    small = Image.fromarray((ramp[..., :3] // 16).astype(np.uint8))
    for suffix in ("avif", "webp", "jpg", "tga", "heic"):
        try:
            small.save(folder / f"small.{suffix}")
        except (ValueError, OSError):  # this Pillow does not write it
            small.save(folder / f"small.{suffix}", "JPEG")
        (folder / f"small.{suffix}").with_suffix(".txt").write_text("a caption\n")
    colours = np.zeros((8, 9, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), folder / "struct.nii")
    volume = np.arange(8 * 9 * 3 * 4, dtype=np.int16).reshape(8, 9, 3, 4)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "channels.nii")
    vectors = volume[:, :, :, None, :3]
    nibabel.save(nibabel.Nifti1Image(vectors, np.eye(4)), folder / "vectors.nii.gz")
    write_enhanced(folder / "enhanced.dcm", ramp[:3, :, :])


def deep_png(values, colour):
    """A PNG file of (H, W, channels) uint16 values; colour: its colour type."""
    height, width, _ = values.shape
    lines = [b"\0" + line.astype(">u2").tobytes() for line in values]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(b"".join(lines))),
        (b"IEND", b""),
    ):
        check = zlib.crc32(kind + data)
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
    return file


def deep_tiff(values):
    """An uncompressed TIFF file of (H, W, 3) uint16 values."""
    height, width, channels = values.shape
    data = values.astype("<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8 + len(data)), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, channels), (278, 3, 1, height)]
    tags += [(279, 4, 1, len(data)), (284, 3, 1, 1)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    depths = struct.pack("<HHH", 16, 16, 16)
    return b"II*\0" + struct.pack("<I", 8 + len(data) + len(depths)) + data + depths + directory


def write_enhanced(path, frames):
    """An enhanced DICOM file, each frame (H, W) with a slope and window of its own."""
    from pydicom.dataset import Dataset

    groups = []
    for slope in range(len(frames)):
        rescale = Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept = slope + 1, -1024
        window = Dataset()
        window.WindowCenter, window.WindowWidth = 40, 400 + slope
        group = Dataset()
        group.PixelValueTransformationSequence = [rescale]
        group.FrameVOILUTSequence = [window]
        groups.append(group)
    write_dicom(path, frames, Modality="MR", PerFrameFunctionalGroupsSequence=groups)


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
# File -> the two matrices of a layer as other tools and other models name them.
FOREIGN = {
    "module": (f"module.unet.{LAYER}.lora_A.weight", f"module.unet.{LAYER}.lora_B.weight"),
    "kohya": (
        f"lora_unet_{LAYER.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{LAYER.replace('.', '_')}.lora_up.weight",
    ),
    "flux": (
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight",
    ),
    "llm": (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    ),
    "loha": (f"lora_unet_{LAYER}.hada_w1_a", f"lora_unet_{LAYER}.hada_w1_b"),
    "lokr": (f"lora_unet_{LAYER}.lokr_w1", f"lora_unet_{LAYER}.lokr_w2"),
    "embedding": ("clip_l", "clip_g"),
    "vae": ("decoder.conv_in.weight", "decoder.conv_out.weight"),
}


def make_foreign_adapters(place):
    """foreign/: adapters of other tools and models, and a folder as PEFT writes it."""
    down, up = torch.ones(4, 16), torch.ones(16, 4)
    folder = place / "foreign" / "files"
    folder.mkdir(parents=True)
    for name, keys in FOREIGN.items():
        save_file(dict(zip(keys, (down, up), strict=True)), folder / f"{name}.safetensors")
    peft = place / "foreign" / "peft"
    peft.mkdir()
    keys = [f"base_model.model.{LAYER}.lora_{side}.weight" for side in "AB"]
    save_file(dict(zip(keys, (down, up), strict=True)), peft / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}
    config |= {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {"attn2.to_k": 2}}
    (peft / "adapter_config.json").write_text(json.dumps(config))


def prepare(place, command):
    result = attempt(command, place)
    assert result.status == 0, f"{command}: {result.errors}"


# ---------------------------------------------------------------- kills
# Each kind of trial yields (what it tried, number of tries, faults).


def kill_jobs(good, place, count, draw):
    """Kill each job at random and type it again, until it ends as a job left alone does."""
    for name, command in JOBS.items():
        refill(place, good)
        alone = attempt(command, place)
        faults = faults_of(alone, allowed=[0])
        expected = read_outcome(place)
        kills = 0
        while not faults and kills < count / len(JOBS):
            refill(place, good)
            for _ in range(draw.randint(1, 3)):
                how = {"kill_after": draw.uniform(0, alone.seconds)}
                if draw.random() < 0.5:
                    how = {"kill_before": draw.randint(1, max(alone.changes, 1))}
                result = attempt(command, place, **how)
                if result.status == -signal.SIGKILL:
                    kills += 1
                faults += torn_files(place) + faults_of(result, allowed=[0, -signal.SIGKILL])
            faults += faults_of(attempt(command, place), allowed=[0])
            faults += differences(expected, place)
        yield name, kills, faults


# ---------------------------------------------------------------- full disks


def fill_disks(good, place, count, draw):
    """Run each job on disks of too little room, and again once there is enough."""
    for name, command in JOBS.items():
        refill(place, good)
        before = disk_use(place)
        faults = faults_of(attempt(command, place), allowed=[0])
        expected = read_outcome(place)
        after = disk_use(place)
        tries = 0
        for _ in range(-(-count // len(JOBS))):
            limit = round(draw.uniform(before, after))
            room = None
            mounted = mount(place, limit)
            if not mounted:
                room = limit - before
            try:
                refill(place, good)
                result = attempt(command, place, room=room)
                faults += torn_files(place) + faults_of(result)
                if result.status == 2:
                    tries += 1
                else:
                    faults += differences(expected, place)  # a swallowed error
                if mounted:
                    mount(place, 10 * after, "remount,")
                faults += faults_of(attempt(command, place), allowed=[0])
                faults += differences(expected, place)
            finally:
                if mounted:
                    subprocess.run(["umount", place], check=True)
        yield name, tries, faults


def mount(place, size, how=""):
    """Put a file system of `size` bytes on a folder; False where this is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", place]
    return subprocess.run(command, capture_output=True).returncode == 0


def disk_use(place):
    return sum(path.stat().st_blocks * 512 for path in Path(place).rglob("*") if path.is_file())


# ---------------------------------------------------------------- bad inputs

NUMBERS = "nan|inf|-1|0|1e999||99999999999999999999|0.5|two|٣|[]|null".split("|")
WORDS = ["\0", '"', "{", "}", ",", "\n", "\r", "|", "-", "--", "/", "true", "label", "file_name"]
WORDS += ["{label}", "../../../etc/passwd", "@flags.txt", "🦶", "A" * 200_000, "[" * 3000]
TEXTS = (".csv", ".jsonl", ".json", ".txt")
KEYS = [
    "F64",
    "I8",
    "F8_E4M3",
    "unet",
    "module",
    "lora_A",
    "lora_up",
    "alpha",
    "dora_scale",
    "bias",
]


def damage(path, other, draw):
    """Damage a file as files get damaged: in transfer, on the disk, or by an editor for texts.

    Files that the scripts write themselves, .pt and .safetensors, are not altered bit by bit: they
    are written atomically and trusted. Those of other tools also get another header.
    """
    data = path.read_bytes()
    ways = ["cut", "other", "empty", "twice"]
    is_foreign = "foreign" in path.parts
    if is_foreign or path.suffix not in (".pt", ".safetensors"):
        ways += ["bits", "head", "zeros"]
    if is_foreign and path.suffix == ".safetensors":
        ways += ["header"] * 6
    if path.suffix in TEXTS:
        ways += ["number", "number", "word", "word"]
    way = draw.choice(ways)
    low, high = sorted(draw.sample(range(len(data) + 1), 2))
    if way == "cut":
        damaged = data[:low]
    elif way == "other":
        damaged = other.read_bytes()
    elif way == "empty":
        damaged = b""
    elif way == "twice":
        damaged = data + data
    elif way == "zeros":
        damaged = data[:low] + bytes(high - low) + data[high:]
    elif way == "header":
        damaged = damage_header(data, draw)
    elif way == "number":
        damaged = replace_one(data, rb"-?\d+(\.\d+)?", NUMBERS, draw)
    elif way == "word":
        damaged = replace_one(data, rb"\w+|\W", WORDS, draw)
    else:
        damaged = flip_bits(data, len(data) if way == "bits" else min(len(data), 400), draw)
    path.write_bytes(damaged)


def flip_bits(data, length, draw):
    """`data` with 1, 3 or 30 bits of its first `length` bytes flipped."""
    flipped = bytearray(data)
    for _ in range(draw.choice([1, 3, 30])):
        flipped[draw.randrange(length)] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def damage_header(data, draw):
    """A safetensors file with a number or word of its header replaced, and the length set right."""
    end = 8 + int.from_bytes(data[:8], "little")
    if draw.random() < 0.5:
        header = replace_one(data[8:end], rb"-?\d+(\.\d+)?", NUMBERS, draw)
    else:
        header = replace_one(data[8:end], rb"\w+|\W", WORDS + KEYS, draw)
    return len(header).to_bytes(8, "little") + header + data[end:]


def replace_one(data, pattern, replacements, draw):
    """`data` with one of the places that match `pattern` replaced."""
    start, end = draw.choice([match.span() for match in re.finditer(pattern, data)] or [(0, 0)])
    return data[:start] + draw.choice(replacements).encode() + data[end:]


def mislead_jobs(good, place, count, draw):
    """Run jobs that read a damaged file."""
    targets = list(dict.fromkeys(pattern for pattern, _ in DAMAGED))
    faults = []
    for number in range(1, count + 1):
        refill(place, good)
        target = draw.choice(targets)
        command = draw.choice([command for pattern, command in DAMAGED if pattern == target])
        path = draw.choice(sorted(Path(place).glob(target)))
        other = draw.choice(sorted(p for p in Path(good).rglob("[!.]*.*") if p.is_file()))
        allowed = [0]
        if target.startswith(("foreign", "odd")):  # some of these are refused as they are
            allowed = [0, 2]
        if target.startswith("spreadsheets") and "--fit" in command:  # of too few ratings
            allowed = [0, 2]
        if draw.random() < 0.9:  # the others show that the job itself does not fail
            damage(path, other, draw)
            allowed = [0, 2]
        content = path.read_bytes()  # the job may change the file
        command = command.replace("FILE", str(path.relative_to(place)))
        for fault in faults_of(attempt(command, place), allowed):
            copy = Path(tempfile.mkdtemp(prefix="torture-")) / path.name
            copy.write_bytes(content)
            faults.append(f"{command} with {path.relative_to(place)} as {copy}: {fault}")
        if number % 100 == 0 or number == count:
            yield f"damaged files up to {number}", (number - 1) % 100 + 1, faults
            faults = []


# ---------------------------------------------------------------- the command

TRIALS = {"kills": kill_jobs, "disks": fill_disks, "inputs": mislead_jobs}
COUNTS = {"kills": 200, "disks": 60, "inputs": 1000}


def parse_args():
    parser = metrics.Flags(__doc__)
    whole = metrics.number(0, 10**9)
    for what, count in COUNTS.items():
        text = f"in all; {count} where none of the three is given, else 0"
        parser.add_argument(f"--{what}", type=whole, help=text)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(args):
    counts = {what: getattr(args, what) for what in COUNTS if getattr(args, what)} or COUNTS
    totals = dict.fromkeys(TRIALS, 0)
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        good, place = Path(folder, "good"), Path(folder, "place")
        good.mkdir()
        place.mkdir()
        make_inputs(good)
        for what, count in counts.items():
            draw = random.Random(f"{args.seed} {what}")
            for name, tries, faults in TRIALS[what](good, place, count, draw):
                totals[what] += tries
                lost += len(faults)
                print(
                    f"{what}: {name}: {tries}, {len(faults)} faults",
                    *faults,
                    sep="\n  ",
                    flush=True,
                )
    figures = ", ".join(f"{number} {what}" for what, number in totals.items())
    print(f"{figures}: {lost} faults")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    metrics.run_script(main, parse_args)
