"""Kill training runs at random instants, start each again by the same command, and compare with one never stopped.

    python tests/torture.py --kills 50

For each configuration one run is left alone and one is killed again and again: while it starts, caches, trains, saves
or validates. After each kill every checkpoint must be readable; in the end adapter and log must equal those of the
run left alone, to the bit. Prints a line a configuration; exit status 1 if anything was lost.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

COMMON = ["--prompt", "a {label} foot", "--rank", "2", "--lr", "1e-3", "--val-split", "0.2", "--val-steps", "1",
          "--val-samples", "1", "--seed", "3"]
CONFIGURATIONS = {
    "plain": ["--steps", "400", "--save-every", "25", "--validate-every", "100", "--dropout", "0.1"],
    "accumulate": ["--steps", "120", "--batch-size", "2", "--accumulate", "4", "--save-every", "10", "--validate-every", "50"],
    "save each step": ["--steps", "150", "--save-every", "1", "--keep-last", "2", "--validate-every", "40"],
    "validate each step": ["--steps", "60", "--save-every", "7", "--validate-every", "1"],
    "full": ["--steps", "200", "--method", "full", "--save-every", "10", "--validate-every", "50"],
    "text": ["--steps", "150", "--text-lora", "--save-every", "15", "--validate-every", "50", "--ema", "0.9"],
}


def make_input(folder):
    """A random base and 24 random images in two classes below `folder`."""
    from conftest import save_base
    save_base(folder / "base")
    draw = np.random.RandomState(0)
    for i in range(24):
        place = folder / "images" / ("calm", "sore")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.randint(0, 255, (64, 64, 3)).astype(np.uint8)).save(place / f"{i}.png")
    return ["--base", folder / "base", "--data", folder / "images", *COMMON]


def start(flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "train.py", *map(str, flags)], cwd=ROOT, env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def unreadable(out):
    """Checkpoints of a run that cannot be read."""
    import torch
    bad = []
    for path in Path(out).glob("checkpoints/*.pt"):
        try:
            torch.load(path, weights_only=True)
        except Exception as why:  # whatever it is, it is the failure this looks for
            bad.append(f"{path.name}: {why}")
    return bad


def outcome(out):
    """What must be equal: the files a run leaves, and its log without times."""
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in Path(out).rglob("*.safetensors")}
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return files, [(line["step"], line.get("loss"), line.get("val_loss"), line.get("grad_norm")) for line in lines]


def kill_again_and_again(flags, kills, length, draw):
    """Start, wait a random time, kill; about `kills` times, most of them once training has begun. Returns the count."""
    done, faults, out = 0, [], Path(flags[flags.index("--out") + 1])
    while done < kills:
        began, process = time.time(), start(flags)
        if draw.random() < 0.7:   # wait for the training to begin: its args.json is written then
            while process.poll() is None and not ((out / "args.json").exists() and (out / "args.json").stat().st_mtime > began):
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 2.2 * length / kills))
        else:
            time.sleep(draw.uniform(0.1, 6))
        if process.poll() is not None:
            faults += [process.stderr.read()] if process.returncode else []
            break
        process.kill()
        process.wait()
        done += 1
        faults += unreadable(out)
    return done, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    args = parser.parse_args()
    draw, killed, lost = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        data = make_input(Path(folder))
        for name, flags in CONFIGURATIONS.items():
            whole, broken = (Path(folder, name.replace(" ", "-"), which) for which in ("whole", "killed"))
            process = start([*data, *flags, "--out", whole])
            while process.poll() is None and not (whole / "args.json").exists():
                time.sleep(0.01)
            began = time.time()
            if process.wait():
                sys.exit(f"{name}: the run that was left alone failed: {process.stderr.read()}")
            share = -(-args.kills // len(CONFIGURATIONS))
            count, faults = kill_again_and_again([*data, *flags, "--out", broken], share, time.time() - began, draw)
            last = start([*data, *flags, "--out", broken])
            faults += [last.stderr.read()] if last.wait() else []
            faults += [] if outcome(whole) == outcome(broken) else ["the final state differs"]
            killed, lost = killed + count, lost + len(faults)
            print(f"{name}: {count} kills, {'equal to the bit' if not faults else faults}", flush=True)
    print(f"{killed} kills over {len(CONFIGURATIONS)} configurations, {lost} faults")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
