"""Kill, starve and mislead every script at random, and see that nothing is lost.

    python tests/torture.py                      200 kills, 60 full disks, 1000 bad inputs
    python tests/torture.py --kills 50           one of the three alone, or --disks, --inputs
    python tests/torture.py --minutes 60         the same again and again, with other draws

Kills: a job is killed at a random moment, or just before its k-th change on the disk, up to three times in a row. No
file may then be torn, and the same command must end with the same bytes as a job left alone. Full disks: a job runs on
a file system with too little room (without root: under a limit on the size of its files); it must say so in one line,
tear nothing, and end with those same bytes once there is room. Bad inputs: one file of a job is damaged; it must end
with status 0, or with status 2 and one line, within two minutes of the processor. Jobs are forks of this process, so
that a try takes a second. Prints a line for each job and each fault; exit status 1 if there was any.
"""

import argparse
import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}  # a fork must not find another's threads missing
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402

import evaluate  # noqa: E402
import filter  # noqa: E402
import lora  # noqa: E402
import metrics  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

SCRIPTS = {module.__name__: module for module in (train, sample, evaluate, filter, lora)}
TRAIN = (
    'train --base base --data images --prompt "a {label} foot" --rank 2 --val-steps 1 --val-samples 1 --seed 3 '
    "--out out "
)
JOBS = {  # what is killed and starved; each leaves its files in the folder it runs in
    "train": TRAIN + "--steps 30 --save-every 7 --validate-every 20 --dropout 0.1",
    "train, accumulate": TRAIN
    + "--steps 8 --batch-size 2 --accumulate 4 --save-every 3 --validate-every 5",
    "train, save each step": TRAIN + "--steps 15 --save-every 1 --keep-last 2 --validate-every 10",
    "train, validate each step": TRAIN + "--steps 8 --save-every 5 --validate-every 1",
    "train, full": TRAIN + "--steps 15 --method full --save-every 4 --validate-every 10",
    "train, text": TRAIN
    + "--steps 15 --text-lora --save-every 6 --validate-every 10 --ema 0.9 --cache cache",
    "train, preview": "train --data images --preview look --augment rotate --resolution 64",
    "sample": "sample --lora run/lora.safetensors --prompts table/metadata.csv --steps 2 --grid --out out",
    "evaluate": "evaluate images new --permutations 99 --json report.json",
    "filter": "filter new --reference images --calibrate 0.1 --out out",
    "filter, link": "filter new --reference images --keep 8 --link --out out",
    "filter, move": "filter new --reference images --keep 8 --move --out out",
    "filter, mix": "filter new --reference images --keep 8 --mix images --share 20 --out out",
    "filter, fit": "filter --fit ratings.csv --force --out fitted.safetensors",
    "rating page": "filter new --rating-page rate.html --blind images",
    "lora merge": "lora merge run/lora.safetensors run/lora-last.safetensors:0.5 --rank 1 --out merged.safetensors",
    "lora convert": "lora convert run/lora.safetensors --to kohya --out kohya.safetensors",
    "lora extract": "lora extract full/model base --rank 2 --out extracted.safetensors",
}
QUICK = TRAIN + "--steps 1 --batch-size 2 "
DAMAGED = {  # a file that is damaged, and the jobs that read it
    "images/*": [
        QUICK,
        JOBS["train, preview"],
        JOBS["evaluate"],
        JOBS["filter"],
        JOBS["rating page"],
    ],
    "new/*.png": [JOBS["evaluate"], JOBS["filter, move"]],
    "table/metadata.csv": [
        QUICK.replace("images", "table"),
        JOBS["sample"],
        "evaluate table new --by sex --utility",
    ],
    "lines/metadata.jsonl": [
        QUICK.replace("images", "lines"),
        "filter new --reference lines --keep 3 --drop-copies",
    ],
    "new/manifest.csv": [
        JOBS["evaluate"],
        JOBS["filter, mix"],
        "sample --base base --prompts new/manifest.csv --steps 1",
    ],
    "run/lora.safetensors": [
        JOBS["lora merge"],
        JOBS["lora convert"],
        "lora info run/lora.safetensors",
        "sample --lora run/lora.safetensors --prompt x --steps 1 --num-images 1",
        QUICK + "--init-lora run/lora.safetensors",
    ],
    "kohya.safetensors": [
        "lora info kohya.safetensors",
        "lora convert kohya.safetensors --to diffusers --out back.safetensors",
    ],
    "full/model/unet/*.safetensors": [JOBS["lora extract"]],
    "run/checkpoints/latest.pt": [
        "sample --checkpoint run/checkpoints/latest.pt --num-images 1 --steps 1",
        QUICK.replace("--out out", "--out run"),
        QUICK + "--resume run/checkpoints/latest.pt",
        "evaluate images --checkpoint run/checkpoints/latest.pt --num-samples 2 --steps 1",
    ],
    "run/split.csv": [
        "evaluate images new --split run/split.csv --permutations 99",
        "filter new --reference images --keep 3 --split run/split.csv",
    ],
    "run/log.jsonl": [QUICK.replace("--out out", "--out run").replace("--steps 1", "--steps 4")],
    "selector.safetensors": [
        "filter new --reference images --selector selector.safetensors --min-alignment 0.1",
        "filter new --rating-page r.html --suggest 4 --selector selector.safetensors",
    ],
    "ratings.csv": [
        JOBS["filter, fit"],
        "filter --agreement ratings.csv",
        "filter new --rating-page r.html --rated ratings.csv",
    ],
    "moved/decisions.csv": [
        "filter --undo moved/decisions.csv",
        "filter new --reference images --keep 3 --out moved",
    ],
    "bands.csv": ["evaluate images new --permutations 99 --bands bands.csv"],
    "prompts.txt": ["sample --base base --prompts prompts.txt --num-images 1 --steps 1"],
    "flags.txt": [f"{script} @flags.txt" for script in SCRIPTS],
    "base/*/*.json": [QUICK, "sample --base base --prompt x --num-images 1 --steps 1"],
}


