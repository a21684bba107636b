"""Fit a LoRA adapter, or the whole UNet, of a Stable Diffusion base to a folder of images.

    python train.py --base tiny --data tests/phantoms --steps 300 --out runs/try
    python train.py @tests/recipes/dfu-inflammatory.txt --data wounds/ --out runs/dfu
    torchrun --nproc_per_node=2 train.py --data xray/ --prompt "a chest X-ray with {labels}" --out runs/xray

The same command typed again goes on where a stopped run was, bit for bit. Leaves in --out: lora.safetensors (EMA
weights of the best validation), lora-last.safetensors, checkpoints/, samples/, log.jsonl, split.csv, report.html.
From sample: the base and drawing from it; from metrics: reading data, keyed randomness; from lora: adapters.
"""
import argparse
import os
import sys


def fail(message):
    """Say what is wrong in one line and stop: exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


class LastWins(argparse.Action):
    """--steps and --epochs: the one given last counts."""

    def __call__(self, parser, args, value, flag=None):
        args.steps = args.epochs = None
        setattr(args, self.dest, value)


def add_data_and_model(parser):
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, help="a folder of images, of class folders or with metadata.csv, or a CSV")
    data.add_argument("--val-data", help="a separate validation set, in any of these forms")
    data.add_argument("--val-split", type=float, default=0.15, help="share held out for validation, by patient if known")
    data.add_argument("--test-split", type=float, default=0.0, help="share that no stage may learn from")
    data.add_argument("--prompt", help="caption format, such as \"a chest X-ray with {labels}\" (default: caption column)")
    for role in ("image", "caption", "label", "group"):
        data.add_argument(f"--{role}-column", help=f"the table's {role} column (default: found by its name)")
    data.add_argument("--resolution", type=int, help="pixels, a multiple of 8 (default: the base's own)")
    data.add_argument("--crop", choices=["center", "pad"], default="center", help="how a picture becomes square")
    data.add_argument("--skip-bad", dest="strict", action="store_false", default=False,
                      help="name and leave out unreadable images, up to 5 %% (the default)")
    data.add_argument("--strict", action="store_true", help="stop at the first unreadable image instead of skipping it")
    model = parser.add_argument_group("model")
    model.add_argument("--base", default="sd21-base", help="tiny, sd15, sd21-base, sd21, a Hub id or a diffusers folder")
    model.add_argument("--method", choices=["lora", "full"], default="lora")
    model.add_argument("--rank", type=int, default=16, help="of the adapter's matrices")
    model.add_argument("--alpha", type=float, help="the adapter acts with alpha/rank (default: the rank)")
    model.add_argument("--dropout", type=float, default=0.0, help="on the adapter's input")
    model.add_argument("--targets", default="attention", help="attention, all, or layer name endings: to_q,to_v")


def add_training(parser):
    loss = parser.add_argument_group("objective")
    loss.add_argument("--snr-gamma", type=float, default=0.0, help="min-SNR weighting, usually 5 (0: off)")
    loss.add_argument("--noise-offset", type=float, default=0.0, help="usually 0 to 0.05")
    loss.add_argument("--prompt-dropout", type=float, default=0.1, help="share of captions replaced by the empty one")
    optimiser = parser.add_argument_group("optimiser")
    optimiser.add_argument("--steps", type=int, action=LastWins, help="optimiser steps (default: 1000)")
    optimiser.add_argument("--epochs", type=float, action=LastWins, help="passes over the data, instead of --steps")
    optimiser.add_argument("--batch-size", type=int, default=8, help="images a forward pass, on each process")
    optimiser.add_argument("--accumulate", type=int, default=1, help="forward passes a step")
    optimiser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    optimiser.add_argument("--lr-schedule", choices=["cosine", "linear", "constant"], default="cosine")
    optimiser.add_argument("--warmup", type=int, default=100, help="steps (at most a tenth of the run)")
    optimiser.add_argument("--weight-decay", type=float, default=1e-2)
    optimiser.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to it (0: off)")
    optimiser.add_argument("--ema", type=float, default=0.9999, help="decay, warmed up (0: off)")
    watching = parser.add_argument_group("watching")
    watching.add_argument("--validate-every", type=int, default=500, help="steps; 0: only at the end")
    watching.add_argument("--val-prompts", action="append", help="a prompt of the grid; may be repeated (default: "
                          "frequent captions)")
    watching.add_argument("--val-samples", type=int, default=2, help="images a prompt in the grid")
    watching.add_argument("--val-steps", type=int, default=25, help="denoising steps of the grid")
    watching.add_argument("--val-guidance-scale", type=float, default=5.0)
    watching.add_argument("--log-every", type=int, default=10, help="steps between two looks at the loss")
    keeping = parser.add_argument_group("keeping")
    keeping.add_argument("--out", default="runs/train", help="the run's folder")
    keeping.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints")
    keeping.add_argument("--keep-last", type=int, default=3, help="checkpoints (0: all)")
    keeping.add_argument("--resume", default="auto", help="auto (go on if there is something), latest, best or a path")
    keeping.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    keeping.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    keeping.add_argument("--seed", type=int, default=0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: [] if line.strip()[:1] in ("", "#") else line.strip().split(None, 1)
    parser.error = fail
    add_data_and_model(parser)
    add_training(parser)
    args = parser.parse_args()
    if args.steps is None and args.epochs is None:
        args.steps = 1000
    if args.alpha is None:
        args.alpha = float(args.rank)
    bounds = {"rank": (1, 4096), "batch_size": (1, 1e6), "accumulate": (1, 1e6), "steps": (1, 1e9), "epochs": (1e-9, 1e9),
              "lr": (1e-12, 10), "alpha": (1e-6, 1e6), "dropout": (0, 0.99), "val_split": (0, 0.9), "ema": (0, 0.9999999),
              "test_split": (0, 0.9), "prompt_dropout": (0, 1), "save_every": (1, 1e9), "log_every": (1, 1e9),
              "keep_last": (0, 1e9), "warmup": (0, 1e9), "snr_gamma": (0, 1e6), "val_samples": (0, 64),
              "val_steps": (1, 1000), "validate_every": (0, 1e9), "max_grad_norm": (0, 1e9), "weight_decay": (0, 10),
              "noise_offset": (0, 1)}
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # not (…) so that NaN is caught too
            fail(f"--{name.replace('_', '-')} {value:g}: give a number from {low:g} to {high:g}")
    if args.resolution is not None and (args.resolution < 64 or args.resolution % 8):
        fail(f"--resolution {args.resolution}: give a multiple of 8, at least 64")
    return args


if __name__ == "__main__":
    args = parse_args()

import csv  # noqa: E402
import hashlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from contextlib import contextmanager, nullcontext, suppress  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from datetime import timedelta  # noqa: E402
from functools import lru_cache  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lora  # noqa: E402
from metrics import (content_hash, curve, generator, guarded, list_images, load_pixels, page, pick_device,  # noqa: E402
                     replacing, split_rows, table, thumbnail)
from sample import (contact_sheet, denoise, encode, encode_text, find_base, generate, load_base,  # noqa: E402
                    noised_and_target)

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(key, default)) for key, default in
                           (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


# ------------------------------------------------------------------------------------------------- the run's folder

def start_processes(args):
    """Under torchrun, join the others; returns this process's device."""
    device = pick_device(f"cuda:{LOCAL_RANK}" if WORLD > 1 and args.device == "auto" and torch.cuda.is_available()
                         else args.device)
    if WORLD > 1:
        # A rank that dies takes the others down through torchrun; a long grid on rank 0 must not.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return device


