"""Fit an adapter, a new word, or the whole UNet of a Stable Diffusion base to a folder of images.

    python train.py --base tiny --data tests/phantoms --steps 300 --out runs/try
    python train.py @tests/recipes/dfu-inflammatory.txt --data wounds/ --out runs/dfu
    python train.py --data xray/ --preview runs/look        what the model would see, and what is odd about the data
    torchrun --nproc_per_node=2 train.py --data xray/ --prompt "a chest X-ray with {labels}" --out runs/xray

The same command typed again goes on where a stopped run was, bit for bit. Leaves in --out: lora.safetensors (EMA
weights of the best validation), lora-last.safetensors, checkpoints/, samples/, log.jsonl, split.csv, report.html.
From sample: the base and drawing from it; from metrics: reading data, keyed randomness; from lora: adapters.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shlex
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torchvision.transforms.v2 import functional as vision
from tqdm import tqdm

import lora
from metrics import (
    CACHE,
    FID_WEIGHTS,
    FORMATS,
    IMAGENET_SCALE,
    LPIPS,
    VOLUME_SUFFIXES,
    BadImage,
    Flags,
    command,
    content_hash,
    copy_file,
    curve,
    extract,
    fail,
    find_weights,
    frechet,
    generator,
    is_deep,
    kid,
    list_images,
    load_features,
    load_pixels,
    load_weights,
    looks_like_dicom,
    near_duplicates,
    need,
    open_dicom,
    page,
    pick_window,
    picture,
    read_image,
    replacing,
    run_script,
    share_range,
    split_rows,
    table,
    taps,
    thumbnail,
    trunk_of,
    write_csv,
    write_file,
)
from sample import (
    BASES,
    PARTS,
    RANK,
    WORLD,
    add_tokens,
    base_hash,
    check_schedule,
    classes_of,
    contact_sheet,
    decode_with_gradient,
    denoise,
    encode,
    find_base,
    generate,
    load_base,
    noised_and_target,
    own_device,
    own_resolution,
    predicted_latents,
    project,
    save_png,
    split_labels,
    text_states,
    tokenize,
    use_text_encoder,
)

# ------------------------------------------------------------------------------------------------- the run's folder


def start_processes(args):
    """Under torchrun, join the others; returns this process's device."""
    device = own_device(args.device)
    if (
        device.type == "cuda"
    ):  # what is promised, the same bytes after a restart, needs kernels that add in one order
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if WORLD > 1:
        # A rank that dies takes the others down through torchrun; a long grid on rank 0 must not.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=fresh_store(),
            rank=RANK,
            world_size=WORLD,
            timeout=timedelta(hours=2),
        )
    return device


def fresh_store():
    """A part of torchrun's key-value store that only the processes of this attempt use.

    After a restart the store still holds the addresses of the dead, and a rank that reads one hangs. So each process
    leaves a name of its own, rank 0 strings them together, and the string that all of them have signed is the part.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(hours=2)))
    mine, signed = secrets.token_hex(8), set()
    store.set(f"medlora-{RANK}", mine)
    while True:
        if RANK == 0:
            store.set(
                "medlora-all",
                " ".join(store.get(f"medlora-{rank}").decode() for rank in range(WORLD)),
            )
        names = store.get("medlora-all").decode()
        if mine in names and names not in signed:
            signed.add(names)
            store.add(names, 1)
        if names in signed and store.add(names, 0) == WORLD:
            return dist.PrefixStore(names, store)
        time.sleep(0.02)


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
    for place in (".", "checkpoints", "samples", "model", "model/*", "class-images"):
        for litter in Path(out).glob(
            f"{place}/.*.[0-9]*.tmp"
        ):  # of runs that were killed in mid-write
            litter.unlink()
    with file:
        yield


HARMLESS = (
    "steps epochs out resume device precision save_every keep_last log_every validate_every val_prompts val_samples "
    "val_steps val_guidance_scale strict cache batch_size accumulate data val_data class_data patience "
    "tensorboard wandb compile gradient_checkpointing"
).split()


def effective_batch(args):
    """Images an optimizer step."""
    return args.batch_size * args.accumulate * WORLD


KINDS = {
    "args": dict,
    "step": int,
    "weights": dict,
    "ema": dict,
    "optimizer": dict,
    "scaler": dict,
    "best": dict,
    "history": list,
    "random": torch.Tensor,
    "made_of": dict,
}  # of what a checkpoint holds


def plain(value):
    """What a checkpoint may hold: tuples become lists, and what is None is left out."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if part is not None}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def checkpoint_path(args):
    """The file that --resume means."""
    names = {"auto": "latest.pt", "latest": "latest.pt", "best": "best.pt"}
    return (
        Path(args.out, "checkpoints", names[args.resume])
        if args.resume in names
        else Path(args.resume)
    )