# ---- one try of a job


def attempt(command, place, kill_after=None, kill_before=None, room=None):
    """Run a job in `place`, in a fork. Returns (status, None for one that hangs; what it said on stderr; seconds; how
    many changes it made on the disk). kill_after: seconds; kill_before: the number of a change; room: bytes a file."""
    said, counted = tempfile.TemporaryFile("w+"), os.pipe()
    sys.stdout.flush()
    began, pid = time.time(), os.fork()
    if not pid:
        os.dup2(said.fileno(), 2), os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(inside(command, place, counted[1], kill_before, room))
    status, deadline = None, began + (kill_after or 3600)
    while status is None and time.time() < deadline:
        ended, code = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else time.sleep(0.002)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        status = -signal.SIGKILL if kill_after else None
    said.seek(0)
    os.close(counted[1])
    with said, os.fdopen(counted[0]) as changes:
        return status, said.read(), time.time() - began, len(changes.read())


def inside(command, place, counter, kill_before, room):
    """The job itself, in the fork: what it does on the disk is counted; returns the exit status."""
    import resource

    changes = []

    def watch(event, args):
        if (
            event in ("os.rename", "os.remove", "os.link", "os.mkdir")
            or event == "open"
            and str(args[1])[0] in "wxa"
        ):
            changes.append(event)
            os.write(counter, b".")
            if len(changes) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        resource.setrlimit(
            resource.RLIMIT_AS, (32 * 2**30, -1)
        )  # what would eat the machine, or hang, is a fault
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        os.chdir(place)
        metrics.CACHE = Path("features").resolve()
        script, *sys.argv = shlex.split(command)
        sys.argv.insert(0, f"{script}.py")
        args = SCRIPTS[script].parse_args()
        sys.addaudithook(watch)
        metrics.run_script(SCRIPTS[script].main, lambda: args)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def wrong(status, said, allowed=(0, 2)):
    """What is wrong with how a job ended, as a list."""
    one_line = status != 2 or len(re.findall("^error: ", said, re.M)) == 1
    if (
        status in allowed and one_line and "Traceback" not in said and "memory is full" not in said
    ):  # of small inputs
        return []
    return [f"status {status}: {said[-600:]}"]