@contextmanager
def lock(out):
    """Hold the run's folder: a kernel lock, which dies with its process. A second run is refused."""
    Path(out, "checkpoints").mkdir(parents=True, exist_ok=True)
    file = open(Path(out, ".lock"), "a+b")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"{out}: another run is writing here; wait for it or give another --out")
    for litter in [*Path(out).glob(".*.tmp"), *Path(out).glob("*/.*.tmp")]:  # of runs that were killed in mid-write
        litter.unlink()
    with file:
        yield


HARMLESS = ("steps epochs out resume device precision save_every keep_last log_every validate_every val_prompts val_samples "
            "val_steps val_guidance_scale strict batch_size accumulate data val_data").split()


def find_checkpoint(args, data_hash):
    """The checkpoint that --resume means, read, or None to start afresh. Nothing is unpickled."""
    names = {"auto": "latest.pt", "latest": "latest.pt", "best": "best.pt"}
    path = Path(args.out, "checkpoints", names[args.resume]) if args.resume in names else Path(args.resume)
    if not path.exists():
        return None if args.resume == "auto" else fail(f"--resume {args.resume}: there is no {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        then = checkpoint["args"]
        assert checkpoint["format"] == 1
    except Exception as why:  # truncated, a pickle, another program's: torch.load raises whatever it meets
        fail(f"{path}: not a checkpoint of train.py, or damaged ({type(why).__name__}); give --resume an older one of "
             f"{path.parent}, or another --out to start afresh")
    changed = [name for name, value in vars(args).items() if name not in HARMLESS and then.get(name) != value]
    if changed:
        fail(f"{path} was made with other flags: " + "; ".join(
            f"--{name.replace('_', '-')} {then.get(name)} there, {getattr(args, name)} here" for name in changed)
            + "; give the same, or another --out")
    then_batch, batch = checkpoint["effective_batch"], args.batch_size * args.accumulate * WORLD
    if then_batch != batch:
        fail(f"{path}: the effective batch was {then_batch}, now it is {batch} = --batch-size {args.batch_size} × "
             f"--accumulate {args.accumulate} × {WORLD} processes; change one of them")
    if checkpoint["data"] != data_hash:
        fail(f"{path}: the training images or captions of {args.data} have changed since; give another --out")
    return checkpoint


def finished(out):
    """The step at which a run in this folder ended and left its results, or None."""
    with suppress(OSError, ValueError):
        return json.loads(Path(out, "args.json").read_text(encoding="utf-8")).get("finished")


def write_args(args, ended=None):
    """args.json: every flag, what ran it, and the step at which the run ended."""
    about = {"command": sys.argv, "torch": torch.__version__, "python": platform.python_version(),
             "processes": WORLD, "finished": ended}
    with replacing(Path(args.out, "args.json")) as file:
        file.write(json.dumps({"args": vars(args), **about}, indent=1, ensure_ascii=False).encode())


# ------------------------------------------------------------------------------------------------- data

@dataclass
class Data:
    """A data set in latents, on the device. mean, std: (N, 4, h, w); cond: UNet arguments, (captions + 1, …), of which
    the last is the empty caption; caption: (N,) index into them."""
    rows: list
    mean: torch.Tensor
    std: torch.Tensor
    cond: dict
    caption: torch.Tensor


def list_data(args):
    """Rows for training and for validation, by --val-data or by a hash of patient or content; writes split.csv."""
    columns = {f"{role}_column": getattr(args, f"{role}_column") for role in ("image", "caption", "label", "group")}
    rows = list_images(args.data, prompt=args.prompt, **columns)
    split_rows(rows, 0.0 if args.val_data else args.val_split, args.test_split)
    parts = {part: [row for row in rows if row["split"] == part] for part in ("train", "val", "test")}
    for part, share in (("train", 1), ("val", 0 if args.val_data else args.val_split), ("test", args.test_split)):
        if share and not parts[part]:
            fail(f"{args.data}: {len(rows)} images are not enough for the split: none fell to {part}; "
                 "add images or give --val-split 0")
    if args.val_data:
        parts["val"] = list_images(args.val_data, prompt=args.prompt, **columns)
    if RANK == 0:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["file_name", "group", "split"])
        writer.writerows([row["file_name"], row["group"], row["split"]] for row in rows)
        with replacing(Path(args.out, "split.csv")) as file:
            file.write(text.getvalue().encode())
        if not any(row["caption"] for row in rows):
            print("no captions: no --prompt and no caption column, so every image gets the empty one")
    return parts["train"], parts["val"]