def find_checkpoint(args, made_of):
    """The checkpoint that --resume means, read, or None to start afresh. Nothing is unpickled. made_of: as in Data."""
    path = checkpoint_path(args)
    if not path.exists():
        return (
            None if args.resume == "auto" else fail(f"--resume {args.resume}: there is no {path}")
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        then = checkpoint["args"]
        assert checkpoint["format"] == 1 and all(
            isinstance(checkpoint[key], kind) for key, kind in KINDS.items()
        )
        best, history, figure = (
            checkpoint["best"],
            checkpoint["history"],
            args.select_by.replace("-", "_"),
        )
        for entry in (
            best,
            *history,
        ):  # best is of step 0, without figures, as long as none was a number
            assert "step" in entry and all(
                isinstance(value, (int, float)) for value in entry.values()
            )
            assert {"val_loss", figure} <= entry.keys() or entry is best and not best["step"]
    except (
        Exception
    ) as why:  # truncated, a pickle, another program's: torch.load raises whatever it meets
        fail(
            f"{path}: not a checkpoint of train.py, or damaged ({type(why).__name__}); give --resume an older one of "
            f"{path.parent}, or another --out to start afresh"
        )
    changed = [
        name
        for name, value in vars(args).items()
        if then.get(name) != plain(value) and name not in HARMLESS
    ]
    if changed:
        fail(
            f"{path} was made with other flags: "
            + "; ".join(
                f"--{name.replace('_', '-')} {then.get(name)} there, {getattr(args, name)} here"
                for name in changed
            )
            + "; give the same, or another --out"
        )
    then_batch, batch = checkpoint["effective_batch"], effective_batch(args)
    if then_batch != batch:
        fail(
            f"{path}: the effective batch was {then_batch}, now it is {batch} = --batch-size {args.batch_size} × "
            f"--accumulate {args.accumulate} × {WORLD} processes; change one of them"
        )
    for name, digest in made_of.items():
        if checkpoint["made_of"].get(name) != digest:
            fail(
                f"{path}: {name}: {'files, captions or their order have' if 'data' in name else 'its content has'} changed since; "
                "give another --out"
            )
    return checkpoint


def finished(out):
    """The step at which a run in this folder ended and left its results, or None."""
    with suppress(OSError, ValueError):
        return json.loads(Path(out, "args.json").read_text(encoding="utf-8")).get("finished")


def write_args(args, ended=None):
    """args.json: every flag, what ran it, and the step at which the run ended."""
    about = {
        "command": sys.argv,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processes": WORLD,
        "finished": ended,
    }
    write_file(
        Path(args.out, "args.json"),
        json.dumps({"args": vars(args), **about}, indent=1, ensure_ascii=False),
    )


# ------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """A data set in latents, on the device. mean, std: (variants x N, 4, h, w); text: what the captions become, each value
    (captions + 1, …), the last of the empty caption: encoders' states, or tokens where the text encoder learns (live);
    caption: (N,) index into them."""

    rows: list
    mean: torch.Tensor
    std: torch.Tensor
    text: dict
    caption: torch.Tensor
    live: bool
    classes: tuple = ()  # of the rows, for --balance
    weight: torch.Tensor = None  # (N,) of each row's loss, mean 1
    made_of: dict = field(
        default_factory=dict
    )  # what must not change while a run goes on → its hash


def cond_of(base, data, part):
    """UNet arguments for a part of data.text, with gradients where something in the text's path learns."""
    return project(base, text_states(base, part) if data.live else part)


def list_data(args):
    """All rows, each with its split, by --val-data or by a hash of patient or content."""
    columns = {
        f"{role}_column": getattr(args, f"{role}_column")
        for role in ("image", "caption", "label", "group")
    }
    columns |= {
        "prompt": args.prompt,
        "slices": args.slices,
        "strict": None if args.preview else args.strict,
    }  # the doctor names all that is not there
    rows = list_images(args.data, **columns)
    for flag, folder in (("out", args.out), ("preview", args.preview)):
        where = Path(folder or "/").resolve()
        if Path(args.data).resolve() in [where, *where.parents] and (
            flag == "preview" or not rows[0]["fields"]
        ):
            fail(
                f"--{flag} {folder} lies in --data {args.data}: its pictures would be trained on; give another folder"
            )
    split_rows(rows, 0.0 if args.val_data else args.val_split, args.test_split)
    there = {row["split"] for row in rows}
    for part, share in (
        ("train", 1),
        ("val", 0 if args.val_data else args.val_split),
        ("test", args.test_split),
    ):
        if share and part not in there:
            fail(
                f"{args.data}: {len(rows)} images are not enough for the split: none fell to {part}; "
                "add images or give --val-split 0"
            )
    if args.val_data:  # a name that both sets have is no name in split.csv
        known = {row["file_name"] for row in rows}
        rows += [
            row
            | {
                "split": "val",
                "file_name": row["path"] if row["file_name"] in known else row["file_name"],
            }
            for row in list_images(args.val_data, **columns)
        ]
    if RANK == 0 and not any(row["caption"] for row in rows):
        print("no captions: no --prompt and no caption column, so every image gets the empty one")
    add_facts(rows, args)
    if args.balance and not any(row["label"] for row in rows):
        fail(
            f"--balance: {args.data} has no labels: give --label-column, or a folder for each class"
        )
    sides = Counter(
        group for group, _ in dict.fromkeys((row["group"], row["split"]) for row in rows)
    )
    warn(
        [group for group, count in sides.items() if group and count > 1],
        "patients on both sides of the split",
        "take them out of one",
    )
    if {"hflip", "vflip"} & set(args.augment.split(",")):
        warn(
            [
                row["file_name"]
                for row in rows
                if re.search(r"\b(?i:left|right)\b|\bO[DS]\b", row["caption"])
            ],
            "captions that say left, right, OD or OS, which a flip makes wrong",
            "leave the flips out: they swap no words",
        )
    return rows


def add_facts(rows, args):
    """Set what the whole set decides or is asked for often: row["hash"] of the file's content, and row["range"]."""
    hashes = {path: content_hash(path) for path in {row["path"] for row in rows}}
    for row in share_range(rows, args.range):
        row["hash"] = hashes[row["path"]]
    return rows


def warn(names, what, advice):
    """One line about these files, patients or classes, where there are any."""
    if names and RANK == 0:
        print(
            f"warning: {what}: {len(names)} ({', '.join(names[:3])}{', …' * (len(names) > 3)}): {advice}"
        )


def load(rows, args, seed=None):
    """The readable ones of `rows` and their pixels, plain; another `seed` gives other random crops."""
    return load_pixels(
        rows,
        args.resolution,
        args.crop,
        args.strict,
        args.window,
        args.range,
        args.allow_burned_in,
        args.seed if seed is None else seed,
    )


def load_uncached(rows, args):
    """As `load`, but nothing is read, and no row has pixels, where --cache holds the latents of all."""
    if args.cache and all(
        kept(row, variant, args).exists()
        for row in rows
        for variant in range(variants_of(row, args))
    ):
        return rows, [None] * len(rows)
    return load(rows, args)


def variants_of(row, args):
    """How many pictures are made of a row: what is validated on stays plain."""
    return args.variants if row.get("split") == "train" else 1


def name_of(row, variant, args):
    """A name for a variant of a row: a hash of all that its pixels depend on."""
    parts = [row["hash"], row["slice"], row["range"], args.resolution, args.crop, args.window]
    if variant or args.crop == "random":
        parts += [row["file_name"], args.seed, variant, args.augment]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def kept(row, variant, args):
    """The file of --cache with the latents of a variant of a row."""
    return Path(args.cache, name_of(row, variant, args) + ".safetensors")


def variant_of(row, plain, variant, args):
    """What training sees of a row, uint8 (3, S, S): `plain` (None: still to be read), or a further variant of it."""
    if plain is None or variant and args.crop == "random":
        plain = load([row], args, (args.seed, variant) if variant else None)[1][0]
    if not (variant and args.augment):
        return plain
    return augmented(
        plain,
        args.augment.split(","),
        args.seed,
        "augment",
        row["file_name"],
        row["slice"],
        variant,
    )


def latents_of(base, jobs, args):
    """Posterior mean and std, (2, B, 4, h, w), of `jobs`, each (row, plain pixels, variant): from --cache, or encoded."""
    paths = [kept(row, variant, args) for row, _, variant in jobs] if args.cache else []
    found = [read_latents(path) for path in paths]
    if found and not any(each is None for each in found):
        return torch.stack(found, 1).to(base.device)
    made = torch.stack(encode(base, torch.stack([variant_of(*job, args) for job in jobs])))
    for path, each in zip(paths, made.cpu().unbind(1)):
        digest = hashlib.sha256(each.numpy().tobytes()).hexdigest()
        write_file(path, lora.to_bytes({"latents": each.contiguous()}, {"sha256": digest}))
    return made


def read_latents(path):
    """(2, 4, h, w) from a file of --cache, or None where there is none or it is damaged."""
    with suppress(OSError, SafetensorError, KeyError, TypeError), safe_open(path, "pt") as file:
        found = file.get_tensor("latents")
        if hashlib.sha256(found.numpy().tobytes()).hexdigest() == file.metadata()["sha256"]:
            return found


# ------------------------------------------------------------------------------------------------- the data doctor


def preview(args):
    """--preview: say what the data are and what is odd about them, and write them as the model would see them."""
    listed, folder = list_data(args), Path(args.preview)
    ours, target = (
        ["file_name", "text", "label", "patient_id", "source", "synthetic"],
        folder / "metadata.csv",
    )
    if target.exists() and (
        target.samefile(args.data)
        or target.read_text(encoding="utf-8", errors="replace").split("\n")[0].strip()
        != ",".join(ours)
    ):
        fail(f"--preview {folder}: there is another data set's metadata.csv; give another folder")
    if args.resolution is None:  # a base that is not on this machine yet is not fetched for this
        where = BASES.get(args.base, args.base) or ""
        args.resolution = (
            own_resolution(where)
            if os.path.isdir(where)
            else {"sd21": 768, "sdxl": 1024}.get(args.base, 512)
        )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        seen = list(
            tqdm(
                pool.map(lambda row: examine(row, args), listed),
                "examining",
                len(listed),
                unit="image",
                disable=RANK > 0,
                leave=False,
            )
        )
    bad = [
        f"{row['file_name']}: {facts['bad']}" for row, facts in zip(listed, seen) if "bad" in facts
    ]
    if len(bad) == len(listed):
        fail(f"{args.data}: none of the {len(bad)} images can be read, the first: {bad[0]}")
    rows, pixels = load(
        [row | facts for row, facts in zip(listed, seen) if "bad" not in facts], args
    )
    if RANK == 0:
        describe_data(rows, args)
        diagnose(rows, pixels, bad, args)
    jobs = [
        (row, plain, variant)
        for row, plain in zip(rows, pixels)
        if row["split"] != "test"
        for variant in range(args.variants)
    ]
    suffix = ".png" if len(jobs) <= 10_000 else ".jpg"  # a very large set would fill the disk
    names = [
        f"{Path(row['file_name']).stem[:80]}-{name_of(row, variant, args)[:8]}-{variant}{suffix}"
        for row, _, variant in jobs
    ]
    for job, name in tqdm(
        list(zip(jobs, names))[RANK::WORLD], "writing", unit="image", disable=RANK > 0, leave=False
    ):
        if not (folder / name).exists():
            with replacing(folder / name) as file:
                picture(variant_of(*job, args)).save(
                    file, "PNG" if suffix == ".png" else "JPEG", quality=95, subsampling=0
                )
    if WORLD > 1:
        dist.barrier()
    if (
        RANK == 0
    ):  # the variants of a picture without a patient stay together too: its name takes the patient's place
        write_csv(
            target,
            ours,
            [
                [
                    name,
                    row["caption"],
                    row["label"],
                    row["group"] or row["file_name"] * (args.variants > 1),
                    row["file_name"],
                    row["fields"].get("synthetic", ""),
                ]
                for (row, _, _), name in zip(jobs, names)
            ],
        )
        images, most = len(jobs) // args.variants, max(1, 48 // args.variants)
        places = sorted(
            {n * images // most * args.variants for n in range(most)}
        )  # spread over the set
        shown = [job for place in places for job in jobs[place : place + args.variants]]
        sheet = contact_sheet(
            [picture(variant_of(*job, args)) for job in shown],
            [row["caption"] or row["label"] or row["file_name"] for row, _, _ in shown],
            args.variants * max(1, 8 // args.variants),
        )
        with replacing(folder / "grid.png") as file:
            sheet.save(file, "PNG")
        print(
            f"{len(jobs)} pictures of {args.resolution} x {args.resolution} in {folder}: look at {folder / 'grid.png'}\n"
            f"next: the same command without --preview, or {command('train.py', '--data', folder)}"
        )


def examine(row, args):
    """What a file is, for the doctor: {"size", "ends", "kind", "inverted", "burned"}, or {"bad": why}. Of a DICOM's
    header nothing is kept that could name a patient."""
    try:
        image = read_image(
            row["path"], row["slice"], args.window, row["range"], args.allow_burned_in
        )
    except BadImage as error:
        return {"bad": error.why}
    ends = image.convert("L").getextrema()
    facts = {
        "size": image.size,
        "ends": ends,
        "kind": "volume",
        "inverted": None,
        "burned": False,
    }
    if not row["path"].lower().endswith(VOLUME_SUFFIXES) and looks_like_dicom(row["path"]):
        header = open_dicom(row["path"], stop_before_pixels=True)
        return {
            **facts,
            "kind": f"DICOM of {header.get('BitsStored') or 32} bits",
            "burned": header.get("BurnedInAnnotation") == "YES",
            "inverted": {"MONOCHROME1": True, "MONOCHROME2": False}.get(
                header.PhotometricInterpretation
            ),
        }
    with suppress(UnidentifiedImageError), Image.open(row["path"], formats=FORMATS) as file:
        facts["kind"] = f"{file.format} of {'16 bits or floats' if is_deep(file) else '8 bits'}"
    return facts


def describe_data(rows, args):
    """Count, shapes, depth, labels and patients of the readable rows."""
    split, kinds = Counter(row["split"] for row in rows), Counter(row["kind"] for row in rows)
    sides, (low, high) = (
        [side for row in rows for side in row["size"]],
        zip(*(row["ends"] for row in rows)),
    )
    print(
        f"{len(rows)} images: {split['train']} to train on, {split['val']} for validation, {split['test']} for a test"
    )
    print(
        "files: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        + f"; sides from {min(sides)} to {max(sides)} pixels, {len({row['size'] for row in rows})} shapes; grey values "
        f"from {min(low)} to {max(high)}, of the dimmest up to {min(high)}"
    )
    groups = Counter(row["group"] for row in rows if row["group"])
    print(
        f"patients: {len(groups)}, with 1 to {max(groups.values())} images"
        if groups
        else "patients: unknown"
    )
    labels = Counter(label for row in rows for label in split_labels(row))
    for label, count in labels.most_common() if len(labels) > 1 or "" not in labels else ():
        patients = len({row["group"] for row in rows if label in split_labels(row)} - {""})
        print(
            f"  {label or '(no label)':<32} {count:>6} images {count / len(rows):>5.0%} {patients or '-':>6} patients"
        )
    warn(
        [
            f"{label or '(no label)'}: {count}"
            for label, count in labels.items()
            if count < 10 and len(labels) > 1
        ],
        "classes of fewer than 10 images, which a model learns by heart",
        "add images, join classes or leave them out",
    )


def diagnose(rows, pixels, bad, args):
    """What is odd about the data, a line each, with what to do."""

    def named(key):
        return [row["file_name"] for row in rows if row[key]]

    warn(bad, "files that cannot be read", "mend them or take them out")
    warn_of_twins(rows, pixels, args)
    inverted = [row["inverted"] for row in rows]
    if {True, False} <= set(inverted):
        warn(
            named("inverted"),
            "MONOCHROME1 films, which store black as white, among MONOCHROME2",
            "they are inverted as their header says; see in grid.png that it is right",
        )
    deep = [
        row for row in rows if args.range is None and row["range"] and 255 < row["range"][1] <= 4095
    ]
    warn(
        [row["file_name"] for row in deep],
        "16-bit files with 12-bit values",
        "with --range 0,4095 their scale stays when images are added",
    )
    warn(
        named("burned"),
        "DICOM files that say text is burnt into the picture",
        "look at them, blacken it",
    )


def warn_of_twins(rows, pixels, args, crossing=False):
    """Warn of pictures that are there twice; crossing: only of those on two sides of the split."""
    alike = (
        0.98 if args.crop in ("pad", "fundus") else 0.95
    )  # black borders make all pictures more alike
    pairs = [
        (rows[i], rows[j], kind)
        for i, j, kind in near_duplicates(pixels, alike)
        if (rows[i]["path"], rows[i]["split"])
        != (rows[j]["path"], rows[j]["split"])  # not slices of one volume,
        and pixels[i].min() < pixels[i].max()
    ]  # nor blank ones
    advice = "delete one of each, or give both one patient_id"
    ways = {
        "exact": "exact duplicates",
        "near": "duplicates re-saved or retouched",
        "flipped": "mirrored duplicates",
    }
    for kind, way in ways.items() if not crossing else ():
        warn(
            [f"{a['file_name']} = {b['file_name']}" for a, b, its in pairs if its == kind],
            way,
            advice,
        )
    warn(
        [f"{a['file_name']} = {b['file_name']}" for a, b, _ in pairs if a["split"] != b["split"]],
        "pictures on both sides of the split, by which validation flatters",
        advice,
    )


# ------------------------------------------------------------------------------------------------- latents


def augmented(picture, names, *key):
    """A variant of a picture, uint8 (3, S, S), S a multiple of 8: what the AUGMENT named make of it, each by a draw of its
    own, keyed by `key`."""

    def draw(name, count=1):
        drawn = torch.rand(count, generator=generator(*key, name)) * 2 - 1
        return drawn * AUGMENT[name] * (name in names)

    size, image = picture.shape[-1], picture[None].float() / 255  # (1, 3, S, S)
    image = image.flip([axis for axis, name in ((3, "hflip"), (2, "vflip")) if draw(name) > 0])
    if {"rotate", "shift", "scale", "elastic"} & set(names):
        zoom, angle, (across, down) = (
            1 / (1 + draw("scale")),
            draw("rotate").deg2rad(),
            2 * draw("shift", 2),
        )
        matrix = torch.cat(
            [
                zoom * angle.cos(),
                -zoom * angle.sin(),
                across[None],
                zoom * angle.sin(),
                zoom * angle.cos(),
                down[None],
            ]
        ).view(1, 2, 3)
        nodes = (
            torch.randn(1, 2, 4, 4, generator=generator(*key, "elastic")) * 2 * AUGMENT["elastic"]
        )
        field = F.interpolate(
            nodes * ("elastic" in names), (size, size), mode="bicubic", align_corners=True
        )
        image = displaced(
            image,
            F.affine_grid(matrix, image.shape, align_corners=False) + field.permute(0, 2, 3, 1),
        )
    if draw("clahe") > 0:
        grey = vision.rgb_to_grayscale(image)[0, 0]
        image = image + clahe(grey, AUGMENT["clahe"]) - grey
    for change, factor in zip(
        (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation),
        1 + draw("color", 3) if "color" in names else (),
    ):
        image = change(image.clamp(0, 1), factor.item())
    if blur := draw("blur").abs().item() * size:
        image = vision.gaussian_blur(image, 2 * math.ceil(3 * blur) + 1, blur)
    noise = torch.randn(1, 1, size, size, generator=generator(*key, "grain")) * draw("noise").abs()
    return ((image + noise).clamp(0, 1) * 255).round().to(torch.uint8)[0]


def displaced(image, grid):
    """(1, C, S, S) in [0, 1] looked up at `grid`, (1, S, S, 2) of x and y from -1 to 1: bicubic, mirrored at the border."""
    return F.grid_sample(image, grid, "bicubic", "reflection", align_corners=False).clamp(0, 1)


def clahe(grey, limit, tiles=8):
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994; OpenCV's form) of (S, S) in [0, 1].

    Each of tiles x tiles regions gets the map that equalises its histogram of 256 bins, of which none may hold more than
    `limit` times the mean (the excess goes to all alike); a pixel takes the bilinear mean of the four nearest maps.
    """
    side = len(grey) // tiles
    levels = (grey * 255).round().long()  # (S, S)
    regions = levels.unfold(0, side, side).unfold(1, side, side).reshape(tiles**2, side**2)
    counts = torch.zeros(tiles**2, 256).scatter_add_(1, regions, torch.ones(regions.shape))
    counts = counts.clamp(max=max(1, limit * side**2 / 256))
    counts += (side**2 - counts.sum(1, keepdim=True)) / 256
    maps = (counts.cumsum(1) / side**2).view(tiles, tiles, 256)
    place = torch.arange(len(grey)) / side - 0.5
    first, share = place.floor(), place.frac() % 1
    near = [
        ((first + step).clamp(0, tiles - 1).long(), weight)
        for step, weight in ((0, 1 - share), (1, share))
    ]
    return sum(
        down[:, None] * across * maps[rows[:, None], columns, levels]
        for rows, down in near
        for columns, across in near
    )


def cache(base, rows, pixels, args, what):
    """Encode and keep on the device what training needs of `rows`, variant by variant; latents as posterior mean and std.

    Under torchrun the encoding is shared out.
    """
    if not rows:
        fail(f"{args.data}: none of the {what} can be read")
    scale = 2 ** (len(base.vae.config.block_out_channels) - 1)
    jobs = [
        (row, plain, number)
        for number in range(variants_of(rows[0], args))
        for row, plain in zip(rows, pixels)
    ]
    shape = (
        len(jobs),
        base.vae.config.latent_channels,
        args.resolution // scale,
        args.resolution // scale,
    )
    latents = torch.zeros(2, *shape, device=base.device)
    size = min(8, args.batch_size)
    for i in tqdm(
        range(size * RANK, len(jobs), size * WORLD),
        f"encoding {what}",
        unit="batch",
        disable=RANK > 0,
        leave=False,
    ):
        latents[:, i : i + size] = latents_of(base, jobs[i : i + size], args)
    captions = sorted({row["caption"] for row in rows} - {""}) + [""]
    live = args.text_lora or args.method == "textual-inversion"
    with torch.no_grad():
        tokens = [tokenize(base, captions[i : i + 64]) for i in range(0, len(captions), 64)]
        parts = tokens if live else [text_states(base, part) for part in tokens]
    place = {caption: i for i, caption in enumerate(captions)}
    return Data(
        rows,
        *over_processes(latents),
        {key: torch.cat([part[key] for part in parts]) for key in parts[0]},
        torch.tensor([place[row["caption"]] for row in rows], device=base.device),
        live,
    )


def pictures_of(base, jobs, args, **how):
    """Yield a picture for each of `jobs`, drawn as the run's flags have it."""
    usual = {
        "height": args.resolution,
        "width": args.resolution,
        "seed": args.seed,
        "batch_size": args.batch_size,
    }
    return generate(base, jobs, args.val_steps, args.val_guidance_scale, **usual | how)


def class_images(base, count, args):
    """The images of --class-data, encoded. Where they are fewer than `count`, the error says how to draw them."""
    folder = Path(args.class_data)
    rows = list_images(args.class_data) if any(folder.glob("[!.]*")) else []
    if len(rows) < count:
        size = ("--height", args.resolution, "--width", args.resolution)
        draw = ("--base", args.base, "--prompt", args.class_prompt, "--num-images", count)
        fail(
            f"--class-data {folder}: {len(rows)} images, {count} are needed; to draw them: "
            + command("sample.py", *draw, *size, "--out", folder)
        )
    rows = [row | {"caption": args.class_prompt} for row in rows]
    return cache(base, *load_uncached(add_facts(rows, args), args), args, "class images")


def fingerprint(rows):
    """One hash of a data set: what is in its files and what its captions and labels say, in this order."""
    parts = [f"{row['hash']}{row['slice']}{row['caption']}{row['label']}" for row in rows]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- one step


@lru_cache(4)
def order(seed, epoch, count, classes=()):
    """The order of the data in an epoch: a permutation keyed by the epoch, so that the place follows from the step.

    classes: --balance, one an image: each is drawn equally often, its images in turn.
    """
    shuffled = torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()
    if not classes:
        return shuffled
    members = {name: [i for i in shuffled if classes[i] == name] for name in sorted(set(classes))}
    turns = list(members.values())
    chosen = [turns[(k + epoch) % len(turns)] for k in shuffled]
    return [part[k // len(turns) % len(part)] for k, part in zip(shuffled, chosen)]


def make_batch(data, step, slots, args, stream="data"):
    """What step `step` sees at global batch positions `slots`: latents, noise, timesteps (on the CPU), part of data.text,
    weights of the rows' losses.

    Every draw is keyed by (purpose, step, slot): the same whatever the number of processes and forward passes.
    """
    count, batch = len(data.rows), effective_batch(args)
    places = [step * batch + slot for slot in slots]
    orders = {
        epoch: order((args.seed, stream), epoch, count, data.classes)
        for epoch in {p // count for p in places}
    }
    shape, device = data.mean.shape[1:], data.mean.device
    index = torch.tensor([orders[place // count][place % count] for place in places]).to(
        device, non_blocking=True
    )
    caption, variants = data.caption[index], len(data.mean) // count
    weight = torch.ones(len(slots), device=device) if data.weight is None else data.weight[index]
    if variants > 1:  # latents of variant v stand at v * count
        index = index + count * torch.stack(
            [
                torch.randint(
                    variants, (), generator=generator(args.seed, stream, "variant", step, slot)
                )
                for slot in slots
            ]
        ).to(device, non_blocking=True)

    def draw(purpose, make):
        values = [make(generator(args.seed, stream, purpose, step, slot)) for slot in slots]
        return torch.stack(values).to(device, non_blocking=True)

    noise = draw("noise", lambda g: torch.randn(shape, generator=g))
    if args.noise_offset:
        noise += args.noise_offset * draw(
            "noise-offset", lambda g: torch.randn(shape[0], 1, 1, generator=g)
        )
    latents = data.mean[index] + data.std[index] * draw(
        "posterior", lambda g: torch.randn(shape, generator=g)
    )
    timesteps = torch.stack(
        [
            torch.randint(1000, (), generator=generator(args.seed, stream, "timestep", step, slot))
            for slot in slots
        ]
    )
    dropped = draw("caption-dropout", lambda g: torch.rand((), generator=g)) < args.prompt_dropout
    caption = torch.where(dropped, len(next(iter(data.text.values()))) - 1, caption)
    return (
        latents,
        noise,
        timesteps,
        {key: value[caption] for key, value in data.text.items()},
        weight,
    )


def learning_rate(step, args):
    """Warm-up, then cosine or linear to zero, or constant."""
    length, warmup = args.steps, args.warmup
    if warmup is None or warmup >= length:
        warmup = min(100, length // 10)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, length - warmup)
    return (
        args.lr
        * {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "constant": 1}[
            args.lr_schedule
        ]
    )


def over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_over_processes(weights, numbers):
    """Sum the gradients and the tensor `numbers` over all processes: one all-reduce of one flat buffer."""
    if WORLD == 1:
        return numbers
    flat = over_processes(torch.cat([w.grad.flatten() for w in weights] + [numbers]))
    for w, part in zip(weights, flat.split([w.numel() for w in weights] + [len(numbers)])):
        w.grad.copy_(part.view_as(w))
    return flat[-len(numbers) :]


# ------------------------------------------------------------------------------------------------- state


@dataclass
class State:
    """What a checkpoint holds and a resumed run starts from."""

    weights: dict  # name → parameter, fp32
    ema: dict  # name → tensor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: dict = field(default_factory=lambda: {"step": 0, "val_loss": math.inf})
    history: list = field(default_factory=list)  # of validations: {"step", "val_loss"}
    bad_steps: int = 0  # steps with NaN, in a row


def trainable(base, args):
    """What the method trains: {name: fp32 parameter}; everything else is frozen."""
    if args.method == "full":
        return {f"unet.{name}": w for name, w in base.unet.requires_grad_(True).named_parameters()}
    if args.method == "textual-inversion":
        words = base.tokenizers[0](args.init_word, add_special_tokens=False).input_ids or fail(
            f'--init-word "{args.init_word}": give a word, such as lesion'
        )
        known = base.text_encoders[0].get_input_embeddings().weight[words].mean(0)
        return {args.token: add_tokens(base, {args.token: known.repeat(args.vectors, 1)})}
    weights = lora.inject(
        base.unet, args.targets, args.rank, args.alpha, args.dropout, generator(args.seed, "init")
    )
    if args.text_lora:
        for name, encoder in list(base.parts().items())[1:]:
            weights |= lora.inject(
                encoder,
                "q_proj,k_proj,v_proj,out_proj",
                args.rank,
                args.alpha,
                args.dropout,
                generator(args.seed, "init", name),
                name,
            )
    if args.text_encoder:
        torch.manual_seed(generator(args.seed, "projection").initial_seed())
        base.text_projection.reset_parameters()
        weights |= {
            f"text_projection.{name}": w for name, w in base.text_projection.named_parameters()
        }
    if args.init_lora:
        start_from_adapter(weights, args)
    return weights


def start_from_adapter(weights, args):
    """Copy an adapter file into fresh adapter weights: the same layers and rank, whatever its resolution and alpha."""
    pairs, _, extra = lora.load(args.init_lora)
    found = {
        f"{name}.lora_{which}.weight": value
        for name, pair in pairs.items()
        for which, value in zip("AB", pair)
    } | extra
    ours = {lora.on_disk(name): name for name in weights}
    if {name: w.shape for name, w in found.items()} != {
        disk: weights[name].shape for disk, name in ours.items()
    }:
        fail(
            f"--init-lora {args.init_lora}: its layers or rank are not those of --rank {args.rank} --targets {args.targets}"
            + " --text-lora" * args.text_lora
            + "; see python lora.py info"
        )
    for disk, name in ours.items():
        scale = (
            args.rank / args.alpha if ".lora_B." in name else 1
        )  # the file has alpha/rank folded into B
        weights[name].data.copy_(found[disk] * scale)


def start(base, args, checkpoint):
    """Make what is trained, fresh or as the checkpoint left it."""
    weights = trainable(base, args)
    ema = {name: w.detach().clone() for name, w in weights.items()}
    optimizer = make_optimizer(weights, args)
    state = State(
        weights,
        ema,
        optimizer,
        torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16),
    )
    try:
        if checkpoint:
            for part in (checkpoint["weights"], checkpoint["ema"]):
                assert {k: v.shape for k, v in part.items()} == {
                    k: v.shape for k, v in weights.items()
                }
            for name, w in weights.items():
                w.data.copy_(checkpoint["weights"][name])
                ema[name].copy_(checkpoint["ema"][name])
            optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"] and state.scaler.is_enabled():
                state.scaler.load_state_dict(checkpoint["scaler"])
            state.step, state.best, state.history = (
                checkpoint["step"],
                checkpoint["best"],
                checkpoint["history"],
            )
            torch.set_rng_state(checkpoint["random"])
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        fail(
            "the checkpoint does not fit this base, rank or targets, or is damaged; give the --base it was made with, or "
            "another --out to start afresh"
        )
    return state


def make_optimizer(weights, args):
    small = (
        args.optimizer == "adamw8bit"
        and need("bitsandbytes", "--optimizer adamw8bit").optim.AdamW8bit
    )
    make = small or partial(torch.optim.AdamW, fused=True)
    return make(weights.values(), lr=args.lr, weight_decay=args.weight_decay)


def save_checkpoint(state, args, data, best=False):
    """Write checkpoints/step-N.pt, let best.pt be it if it is and then latest.pt; the oldest beyond --keep-last go."""
    if RANK > 0:
        return
    folder = Path(args.out, "checkpoints")
    path = folder / f"step-{state.step:08d}.pt"
    batch = effective_batch(args)
    content = {
        "format": 1,
        "step": state.step,
        "epoch": state.step * batch // len(data.rows),
        "position": state.step * batch,
        "weights": {name: w.detach() for name, w in state.weights.items()},
        "ema": state.ema,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "effective_batch": batch,
        "schedule": {"lr": learning_rate(state.step, args)},
        "best": state.best,
        "history": state.history,
        "args": vars(args),
        "made_of": data.made_of,
        "random": torch.get_rng_state(),
    }
    with replacing(path) as file:
        torch.save(plain(content), file)
    if best:  # before latest.pt: a run killed between the two then does this step again
        point(folder / "best.pt", path)
    point(folder / "latest.pt", path)
    for old in sorted(folder.glob("step-*.pt"), key=lambda each: each.stat().st_mtime_ns)[
        : -args.keep_last
    ]:  # [:-0]: none
        old.unlink()


def point(name, path):
    """Let `name` be the file `path`: a hard link, or a copy where the file system has none; replaced atomically."""
    if name.exists() and name.samefile(path):  # of two hard links os.replace moves none
        return
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(path), temporary)
    except OSError:
        copy_file(path, name)
    else:
        os.replace(temporary, name)


@contextmanager
def swapped(state, base, weights):
    """The model, without dropout, with `weights` in place of the trained ones, which come back whatever happens."""
    trained, learning = (
        {name: w.detach().clone() for name, w in state.weights.items()},
        base.unet.training,
    )
    try:
        for name, w in state.weights.items():
            w.data.copy_(weights[name])
        for module in base.parts().values():
            module.eval()
        yield
    finally:
        for module in base.parts().values():
            module.train(learning)
        for name, w in state.weights.items():
            w.data.copy_(trained[name])


# ------------------------------------------------------------------------------------------------- watching


@torch.no_grad()
def validation_loss(base, data, batch_size):
    """Mean squared error at noise and timesteps that never change, spread evenly over all: comparable between steps."""
    rows = len(data.rows)
    count = max(rows, 64)  # a few images are looked at several times
    index = torch.arange(count) % rows
    draw = generator(0, "validation")
    timesteps = ((torch.arange(count) + 0.5) * 1000 / count).long()[
        torch.randperm(count, generator=draw)
    ]
    noise = torch.randn(count, *data.mean.shape[1:], generator=draw)
    total = torch.zeros((), dtype=torch.float64, device=base.device)
    for i in range(RANK * batch_size, count, WORLD * batch_size):
        part, t = (x[i : i + batch_size].to(base.device) for x in (index, timesteps))
        noisy, target, _ = noised_and_target(
            base, data.mean[part], noise[i : i + batch_size].to(base.device), t
        )
        text = {key: value[data.caption[part]] for key, value in data.text.items()}
        total += (
            (denoise(base, noisy, t, cond_of(base, data, text)) - target)
            .square()
            .mean((1, 2, 3))
            .double()
            .sum()
        )
    return over_processes(total).item() / count


def set_distance(base, data, args):
    """--select-by kid or fid: the distance between as many drawn images as there are validation images, and these."""
    jobs = [(row["caption"], i) for i, row in enumerate(data.rows)]
    pixels = torch.stack(
        [
            torch.from_numpy(np.array(image)).permute(2, 0, 1)
            for image in pictures_of(base, jobs, args)
        ]
    )
    network = load_features("inception" if args.select_by == "fid" else "texture", base.device)
    real = load(data.rows, args)[1]
    sets = [extract(part, network, base.device) for part in (real, pixels)]
    if network["standardise"]:
        mean, spread = np.concatenate(sets).mean(0), np.maximum(np.concatenate(sets).std(0), 1e-9)
        sets = [(part - mean) / spread for part in sets]
    return float(frechet(*sets) if args.select_by == "fid" else kid(*sets)[0])


def validate(base, state, val, args, log):
    """Validation loss and the selection figure; True if it is the best so far."""
    if not val:
        return False
    figure = args.select_by.replace("-", "_")
    with looking(state, base, args):
        entry = {"step": state.step, "val_loss": validation_loss(base, val, args.batch_size)}
        if args.select_by != "val-loss":  # only rank 0 draws; all must agree on which is best
            distance = set_distance(base, val, args) if RANK == 0 else 0.0
            entry[figure] = over_processes(
                torch.tensor(distance, dtype=torch.float64, device=base.device)
            ).item()
    state.history.append(entry)
    log(entry)
    best = entry[figure] < state.best.get(figure, math.inf)
    state.best = entry if best else state.best
    return best


@contextmanager
def looking(state, base, args):
    """The base as it is looked at: averaged weights, encoders and VAE on the device, nothing compiled."""
    for module in (base.vae, *base.text_encoders):
        module.to(base.device)
    # other batch sizes than the step's would each be compiled anew
    with (
        swapped(state, base, state.ema),
        torch.compiler.set_stance("force_eager" if args.compile else "default"),
    ):
        yield
    rest_encoders(base, args)


def rest_encoders(base, args):
    """Put what a step does not need out of the GPU's memory: the VAE, and the text encoders unless they learn."""
    if not args.perceptual_weight:
        base.vae.to("cpu")
    if not (args.text_lora or args.method == "textual-inversion"):
        for encoder in base.text_encoders:
            encoder.to("cpu")


def draw_grid(base, state, args, log):
    """samples/step-N.png: the same prompts from the same noise each time. Drawn after the checkpoint is safe."""
    jobs = [(prompt, number) for prompt in args.val_prompts for number in range(args.val_samples)]
    path = Path(args.out, "samples", f"step-{state.step:08d}.png")
    if RANK > 0 or not jobs or path.exists():
        return
    with looking(state, base, args):
        images = list(pictures_of(base, jobs, args))
    grid = contact_sheet(
        images, [prompt for prompt, _ in jobs], columns=min(8, max(4, args.val_samples))
    )
    save_png(grid, path, "\n".join(args.val_prompts))
    log.picture(grid, state.step)


def out_of_patience(history, best, args):
    """True once --patience validations in a row were no better than the best before them."""
    return (
        bool(args.patience)
        and sum(entry["step"] > best["step"] for entry in history) >= args.patience
    )


class Log:
    """log.jsonl: a line a step and a line a validation, mirrored to TensorBoard and Weights & Biases where asked.

    Resuming cuts it back to the checkpoint; judged: the steps of the validations that it knows.
    """

    def __init__(self, args, step, judged):
        self.path, self.board, self.run, kept = Path(args.out, "log.jsonl"), None, None, []
        if RANK > 0:
            return
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            with suppress(
                ValueError, KeyError, TypeError, RecursionError
            ):  # the torn last line of a run that was killed
                entry = json.loads(line)
                if 0 < step >= entry["step"] and ("loss" in entry or entry["step"] in judged):
                    kept.append(line)
        write_file(self.path, b"".join(kept))
        for grid in Path(args.out, "samples").glob("step-" + 8 * "[0-9]" + ".png"):
            if not step or int(grid.stem[5:]) > step:
                grid.unlink()
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(Path(args.out, "tensorboard"), purge_step=step + 1)
        if args.wandb:
            wandb, number = (
                need("wandb", "--wandb"),
                hashlib.sha256(os.path.abspath(args.out).encode()).hexdigest()[:16],
            )
            try:
                self.run = wandb.init(
                    project="medlora",
                    name=Path(args.out).name,
                    dir=args.out,
                    config=vars(args),
                    resume="allow",
                    id=number,
                )
            except wandb.Error as why:  # such as no login
                fail(f"--wandb: {why} (or WANDB_MODE=offline)")

    def __call__(self, *entries):
        if RANK > 0:
            return
        with open(self.path, "ab") as file:
            lines = "".join(json.dumps(entry) + "\n" for entry in entries)
            file.write(
                re.sub(r"\bNaN\b|-?\bInfinity\b", "null", lines).encode()
            )  # which are no JSON
        for entry in entries:
            for name, value in entry.items() if self.board else ():
                self.board.add_scalar(name, value, entry["step"])
            if self.run:
                self.run.log(entry, step=entry["step"])

    def close(self):
        for mirror, end in ((self.board, "close"), (self.run, "finish")):
            if mirror:
                getattr(mirror, end)()

    def picture(self, image, step):
        if self.board:
            self.board.add_image("samples", np.asarray(image), step, dataformats="HWC")
        if self.run:
            self.run.log({"samples": need("wandb", "--wandb").Image(image)}, step=step)


# ------------------------------------------------------------------------------------------------- the loop


@contextmanager
def deferred():
    """A list that SIGINT and SIGTERM are added to, instead of ending what runs."""
    asked, signals = [], (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda *_: asked.append(True)) for number in signals]
    try:
        yield asked
    finally:
        for number, handler in zip(signals, handlers):
            signal.signal(number, handler)


def fit(base, streams, check, state, args, log):
    """Train until --steps or out of patience; check() validates: is this the best so far? SIGINT and SIGTERM save first
    and then end the run."""
    weights, first, data, stop = list(state.weights.values()), state.step, streams[0][1], False
    features = perceptual_features(base, args)
    seen, clock = [], time.perf_counter()
    for (
        module
    ) in base.parts().values():  # so that adapters drop out; the base itself has no dropout
        module.train()
    with (
        deferred() as asked,
        tqdm(
            total=args.steps,
            initial=state.step,
            desc="training",
            unit="step",
            disable=RANK > 0,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        ) as bar,
    ):
        while (
            state.step < args.steps
            and not stop
            and not out_of_patience(state.history, state.best, args)
        ):
            loss = compute_gradients(base, streams, features, state, args)
            loss, stop = sum_over_processes(
                weights, torch.stack([loss, torch.full_like(loss, len(asked))])
            )
            norm = apply_gradients(state, weights, args)
            state.step += 1
            seen.append(torch.stack([loss, norm]))
            bar.update()
            last = state.step == args.steps
            validating = last or args.validate_every and state.step % args.validate_every == 0
            saving = last or state.step % args.save_every == 0
            look = (
                validating or saving or state.step % args.log_every == 0 or state.step == first + 20
            )
            stop = (
                bool(asked) if WORLD == 1 else look and stop.item() > 0
            )  # to look makes a GPU wait
            if look or stop:
                bar.set_postfix(
                    loss=f"{write_log(log, seen, clock, base.device, state, args, data):.4f}"
                )
                if state.step == first + 20 and RANK == 0:
                    estimate(state, seen, clock, base.device, args)
                seen = []
            if state.bad_steps >= 3:
                bar.close()
                fail(
                    f"step {state.step}: three steps in a row gave NaN or infinity; try a smaller --lr or --precision "
                    f"fp32; what lies in {args.out}/checkpoints is from before"
                )
            best = validating and check()
            if saving or best or stop or out_of_patience(state.history, state.best, args):
                save_checkpoint(state, args, data, best)
            if (
                validating and not last
            ):  # the last one's follows the loop, where a killed run also comes by
                draw_grid(base, state, args, log)
            if look:
                clock = time.perf_counter()
    if stop or asked:
        RANK or print(f"stopped at step {state.step}, saved; the same command goes on from here")
        raise KeyboardInterrupt


def compute_gradients(base, streams, features, state, args):
    """This process's share of a step: gradients in place, and of the loss, which it returns, on the device.

    streams: [(name, Data, share of the loss)], a batch of the same size from each, with draws of its own; the second are
    DreamBooth's class images (Ruiz et al. 2023).
    """
    total = torch.zeros((), device=base.device)
    for micro in range(args.accumulate):
        first = (micro * WORLD + RANK) * args.batch_size
        for stream, part, share in streams:
            slots = range(first, first + args.batch_size)
            latents, noise, planned, text, weight = make_batch(
                part, state.step, slots, args, stream
            )
            timesteps = planned.to(base.device, non_blocking=True)
            noisy, target, snr_weight = noised_and_target(
                base, latents, noise, timesteps, args.snr_gamma
            )
            if args.dropout:  # the one hidden state: nn.Dropout draws from the global generator
                torch.manual_seed(
                    generator(args.seed, "dropout", stream, state.step, micro, RANK).initial_seed()
                )
            prediction = denoise(base, noisy, timesteps, cond_of(base, part, text))
            error = (prediction - target).square().mean((1, 2, 3)) * snr_weight  # (B,)
            if features:
                clean = predicted_latents(base, noisy, prediction, timesteps)
                error = error + args.perceptual_weight * perceptual_loss(
                    features, clean, latents, planned
                )
            error = error * weight
            loss = share * error.sum() / effective_batch(args)
            state.scaler.scale(loss).backward()
            total += loss.detach()
    for w in state.weights.values():
        if (
            w.grad is None
        ):  # SDXL reads the last layer but one of its text encoders: the last has an adapter in vain
            w.grad = torch.zeros_like(w)
    return total


def perceptual_features(base, args):
    """The function, latents → features, of --perceptual and the first timestep at which noise outweighs the signal, where
    the prediction is a blur that features would punish; None where it is off."""
    if not args.perceptual_weight:
        return None
    blur = int((base.alphas_cumprod >= 0.5).sum())
    if args.perceptual == "vae":
        return lambda latents: decode_with_gradient(base, latents, features=True), blur
    trunk = trunk_of("vgg16", load_weights(find_weights(LPIPS["vgg"][2]))).to(base.device)
    mean, std = (torch.tensor(v, device=base.device)[:, None, None] for v in IMAGENET_SCALE)
    # conv3_3 after its ReLU (Johnson et al. 2016 use its neighbours)
    return lambda latents: taps(
        trunk, ((decode_with_gradient(base, latents) + 1) / 2 - mean) / std, (15,)
    )[0], blur


def perceptual_loss(features, clean, latents, timesteps):
    """Squared distance in features between the predicted clean latents and the true ones, (B,); 0 where blurred.

    timesteps: on the CPU, so that the choice of rows keeps no GPU waiting.
    """
    function, blur = features
    seen = (timesteps < blur).nonzero().flatten()
    loss = torch.zeros(len(latents), device=latents.device)
    if len(seen):
        seen = seen.to(latents.device, non_blocking=True)
        with torch.no_grad():
            wanted = function(latents[seen])
        loss = loss.index_add(0, seen, (function(clean[seen]) - wanted).square().mean((1, 2, 3)))
    return loss


def estimate(state, seen, clock, device, args):
    """After the first 20 steps: what the whole run will take, before a night is committed to it."""
    hours = (time.perf_counter() - clock) / len(seen) * (args.steps - state.step) / 3600
    size = 4 * 4 * sum(w.numel() for w in state.weights.values()) / 1e6
    kept = min(args.keep_last or args.steps, -(-args.steps // args.save_every)) + 2
    tqdm.write(
        f"about {hours * 60:.0f} minutes to go"
        + f" ({hours:.1f} h)" * (hours > 1)
        + f", peak memory {memory_in_use(device)} MB, checkpoints up to {size * kept:.0f} MB on the disk"
    )


def write_log(log, seen, clock, device, state, args, data):
    """A line for each step since the last look; returns their mean loss; counts steps with NaN, in a row."""
    values, batch = torch.stack(seen).tolist(), effective_batch(args)
    speed = round(len(seen) * batch / (time.perf_counter() - clock), 2)
    first = state.step - len(seen) + 1
    log(
        *(
            {
                "step": step,
                "epoch": round(step * batch / len(data.rows), 3),
                "loss": loss,
                "lr": learning_rate(step - 1, args),
                "grad_norm": norm,
                "images_per_second": speed,
                "memory": memory_in_use(device),
            }
            for step, (loss, norm) in enumerate(values, first)
        )
    )
    for (
        loss,
        norm,
    ) in values:  # fp16's scaler looks for its scale by overflowing: there the loss alone counts
        bad = not math.isfinite(loss) or not (math.isfinite(norm) or state.scaler.is_enabled())
        state.bad_steps = state.bad_steps + 1 if bad or state.bad_steps >= 3 else 0
    return sum(loss for loss, _ in values) / len(values)


def apply_gradients(state, weights, args):
    """Clip, step, average. Returns the gradient norm before clipping, on the device; NaN changes no weight."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, args)
    state.scaler.unscale_(state.optimizer)
    grads = [w.grad for w in weights]
    norm = torch.nn.utils.get_total_norm(grads)
    if args.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(weights, args.max_grad_norm, norm)
    if args.optimizer == "adamw" and not state.scaler.is_enabled():
        state.optimizer.found_inf = (
            ~norm.isfinite()
        ).float()  # fused: it then skips without the host asking
    if args.optimizer == "adamw" or state.scaler.is_enabled() or norm.isfinite():
        state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    decay = min(args.ema, (1 + state.step) / (10 + state.step)) if args.ema else 0.0
    torch._foreach_lerp_(list(state.ema.values()), [w.data for w in weights], 1 - decay)
    return norm


def memory_in_use(device):
    """Peak memory so far, in MB: the GPU's, else the process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    with suppress(ImportError):  # Windows has no resource module
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (1e6 if sys.platform == "darwin" else 1e3))


# ------------------------------------------------------------------------------------------------- what a run leaves


def save_results(state, args, data):
    """lora.safetensors (EMA weights of the best validation, else of the end) and lora-last.safetensors; model/ for
    --method full, embeddings.safetensors for textual-inversion. Returns its path."""
    best, best_path = state.ema, Path(args.out, "checkpoints", "best.pt")
    if (
        state.best["step"] and best_path.exists()
    ):  # absent where a run went on from another folder's checkpoint
        kept = torch.load(best_path, map_location="cpu", weights_only=True)
        best = kept["ema"] if kept["step"] == state.best["step"] else best
    if best is state.ema:
        state.best = {"step": state.step}
    if args.method == "full":
        save_model(best, args)
        return Path(args.out, "model")
    about = {
        "base": args.base,
        "rank": args.rank,
        "alpha": f"{args.alpha:g}",
        "targets": args.targets,
        "prompt": args.prompt or "",
        "resolution": args.resolution,
        "seed": args.seed,
        "images": len(data.rows),
        "data": data.made_of["the training data"],
        "format_version": 1,
        "made_by": "medlora",
        "licence": "that of the base; research use, not for diagnosis",
    }
    if (
        args.method == "textual-inversion"
    ):  # {"<word>": (n, D)}: the form diffusers' load_textual_inversion reads
        path = Path(args.out, "embeddings.safetensors")
        lora.save(path, best, {**about, "tokens": args.token, "steps": state.best["step"]})
        return path
    if args.text_encoder:
        about |= {"text_encoder": args.text_encoder, "text_length": args.text_length}
    lora.save(Path(args.out, "lora.safetensors"), best, {**about, "steps": state.best["step"]})
    lora.save(Path(args.out, "lora-last.safetensors"), state.ema, {**about, "steps": state.step})
    return Path(args.out, "lora.safetensors")


LICENCES = {
    "sd15": "creativeml-openrail-m",
    "sd21-base": "openrail++",
    "sd21": "openrail++",
    "sdxl": "openrail++",
}


def write_card(state, args, data, result):
    """README.md: a model card with the metadata that the Hub reads (base, licence, tags, prompt), data and limits."""
    base, caption = (
        BASES.get(args.base, args.base),
        Counter(row["caption"] for row in data.rows).most_common(1)[0][0],
    )
    prompt = json.dumps(caption, ensure_ascii=False)
    tags = ["stable-diffusion", "diffusers", "text-to-image", "medical", "synthetic"] + ["lora"] * (
        args.method != "full"
    )
    head = ["---", f"base_model: {base}"] * ("/" in base and not os.path.exists(base)) or ["---"]
    head += [
        f"license: {LICENCES.get(args.base, 'other')}",
        "library_name: diffusers",
        f"instance_prompt: {prompt}",
        "tags:",
    ]
    head += [f"- {tag}" for tag in tags] + ["---"]
    seen = "val_loss" in state.best
    best = (
        f" Best validation loss {state.best['val_loss']:.4f}, at step {state.best['step']}."
        if seen
        else ""
    )
    kind = {"full": "A whole UNet", "textual-inversion": "A new word"}.get(
        args.method, "An adapter"
    )
    patients = len({row["group"] for row in data.rows} - {""}) or "unknown"
    text = f"""
# {Path(args.out).name}

{kind} for {args.base}, trained with medlora on {len(data.rows)} images of {patients} patients (SHA-256 of the set:
`{data.made_of["the training data"][:16]}…`) at {args.resolution} px for {state.step} steps, captions such as {prompt}.{best}

Use: `python sample.py --{"base" if args.method == "full" else "lora"} {result.name} --prompt {shlex.quote(caption)}`

**Intended use**: research, such as enlarging training sets, after an evaluation against held-out real images.
**Limits**: not for diagnosis. Its images show no patient; they may repeat training images (see evaluate.py's nearest
pairs) and inherit the training set's biases and the base's licence.

Flags: `{json.dumps(vars(args), ensure_ascii=False)}`
"""
    write_file(Path(args.out, "README.md"), "\n".join(head) + text)


def save_model(weights, args):
    """model/: a diffusers folder with the tuned UNet (fp32) and the base's other parts, usable as --base."""
    folder, unet = Path(args.out, "model"), "unet/diffusion_pytorch_model.safetensors"
    source = Path(find_base(args.base))
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if (
            path.is_file()
            and relative.as_posix() != unet
            and any(fnmatch(relative.as_posix(), part) for part in PARTS)
        ):
            copy_file(path, folder / relative)
    tensors = {name.removeprefix("unet."): w.cpu().contiguous() for name, w in weights.items()}
    write_file(folder / unet, lora.to_bytes(tensors, {}))


def write_report(state, args):
    """report.html: loss, validation, learning rate, gradient norm, the grids in order, the flags."""
    lines = [json.loads(line) for line in Path(args.out, "log.jsonl").read_text().splitlines()]
    steps = [
        line
        for line in lines
        if all(isinstance(line.get(key), (int, float)) for key in ("loss", "grad_norm", "lr"))
    ]
    grids = sorted(Path(args.out, "samples").glob("step-*.png"))
    width = max(1, len(steps) // 200)  # points are means over this many steps

    def points(key):
        parts = [steps[i : i + width] for i in range(0, len(steps), width)]
        return [(part[-1]["step"], sum(line[key] for line in part) / len(part)) for part in parts]

    best = (
        f", best {state.best['val_loss']:.4f} at step {state.best['step']}"
        if "val_loss" in state.best
        else ""
    )
    skipped = sum(
        "loss" in line and None in (line["loss"], line.get("grad_norm")) for line in lines
    )
    cost = [
        f"; peak memory {line.get('memory')} MB, {line.get('images_per_second')} images a second"
        for line in steps[-1:]
    ]
    cost += [f"; {skipped} steps changed nothing, for their gradients were no numbers"] * (
        skipped > 0
    )
    body = (
        f"<p>{state.step} steps{best}{''.join(cost)}.</p>"
        + "<h2>Loss</h2>"
        + curve(
            {
                "training": points("loss"),
                "validation": [(v["step"], v["val_loss"]) for v in state.history],
            },
            "step",
        )
        + "<h2>Gradient norm</h2>"
        + curve({"before clipping": points("grad_norm")}, "step")
        + "<h2>Learning rate</h2>"
        + curve({"lr": points("lr")}, "step")
        + "<h2>Samples, same noise each time</h2>"
    )
    for path in grids[:: max(1, len(grids) // 6)][:-1] + grids[-1:]:
        with Image.open(path) as grid:
            body += f'<p class="soft">{path.stem}</p>{thumbnail(grid, 1000)}'
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in vars(args).items()]
    body += "<h2>Flags</h2>" + table(["flag", "value"], flags)
    write_file(Path(args.out, "report.html"), page(f"Training {args.out}", body))


def describe(state, data, val, args):
    """Before anything long starts: what will be trained on what."""
    batch, size = effective_batch(args), sum(w.numel() for w in state.weights.values())
    groups = len({row["group"] for row in data.rows} - {""})
    print(
        f"{len(data.rows)} training images"
        + f" of {groups} patients" * (groups > 0)
        + f", {len(val.rows) if val else 0} for validation, {len(next(iter(data.text.values()))) - 1} captions"
    )
    print(
        f"{size:,} trainable weights ({size * 4 / 1e6:.1f} MB); effective batch {batch} = {args.batch_size} × "
        f"{args.accumulate} × {WORLD}; {len(data.rows) / batch:.1f} steps an epoch, {args.steps} steps"
        + f", going on from {state.step}"
        * (state.step > 0),
        flush=True,
    )
    for name, number in Counter(data.classes).most_common():
        times = len(data.rows) / number / len(set(data.classes))
        print(
            f"balance: {name or '(no label)'}: {number} images, each drawn {times:.2f} times an epoch"
        )


def prepare_base(args, device):
    """Load the base as the flags want it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    base = load_base(args.base, device, args.precision, args.method)
    check_schedule(base)
    if args.text_encoder:
        use_text_encoder(base, args.text_encoder, args.text_length)
    if args.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    return base


def check_against_data(args, val_rows):
    """Flags that the data, or files that are not there, make idle: now, not after an hour."""
    if args.select_by != "val-loss" and len(val_rows) < 50:
        fail(
            f"--select-by {args.select_by} needs 50 validation images, there are {len(val_rows)}: use val-loss, which "
            "means something at any number"
        )
    if args.patience and not (val_rows and args.validate_every):
        fail("--patience counts validations: give --val-split or --val-data, and --validate-every")
    for flag, wanted, name in (
        ("--select-by fid", args.select_by == "fid", FID_WEIGHTS),
        ("--perceptual vgg", args.perceptual_weight and args.perceptual == "vgg", LPIPS["vgg"][2]),
    ):
        if wanted and find_weights(name) is None:
            fail(
                f"{flag}: needs {name} in {CACHE} or torch's own cache; --select-by kid and --perceptual vae need no file"
            )


def run(args, device):
    listed = list_data(args)
    train_rows, val_rows = (
        [row for row in listed if row["split"] == part] for part in ("train", "val")
    )
    args.resolution = args.resolution or own_resolution(find_base(args.base))
    args.steps = args.steps or math.ceil(args.epochs * len(train_rows) / effective_batch(args))
    check_against_data(args, val_rows)
    args.val_prompts = args.val_prompts or [
        caption for caption, _ in Counter(r["caption"] for r in train_rows).most_common(4)
    ]
    made_of = {
        "the training data": fingerprint(train_rows),
        "the validation data": fingerprint(val_rows),
        "--base": base_hash(find_base(args.base)),
        **{
            flag: content_hash(path)
            for flag, path in (("--init-lora", args.init_lora),)
            if path and os.path.isfile(path)
        },
    }
    if args.cache:  # another VAE, another folder
        args.cache = os.path.join(args.cache, base_hash(find_base(args.base), "vae"))
    checkpoint = find_checkpoint(args, made_of)
    if (
        checkpoint
        and finished(args.out) == checkpoint["step"]
        and (
            checkpoint["step"] >= args.steps
            or out_of_patience(checkpoint["history"], checkpoint["best"], args)
        )
    ):
        more = "steps" if checkpoint["step"] >= args.steps else "patience"
        RANK or print(
            f"{args.out} is finished: {checkpoint['step']} steps. To go on, give more --{more}"
        )
        return
    base = prepare_base(args, device)
    classes = class_images(base, len(train_rows), args) if args.method == "dreambooth" else None
    state = start(
        base, args, checkpoint
    )  # before captions are encoded: a new word must exist by then
    resumed = checkpoint is not None
    del checkpoint  # gigabytes, with --method full
    if args.compile:
        base.unet.compile()
    rows, pixels = load_uncached(train_rows + val_rows, args)
    if val_rows and RANK == 0 and isinstance(pixels, torch.Tensor):
        warn_of_twins(rows, pixels, args, crossing=True)
    count = sum(row["split"] == "train" for row in rows)
    data = cache(base, rows[:count], pixels[:count], args, "training images")
    val = cache(base, rows[count:], pixels[count:], args, "validation images") if val_rows else None
    data.made_of, data.classes = made_of, classes_of(data.rows) if args.balance else ()
    del pixels  # gigabytes
    rest_encoders(base, args)
    if RANK == 0:
        write_csv(
            Path(args.out, "split.csv"),
            ["file_name", "group", "split"],
            [[row["file_name"], row["group"], row["split"]] for row in listed],
        )
        write_args(args)
        describe(state, data, val, args)
    if (
        resumed and RANK == 0 and args.resume not in ("auto", "latest")
    ):  # should it be killed, it goes on from here too
        point(Path(args.out, "checkpoints", "latest.pt"), checkpoint_path(args))
    log = Log(args, state.step, {entry["step"] for entry in state.history})
    streams = [("data", data, 1.0)] + [("class", classes, args.prior_weight)] * (
        classes is not None
    )
    if resumed and args.validate_every and state.step % args.validate_every == 0:
        draw_grid(base, state, args, log)  # a kill may have come between a checkpoint and its grid
    fit(base, streams, lambda: validate(base, state, val, args, log), state, args, log)
    draw_grid(base, state, args, log)
    if RANK == 0:
        leave(state, args, data)
        log.close()


def leave(state, args, data):
    """Write all that a run leaves, and say where it is and what to do next."""
    result = save_results(state, args, data)
    write_report(state, args)
    write_card(state, args, data, result)
    write_args(args, state.step)
    print(
        f"done: {result}; look at {args.out}/report.html\nnext: "
        + command(
            "sample.py",
            "--base" if args.method == "full" else "--lora",
            result,
            "--prompt",
            args.val_prompts[0],
            "--num-images",
            50,
            "--grid",
        )
    )


# ---------------------------------------------------------------- flags


class LastWins(argparse.Action):
    """--steps and --epochs: the one given last counts."""

    def __call__(self, parser, args, value, flag=None):
        args.steps = args.epochs = None
        setattr(args, self.dest, value)


# What --augment may name and how far a draw goes: mild, for a finding must stay one. Hue is left alone, for erythema and
# pallor are findings; rotate, shift, scale and elastic are one resampling, mirrored at the border.
AUGMENT = {
    "hflip": 1.0,  # half of the variants; off unless named, for a heart has its side
    "vflip": 1.0,  # half of the variants
    "rotate": 10.0,  # degrees either way
    "shift": 0.05,  # of the side, either way
    "scale": 0.1,  # larger or smaller
    "elastic": 0.02,  # of the side: deviation of a 4 x 4 grid's nodes (10 of 512 pixels: Ronneberger et al. 2015)
    "clahe": 2.0,  # clip limit; half of the variants
    "color": 0.1,  # brightness, contrast and saturation, up or down
    "blur": 0.004,  # of the side: deviation at most
    "noise": 0.02,
}  # of white: deviation at most, the same in all channels


def interval(text):
    """LO,HI as two numbers."""
    low, high = map(float, text.split(","))  # argparse names the flag where this raises ValueError
    if not low < high:
        raise ValueError
    return [low, high]


def add_data_and_model(parser):
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        help="a folder of images, of class folders or with metadata.csv, or a CSV",
    )
    data.add_argument("--val-data", help="a separate validation set, in any of these forms")
    data.add_argument(
        "--val-split",
        type=float,
        default=0.15,
        help="share held out for validation, by patient if known",
    )
    data.add_argument(
        "--test-split", type=float, default=0.0, help="share that no stage may learn from"
    )
    data.add_argument(
        "--prompt",
        help='caption format, such as "a chest X-ray with {labels}" (default: caption column)',
    )
    for role in ("image", "caption", "label", "group"):
        data.add_argument(
            f"--{role}-column", help=f"the table's {role} column (default: found by its name)"
        )
    data.add_argument(
        "--resolution", type=int, help="pixels, a multiple of 8 (default: the base's own)"
    )
    data.add_argument(
        "--crop",
        choices=["center", "random", "pad", "fundus"],
        default="center",
        help="how a picture becomes square: cut in the middle or anywhere, bordered with black, or cut round "
        "the lit disc",
    )
    data.add_argument(
        "--slices",
        default="middle",
        help="of volumes: middle, every:N or all",
    )
    data.add_argument(
        "--window",
        help="centre,width, or lung, soft, bone, brain …: what becomes black to white in CT",
    )
    data.add_argument(
        "--range",
        type=interval,
        metavar="LO,HI",
        help="black and white of images with more than 8 bits "
        "(default: the set's own); --range=-1,1 where it starts with a minus",
    )
    data.add_argument(
        "--allow-burned-in",
        action="store_true",
        help="read DICOM that says text is burnt into its picture",
    )
    data.add_argument(
        "--augment", default="", metavar="LIST", help=f"a comma list out of {', '.join(AUGMENT)}"
    )
    data.add_argument(
        "--variants",
        type=int,
        help="pictures made of each image, the first of them plain (default: 4 with "
        "--augment or --crop random, else 1)",
    )
    data.add_argument(
        "--balance",
        action="store_true",
        help="draw classes equally often, A|B as the rarer of both",
    )
    data.add_argument(
        "--cache",
        metavar="DIR",
        help="keep latents here, for any later run on the same images and VAE",
    )
    data.add_argument(
        "--preview",
        metavar="DIR",
        help="write what the model would see and say what is odd about the data, "
        "then end; with --augment and --variants also the way to write an augmented data set",
    )
    data.add_argument(
        "--skip-bad",
        dest="strict",
        action="store_false",
        default=False,
        help="name and leave out unreadable images, up to 5 %% (the default)",
    )
    data.add_argument(
        "--strict", "--no-skip-bad", action="store_true", help="stop where an image cannot be read"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--base",
        default="sd21-base",
        help="tiny, sd15, sd21-base, sd21, sdxl, a Hub id or a folder",
    )
    model.add_argument(
        "--method",
        choices=["lora", "full", "dreambooth", "textual-inversion"],
        help="(default: lora)",
    )
    model.add_argument("--rank", type=int, default=16, help="of the adapter's matrices")
    model.add_argument(
        "--alpha", type=float, help="the adapter acts with alpha/rank (default: the rank)"
    )
    model.add_argument(
        "--dropout",
        type=float,
        default=0.0,
        help="on the adapter's input; its draws alone depend on how "
        "many processes and passes share a step",
    )
    model.add_argument(
        "--targets", default="attention", help="attention, all, or layer name endings: to_q,to_v"
    )
    model.add_argument(
        "--text-lora", action="store_true", help="adapt the text encoder's attention too"
    )
    model.add_argument(
        "--text-encoder",
        metavar="HUB-ID|FOLDER",
        help="another encoder (BERT and its family) reads the "
        "captions, behind a trained projection",
    )
    model.add_argument(
        "--text-length", type=int, default=256, help="tokens of --text-encoder, at most 512"
    )
    model.add_argument(
        "--init-lora", metavar="PATH", help="start from an adapter, also one of another resolution"
    )
    model.add_argument(
        "--class-data",
        help="dreambooth: a folder of images of the class, by the base where there are too "
        "few (default: class-images in --out)",
    )
    model.add_argument(
        "--class-prompt", help='dreambooth: what the base calls the class, such as "a skin lesion"'
    )
    model.add_argument(
        "--prior-weight",
        type=float,
        default=1.0,
        help="dreambooth: weight of the class images' loss",
    )
    model.add_argument(
        "--token", default="<concept>", help="textual-inversion: the new word, as --prompt uses it"
    )
    model.add_argument(
        "--init-word", default="lesion", help="textual-inversion: the known word it starts from"
    )
    model.add_argument(
        "--vectors", type=int, default=1, help="textual-inversion: tokens the word stands for"
    )


def add_training(parser):
    loss = parser.add_argument_group("objective")
    loss.add_argument(
        "--snr-gamma", type=float, default=0.0, help="min-SNR weighting, usually 5 (0: off)"
    )
    loss.add_argument("--noise-offset", type=float, default=0.0, help="usually 0 to 0.05")
    loss.add_argument(
        "--prompt-dropout",
        type=float,
        default=0.1,
        help="share of captions replaced by the empty one",
    )
    loss.add_argument(
        "--perceptual-weight",
        type=float,
        default=0.0,
        help="of a loss on features, usually 0.1 (0: off)",
    )
    loss.add_argument(
        "--perceptual",
        choices=["vgg", "vae"],
        default="vae",
        help="VGG-16 conv3_3, or the VAE decoder's own features, which need no weight file",
    )
    optimiser = parser.add_argument_group("optimiser")
    optimiser.add_argument(
        "--steps", type=int, action=LastWins, help="optimiser steps (default: 1000)"
    )
    optimiser.add_argument(
        "--epochs", type=float, action=LastWins, help="passes over the data, instead of --steps"
    )
    optimiser.add_argument(
        "--batch-size", type=int, default=8, help="images a forward pass, on each process"
    )
    optimiser.add_argument("--accumulate", type=int, default=1, help="forward passes a step")
    optimiser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    optimiser.add_argument(
        "--lr-schedule", choices=["cosine", "linear", "constant"], default="cosine"
    )
    optimiser.add_argument(
        "--warmup", type=int, help="steps (default: a tenth of the run, at most 100)"
    )
    optimiser.add_argument("--weight-decay", type=float, default=1e-2)
    optimiser.add_argument(
        "--max-grad-norm", type=float, default=1.0, help="gradients are clipped to it (0: off)"
    )
    optimiser.add_argument("--optimizer", choices=["adamw", "adamw8bit"], default="adamw")
    optimiser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, a fifth slower"
    )
    optimiser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the UNet: minutes at first, then faster",
    )
    optimiser.add_argument("--ema", type=float, default=0.9999, help="decay, warmed up (0: off)")
    watching = parser.add_argument_group("watching")
    watching.add_argument(
        "--validate-every", type=int, default=500, help="steps; 0: only at the end"
    )
    watching.add_argument(
        "--val-prompts",
        action="append",
        help="a prompt of the grid; may be repeated (default: frequent captions)",
    )
    watching.add_argument("--val-samples", type=int, default=2, help="images a prompt in the grid")
    watching.add_argument("--val-steps", type=int, default=25, help="denoising steps of the grid")
    watching.add_argument("--val-guidance-scale", type=float, default=5.0)
    watching.add_argument(
        "--select-by",
        choices=["val-loss", "kid", "fid"],
        default="val-loss",
        help="what the best is; kid "
        "and fid draw an image for each validation image, of which they need 50",
    )
    watching.add_argument(
        "--patience",
        type=int,
        default=0,
        help="stop after so many validations without a better one",
    )
    watching.add_argument(
        "--tensorboard", action="store_true", help="mirror the log into --out for TensorBoard"
    )
    watching.add_argument("--wandb", action="store_true", help="mirror the log to Weights & Biases")
    watching.add_argument(
        "--log-every", type=int, default=10, help="steps between two looks at the loss"
    )
    keeping = parser.add_argument_group("keeping")
    keeping.add_argument("--out", default="runs/train", help="the run's folder")
    keeping.add_argument(
        "--save-every", type=int, default=500, help="steps between two checkpoints"
    )
    keeping.add_argument("--keep-last", type=int, default=3, help="checkpoints (0: all)")
    keeping.add_argument(
        "--resume",
        default="auto",
        help="auto (go on if there is something), latest, best or a path",
    )
    keeping.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    keeping.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    keeping.add_argument("--seed", type=int, default=0)


def parse_args():
    parser = Flags(__doc__)
    add_data_and_model(parser)
    add_training(parser)
    args = parser.parse_args()
    check_given(
        args, [name for name, value in vars(args).items() if value != parser.get_default(name)]
    )
    args.method = args.method or "lora"
    if args.steps is None and args.epochs is None:
        args.steps = 1000
    if args.alpha is None:
        args.alpha = float(args.rank)
    bounds = {
        "rank": (1, 4096),
        "batch_size": (1, 1e6),
        "accumulate": (1, 1e6),
        "steps": (1, 1e9),
        "epochs": (1e-9, 1e9),
        "lr": (1e-12, 10),
        "alpha": (1e-6, 1e6),
        "dropout": (0, 0.99),
        "val_split": (0, 0.9),
        "ema": (0, 0.9999999),
        "test_split": (0, 0.9),
        "prompt_dropout": (0, 1),
        "save_every": (1, 1e9),
        "log_every": (1, 1e9),
        "keep_last": (0, 1e9),
        "warmup": (0, 1e9),
        "snr_gamma": (0, 1e6),
        "val_samples": (0, 64),
        "val_steps": (1, 999),
        "validate_every": (0, 1e9),
        "max_grad_norm": (0, 1e9),
        "weight_decay": (0, 10),
        "noise_offset": (0, 1),
        "prior_weight": (0, 1e6),
        "vectors": (1, 75),
        "text_length": (8, 512),
        "variants": (1, 1000),
        "perceptual_weight": (0, 1e6),
        "patience": (0, 1e9),
        "val_guidance_scale": (0, 1000),
    }
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # not (…) so that NaN is caught too
            fail(f"--{name.replace('_', '-')} {value:g}: give a number from {low:g} to {high:g}")
    if args.resolution is not None and (not 64 <= args.resolution <= 4096 or args.resolution % 8):
        fail(f"--resolution {args.resolution}: give a multiple of 8 from 64 to 4096")
    check_together(args)
    return args


def check_given(args, given):
    """Flags that would be ignored; given: the names of those that were given. args.method: None where it was not, for
    --method lora behind a recipe of dreambooth takes its class along."""
    for needed, there, names in (
        (
            "--method dreambooth",
            args.method in ("dreambooth", "lora"),
            "class_data class_prompt prior_weight",
        ),
        (
            "--method textual-inversion",
            args.method == "textual-inversion",
            "token init_word vectors",
        ),
        (
            f"--method lora or dreambooth, not {args.method}",
            args.method in (None, "lora", "dreambooth"),
            "text_lora init_lora",
        ),
        ("--method lora", args.method in (None, "lora"), "text_encoder"),
        ("--text-encoder", args.text_encoder, "text_length"),
        ("--perceptual-weight", args.perceptual_weight, "perceptual"),
    ):
        alone = [name for name in names.split() if name in given and not there]
        if alone:
            fail(f"--{alone[0].replace('_', '-')} goes with {needed}")


def check_together(args):
    """Flags that contradict one another."""
    if args.method == "dreambooth" and not args.class_prompt:
        fail(
            '--method dreambooth needs --class-prompt, what the base calls the class, such as "a skin lesion"'
        )
    if args.method == "dreambooth":
        args.class_data = args.class_data or os.path.join(args.out, "class-images")
    named = [name.strip() for name in args.augment.split(",") if name.strip()]
    for name in set(named) - set(AUGMENT):
        fail(f"--augment {name}: give a comma list out of {', '.join(AUGMENT)}")
    args.augment, varied = (
        ",".join(name for name in AUGMENT if name in named),
        bool(named) or args.crop == "random",
    )
    if args.variants is None:
        args.variants = 4 if varied else 1
    if (args.variants > 1) != varied:
        fail(
            f"--variants {args.variants}: the first is the plain picture, further ones come of --augment or --crop random"
        )
    if len(args.token.split()) != 1:
        fail(f'--token "{args.token}": give one word, such as <lesion>')
    if args.method == "textual-inversion" and (not args.prompt or args.token not in args.prompt):
        fail(
            f'--method textual-inversion needs --prompt with the new word in it, such as "a photo of {args.token}"'
        )
    if args.text_lora and args.text_encoder:
        fail(
            "--text-lora adapts the base's own text encoder, --text-encoder replaces it: give one of them"
        )


def main(args):
    for package, flag, wanted in (
        ("tensorboard", "--tensorboard", args.tensorboard),
        ("wandb", "--wandb", args.wandb),
        ("bitsandbytes", "--optimizer adamw8bit", args.optimizer == "adamw8bit"),
    ):
        if wanted:  # now, not after an hour of caching
            need(package, flag)
    device = start_processes(args)
    pick_window(args.window)  # a wrong one ends here; a name must stay one, for only CTs obey it
    if args.preview:
        preview(args)
    else:
        with lock(args.out) if RANK == 0 else nullcontext():
            run(args, device)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main, parse_args)