def torn(place):
    """The files below a folder that are not whole."""
    checks = {
        ".pt": lambda p: torch.load(p, weights_only=True),
        ".safetensors": lambda p: safe_open(p, "pt").keys(),
        ".png": lambda p: Image.open(p).load(),
        ".json": lambda p: json.loads(p.read_text()),
        ".csv": lambda p: p.read_text()[-1:].index("\n"),
        ".html": lambda p: p.read_text().index("</html>"),
    }
    found = []
    for path in Path(place).rglob("[!.]*.*"):
        try:
            checks.get(path.suffix, id)(path)
        except Exception as why:  # whatever it is, it is the failure this looks for
            found.append(f"torn: {path.relative_to(place)}: {why!r}")
    return found


def outcome(place):
    """{file: bytes} of all that a job leaves, but for what tells the time that training took."""
    found = {}
    for path in Path(place).rglob("[!.]*.*"):
        name = path.relative_to(place).as_posix()
        if path.is_file() and not name.startswith(
            ("features", "out/checkpoints", "out/report.html")
        ):
            found[name] = path.read_bytes()
    lines = [json.loads(line) for line in found.pop("out/log.jsonl", b"").splitlines()]
    found["log"] = [
        [line.get(key) for key in ("step", "loss", "val_loss", "grad_norm")] for line in lines
    ]
    return found


def differences(whole, place):
    """The names of files that are not as a job left alone leaves them."""
    found = outcome(place)
    return [
        f"differs: {name}"
        for name in sorted({*whole, *found})
        if whole.get(name) != found.get(name)
    ]


def fresh(good, place):
    """Empty a folder and fill it with a job's inputs."""
    for path in Path(place).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(good, place, dirs_exist_ok=True)


# ---- what jobs need