def cache(base, rows, args, what):
    """Read, encode and keep on the device what training needs of `rows`; latents as posterior mean and std."""
    rows, pixels = load_pixels(rows, args.resolution, args.crop, args.strict)
    if not rows:
        fail(f"{args.data}: none of the {what} can be read")
    parts = [encode(base, pixels[i:i + 8]) for i in
             tqdm(range(0, len(rows), 8), f"encoding {what}", unit="batch", disable=RANK > 0, leave=False)]
    mean, std = (torch.cat(part) for part in zip(*parts))
    captions = sorted({row["caption"] for row in rows} - {""}) + [""]
    cond = [encode_text(base, captions[i:i + 64]) for i in range(0, len(captions), 64)]
    place = {caption: i for i, caption in enumerate(captions)}
    return Data(rows, mean, std, {key: torch.cat([c[key] for c in cond]) for key in cond[0]},
                torch.tensor([place[row["caption"]] for row in rows], device=base.device))


def fingerprint(rows):
    """One hash of a data set: what is in its files and what its captions say."""
    parts = sorted(content_hash(row["path"]) + row["caption"] for row in rows)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- one step

@lru_cache(4)
def order(seed, epoch, count):
    """The order of the data in an epoch: a permutation keyed by the epoch, so that the place follows from the step."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()


def make_batch(data, step, slots, args):
    """What step `step` sees at global batch positions `slots`: latents, noise, timesteps, cond.

    Every draw is keyed by (purpose, step, slot): the same whatever the number of processes and forward passes.
    """
    count, batch = len(data.rows), args.batch_size * args.accumulate * WORLD
    places = [step * batch + slot for slot in slots]
    orders = {epoch: order(args.seed, epoch, count) for epoch in {place // count for place in places}}
    index = [orders[place // count][place % count] for place in places]
    shape, device = data.mean.shape[1:], data.mean.device

    def draw(purpose, make):
        values = [make(generator(args.seed, purpose, step, slot)) for slot in slots]
        return torch.stack(values).to(device, non_blocking=True)
    noise = draw("noise", lambda g: torch.randn(shape, generator=g))
    if args.noise_offset:
        noise += args.noise_offset * draw("noise-offset", lambda g: torch.randn(shape[0], 1, 1, generator=g))
    latents = data.mean[index] + data.std[index] * draw("posterior", lambda g: torch.randn(shape, generator=g))
    timesteps = draw("timestep", lambda g: torch.randint(1000, (), generator=g))
    dropped = draw("caption-dropout", lambda g: torch.rand((), generator=g)) < args.prompt_dropout
    caption = torch.where(dropped, len(next(iter(data.cond.values()))) - 1, data.caption[index])
    return latents, noise, timesteps, {key: value[caption] for key, value in data.cond.items()}


def learning_rate(step, args):
    """Warm-up, then cosine or linear to zero, or constant."""
    warmup = min(args.warmup, args.steps // 10)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "constant": 1}[args.lr_schedule]


def sum_over_processes(weights, numbers):
    """Sum the gradients and the tensor `numbers` over all processes: one all-reduce of one flat buffer."""
    if WORLD == 1:
        return numbers
    flat = torch.cat([w.grad.flatten() for w in weights] + [numbers])
    dist.all_reduce(flat)
    for w, part in zip(weights, flat.split([w.numel() for w in weights] + [len(numbers)])):
        w.grad.copy_(part.view_as(w))
    return flat[-len(numbers):]


# ------------------------------------------------------------------------------------------------- state

@dataclass
class State:
    """What a checkpoint holds and a resumed run starts from."""
    weights: dict                    # name → parameter, fp32
    ema: dict                        # name → tensor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: dict = field(default_factory=lambda: {"step": 0, "val_loss": math.inf})
    history: list = field(default_factory=list)   # of validations: {"step", "val_loss"}
    bad_steps: int = 0                            # steps with NaN, in a row


def start(base, args, checkpoint):
    """Make what is trained, fresh or as the checkpoint left it."""
    if args.method == "full":
        weights = dict(base.unet.requires_grad_(True).named_parameters())
    else:
        weights = lora.inject(base.unet, args.targets, args.rank, args.alpha, args.dropout, generator(args.seed, "init"))
    ema = {name: w.detach().clone() for name, w in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    state = State(weights, ema, optimizer, torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16))
    if checkpoint:
        if {k: v.shape for k, v in checkpoint["weights"].items()} != {k: v.shape for k, v in weights.items()}:
            fail("the checkpoint's weights do not fit this base, rank or targets; give the --base it was made with")
        for name, w in weights.items():
            w.data.copy_(checkpoint["weights"][name])
            ema[name].copy_(checkpoint["ema"][name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state.scaler.load_state_dict(checkpoint["scaler"])
        state.step, state.best, state.history = checkpoint["step"], checkpoint["best"], checkpoint["history"]
        torch.set_rng_state(checkpoint["random"])
    return state


def save_checkpoint(state, args, images, data_hash, best=False):
    """Write checkpoints/step-N.pt, let best.pt be it if it is and then latest.pt; the oldest beyond --keep-last go."""
    if RANK > 0:
        return
    folder = Path(args.out, "checkpoints")
    path = folder / f"step-{state.step:08d}.pt"
    batch = args.batch_size * args.accumulate * WORLD
    content = {"format": 1, "step": state.step, "epoch": state.step * batch // images, "position": state.step * batch,
               "weights": {name: w.detach() for name, w in state.weights.items()}, "ema": state.ema,
               "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict(), "effective_batch": batch,
               "schedule": {"lr": learning_rate(state.step, args)}, "best": state.best, "history": state.history,
               "args": vars(args), "data": data_hash, "random": torch.get_rng_state()}
    with replacing(path) as file:
        torch.save(content, file)
    if best:   # before latest.pt: a run killed between the two then does this step again
        point(folder / "best.pt", path)
    point(folder / "latest.pt", path)
    if args.keep_last:
        for old in sorted(folder.glob("step-*.pt"))[:-args.keep_last]:
            old.unlink()


def point(name, path):
    """Let `name` be the file `path`: a hard link, or a copy where the file system has none; replaced atomically."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path, temporary)
    except OSError:
        with replacing(name) as file, open(path, "rb") as source:
            shutil.copyfileobj(source, file)
    else:
        os.replace(temporary, name)


@contextmanager
def ema_weights(state, base):
    """The model with its averaged weights, for validation and drawing; the trained ones come back after."""
    trained = {name: w.detach().clone() for name, w in state.weights.items()}
    for name, w in state.weights.items():
        w.data.copy_(state.ema[name])
    base.unet.eval()
    yield
    base.unet.train()
    for name, w in state.weights.items():
        w.data.copy_(trained[name])


# ------------------------------------------------------------------------------------------------- watching

@torch.no_grad()
def validation_loss(base, data, batch_size=8):
    """Mean squared error at noise and timesteps that never change, spread evenly over all: comparable between steps."""
    rows = len(data.rows)
    count = max(rows, 64)                       # a few images are looked at several times
    index = torch.arange(count) % rows
    draw = generator(0, "validation")
    timesteps = ((torch.arange(count) + 0.5) * 1000 / count).long()[torch.randperm(count, generator=draw)]
    noise = torch.randn(count, *data.mean.shape[1:], generator=draw)
    total = torch.zeros((), dtype=torch.float64, device=base.device)
    for i in range(RANK * batch_size, count, WORLD * batch_size):
        part = index[i:i + batch_size].to(base.device)
        noisy, target, _ = noised_and_target(base, data.mean[part], noise[i:i + batch_size].to(base.device),
                                             timesteps[i:i + batch_size].to(base.device))
        cond = {key: value[data.caption[part]] for key, value in data.cond.items()}
        prediction = denoise(base, noisy, timesteps[i:i + batch_size].to(base.device), cond)
        total += (prediction - target).square().mean((1, 2, 3)).double().sum()
    if WORLD > 1:
        dist.all_reduce(total)
    return total.item() / count