def make_inputs(place):
    """A base, 30 images of all kinds, tables of them, and what the scripts make of these."""
    import nibabel

    conftest.save_base(place / "base")
    draw, rows = np.random.RandomState(0), []
    for n, kind in enumerate(
        ["png", "jpg", "png", "tif", "dcm", "nii.gz", "webp", "bmp", "gif", "png"] * 3
    ):
        path = place / "images" / ("calm", "sore")[n % 2] / f"{n}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(draw.randint(0, 255, (6, 6, 3)).astype(np.uint8)).resize((70, 64))
        if kind == "dcm":
            sample.save_dicom(image, path, "drawn")
        elif kind == "nii.gz":
            nibabel.save(nibabel.Nifti1Image(np.asarray(image).astype(np.int16), np.eye(4)), path)
        else:
            image = (
                Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 16)
                if kind == "tif"
                else image
            )
            image.save(path)
        rows.append(
            {
                "file_name": f"{n}.{kind}",
                "text": f"a foot, number {n % 4}",
                "label": path.parent.name,
                "patient_id": f"p{n // 2}",
                "sex": "fm"[n // 2 % 2],
            }
        )
        for folder in ("table", "lines"):
            (place / folder).mkdir(exist_ok=True)
            shutil.copy(path, place / folder)
    metrics.write_csv(place / "table" / "metadata.csv", rows[0], [row.values() for row in rows])
    (place / "lines" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "bands.csv").write_text("metric,excellent,good,fair\nfrechet,1,2,3\nkid,1,2.5,3\n")
    (place / "prompts.txt").write_text("a calm foot\na sore foot\n")
    (place / "flags.txt").write_text(
        "# a recipe\n--seed 3\n--batch-size 2\n--resolution 64\n--out out\n"
    )
    for command in (
        QUICK.replace("--out out", "--out run").replace("--steps 1", "--steps 3"),
        QUICK.replace("--out out", "--out full --method full"),
        "sample --lora run/lora.safetensors --labels-from images --prompt {label} --num-images 8 --out new",
        "lora convert run/lora.safetensors --to kohya --out kohya.safetensors",
    ):
        status, said, _, _ = attempt(command, place)
        assert status == 0, said
    with open(place / "new" / "manifest.csv", newline="") as file:
        drawn = [row["file"] for row in csv.DictReader(file)]
    metrics.write_csv(
        place / "ratings.csv",
        ["image_path", "rating", "modality", "expert_level", "prompt", "expert"],
        [[f"new/{name}", n % 3 + 1, "photo", 3, name[:6], "anna"] for n, name in enumerate(drawn)],
    )
    shutil.copytree(place / "new", place / "again")
    for command in (
        JOBS["filter, fit"].replace("fitted", "selector"),
        "filter again --reference images --keep 4 --move --out moved",
    ):
        status, said, _, _ = attempt(command, place)
        assert status == 0, said


# ---- kills, full disks, bad inputs: each yields (job, tries, faults)


def killed(good, place, count, draw):
    """Each job, killed again and again."""
    for name, command in JOBS.items():
        fresh(good, place)
        status, said, seconds, changes = attempt(command, place)
        faults, whole, kills = wrong(status, said, (0,)), outcome(place), 0
        while kills < count / len(JOBS):
            fresh(good, place)
            for _ in range(draw.randint(1, 3)):
                how = [
                    {"kill_after": draw.uniform(0, seconds)},
                    {"kill_before": draw.randint(1, changes)},
                ]
                status, said, _, _ = attempt(command, place, **draw.choice(how))
                kills += status == -signal.SIGKILL
                faults += torn(place) + wrong(status, said, (0, -signal.SIGKILL))
            status, said, _, _ = attempt(command, place)
            faults += wrong(status, said, (0,)) + differences(whole, place)
        yield name, kills, faults


def starved(good, place, count, draw):
    """Each job, on disks of too little room; then on one with enough."""
    for name, command in JOBS.items():
        fresh(good, place)
        sizes = [size_of(place)]
        status, said, _, _ = attempt(command, place)
        faults, whole, tries = wrong(status, said, (0,)), outcome(place), 0
        sizes.append(size_of(place))
        for _ in range(-(-count // len(JOBS))):
            limit = round(draw.uniform(*sizes))
            mounted = not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", place], capture_output=True
            ).returncode
            try:
                fresh(good, place)
                status, said, _, _ = attempt(
                    command, place, room=None if mounted else limit - sizes[0]
                )
                faults += torn(place) + wrong(status, said)
                faults += differences(whole, place) if status == 0 else []  # what was swallowed
                tries += status == 2
                if mounted:
                    subprocess.run(
                        ["mount", "-o", f"remount,size={10 * sizes[1]}", place], check=True
                    )
                status, said, _, _ = attempt(command, place)
                faults += wrong(status, said, (0,)) + differences(whole, place)
            finally:
                if mounted:
                    subprocess.run(["umount", place], check=True)
        yield name, tries, faults


def size_of(place):
    return sum(path.stat().st_blocks * 512 for path in Path(place).rglob("*") if path.is_file())


NUMBERS = [
    b"nan",
    b"inf",
    b"-1",
    b"0",
    b"1e999",
    b"",
    b"99999999999999999999",
    b"0.5",
    b"two",
    b"\xd9\xa3",
    b"[]",
    b"null",
]
WORDS = [
    b"\0",
    b'"',
    b"{",
    b"}",
    b",",
    b"\n",
    b"{label}",
    b"../../../etc/passwd",
    b"/",
    b"\xff\xfe",
    b"A" * 200_000,
    "\U0001f9b6".encode(),
    b"|",
    b"-",
    b"--",
    b"@flags.txt",
    b"\r",
    b"true",
    b"[" * 3000,
    b"label",
    b"file_name",
]


def damaged(data, other, draw):
    """The bytes of a file, damaged in one of the ways in which files are."""
    low, high = sorted(draw.sample(range(len(data) + 1), 2))
    way = draw.choice(
        "bits head cut zeros other empty twice length number number word word".split()
    )
    if way in ("bits", "head"):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 3, 30])):
            changed[draw.randrange(min(len(data), 400) if way == "head" else len(data))] ^= (
                1 << draw.randrange(8)
            )
        return bytes(changed)
    if way in ("number", "word"):
        start = (
            8 if data[8:9] == b"{" else 0
        )  # safetensors: the length of the header comes before it
        end = start + struct.unpack("<Q", data[:8])[0] if start else len(data)
        found = list(
            re.finditer(
                rb"-?\d+(\.\d+)?" if way == "number" else rb"\w+|\W", data[start:end][:20_000]
            )
        )
        spot, new = (
            draw.choice(found).span() if found else (0, 0),
            draw.choice(NUMBERS if way == "number" else WORDS),
        )
        changed = data[start:end][: spot[0]] + new + data[start:end][spot[1] :]
        return (struct.pack("<Q", len(changed)) if start else b"") + changed + data[end:]
    return {
        "cut": data[:low],
        "zeros": data[:low] + bytes(high - low) + data[high:],
        "other": other,
        "empty": b"",
        "twice": data + data,
        "length": struct.pack("<Q", draw.choice([2**63, 2**40, 10**8, 3])) + data[8:],
    }[way]