def draw_grid(base, prompts, args, step):
    """samples/step-N.png: the same prompts from the same noise each time."""
    jobs = [(prompt, number) for prompt in prompts for number in range(args.val_samples)]
    if RANK > 0 or not jobs:
        return
    images = list(generate(base, jobs, args.val_steps, args.val_guidance_scale, height=args.resolution,
                           width=args.resolution, seed=args.seed))
    with replacing(Path(args.out, "samples", f"step-{step:08d}.png")) as file:
        contact_sheet(images, [prompt for prompt, _ in jobs], columns=min(8, max(4, args.val_samples))).save(file, "PNG")


def validate(base, state, val, prompts, args, log):
    """Validation loss, a grid, and the best so far."""
    with ema_weights(state, base):
        entry = {"step": state.step}
        if val:
            entry["val_loss"] = validation_loss(base, val)
        draw_grid(base, prompts, args, state.step)
    if val:
        state.history.append(entry)
        log(entry)
        if entry["val_loss"] < state.best["val_loss"]:
            state.best = entry
            return True
    return False


class Log:
    """log.jsonl: a line a step and a line a validation. Resuming cuts it back to the checkpoint."""

    def __init__(self, path, step):
        self.path, kept = path, []
        with suppress(FileNotFoundError):
            for line in path.read_bytes().splitlines(keepends=True):
                with suppress(ValueError):   # the torn last line of a run that was killed
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
        if RANK == 0:
            with replacing(path) as file:
                file.write(b"".join(kept))

    def __call__(self, *entries):
        if RANK == 0:
            with open(self.path, "ab") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())


# ------------------------------------------------------------------------------------------------- the loop

def fit(base, data, val, state, prompts, args, data_hash, log):
    """Train until args.steps. SIGINT and SIGTERM save first and then end the run."""
    asked, weights = [], list(state.weights.values())
    handlers = {name: signal.signal(name, lambda *_: asked.append(True)) for name in (signal.SIGINT, signal.SIGTERM)}
    seen, clock = [], time.perf_counter()
    base.unet.train()
    with tqdm(total=args.steps, initial=state.step, desc="training", unit="step", disable=RANK > 0,
              mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        while state.step < args.steps:
            loss = compute_gradients(base, data, state, args)
            numbers = torch.stack([loss, torch.full_like(loss, len(asked))])
            loss, stop = sum_over_processes(weights, numbers)
            norm = apply_gradients(state, weights, args)
            state.step += 1
            seen.append(torch.stack([loss, norm]))
            bar.update()
            last = state.step == args.steps
            validating = last or args.validate_every and state.step % args.validate_every == 0
            saving = last or state.step % args.save_every == 0
            look = validating or saving or state.step % args.log_every == 0
            stop = (look or base.device.type == "cpu") and stop.item() > 0   # to look makes a GPU wait
            if look or stop:
                bar.set_postfix(loss=f"{write_log(log, seen, clock, base.device, state, args, data):.4f}")
                seen = []
            best = validating and validate(base, state, val, prompts, args, log)
            if saving or best or stop:
                save_checkpoint(state, args, len(data.rows), data_hash, best)
            if look:
                clock = time.perf_counter()
            if stop and not last:
                tqdm.write(f"stopped at step {state.step}, saved; the same command goes on from here")
                raise KeyboardInterrupt
    for name, handler in handlers.items():
        signal.signal(name, handler)


def compute_gradients(base, data, state, args):
    """This process's share of a step: gradients in place, and its share of the loss, on the device."""
    total = torch.zeros((), device=base.device)
    for micro in range(args.accumulate):
        first = (micro * WORLD + RANK) * args.batch_size
        slots = range(first, first + args.batch_size)
        latents, noise, timesteps, cond = make_batch(data, state.step, slots, args)
        noisy, target, weight = noised_and_target(base, latents, noise, timesteps, args.snr_gamma)
        if args.dropout:  # the one hidden state: nn.Dropout draws from the global generator
            torch.manual_seed(generator(args.seed, "dropout", state.step, micro, RANK).initial_seed())
        error = (denoise(base, noisy, timesteps, cond) - target).square().mean((1, 2, 3))   # (B,)
        loss = (error * weight).sum() / (args.batch_size * args.accumulate * WORLD)
        state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def write_log(log, seen, clock, device, state, args, data):
    """A line for each step since the last look; returns their mean loss. Three NaN steps in a row end the run."""
    values, batch = torch.stack(seen).tolist(), args.batch_size * args.accumulate * WORLD
    speed = round(len(seen) * batch / (time.perf_counter() - clock), 2)
    first = state.step - len(seen) + 1
    log(*({"step": step, "epoch": round(step * batch / len(data.rows), 3), "loss": loss,
           "lr": learning_rate(step - 1, args), "grad_norm": norm, "images_per_second": speed,
           "memory": memory_in_use(device)} for step, (loss, norm) in enumerate(values, first)))
    for _, norm in values:
        state.bad_steps = 0 if math.isfinite(norm) else state.bad_steps + 1
        if state.bad_steps == 3:
            fail(f"step {state.step}: three steps in a row gave NaN or infinity; try a smaller --lr or --precision fp32; "
                 f"{args.out}/checkpoints/latest.pt is from before")
    return sum(loss for loss, _ in values) / len(values)


def apply_gradients(state, weights, args):
    """Clip, step, average. Returns the gradient norm before clipping, on the device; a step with NaN changes nothing."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, args)
    state.scaler.unscale_(state.optimizer)
    grads = [w.grad for w in weights]
    norm = torch.nn.utils.get_total_norm(grads)
    if args.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(weights, args.max_grad_norm, norm)
    if state.scaler.is_enabled():
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        state.optimizer.found_inf = (~norm.isfinite()).float()   # fused AdamW then skips, without the host asking
        state.optimizer.step()
    state.optimizer.zero_grad()
    decay = min(args.ema, (1 + state.step) / (10 + state.step)) if args.ema else 0.0
    torch._foreach_lerp_(list(state.ema.values()), [w.data for w in weights], 1 - decay)
    return norm


def memory_in_use(device):
    """Peak memory so far, in MB: the GPU's, else the process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    with suppress(ImportError):   # Windows has no resource module
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (1e6 if sys.platform == "darwin" else 1e3))