def odd_checkpoint(path, draw):
    """Put something else in the place of one of a checkpoint's values."""
    content = torch.load(path, weights_only=True)
    where = draw.choice(
        [part for part in content.values() if isinstance(part, dict) and part] + [content] * 3
    )
    where[draw.choice(list(where))] = draw.choice(
        [None, "x", -1, 10**30, [], {}, float("nan"), torch.zeros(2), True]
    )
    torch.save(content, path)


def misled(good, place, count, draw):
    """Jobs that read a damaged file."""
    faults = []
    for number in range(1, count + 1):
        target = draw.choice(list(DAMAGED))
        command = draw.choice(DAMAGED[target])
        fresh(good, place)
        path = draw.choice(
            sorted(
                p for p in Path(place).glob(target.replace("images/*", "images/*/*")) if p.is_file()
            )
        )
        other = draw.choice(sorted(p for p in Path(good).rglob("[!.]*.*") if p.is_file()))
        if path.suffix == ".pt" and draw.random() < 0.5:
            odd_checkpoint(path, draw)
        else:
            path.write_bytes(damaged(path.read_bytes(), other.read_bytes(), draw))
        status, said, _, _ = attempt(command, place)
        for fault in wrong(status, said):
            kept = Path(tempfile.mkdtemp(prefix="torture-")) / path.name
            shutil.copy(path, kept)
            faults.append(f"{command} with {path.relative_to(place)} as {kept}: {fault}")
        if number % 100 == 0 or number == count:
            yield f"damaged files up to {number}", (number - 1) % 100 + 1, faults
            faults = []


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, number in (("kills", 200), ("disks", 60), ("inputs", 1000)):
        parser.add_argument(
            f"--{name}", type=int, help=f"in all (default: {number}; 0 where another is given)"
        )
    parser.add_argument(
        "--minutes", type=float, default=0, help="go on with other draws for so long"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    asked = {"kills": args.kills, "disks": args.disks, "inputs": args.inputs}
    asked = {"kills": 200, "disks": 60, "inputs": 1000} if set(asked.values()) == {None} else asked
    ends, total, lost = time.time() + 60 * args.minutes, Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        good, place = Path(folder, "good"), Path(folder, "place")
        good.mkdir(), place.mkdir()
        make_inputs(good)
        while not total or time.time() < ends:
            for (what, count), torment in zip(asked.items(), (killed, starved, misled)):
                draw = random.Random(f"{args.seed} {what} {total}")
                for name, tries, faults in torment(good, place, count, draw) if count else ():
                    total[what], lost = total[what] + tries, lost + len(faults)
                    print(
                        f"{what}: {name}: {tries}, {len(faults)} faults",
                        *faults,
                        sep="\n  ",
                        flush=True,
                    )
    print(", ".join(f"{number} {what}" for what, number in total.items()) + f": {lost} faults")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