# ------------------------------------------------------------------------------------------------- what a run leaves

def save_results(state, args, data, data_hash):
    """lora.safetensors (EMA weights of the best validation, else of the end) and lora-last.safetensors, or model/."""
    best_path = Path(args.out, "checkpoints", "best.pt")
    best = torch.load(best_path, map_location="cpu", weights_only=True)["ema"] if state.history else state.ema
    if args.method == "full":
        save_model(best, args)
        return Path(args.out, "model")
    about = {"base": args.base, "rank": args.rank, "alpha": f"{args.alpha:g}", "targets": args.targets,
             "prompt": args.prompt or "", "resolution": args.resolution, "seed": args.seed, "images": len(data.rows),
             "data": data_hash, "format_version": 1, "made_by": "medlora",
             "licence": "that of the base; research use, not for diagnosis"}
    lora.save(Path(args.out, "lora.safetensors"), best, {**about, "steps": state.best["step"] or state.step})
    lora.save(Path(args.out, "lora-last.safetensors"), state.ema, {**about, "steps": state.step})
    return Path(args.out, "lora.safetensors")


def save_model(weights, args):
    """model/: a diffusers folder with the tuned UNet (fp32) and the base's other parts, usable as --base."""
    folder, unet = Path(args.out, "model"), "unet/diffusion_pytorch_model.safetensors"
    source = Path(find_base(args.base))
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and relative.as_posix() != unet and not relative.parts[0].startswith("."):
            with replacing(folder / relative) as file, open(path, "rb") as part:
                shutil.copyfileobj(part, file)
    with replacing(folder / unet) as file:
        file.write(lora.to_bytes({name: w.cpu().contiguous() for name, w in weights.items()}, {}))


def write_report(state, args):
    """report.html: loss, validation, learning rate, gradient norm, the grids in order, the flags."""
    lines = [json.loads(line) for line in Path(args.out, "log.jsonl").read_text().splitlines()]
    steps, grids = [line for line in lines if "loss" in line], sorted(Path(args.out, "samples").glob("step-*.png"))
    width = max(1, len(steps) // 200)   # points are means over this many steps

    def points(key):
        parts = [steps[i:i + width] for i in range(0, len(steps), width)]
        return [(part[-1]["step"], sum(line[key] for line in part) / len(part)) for part in parts]
    best = f", best {state.best['val_loss']:.4f} at step {state.best['step']}" if state.history else ""
    body = (f"<p>{state.step} steps{best}; peak memory {steps[-1]['memory']} MB, "
            f"{steps[-1]['images_per_second']} images a second.</p>" + "<h2>Loss</h2>"
            + curve({"training": points("loss"), "validation": [(v["step"], v["val_loss"]) for v in state.history]}, "step")
            + "<h2>Gradient norm</h2>" + curve({"before clipping": points("grad_norm")}, "step")
            + "<h2>Learning rate</h2>" + curve({"lr": points("lr")}, "step") + "<h2>Samples, same noise each time</h2>")
    for path in grids[:: max(1, len(grids) // 6)][:-1] + grids[-1:]:
        with Image.open(path) as grid:
            body += f"<p class=\"soft\">{path.stem}</p>{thumbnail(grid, 1000)}"
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in vars(args).items()]
    with replacing(Path(args.out, "report.html")) as file:
        file.write(page(f"Training {args.out}", body + "<h2>Flags</h2>" + table(["flag", "value"], flags)).encode())


def describe(state, data, val, args):
    """Before anything long starts: what will be trained on what."""
    batch, size = args.batch_size * args.accumulate * WORLD, sum(w.numel() for w in state.weights.values())
    groups = len({row["group"] for row in data.rows} - {""})
    print(f"{len(data.rows)} training images" + f" of {groups} patients" * (groups > 0)
          + f", {len(val.rows) if val else 0} for validation, {len(next(iter(data.cond.values()))) - 1} captions")
    print(f"{size:,} trainable weights ({size * 4 / 1e6:.1f} MB); effective batch {batch} = {args.batch_size} × "
          f"{args.accumulate} × {WORLD}; {len(data.rows) / batch:.1f} steps an epoch, {args.steps} steps"
          + f", going on from {state.step}" * (state.step > 0), flush=True)


def run(args, device):
    train_rows, val_rows = list_data(args)
    with open(Path(find_base(args.base), "unet", "config.json"), encoding="utf-8") as file:
        args.resolution = args.resolution or json.load(file)["sample_size"] * 8
    batch = args.batch_size * args.accumulate * WORLD
    args.steps = args.steps or math.ceil(args.epochs * len(train_rows) / batch)
    data_hash = fingerprint(train_rows)
    checkpoint = find_checkpoint(args, data_hash)
    if checkpoint and checkpoint["step"] >= args.steps and finished(args.out) == checkpoint["step"]:
        print(f"{args.out} is finished: {checkpoint['step']} steps. To go on, give more --steps")
        return
    base = load_base(args.base, device, args.precision, args.method)
    data = cache(base, train_rows, args, "training images")
    val = cache(base, val_rows, args, "validation images") if val_rows else None
    state = start(base, args, checkpoint)
    prompts = args.val_prompts or [caption for caption, _ in Counter(r["caption"] for r in data.rows).most_common(4)]
    if RANK == 0:
        write_args(args)
        describe(state, data, val, args)
    fit(base, data, val, state, prompts, args, data_hash, Log(Path(args.out, "log.jsonl"), state.step))
    if RANK == 0:
        result = save_results(state, args, data, data_hash)
        write_report(state, args)
        write_args(args, ended=state.step)
        print(f"done: {result}; look at {args.out}/report.html\nnext: python sample.py --"
              f"{'base' if args.method == 'full' else 'lora'} {result} --prompt \"{prompts[0]}\" --num-images 50 --grid")


def main(args):
    device = start_processes(args)
    with lock(args.out) if RANK == 0 else nullcontext():
        run(args, device)


if __name__ == "__main__":
    guarded(main, args)
