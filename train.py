r"""Train an adapter, a new word, or all of a Stable Diffusion UNet on a folder of images.

    python train.py --base tiny --data runs/quickstart/data --steps 300 --out runs/try
    python train.py --data xray/ --preview runs/look      check the data first; trains nothing
    python train.py @tests/recipes/dfu-inflammatory.txt --data wounds/ --out runs/dfu
    torchrun --nproc_per_node=2 train.py --data xray/ --prompt "a chest X-ray with {labels}"
    python train.py --method dreambooth --data mpox/ --prompt "a photo of a monkeypox lesion" \
        --class-data runs/skin --class-prompt "a photo of a skin lesion"
    python train.py --method textual-inversion --data mpox/ --prompt "a photo of <mpox>" \
        --token "<mpox>" --init-word lesion --lr 5e-3

--method lora and dreambooth train an adapter, full the UNet, textual-inversion a word. @FILE reads
flags, one a line; those typed after it win. A stopped run continues when you type its command
again, and the result has the same bytes. --out then holds:

    lora.safetensors        the adapter: averaged weights (EMA) of the best validation, else of the
                            end; full: model/, textual-inversion: embeddings.safetensors
    lora-last.safetensors   the adapter of the last step
    report.html, samples/   how it went; log.jsonl has the numbers
    README.md, audit.json   a model card; the membership audit
    split.csv, people.csv   what each image was used for; counts of images and patients
    checkpoints/, args.json what the same command continues from

Several machines with a shared file system, under Slurm; a preempted job continues by itself:

    #SBATCH --nodes=2 --gpus-per-node=4 --ntasks-per-node=1 --requeue --signal=TERM@120
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # all meet again when one comes back
    srun torchrun --nnodes=2 --nproc_per_node=4 --max-restarts=3 --rdzv_id=$SLURM_JOB_ID \
        --rdzv_backend=c10d --rdzv_endpoint=$(scontrol show hostnames | head -n 1):29500 \
        train.py @tests/recipes/chest-xray.txt --data xray/ --out runs/xray
"""

import argparse
import html
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage, stats
from torch.utils.data import default_collate
from tqdm import tqdm

import lora
from metrics import (
    BAD_SHARE,
    FID_WEIGHTS,
    LPIPS,
    Flags,
    add_card_flags,
    add_common_flags,
    add_reading_flags,
    auroc,
    command,
    content_hash,
    copy_file,
    count_people,
    counts_table,
    curve,
    data_set,
    existing_file,
    extract,
    fail,
    flag_adder,
    fold,
    frechet,
    generator,
    grey_kind,
    kid,
    list_images,
    list_rows,
    load_features,
    load_real,
    load_weights,
    near_duplicates,
    need,
    need_weights,
    note,
    number,
    page,
    pick_device,
    picture,
    pooled,
    replacing,
    report_enlarged,
    report_remarks,
    resamples,
    run_script,
    sha256,
    share_range,
    shrink,
    split_labels,
    split_rows,
    ssim_matrix,
    table,
    taps,
    thumbnail,
    to_grey,
    trunk_of,
    write_card,
    write_csv,
    write_file,
)
from sample import (
    BASES,
    PARTS,
    RANK,
    WORLD,
    Settings,
    add_tokens,
    base_hash,
    blur_timestep,
    contact_sheet,
    decode,
    decode_with_gradient,
    denoise,
    encode,
    evaluation_words,
    find_base,
    generate,
    load_base,
    load_vae,
    multiple_of_8,
    noised_and_target,
    note_long_texts,
    own_resolution,
    predicted_latents,
    progress_on_rank_0,
    project,
    public_name,
    save_png,
    text_states,
    tokenize,
    use_text_encoder,
)

# ---------------------------------------------------------------- one step, and the loop


def training_loss(base, batch, perceptual, args):
    """The loss of each image of a batch (B,), fp32. perceptual: what load_perceptual returns.

    Noise or v prediction of latents (Rombach et al. 2022), min-SNR weights (Hang et al. 2023).
    """
    timesteps = batch.timesteps.to(base.device, non_blocking=True)
    noisy, target, snr_weight = noised_and_target(
        base, batch.latents, batch.noise, timesteps, args.snr_gamma
    )
    prediction = denoise(base, noisy, timesteps, text_condition(base, batch, args))
    loss = (prediction - target).square().mean((1, 2, 3)) * snr_weight
    if perceptual:
        clean = predicted_latents(base, noisy, prediction, timesteps)
        loss = loss + args.perceptual_weight * perceptual(clean, batch)
    return loss * batch.weight


def accumulate_gradients(base, batches, perceptual, state, args):
    """Add up this process's gradients of one step; returns its share of the loss, on the device."""
    total = torch.zeros((), device=base.device)
    for micro in range(args.accumulate):
        if args.dropout:  # nn.Dropout draws from the global generator
            key = (args.seed, "dropout", state.step, micro, RANK)
            torch.manual_seed(generator(*key).initial_seed())
        batch = on_device(next(batches), base.device)
        loss = training_loss(base, batch, perceptual, args).sum() / effective_batch(args)
        state.scaler.scale(loss).backward()
        total += loss.detach()
    for weight in state.weights.values():
        if weight.grad is None:  # SDXL does not read the last layer of a text encoder
            weight.grad = torch.zeros_like(weight)
    return total


def fit(base, streams, perceptual, validation, state, args, log):
    """Train until --steps, --patience or a signal; after saving, a signal is a KeyboardInterrupt.

    streams: the data sets of which each step sees a batch: the training images, and DreamBooth's
    class images (Ruiz et al. 2023).
    """
    for module in base.parts().values():
        module.train()
    stop = False
    batches = upcoming_batches(streams, base.num_timesteps, state.step, args)
    bar = tqdm(desc="training", total=args.steps, initial=state.step, disable=RANK > 0)
    with bar, deferred_signals() as signals:
        while state.step < args.steps and not stop and not out_of_patience(state, args):
            loss = accumulate_gradients(base, batches, perceptual, state, args)
            loss, stops = sum_over_processes(loss, len(signals), state)
            grad_norm = optimizer_step(state, args)
            state.step += 1
            bar.update()
            log.add_step(loss, grad_norm)

            validating = is_due(state.step, args.validate_every, args)
            saving = is_due(state.step, args.save_every, args)
            logging = validating or saving or is_due(state.step, args.log_every, args)
            if WORLD == 1:
                stop = len(signals) > 0
            elif logging:  # reading a number makes the GPU wait
                stop = stops.item() > 0
            if logging or stop:
                bar.set_postfix(loss=log.write_steps(state, args))
            if state.bad_steps >= 3:
                bar.close()
                fail(f"step {state.step}: NaN in three steps; use --precision fp32 or a lower --lr")
            is_best = validating and validate(base, validation, state, args, log)
            if saving or is_best or stop or out_of_patience(state, args):
                save_checkpoint(state, args, is_best)
            if validating:
                draw_grid(base, state, args, log)
            if logging:
                log.clock = time.perf_counter()  # what came after the step is no training
    if stop or signals:
        if RANK == 0:
            print(f"stopped at step {state.step}, saved; type the same command to continue")
            words = ("--prompt", args.val_prompts[0], "--grid")
            look = command("sample.py", "--checkpoint", f"{args.out}/checkpoints/latest.pt", *words)
            print(f"to see what it draws now: {look}")
        raise KeyboardInterrupt


def is_due(step, every, args):
    """True at the last step and every `every` steps (0: only at the last)."""
    return step == args.steps or (every > 0 and step % every == 0)


def out_of_patience(state, args):
    """True if the last --patience validations improve the best by less than MIN_GAIN of it."""
    values = [entry[args.select_by.replace("-", "_")] for entry in state.history]
    if not 0 < args.patience < len(values):
        return False
    best = min(values[: -args.patience])
    return min(values[-args.patience :]) > best - MIN_GAIN * abs(best)


MIN_GAIN = 0.002  # a share


@contextmanager
def deferred_signals():
    """Give a list that grows with each SIGINT or SIGTERM; neither interrupts a step."""
    arrived = []

    def defer(*_):
        if not arrived and RANK == 0:
            with suppress(OSError):  # its reader is gone; print() must not interrupt itself
                os.write(2, b"\nstopping after this step, saving\n")
        arrived.append(True)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, defer)
    try:
        yield arrived
    finally:
        for name in (signal.SIGINT, signal.SIGTERM):  # as run_script has them
            signal.signal(name, signal.default_int_handler)


# ---------------------------------------------------------------- what a step is made of


class Batch(NamedTuple):
    """What one forward pass sees; without the dimension B, what one image adds to it."""

    latents: torch.Tensor  # (B, 4, h, w)
    noise: torch.Tensor  # (B, 4, h, w)
    timesteps: torch.Tensor  # (B,), always on the CPU: choosing by them makes no GPU wait
    text: dict  # of each caption: tokens if the text encoder learns, or its states
    sizes: torch.Tensor  # (B, 6), of image_sizes
    weight: torch.Tensor  # (B,) of the loss


def upcoming_batches(streams, num_timesteps, step, args):
    """Yield this process's batches from a step on, each made while the model learns the last."""
    passes = product(range(step, args.steps), range(args.accumulate))
    with ThreadPoolExecutor(1) as thread:
        coming = []
        for step, micro in passes:
            first = (micro * WORLD + RANK) * args.batch_size
            slots = range(first, first + args.batch_size)
            coming.append(thread.submit(make_batch, streams, num_timesteps, step, slots, args))
            if len(coming) > 1:
                yield coming.pop(0).result()
        for batch in coming:
            yield batch.result()


def make_batch(streams, num_timesteps, step, slots, args):
    """The Batch of a step, on the CPU: places `slots` of the global batch of each data set."""
    items = []
    for data, slot in product(streams, slots):
        items.append(make_item(data, num_timesteps, step, slot, args))
    return default_collate(items)


def make_item(data, num_timesteps, step, slot, args):
    """One image of a Batch; its random draws are keyed by step and place in the global batch."""

    def draw(purpose, make, *size):
        return make(size, generator=generator(args.seed, data.name, purpose, step, slot))

    epoch, place = divmod(step * effective_batch(args) + slot, len(data.rows))
    row = epoch_order((args.seed, data.name), epoch, len(data.rows), data.classes)[place]
    variant = draw("variant", partial(torch.randint, data.mean.shape[1]))
    mean = data.mean[row, variant]
    noise = draw("noise", torch.randn, *mean.shape)
    if args.noise_offset:
        noise += args.noise_offset * draw("noise-offset", torch.randn, len(mean), 1, 1)
    latents = mean + data.std[row, variant] * draw("posterior", torch.randn, *mean.shape)
    timestep = draw("timestep", partial(torch.randint, num_timesteps))
    caption = data.caption[row]
    if draw("caption-dropout", torch.rand) < args.prompt_dropout:
        caption = -1  # the last is the empty one
    text = {name: values[caption] for name, values in data.text.items()}
    return Batch(latents, noise, timestep, text, data.sizes[row, variant], data.weight[row])


def on_device(batch, device):
    """The batch on the device, except its timesteps; no step waits for these copies."""

    def move(values):
        if device.type == "cuda":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)

    moved = {name: move(getattr(batch, name)) for name in ("latents", "noise", "sizes", "weight")}
    text = {name: move(values) for name, values in batch.text.items()}
    return batch._replace(text=text, **moved)


def text_condition(base, batch, args):
    """The UNet's text arguments for a batch, with gradients if the text encoder learns."""
    text = batch.text
    if text_learns(args):
        text = text_states(base, text)
    return project(base, text) | {"time_ids": batch.sizes}


@lru_cache(4)
def epoch_order(seed, epoch, count, classes=()):
    """The order of the `count` rows in an epoch, a list; random, keyed by seed and epoch.

    classes: with --balance, of each row: all are drawn equally often, to within one.
    """
    shuffled = torch.randperm(count, generator=generator(seed, "order", epoch)).tolist()
    if not classes:
        return shuffled
    members = {name: [] for name in sorted(set(classes))}
    for row in shuffled:
        members[classes[row]].append(row)
    turns = list(members.values())
    order = []
    for place in shuffled:
        rows = turns[(place + epoch) % len(turns)]
        order.append(rows[place // len(turns) % len(rows)])
    return order


def effective_batch(args):
    """Training images in an optimizer step, over all processes; class images do not count."""
    return args.batch_size * args.accumulate * WORLD


def over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_over_processes(loss, signals, state):
    """Sum gradients over all processes, in place; returns the sums of loss and signals, (2,)."""
    numbers = torch.stack([loss, torch.full_like(loss, signals)])
    if WORLD == 1:
        return numbers
    bucket = [numbers]
    for weight in state.weights.values():
        if sum(tensor.numel() for tensor in bucket) > BUCKET:
            sum_bucket(bucket)
            bucket = []
        bucket.append(weight.grad)
    sum_bucket(bucket)
    return numbers


BUCKET = 2**25  # numbers, 128 MiB in fp32: then another all-reduce begins


def sum_bucket(tensors):
    """Sum tensors over all processes, in place, by one all-reduce."""
    flat = over_processes(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def optimizer_step(state, args):
    """Clip, step, average; NaN or infinity changes no weight. Returns the norm before clipping."""
    weights = list(state.weights.values())
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, args)
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
    if args.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(weights, args.max_grad_norm, norm)
    if not state.scaler.is_enabled():  # which skips such a step
        # torch's fused AdamW skips it where this is 1, so that no number is read from the GPU
        state.optimizer.found_inf = (~norm.isfinite()).float()
    if args.optimizer == "adamw" or state.scaler.is_enabled() or norm.isfinite():
        state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    # EMA with a warm-up, without which a short run would keep its untouched start
    decay = min(args.ema, (1 + state.step) / (10 + state.step))
    if args.ema:
        torch._foreach_lerp_(list(state.ema.values()), [w.data for w in weights], 1 - decay)
    return norm


def learning_rate(step, args):
    """The rate of a step, from 0: linear warm-up, then cosine or linear to zero, or constant."""
    warmup = args.warmup
    if warmup is None or warmup >= args.steps:
        warmup = min(100, args.steps // 10)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, args.steps - warmup)
    shapes = {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "constant": 1}
    return args.lr * shapes[args.lr_schedule]


def load_perceptual(base, args):
    """The perceptual loss, a function of predicted latents and a Batch: (B,); None if it is off."""
    if not args.perceptual_weight:
        return None
    features = partial(decode_with_gradient, base, features=True)
    if args.perceptual == "vgg":
        features = vgg_features(base)
    return partial(perceptual_loss, features, blur_timestep(base))


IMAGENET_SCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, sd


def vgg_features(base):
    """A function: latents (B, 4, h, w) → VGG-16's relu3_3 (as Johnson et al. 2016)."""
    path = need_weights(LPIPS["vgg"][2][0], "--perceptual vgg (vae needs no file)")
    trunk = trunk_of("vgg16", load_weights(path)).to(base.device)
    mean, std = torch.tensor(IMAGENET_SCALE, device=base.device)[:, :, None, None]

    def features(latents):
        images = (decode_with_gradient(base, latents) + 1) / 2
        return taps(trunk, (images - mean) / std, (15,))[0]

    return features


def perceptual_loss(features, blur, clean, batch):
    """Squared distance of the features of predicted and true latents, (B,).

    0 from the timestep `blur` on: noise outweighs the signal, and any prediction is blurred.
    """
    loss = torch.zeros(len(clean), device=clean.device)
    sharp = (batch.timesteps < blur).nonzero().flatten()
    if len(sharp) > 0:
        sharp = sharp.to(clean.device, non_blocking=True)
        with torch.no_grad():
            wanted = features(batch.latents[sharp])
        distance = (features(clean[sharp]) - wanted).square().mean((1, 2, 3))
        loss = loss.index_add(0, sharp, distance)
    return loss


# ---------------------------------------------------------------- state and checkpoints


@dataclass
class State:
    """What a checkpoint holds and a resumed run starts from."""

    weights: dict  # name -> parameter, fp32
    ema: dict  # name -> its exponential moving average
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    made_of: dict  # what must not change while a run goes on: fixed_settings
    images: int = 0  # in the training set
    is_grey: bool = False  # the training set, but for a few images
    step: int = 0
    best: dict = field(default_factory=lambda: {"step": 0})  # the best entry of history
    history: list = field(default_factory=list)  # of validations: {"step", "val_loss", …}
    bad_steps: int = 0  # steps with NaN, in a row


def start(base, weights, args, made_of, checkpoint=None):
    """The State of a new run, or that of a checkpoint, which also sets torch's global generator."""
    make = partial(torch.optim.AdamW, fused=True)
    if args.optimizer == "adamw8bit":
        make = need("bitsandbytes", "--optimizer adamw8bit").optim.AdamW8bit
    optimizer = make(weights.values(), lr=args.lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
    ema = {name: weight.detach() for name, weight in weights.items()}
    if args.ema:  # else the weights are their own average
        ema = {name: weight.clone() for name, weight in ema.items()}
    state = State(weights, ema, optimizer, scaler, made_of)
    if checkpoint:
        for name, weight in weights.items():
            weight.data.copy_(checkpoint["weights"][name])
            ema[name].copy_(checkpoint["ema"][name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty where the run was not in fp16
            scaler.load_state_dict(checkpoint["scaler"])
        state.step = checkpoint["step"]
        state.best = checkpoint["best"]
        state.history = checkpoint["history"]
        torch.set_rng_state(checkpoint["random"])
    return state


def save_checkpoint(state, args, is_best=False):
    """Write checkpoints/step-N.pt, let latest.pt (and best.pt) be it; keep --keep-last of them."""
    if RANK > 0:
        return
    content = {
        "format": 1,
        "step": state.step,
        "epoch": state.step * effective_batch(args) // state.images,
        "weights": state.weights,
        "ema": state.ema,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "best": state.best,
        "history": state.history,
        "args": vars(args),
        "made_of": state.made_of,
        "grey": state.is_grey,
        "random": torch.get_rng_state(),
    }
    folder = Path(args.out, "checkpoints")
    path = folder / f"step-{state.step:08d}.pt"
    with replacing(path) as file:
        torch.save(content, file)
    if is_best:  # before latest.pt: a run killed between the two then does this step again
        point(folder / "best.pt", path)
    point(folder / "latest.pt", path)
    steps = sorted(folder.glob("step-*.pt"), key=os.path.getmtime)
    for old in steps[: -args.keep_last]:  # none where it is 0
        old.unlink()


def point(name, path):
    """Let `name` be the file `path`, atomically: a hard link, or a copy where there are none."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        os.link(os.path.realpath(path), temporary)
        os.replace(temporary, name)
        temporary.unlink(missing_ok=True)  # os.replace moves neither of two links to one file
    except OSError:
        copy_file(path, name)


def fixed_settings(train_rows, val_rows, args):
    """What must not change while a run goes on: {name: value or hash}."""
    settings = {}
    for name, value in vars(args).items():
        if name not in MAY_CHANGE:
            settings[f"--{name.replace('_', '-')}"] = value
    settings["the base's files"] = base_hash(find_base(args.base))
    settings["--batch-size × --accumulate × processes"] = effective_batch(args)
    if args.init_lora:
        settings["the content of --init-lora"] = content_hash(args.init_lora)
    for name, rows in (("the training data", train_rows), ("the validation data", val_rows)):
        contents = [(hash_of(row.path), row.slice, row.caption, row.label) for row in rows]
        settings[name] = digest([contents, [row.weight for row in rows]])
    return settings


# flags on which what is learnt does not depend, or which fixed_settings replaces
MAY_CHANGE = """epochs out resume device precision save_every keep_last log_every val_prompts
    validate_every val_samples val_steps val_guidance_scale strict cache batch_size accumulate data
    val_data class_data audit patience tensorboard wandb compile gradient_checkpointing
    sex_column age_column data_licence ethics""".split()
hash_of = lru_cache(None)(content_hash)  # each file is read once


def digest(value):
    """SHA-256 of a value as Python writes it, in hexadecimal."""
    return sha256(repr(value).encode())


def checkpoint_path(args):
    """The file that --resume names; of a folder its latest.pt."""
    if args.resume in ("auto", "latest", "best"):
        name = args.resume.replace("auto", "latest")
        return Path(args.out, "checkpoints", f"{name}.pt")
    path = Path(args.resume)
    return path / "latest.pt" if path.is_dir() else path


def read_checkpoint(made_of, args):
    """The checkpoint that --resume names, None for a new run; fails if other flags made it.

    More steps for a finished run need --lr-schedule constant: the other schedules end at 0.
    """
    path = checkpoint_path(args)
    if not path.exists():
        if args.resume == "auto" and not args.audit:
            return None
        fail(f"--resume {args.resume}: there is no {path}: give the --out of a run or a checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = checkpoint["made_of"]
        is_over = checkpoint["step"] >= before["--steps"]
    except Exception:  # truncated, a pickle, another program's: torch.load raises a dozen kinds
        fail(f"{path}: damaged, or not of train.py: give --resume an older one, or another --out")
    may_change = ()
    if args.steps <= checkpoint["step"]:  # nothing more is learnt
        may_change = ("--steps",)
    elif is_over and args.lr_schedule == "constant":
        may_change = ("--steps", "--lr-schedule")
    changed = []
    for name, value in made_of.items():
        if before.get(name) == value or name in may_change:
            continue
        if name.startswith("--"):
            changed.append(f"{name}: {before.get(name)} before, {value} now")
        elif name.endswith("data"):
            changed.append(f"{name}: not the same images, captions, labels or weights")
        else:
            changed.append(f"{name}: not the same")
    if changed:
        fail(
            f"{path} was made with other settings: {'; '.join(changed)}. Give those again, or "
            "another --out; to add steps to a finished run, give --lr-schedule constant"
        )
    return checkpoint


def write_args(args, finished=None):
    """args.json: every flag, what ran it, and the step at which the run ended."""
    content = {
        "args": vars(args),
        "command": sys.argv,
        "torch": torch.__version__,
        "processes": WORLD,
        "finished": finished,
    }
    write_file(Path(args.out, "args.json"), json.dumps(content, indent=1, ensure_ascii=False))


def is_finished(checkpoint, args):
    """True if a run ended with this checkpoint and wrote its results."""
    with suppress(OSError, ValueError, KeyError):  # not there, or edited by hand
        text = Path(args.out, "args.json").read_text(encoding="utf-8")
        return json.loads(text)["finished"] == checkpoint["step"] >= args.steps
    return False


@contextmanager
def averaged_model(base, state, args):
    """While this is open, the base has EMA weights, no dropout, and its VAE on the device."""
    swap_weights(state)
    base.vae.to(base.device)
    for module in base.parts().values():
        module.eval()
    with torch.compiler.set_stance("force_eager"):  # no compiling for other batch sizes
        yield
    for module in base.parts().values():
        module.train()
    swap_weights(state)
    release_memory(base, args)


def swap_weights(state):
    """Exchange the trained weights and their averages."""
    for name, weight in state.weights.items():
        weight.data, state.ema[name] = state.ema[name], weight.data


def release_memory(base, args):
    """Move the UNet to the device; VAE and text encoders to the CPU unless a step needs them."""
    if not args.perceptual_weight:
        base.vae.to("cpu")
    if not text_learns(args):
        for encoder in base.text_encoders:
            encoder.to("cpu")
    base.unet.to(base.device)
    if base.device.type == "cuda":  # so that the memory in the log is that of training
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---------------------------------------------------------------- the data set


@dataclass
class Data:
    """N rows as latents, fp32, in host memory: a GPU holds one batch of them at a time."""

    rows: list
    mean: torch.Tensor  # of the posterior, (N, variants, 4, h, w)
    std: torch.Tensor  # of the posterior, likewise
    sizes: torch.Tensor  # of the images, (N, variants, 6), of image_sizes
    text: dict  # of each caption, the last the empty one: tokens if the encoder learns, or states
    caption: torch.Tensor  # (N,) index into text
    weight: torch.Tensor  # (N,) of each row's loss
    classes: tuple = ()  # of the rows, with --balance
    is_grey: bool = False  # hardly any image shows a colour
    name: str = "data"  # keys its random draws


def list_data(args):
    """All rows, each with its split: by --val-data, or by a hash of the patient or the content."""
    note(f"listing the images of {args.data}")
    rows = list_rows(args.data, args, args.prompt, args.strict)
    val_share = 0.0 if args.val_data else args.val_split
    split_rows(rows, val_share, args.test_split)
    splits = {row.split for row in rows}
    for split, share in (("train", 1.0), ("val", val_share), ("test", args.test_split)):
        if share and split not in splits:
            if split == "val" and any(row.fields.get("synthetic") == "1" for row in rows):
                note("no validation images: the mixed set leaves no real ones; give --val-data")
                continue
            fail(
                f"{args.data}: {len(rows)} images are too few to split: none is left for {split}: "
                "give more, or --val-split 0 and --test-split 0"
            )
    if args.val_data:
        rows += list_validation(rows, args)
    share_range(rows, args.range)
    if args.weight_column:
        add_weights(rows, args)
    if not any(row.caption for row in rows):
        note("all captions are empty: to train with text, give --prompt or --caption-column")
    if args.balance and not any(row.label for row in rows):
        fail(f"--balance: {args.data} has no labels: give --label-column or one folder per label")
    if "flip" in args.augment:
        sided = r"\b(?i:left|right)\b|\bO[DS]\b"
        names = [row.file_name for row in rows if re.search(sided, row.caption)]
        warn(names, "captions that say left, right, OD, OS", "leave out flips: words stay the same")
    return rows


def list_validation(train_rows, args):
    """The rows of --val-data."""
    rows = list_rows(args.val_data, args, args.prompt, args.strict)
    names = {row.file_name for row in train_rows}
    patients = {row.group for row in train_rows} & {row.group for row in rows} - {""}
    warn(sorted(patients), "patients on both sides of the split", "remove them from --val-data")
    for row in rows:
        row.split = "val"
        if row.file_name in names:  # split.csv names each row once
            row.file_name = row.path
    return rows


def add_weights(rows, args):
    """Set row.weight of training rows: the number in --weight-column over its mean; 1 if empty."""
    column = args.weight_column
    if column not in rows[0].fields:
        fail(f"--weight-column {column}: {args.data} has no such column: give one that it has")
    weighted = []
    for row in rows:
        if row.split == "train" and row.fields[column].strip():
            weighted.append(row)
            try:
                row.weight = number(0.0, 1e9)(row.fields[column])
            except argparse.ArgumentTypeError as why:
                fail(f"--weight-column {column}: {row.file_name}: {why}")
    total = sum(row.weight for row in weighted)
    if weighted and total == 0:
        fail(f"--weight-column {column}: all training images have weight 0: give numbers above 0")
    for row in weighted:
        row.weight *= len(weighted) / total


def by_split(rows):
    """{split: its rows}, in the order in which they come."""
    splits = {}
    for row in rows:
        splits.setdefault(row.split, []).append(row)
    return splits


def count_patients(rows):
    """The number of patients, or "unknown"."""
    return len({row.group for row in rows} - {""}) or "unknown"


def warn(names, what, advice):
    """Print one warning about these files, patients or labels and name three; nothing if none."""
    if names and RANK == 0:
        print(f"warning: {what}: {len(names)} ({', '.join(names[:3])}): {advice}")


def warn_of_duplicates(rows, pixels):
    """Warn of images, uint8 (N, 3, S, S), that are there twice, or on both sides of the split."""
    twice = []
    leaks = []
    for i, j in near_duplicates(pixels, 0.98):
        first, second = rows[i], rows[j]
        names = f"{first.file_name} = {second.file_name}"
        if first.split != second.split:
            leaks.append(names)
        elif first.path != second.path:  # slices of a volume are alike
            twice.append(names)
    advice = "delete one of each pair, or give both the same patient_id"
    warn(twice, "duplicates", advice)
    warn(leaks, "images on both sides of the split, so validation looks too good", advice)


def list_class_images(count, args):
    """The rows of --class-data for dreambooth; fails if fewer than `count`: says how to draw."""
    if args.method != "dreambooth":
        return []
    rows = []
    folder = args.class_data or os.path.join(args.out, "class-images")
    if os.path.isdir(folder):
        rows = share_range(list_images(folder), args.range)
    if len(rows) < count:
        words = ("--prompt", args.class_prompt, "--num-images", count, "--out", folder)
        draw = command("sample.py", "--base", args.base, *words)
        fail(f"{folder} has {len(rows)} class images, {count} are needed; draw them with: {draw}")
    for row in rows:
        row.caption = args.class_prompt
        row.split = "class"
    return rows


def rarest_labels(rows):
    """The class of each row for --balance, a tuple: its label, of several (A|B) the rarest."""
    labels = [split_labels(row) for row in rows]
    counts = Counter(chain.from_iterable(labels))
    return tuple(min(several, key=lambda label: (counts[label], label)) for several in labels)


# ---------------------------------------------------------------- pixels and latents


def image_sizes(row, variant, args):
    """SDXL's pixels (Podell et al. 2023, 2.2): stored height, width; crop top, left; size seen."""
    width, height = row.size
    seen = args.resolution
    side = min(width, height)
    place = 0.5 if args.crop == "center" else 0.0
    if args.crop == "random":  # as fit_square draws it
        key = (variant_seed(variant, args), "crop", row.file_name, row.slice)
        place = torch.rand((), generator=generator(*key)).item()
    top = round((height - side) * place * seen / side)
    left = round((width - side) * place * seen / side)
    return [height, width, top, left, seen, seen]


def load_rows(rows, args, variant=0, **how):
    """The readable rows and their pixels, uint8 (N, 3, S, S), S --resolution; no augmentation."""
    how |= {"strict": args.strict, "seed": variant_seed(variant, args)}
    return load_real(rows, args.resolution, args, **how)


def make_variant(rows, pixels, variant, args):
    """What the model sees of rows: their plain pixels, uint8 (N, 3, S, S), or a further variant."""
    if variant and args.crop == "random":
        _, pixels = load_rows(rows, args, variant, bad_share=1)
    if not variant or not args.augment:
        return pixels
    changed = []
    for row, image in zip(rows, pixels, strict=True):
        key = (args.seed, "augment", row.file_name, row.slice, variant)
        changed.append(augment(image, args.augment.split(","), key))
    return torch.stack(changed)


def variant_seed(variant, args):
    """The seed that keys the place of a random crop."""
    return (args.seed, variant) if variant else args.seed


def load_data(base, rows, args):
    """([Data of training and, with dreambooth, class images], validation's Data or None)."""
    rows, encoded = load_encoded(base, rows, args)
    data = {}
    for split, members in by_split(rows).items():
        latents, sizes = encoded[f"{split} latents"], encoded[f"{split} sizes"]
        data[split] = make_data(base, members, latents, sizes, args)
    data["train"].is_grey = bool(encoded["grey"])
    streams = [data["train"]]
    if args.balance:
        streams[0].classes = rarest_labels(streams[0].rows)
    if args.method == "dreambooth":
        data["class"].name = "class"
        data["class"].weight *= args.prior_weight
        streams.append(data["class"])
    return streams, data.get("val")


def load_encoded(base, rows, args):
    """The readable rows, and {"train latents": …, "train sizes": …, …, "grey": of a grey kind}."""
    if args.cache:
        path = cache_path(rows, args)
        is_there = over_processes(torch.tensor(float(path.is_file()), device=base.device))
        if is_there == WORLD:  # each machine may have its own cache
            return rows, load_file(path)
    readable = []
    thumbnails = []
    encoded = {}
    for split, members in by_split(rows).items():  # the training images come first
        members, tensors = encode_rows(base, members, args)
        readable += members
        thumbnails.append(tensors["thumbnails"][:, 0])
        encoded[f"{split} latents"] = tensors["latents"]
        encoded[f"{split} sizes"] = tensors["sizes"]
    bad = len(rows) - len(readable)
    if bad > BAD_SHARE * len(rows):
        fail(f"{bad} of {len(rows)} images cannot be read: mend or remove those named above")
    report_remarks(readable)
    if RANK == 0:
        warn_of_duplicates(readable, torch.cat(thumbnails))
    encoded["grey"] = torch.tensor(grey_kind(thumbnails[0])[1] is not None)
    if args.cache and RANK == 0 and not bad:
        lora.save_tensors(path, encoded)
    return readable, encoded


def cache_path(rows, args):
    """The file of --cache for these rows, named by a hash of all that their latents depend on."""
    parts = [base_hash(find_base(args.base), "vae"), args.resolution, args.crop, args.window]
    if args.variants > 1:
        parts += [args.variants, args.augment, args.seed]
    for row in rows:
        parts += [hash_of(row.path), row.slice, row.value_range, row.split, row.file_name]
    return Path(args.cache, digest(["variants of a row", *parts])[:32] + ".safetensors")


@torch.no_grad()
def encode_rows(base, rows, args):
    """Encode the images of one split, a few at a time; processes share the work.

    Returns the rows that can be read and, of them, by name: "latents", mean and std of the
    posterior (N, variants, 2, 4, h, w); "sizes" (N, variants, 6); "thumbnails", uint8
    (N, variants, 3, s, s).
    """
    variants = args.variants if rows[0].split == "train" else 1
    side = args.resolution // 8
    small = min(64, args.resolution)
    shape = (len(rows), variants)
    encoded = {
        "latents": torch.zeros(*shape, 2, base.unet.config.in_channels, side, side),
        "sizes": torch.zeros(*shape, 6, dtype=torch.long),
        "thumbnails": torch.zeros(*shape, 3, small, small, dtype=torch.uint8),
    }
    for place, row in enumerate(rows):
        row.place = place
    for part, variant, pixels in read_in_parts(rows, variants, args):
        places = [row.place for row in part]
        sizes = [image_sizes(row, variant, args) for row in part]
        thumbnails = F.interpolate(pixels.float(), small, mode="area").to(torch.uint8)
        encoded["latents"][places, variant] = torch.stack(encode(base, pixels), 1).cpu()
        encoded["sizes"][places, variant] = torch.tensor(sizes)
        encoded["thumbnails"][places, variant] = thumbnails
    for tensor in encoded.values():
        sum_on_host(tensor, base.device)
    places = encoded["sizes"][:, 0, 0].nonzero().flatten()  # what cannot be read has no height
    if len(places) < len(rows):
        encoded = {name: tensor[places] for name, tensor in encoded.items()}
    return [rows[place] for place in places], encoded


def read_in_parts(rows, variants, args):
    """Yield this process's share of the images that can be read: rows, variant, pixels."""
    count = min(64, math.ceil(len(rows) / WORLD))  # at once: 200 MB at 1024 pixels
    for start in progress_on_rank_0(
        range(count * RANK, len(rows), count * WORLD), "encoding images"
    ):
        part, pixels = load_rows(rows[start : start + count], args, bad_share=1)
        for variant in range(variants if part else 0):
            yield part, variant, make_variant(part, pixels, variant, args)


def sum_on_host(tensor, device):
    """Sum a tensor in host memory over all processes, in place, in parts of bounded size."""
    if WORLD > 1:
        for part in tensor.view(-1).split(BUCKET):
            part.copy_(over_processes(part.to(device)))


def make_data(base, rows, latents, sizes, args):
    """The Data of one split. latents: (N, variants, 2, 4, h, w); sizes: (N, variants, 6)."""
    captions = [*sorted({row.caption for row in rows} - {""}), ""]
    numbers = {caption: i for i, caption in enumerate(captions)}
    text = encode_captions(base, captions, args)
    caption = torch.tensor([numbers[row.caption] for row in rows])
    weight = torch.tensor([row.weight for row in rows])
    return Data(rows, *latents.unbind(2), sizes, text, caption, weight)


@torch.no_grad()
def encode_captions(base, captions, args):
    """{name: (captions, …)} in host memory: tokens if the text encoder learns, else its states."""
    note_long_texts(base, captions)
    table = {}
    starts = range(0, len(captions), 64)
    for start in progress_on_rank_0(starts, "encoding captions"):
        part = tokenize(base, captions[start : start + 64])
        if not text_learns(args):
            part = text_states(base, part)
        for name, values in part.items():
            if values.is_floating_point():
                values = values.to(base.dtype)
            if name not in table:
                table[name] = torch.empty(len(captions), *values.shape[1:], dtype=values.dtype)
            table[name][start : start + 64] = values
    return table


def text_learns(args):
    """True if captions must be encoded again in each step."""
    return args.text_lora or args.method == "textual-inversion"


# ---------------------------------------------------------------- augmentation

# What --augment may name, in the order in which it acts. All is mild, for a finding must stay one;
# hue is left alone, for erythema and pallor are findings.
AUGMENT = "hflip vflip rotate shift scale elastic clahe color blur noise".split()


def augment(picture, names, key):
    """A variant of an image, uint8 (3, S, S), by `names` of AUGMENT; its draws are keyed."""
    image = picture[None].float() / 255  # (1, 3, S, S)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*key).initial_seed())
        for change in augmentations(names, picture.shape[-1]):
            image = change(image).clamp(0, 1)
    return (image * 255).round().to(torch.uint8)[0]


def augmentations(names, side):
    """The transforms that the names of --augment mean, for images of `side` pixels."""
    from torchvision.transforms import v2  # here, for it takes seconds

    degrees = 10 if "rotate" in names else 0
    shift = (0.03, 0.03) if "shift" in names else None  # of the padded side: 5 % of the side
    zoom = (0.9, 1.1) if "scale" in names else None
    bilinear = v2.InterpolationMode.BILINEAR
    sigma = (0.001 * side, 0.004 * side)
    table = [
        ("hflip", v2.RandomHorizontalFlip()),
        ("vflip", v2.RandomVerticalFlip()),
        # torchvision fills what comes in from outside with black: mirror the border, then crop
        ("rotate shift scale elastic", v2.Pad(side // 3, padding_mode="reflect")),
        ("rotate shift scale", v2.RandomAffine(degrees, shift, zoom, interpolation=bilinear)),
        ("elastic", displace),
        ("rotate shift scale elastic", v2.CenterCrop(side)),
        ("clahe", v2.RandomApply([equalise])),
        ("color", v2.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1)),
        ("blur", v2.GaussianBlur(2 * math.ceil(3 * sigma[1]) + 1, sigma)),
        ("noise", add_noise),
    ]
    return [change for words, change in table if set(words.split()) & set(names)]


def displace(image):
    """Displace by a smooth field: bicubic between 4 x 4 nodes (Ronneberger et al. 2015)."""
    from torchvision.transforms.v2.functional import elastic

    nodes = 0.024 * torch.randn(1, 2, 4, 4)  # in halves of the padded side: 2 % of the side
    field = F.interpolate(nodes, image.shape[2:], mode="bicubic", align_corners=True)
    return elastic(image, field.permute(0, 2, 3, 1))


def add_noise(image):
    """Gaussian noise of a deviation up to 2 % of white, the same in all channels."""
    return image + 0.02 * torch.rand(1) * torch.randn(image[:, :1].shape)


def equalise(image):
    """CLAHE of the grey values of (1, 3, S, S) in [0, 1]; colours move with them."""
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    grey = rgb_to_grayscale(image)
    return image + clahe(grey[0, 0]) - grey


def clahe(grey, limit=2.0, tiles=8):
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) of (S, S) in [0, 1].

    As OpenCV: each of tiles x tiles regions gets the map that equalises its histogram of 256 bins,
    none of which may hold more than `limit` times the mean (the excess goes to all bins alike); a
    pixel takes the bilinear mean of the four nearest maps. S: a multiple of `tiles`.
    """
    side = len(grey) // tiles
    levels = (grey * 255).round()
    regions = levels.long().unfold(0, side, side).unfold(1, side, side).reshape(tiles**2, -1)
    counts = torch.zeros(tiles**2, 256).scatter_add_(1, regions, torch.ones(regions.shape))
    counts = counts.clamp(max=max(1, limit * side**2 / 256))
    counts += (side**2 - counts.sum(1, keepdim=True)) / 256
    maps = (counts.cumsum(1) / side**2).T.reshape(1, 1, 256, tiles, tiles)
    place = (torch.arange(len(grey)) / side - 0.5) * 2 / (tiles - 1) - 1  # of tiles, in [-1, 1]
    y, x = torch.meshgrid(place, place, indexing="ij")
    grid = torch.stack([x, y, levels / 255 * 2 - 1], dim=-1)
    return F.grid_sample(maps, grid[None, None], padding_mode="border", align_corners=True)[0, 0, 0]


# ---------------------------------------------------------------- what is trained


def prepare_base(args, device):
    """The Base that the flags ask for; its UNet is on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = True
    base = load_base(args.base, device, args.precision, args.method)
    if args.text_encoder:
        use_text_encoder(base, args.text_encoder, args.text_length)
    if args.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    if args.compile:
        base.unet.compile()
    return base


def trainable_weights(base, args):
    """What the method trains: {name: fp32 parameter}; all else is frozen."""
    if args.method == "full":
        base.unet.requires_grad_(True)
        return dict(base.unet.named_parameters(prefix="unet"))
    if args.method == "textual-inversion":
        return {args.token: new_word(base, args)}
    shape = (args.rank, args.alpha, args.dropout)
    weights = lora.inject(base.unet, args.targets, *shape, generator(args.seed, "init"))
    if args.text_lora:
        targets = "q_proj,k_proj,v_proj,out_proj"
        for name, encoder in list(base.parts().items())[1:]:
            key = generator(args.seed, "init", name)
            weights |= lora.inject(encoder, targets, *shape, key, name)
    if args.text_encoder:
        torch.manual_seed(generator(args.seed, "projection").initial_seed())
        base.text_projection.reset_parameters()
        weights |= base.text_projection.named_parameters(prefix="text_projection")
    if args.init_lora:
        copy_adapter(weights, args)
    return weights


def new_word(base, args):
    """The vectors of --token, (--vectors, D), which start as the mean of those of --init-word."""
    tokens = base.tokenizers[0](args.init_word, add_special_tokens=False).input_ids
    if not tokens:
        fail(f'--init-word "{args.init_word}": give a word, such as lesion')
    mean = base.text_encoders[0].get_input_embeddings().weight[tokens].mean(0)
    return add_tokens(base, {args.token: mean.repeat(args.vectors, 1)})


def copy_adapter(weights, args):
    """Copy --init-lora into fresh weights of the same layers and rank, whatever its alpha."""
    pairs, _, extra = lora.load(args.init_lora)
    tensors = lora.diffusers_tensors(pairs) | extra
    shapes = {lora.on_disk(name): weight.shape for name, weight in weights.items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        fail(f"--init-lora {args.init_lora}: needs --rank, --targets and --text-lora of its run")
    for name, weight in weights.items():
        weight.data.copy_(tensors[lora.on_disk(name)])
        if ".lora_B." in name:  # a file has alpha/rank folded in
            weight.data *= args.rank / args.alpha


# ---------------------------------------------------------------- watching


def validation_loss(base, data, args):
    """Mean squared error, a float, at fixed noise and fixed timesteps, spread evenly over all."""
    count = max(len(data.rows), 64)  # a few images are looked at several times
    draw = generator(0, "validation")
    timesteps = ((torch.arange(count) + 0.5) * base.num_timesteps / count).long()
    timesteps = timesteps[torch.randperm(count, generator=draw)]
    noise = torch.randn(count, *data.mean.shape[2:], generator=draw)
    mine = torch.arange(count)[RANK::WORLD]
    rows = mine % len(data.rows)
    errors = denoising_errors(base, data, rows, noise[mine], timesteps[mine], args)
    return over_processes(errors.sum()).item() / count


@torch.no_grad()
def denoising_errors(base, data, rows, noise, timesteps, args):
    """The mean squared error of each of these rows (N,) at its noise and timestep: (N,)."""
    args = argparse.Namespace(**{**vars(args), "snr_gamma": 0.0})
    errors = []
    for part in torch.arange(len(rows)).split(args.batch_size):
        places = rows[part]
        text = {name: values[data.caption[places]] for name, values in data.text.items()}
        more = (text, data.sizes[places, 0], torch.ones(len(places)))
        batch = Batch(data.mean[places, 0], noise[part], timesteps[part], *more)
        errors.append(training_loss(base, on_device(batch, base.device), None, args))
    return torch.cat(errors)


def draw_pictures(base, jobs, args):
    """A picture for each job (prompt, number), uint8 (N, 3, S, S); processes share the work."""
    size = args.resolution
    settings = Settings(args.val_steps, args.val_guidance_scale, height=size, width=size)
    pixels = torch.zeros(len(jobs), 3, size, size, dtype=torch.uint8)
    images = generate(base, jobs[RANK::WORLD], settings, args.batch_size, args.seed)
    for place, image in enumerate(images):
        pixels[RANK + place * WORLD] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    sum_on_host(pixels, base.device)
    return pixels


def set_distance(base, data, args):
    """kid (of texture) or fid (of Inception): up to 200 validation images against drawings."""
    chosen = torch.randperm(len(data.rows), generator=generator(0, "compared"))[:200].tolist()
    rows = [data.rows[i] for i in chosen]
    drawn = draw_pictures(base, [(row.caption, i) for i, row in enumerate(rows)], args)
    distance = torch.zeros((), device=base.device)
    if RANK == 0:  # all must agree on which checkpoint is the best
        _, pixels = load_rows(rows, args)
        name = "inception" if args.select_by == "fid" else "texture"
        network = load_features(name, base.device)
        real = extract(pixels, network, base.device)
        fake = extract(drawn, network, base.device)
        real, fake = np.split(pooled(real, fake, network.standardise), [len(real)])
        distance += frechet(real, fake) if args.select_by == "fid" else kid(real, fake)[0]
    return over_processes(distance).item()


def validate(base, data, state, args, log):
    """Add a validation to the history; returns True if it is the best so far."""
    if data is None:
        return False
    figure = args.select_by.replace("-", "_")
    with averaged_model(base, state, args):
        entry = {"step": state.step, "val_loss": validation_loss(base, data, args)}
        if figure != "val_loss":
            entry[figure] = set_distance(base, data, args)
    state.history.append(entry)
    log.write([entry])
    is_best = entry[figure] < state.best.get(figure, math.inf)
    if is_best:
        state.best = entry
    return is_best


def draw_grid(base, state, args, log):
    """samples/step-N.png: the same prompts from the same noise each time."""
    jobs = list(product(args.val_prompts, range(args.val_samples)))
    if not jobs:
        return
    with averaged_model(base, state, args):
        pixels = draw_pictures(base, jobs, args)
    if RANK == 0:
        cells = []
        for (prompt, number), one in zip(jobs, pixels, strict=True):
            cells.append((picture(one), prompt, str(number + 1)))
        grid = contact_sheet(cells)
        path = Path(args.out, "samples", f"step-{state.step:08d}.png")
        save_png(grid, path, "\n".join(args.val_prompts))
        log.add_picture(grid, state.step)


class Log:
    """log.jsonl: a line a step (memory in MB), a line a validation. --tensorboard, --wandb copy it.

    Losses stay on the device until they are written. Resuming cuts the log back to the checkpoint.
    """

    def __init__(self, state, args):
        self.path = Path(args.out, "log.jsonl")
        self.pending = []  # loss and gradient norm of the steps not yet written
        self.board = None
        if RANK == 0:
            cut_back(self.path, state, args)
            if args.tensorboard or args.wandb:
                self.board = open_board(state, args)
        self.clock = time.perf_counter()  # when the first pending step began

    def add_step(self, loss, grad_norm):
        self.pending.append(torch.stack([loss, grad_norm]))

    def write_steps(self, state, args):
        """Write the pending steps; returns their mean loss. Counts steps with NaN, in a row."""
        values = torch.stack(self.pending).tolist()
        self.pending = []
        batch = effective_batch(args)
        speed = len(values) * batch / (time.perf_counter() - self.clock)
        memory = torch.cuda.max_memory_allocated()  # 0 without a GPU
        entries = []
        for step, (loss, grad_norm) in enumerate(values, state.step - len(values) + 1):
            entry = {
                "step": step,
                "epoch": round(step * batch / state.images, 3),
                "loss": loss,
                "lr": learning_rate(step - 1, args),
                "grad_norm": grad_norm,
                "images_per_second": round(speed, 2),
                "memory": round(memory / 1e6),
            }
            entries.append(entry)
            if not state.scaler.is_enabled():  # which finds its scale by overflowing
                loss += grad_norm
            if not math.isfinite(loss):
                state.bad_steps += 1
            elif state.bad_steps < 3:
                state.bad_steps = 0
        self.write(entries)
        return np.mean(values, axis=0)[0]

    def write(self, entries):
        if RANK > 0:
            return
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        with open(self.path, "a", newline="\n") as file:
            file.write(re.sub(r"\bNaN\b|-?\bInfinity\b", "null", text))  # those are no JSON
        if self.board:
            for entry in entries:
                for name, value in entry.items():
                    self.board.add_scalar(name, value, entry["step"])
            self.board.flush()

    def add_picture(self, image, step):
        if self.board:
            self.board.add_image("samples", np.asarray(image), step, dataformats="HWC")
            self.board.flush()


def cut_back(path, state, args):
    """Take out of the log, and of samples/, what was written after the checkpoint."""
    lines = []
    path.touch()
    for line in path.read_text().splitlines(keepends=True):
        with suppress(ValueError, KeyError, TypeError):  # torn by a kill, or damaged
            if json.loads(line)["step"] <= state.step:
                lines.append(line)
    write_file(path, "".join(lines))
    for grid in Path(args.out, "samples").glob("step-*.png"):
        if int(grid.stem[5:]) > state.step:
            grid.unlink()


def open_board(state, args):
    """TensorBoard's writer, of which --wandb sends a copy to Weights & Biases."""
    from torch.utils.tensorboard import SummaryWriter

    if args.wandb:
        wandb = need("wandb", "--wandb")
        run_id = digest(os.path.abspath(args.out))[:16]
        try:
            wandb.init(
                project="medlora",
                name=Path(args.out).name,
                dir=args.out,
                id=run_id,
                resume="allow",
                config=vars(args),
                sync_tensorboard=True,
            )
        except wandb.Error as why:  # such as no login
            fail(f"--wandb: {why}: type `wandb login`, or set WANDB_MODE=offline")
    return SummaryWriter(Path(args.out, "tensorboard"), purge_step=state.step + 1)


# ---------------------------------------------------------------- the membership audit

AUDITED = 75  # patients a side, at most
LOOKS = 600  # at all patients together: from 4 of each to 16 where they are few
AUROC = "AUROC {auroc:.2f} (95 % interval {low:.2f} to {high:.2f}, p {p:.2g})"


def audit(base, data, validation, best, state, args):
    """audit.json: can someone who has the weights `best` tell what they learnt? In a sentence.

    Learning lowers the error of training images more than that of others (Matsumoto et al. 2023);
    the base's error at the same noise takes out how difficult an image is (Watson et al. 2022).
    What the base's error tells by itself is no memorisation: the control.
    """
    sides = [(side, one_of_each_patient(side, args)) for side in (data, validation) if side]
    if len(sides) < 2 or min(len(rows) for _, rows in sides) < 5:
        return "No membership audit: needs five training and five held-out patients (--val-split)."
    note("membership audit: comparing training images with validation images")
    alone = {name: torch.zeros_like(weight) for name, weight in best.items()}
    if args.method == "full":
        alone = trainable_weights(prepare_base(args, torch.device("cpu")), args)
    count = min(16, LOOKS // sum(len(rows) for _, rows in sides))
    timesteps = (torch.linspace(0.05, 0.6, count) * base.num_timesteps).long()
    errors = []
    for weights in (alone, best):
        ema = {name: weight.to(base.device) for name, weight in weights.items()}
        with averaged_model(base, replace(state, ema=ema), args):
            errors.append([log_errors(base, *side, timesteps, args) for side in sides])
    before, after = errors
    control = tell_apart(*before, args.seed)
    adapter = tell_apart(after[0] - before[0], after[1] - before[1], args.seed)
    sentence = (
        "Someone who has this adapter can tell training images from others with "
        f"{AUROC.format(**adapter)}; the base alone gives {AUROC.format(**control)}. "
        "0.5 is guessing, 1 is certainty."
    )
    result = {"adapter": adapter, "base": control, "sentence": sentence}
    write_file(Path(args.out, "audit.json"), json.dumps(result, indent=1))
    return sentence


def one_of_each_patient(data, args):
    """The row numbers (N,) of a real image of each patient, of at most AUDITED, by the seed."""
    images = {}
    for i, row in enumerate(data.rows):
        if row.fields.get("synthetic") != "1":
            images[row.group or row.path] = i
    order = torch.randperm(len(images), generator=generator(args.seed, "audited"))
    return torch.tensor(list(images.values()))[order[:AUDITED]]


def log_errors(base, data, rows, timesteps, args):
    """The mean log denoising error of rows (N,) over timesteps, at one noise each: (N,)."""
    gen = generator(args.seed, "audit")
    noise = torch.randn(len(timesteps), *data.mean.shape[2:], generator=gen)
    noise = noise.repeat_interleave(len(rows), 0)
    times = timesteps.repeat_interleave(len(rows))
    errors = denoising_errors(base, data, rows.repeat(len(timesteps)), noise, times, args)
    return errors.cpu().double().log().view(-1, len(rows)).mean(0).numpy()


def tell_apart(members, others, seed):
    """Do members (N,) score lower than others (M,)? AUROC, 95 % bootstrap interval, p: a dict."""
    scores = np.concatenate([members, others])
    is_member = np.arange(len(scores)) < len(members)
    values = auroc(-scores, is_member, resamples([""] * len(scores), seed))
    low, high = np.nanpercentile(values[1:], (2.5, 97.5))
    p = stats.mannwhitneyu(members, others, alternative="less").pvalue
    sizes = {"training": len(members), "held_out": len(others)}
    return {"auroc": values[0], "low": low, "high": high, "p": p} | sizes


# ---------------------------------------------------------------- what a run writes and prints


def describe_run(rows, state, data, validation, args):
    """Before the first step: write split.csv and people.csv, print what is trained on what."""
    lines = [[row.file_name, row.group, row.split] for row in rows]
    write_csv(Path(args.out, "split.csv"), ["file_name", "group", "split"], lines)
    people = count_people([(row.split, row) for row in rows])
    write_csv(Path(args.out, "people.csv"), people[0], [record.values() for record in people])
    held_out = len(validation.rows) if validation else 0
    if 0 < held_out < 5:
        note(f"validation images: {held_out}, too few to trust; hold out more, or give more images")
    weights = sum(weight.numel() for weight in state.weights.values())
    print(
        f"{state.images} images to train on (patients: {count_patients(data.rows)}), {held_out} for"
        f" validation\n{weights:,} trainable weights; images in a step: {effective_batch(args)} = "
        f"--batch-size {args.batch_size} × --accumulate {args.accumulate} × processes {WORLD}\n"
        f"{args.steps} steps, {state.step} of them done"
    )


def finish(base, state, data, validation, args):
    """Write the results, the report and the card; print where they are and what to type next."""
    best = best_weights(state, args)
    result = save_results(best, state, args)
    sentence = audit(base, data, validation, best, state, args)
    print(sentence)
    flag = "--base" if args.method == "full" else "--lora"
    words = ("--prompt", args.val_prompts[0], "--num-images", 50, "--grid")
    drawn = f"{args.out}-samples"
    draw = command("sample.py", flag, result, *words, "--out", drawn)
    write_report(state, sentence, draw, args)
    write_model_card(state, data, sentence, result, args)
    write_args(args, state.step)
    print(f"done after {state.step} of {args.steps} steps; the result is {result}")
    print(f"look at {args.out}/report.html\nnext: {draw}")
    if args.val_data or args.val_split or args.test_split:
        words = evaluation_words(vars(args), drawn, args.out)
        print("then:", command("evaluate.py", *words))


def save_results(best, state, args):
    """Write the trained weights; returns the path for --lora or --base of sample.py."""
    if args.method == "full":
        return save_model(best, args)
    metadata = adapter_metadata(state, args)
    name = "lora.safetensors"
    if args.method == "textual-inversion":  # {"<word>": (n, D)}, as diffusers reads it
        name = "embeddings.safetensors"
        metadata["tokens"] = args.token
    else:
        last = Path(args.out, "lora-last.safetensors")
        lora.save(last, state.ema, metadata | {"steps": state.step})
    lora.save(Path(args.out, name), best, metadata | {"steps": state.best["step"]})
    return Path(args.out, name)


def best_weights(state, args):
    """The EMA weights of the best validation, or of the last step, which then is the best."""
    path = Path(args.out, "checkpoints", "best.pt")
    if state.best["step"] and path.exists():
        checkpoint = load_weights(path)
        if checkpoint["step"] == state.best["step"]:
            return checkpoint["ema"]
    # no validation, or the run continued another folder's checkpoint, whose best.pt is not here
    state.best = {"step": state.step}
    return state.ema


def adapter_metadata(state, args):
    """What an adapter says of itself: its shape, its base, and how its images were prepared."""
    names = "base rank alpha targets resolution seed crop window range slices val_prompts".split()
    if args.text_encoder:
        names += ["text_encoder", "text_length"]
    metadata = {name: getattr(args, name) for name in names}
    metadata |= {"prompt": args.prompt or "", "images": state.images, "made_by": "medlora"}
    metadata |= {"grey": state.is_grey, "data": state.made_of["the training data"]}
    metadata["licence"] = "that of the base; research use, not for diagnosis"
    return metadata


def save_model(weights, args):
    """model/: a diffusers folder with the tuned UNet, fp32, and the base's other parts."""
    folder = Path(args.out, "model")
    source = Path(find_base(args.base))
    unet = "unet/diffusion_pytorch_model.safetensors"
    for pattern in PARTS:
        for path in source.glob(pattern):
            if path != source / unet:
                copy_file(path, folder / path.relative_to(source))
    tensors = {name.removeprefix("unet."): weight for name, weight in weights.items()}
    lora.save_tensors(folder / unet, tensors)
    return folder


def write_model_card(state, data, sentence, result, args):
    """README.md: a model card. It names no path, no caption of the data and nobody."""
    tags = f"[stable-diffusion, diffusers, text-to-image, medical, synthetic, {args.method}]"
    header = f"library_name: diffusers\ntags: {tags}"
    hub_id = BASES.get(args.base, args.base)
    if not os.path.exists(hub_id):
        header += f"\nbase_model: {hub_id}"
    if args.prompt:
        header += f"\ninstance_prompt: {json.dumps(args.prompt, ensure_ascii=False)}"
    if result.is_file():
        adapter = content_hash(result)[:10]
    else:
        adapter = base_hash(result)
    write_card(
        args,
        header=header,
        title=f"{result.name}, trained with medlora for {state.step} steps",
        counts=counts_table(data.rows, data.rows),
        images=state.images,
        patients=count_patients(data.rows),
        model=public_name(args.base),
        adapter=adapter,
        checks="Not evaluated yet: run evaluate.py before you use what it draws.",
        audit=sentence,
    )


def write_report(state, sentence, draw, args):
    """report.html: how it went, what to type next, the newest pictures, the loss, the flags."""
    lines = [json.loads(line) for line in Path(args.out, "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    skipped = sum(None in line.values() for line in steps)
    grids = []
    for path in sorted(Path(args.out, "samples").glob("step-*.png"), reverse=True):
        step = int(path.stem[5:])
        what = f"drawn at step {step}: {'; '.join(args.val_prompts)}"
        image = thumbnail(Image.open(path), 4096, what)
        grids.append(f'<h3>Step {step}</h3><div class="wide">{image}</div>')
    losses = {
        "training": mean_points(steps, "loss"),
        "validation": mean_points(state.history, "val_loss"),
    }
    curves = ""
    for key in ("grad_norm", "lr", "images_per_second", "memory"):
        curves += f"<h3>{key}</h3>" + curve({key: mean_points(steps, key)}, "step")
    pictures = ""
    if grids:
        pictures = f"<h2>The newest pictures</h2>{grids[0]}"
    if grids[1:]:
        pictures += fold("Older pictures, drawn from the same noise", "".join(grids[1:]))
    flags = table(("flag", "value"), vars(args).items())
    body = f"""<p class="verdict">{outcome(state, skipped, args)}</p>
<p>{html.escape(sentence)}</p>
<h2>Draw with it</h2><pre>{html.escape(draw)}</pre>
{pictures}
<h2>Loss</h2>{curve(losses, "step")}
<h2>The command</h2><pre>{html.escape(shlex.join(sys.argv))}</pre>
{fold("All flags", flags)}
{fold("Gradient norm, learning rate, images per second, and GPU memory in MB", curves)}"""
    write_file(Path(args.out, "report.html"), page(f"Training {args.out}", body))


def outcome(state, skipped, args):
    """How a run went, in sentences."""
    text = f"{state.step} steps, no validation: the saved weights are those of the last step."
    figure = args.select_by.replace("-", "_")
    if figure in state.best:
        name = args.select_by.replace("val-loss", "validation loss")
        text = (
            f"Best {name} {state.best[figure]:.4g} at step {state.best['step']} of {state.step}; "
            f"the last is {state.history[-1][figure]:.4g}. The saved weights are those of the best."
        )
    if skipped:
        text += f" Steps skipped because of NaN or infinity: {skipped}."
    return text


def mean_points(lines, key):
    """At most 20 points of a curve, each the mean of several steps."""
    values = [(line["step"], line[key]) for line in lines if key in line]  # it may be damaged
    parts = np.array_split(np.array(values, float).reshape(-1, 2), 20)
    return [part.mean(0) for part in parts if len(part)]


# ---------------------------------------------------------------- the data doctor


def preview(args, device):
    """--preview: describe the data, warn of what is odd, and write what the model would see."""
    folder = Path(args.preview)
    rows = list_data(args)
    base = find_base(args.base, note)
    args = with_defaults(args, rows, base)
    rows, pixels = load_rows(rows, args)
    report_enlarged(rows, args.resolution, args.crop)
    describe_data(rows)
    warn_of_captions(rows)
    warn_of_duplicates(rows, pixels)
    warn_of_pictures(rows, pixels, args)
    if base:
        show_ceiling(base, pixels, folder, device, args)
    write_preview(rows, pixels, folder, args)
    print("next: the same command without --preview, or " + command("train.py", "--data", folder))


def warn_of_captions(rows):
    """Warn of captions that seem incomplete, and of one caption for several labels."""
    ending = re.compile(r"(\s(with|of|in|on|at|by|for|from|to|and|or|no|the|an?)|[,:;(])\s*$")
    cut = [row.file_name for row in rows if ending.search(row.caption)]
    warn(cut, "captions that seem incomplete", "fill the empty cells, or remove these rows")
    captions = {row.caption for row in rows}
    labels = sorted({row.label for row in rows})
    if len(captions) == 1 and len(labels) > 1:
        warn(labels, "labels that share one caption", 'name the label: --prompt "… {label}"')


def warn_of_pictures(rows, pixels, args):
    """Warn of images, uint8 (N, 3, S, S), with borders or marks, or unlike all others."""
    names = np.array([row.file_name for row in rows])
    small = shrink(pixels, 128)
    grey = to_grey(small)[:, 0]
    bordered = names[has_border(grey)].tolist()
    if len(bordered) > len(rows) / 2 and args.crop != "pad":
        advice = "crop it off, or the model learns to draw it (around a disc: --crop fundus)"
        warn(bordered, "images with a black or white border", advice)
    if len(rows) < 20:  # too few to say what is usual
        return
    layout = F.adaptive_avg_pool2d(grey, 8).flatten(1)
    layout = F.normalize(layout - layout.mean(1, keepdim=True))
    sizes = torch.tensor([row.size for row in rows]).log()
    tint = small.mean((2, 3)).diff()
    usual = max(2, float(tint.std(0).max()) / 4)  # photographs vary, films hardly
    measures = [("size", sizes, 0.1, 6), ("tint", tint, usual, 7), ("layout", layout, 0.02, 3.7)]
    for name, features, floor, limit in measures:
        odd = names[unlike(features, floor) > limit].tolist()
        warn(odd, f"images of a {name} unlike all others", "remove those of another kind")
    what = "places with the same mark in many images"
    warn(find_marks(grey), what, "black it out or crop it off, or the model learns it")


def has_border(grey):
    """Which of (N, S, S) in [0, 1] have an even border, black or white, on some side: (N,).

    A border ends straight: the rounded edge of a disc or a body in a dark image is none.
    """
    is_extreme = (grey - 0.5).abs() > 0.42
    result = torch.zeros(len(grey), dtype=torch.bool)
    for turn in range(4):
        share = is_extreme.rot90(turn, (1, 2)).float().mean(2)  # of each row
        ends = (share[:, 3:-2] == 1) & (share[:, 5:] < 0.5)  # the row between may be a mixture
        result |= ends.any(1)
    return result.numpy()


def unlike(features, floor):
    """How far each of (N, D) is from its 4th nearest, in deviations above the median: (N,)."""
    features = features.double()
    distances = torch.cdist(features, features).kthvalue(5).values
    above = distances - distances.median()
    return (above / max(floor, 1.4826 * above.abs().median())).numpy()


def find_marks(grey):
    """Where many of (N, 128, 128) in [0, 1] show the same small mark, such as a letter.

    A mark is fine detail that varies less over the images than it stands out in their mean.
    """
    detail = grey - F.avg_pool2d(grey[:, None], 9, 1, 4, count_include_pad=False)[:, 0]
    is_steady = detail.mean(0).abs() > 0.6 * (detail.std(0) + 0.02)
    parts, _ = ndimage.label(ndimage.binary_dilation(is_steady, iterations=3))
    places = []
    for y, x in ndimage.find_objects(parts):
        if y.stop - y.start <= 24 and x.stop - x.start <= 60:  # else an edge, such as a disc's
            middle = [(edges.start + edges.stop) / 2.56 for edges in (x, y)]
            places.append("{:.0f} % from the left, {:.0f} % from the top".format(*middle))
    return places


def show_ceiling(base, pixels, folder, device, args):
    """vae.png: images before and after the base's VAE. No training can draw finer than these."""
    note(f"measuring what the VAE of {args.base} keeps")
    vae = load_vae(base, device)
    before = pixels[:: math.ceil(len(pixels) / 12)]
    after = decode(vae, encode(vae, before)[0])
    error = (before.float() - after.float()).square().mean()
    psnr = 10 * math.log10(255**2 / (error + 0.01))
    half = args.resolution // 2
    middle = slice(max(0, half - 32), half + 32)  # ssim_matrix would shrink what is larger
    ssim = ssim_matrix(before[..., middle, middle], after[..., middle, middle]).diagonal().mean()
    pairs = torch.cat([before, after], 3)[:3]
    save_real(picture(torch.cat(list(pairs), 1)), folder / "vae.png")
    print(
        f"the VAE of {args.base} keeps PSNR {psnr:.1f} dB, SSIM {ssim:.3f} (in the middle); look "
        f"at {folder}/vae.png: left before the VAE, right after it\n"
        "no training draws finer; if that loses what matters, try a larger --resolution"
    )


def save_real(image, path):
    """Write a PNG of real images, which save_png would mark as synthetic."""
    with replacing(path) as file:
        image.save(file, "PNG")


def describe_data(rows):
    """Print counts, sizes, patients and labels."""
    splits = Counter(row.split for row in rows)
    sides = list(chain.from_iterable(row.size for row in rows))
    print(
        f"{len(rows)} images: {splits['train']} to train on, {splits['val']} for validation, "
        f"{splits['test']} for a test\n"
        f"sides from {min(sides)} to {max(sides)} pixels; patients: {count_patients(rows)}"
    )
    labels = {}
    for row in rows:
        for label in split_labels(row):
            labels.setdefault(label or "(no label)", []).append(row)
    for label, members in sorted(labels.items()):
        print(f"  {label:<32} {len(members):>6} images, patients: {count_patients(members)}")


PREVIEW_COLUMNS = ["file_name", "text", "label", "patient_id", "source", "synthetic"]


def write_preview(rows, pixels, folder, args):
    """Write all variants of all images but those kept for a test, metadata.csv and grid.png."""
    path = folder / "metadata.csv"
    header = ",".join(PREVIEW_COLUMNS) + "\n"
    if path.exists() and not path.read_text().startswith(header):
        fail(f"--preview {folder}: holds another data set: give another folder")
    lines = []
    for i, row in enumerate(progress_on_rank_0(rows, "writing images")):
        if row.split == "test":
            continue
        group = row.group
        if not group and args.variants > 1:  # variants stay on one side of a split
            group = row.file_name
        synthetic = row.fields.get("synthetic", "")
        for variant in range(args.variants):
            name = f"{i:06d}-{variant}-{Path(row.file_name).stem[:80]}.png"
            (image,) = make_variant([row], pixels[i : i + 1], variant, args)
            save_real(picture(image), folder / name)
            lines.append([name, row.caption, row.label, group, row.file_name, synthetic])
    write_csv(path, PREVIEW_COLUMNS, lines)
    cells = []
    for name, caption, label, _, source, _ in lines[:: max(1, len(lines) // 48)]:
        cells.append((Image.open(folder / name), caption or label, source))
    save_real(contact_sheet(cells), folder / "grid.png")
    values = f"values from {pixels.min()} to {pixels.max()}"
    print(f"wrote {len(lines)} images, {args.resolution} pixels a side, {values}")
    print(f"look at {folder}/grid.png")


# ---------------------------------------------------------------- processes and the run's folder


def start_processes(args):
    """Under torchrun, join the others; returns this process's device."""
    device = pick_device(args.device)
    if device.type == "cuda":
        # the same bytes after a restart need kernels that add in one order, and cuBLAS a workspace
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # thousands of fills a step
        torch.cuda.set_device(device)
    if WORLD > 1:
        backend = "gloo"
        if device.type == "cuda" and dist.is_nccl_available():  # not on Windows
            backend = "nccl"
        # a rank that dies takes the others down through torchrun; a slow disk must not
        dist.init_process_group(
            backend, store=fresh_store(), rank=RANK, world_size=WORLD, timeout=timedelta(hours=2)
        )
    return device


def fresh_store():
    """torchrun's key-value store, without what the processes of an earlier attempt left in it."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(hours=2)))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # it outlives restarts, and would lead to the addresses of dead processes
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return store


@contextmanager
def lock(out):
    """Hold the run's folder by a kernel lock, which dies with its process; refuse a second run."""
    if RANK > 0:
        yield
        return
    Path(out, "checkpoints").mkdir(parents=True, exist_ok=True)
    with open(Path(out, ".lock"), "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows: a second run is not noticed
        except OSError:
            fail(f"{out}: another run is writing here: wait until it ends, or give another --out")
        for place in (".", "checkpoints", "samples", "model", "model/*"):
            for torn in Path(out).glob(f"{place}/.*.[0-9]*.tmp"):  # of runs killed while writing
                torn.unlink()
        yield


# ---------------------------------------------------------------- flags


count = number(0, 10**9)
positive = number(1, 10**9)
share = number(0.0, 1.0)
factor = number(0.0, 1e6)


def parse_args():
    """The flags, checked; fails if they are wrong."""
    parser = Flags(__doc__)
    group = parser.add_argument_group("data")
    add = flag_adder(group)
    add("--data", "folder of images or class folders, or a table", required=True, type=data_set)
    add("--val-data", "validation images, as --data (instead of --val-split)", type=data_set)
    add("--val-split", "share held out for validation, whole patients, 0 to 1", 0.15, share)
    add("--test-split", "share kept for a test, whole patients, never trained on", 0.0, share)
    add("--prompt", 'caption; {names} are columns: "a film, {labels}" (default: from the data)')
    add_reading_flags(group, with_run=False)
    add("--weight-column", "column of loss weights, from 0 up; divided by their mean")
    add("--resolution", "side in pixels, a multiple of 8 (default: the base's)", type=multiple_of_8)
    add("--augment", f"any of {', '.join(AUGMENT)}, joined by commas (default: none)", "")
    variants = "versions of an image (default: 4 if --augment or --crop random, else 1)"
    add("--variants", variants, type=positive)
    add("--balance", "draw each label equally often; A|B counts as the rarer", False)
    add("--cache", "folder that keeps encoded images for later runs")
    add("--preview", "train nothing; check the data, write what the model sees to this folder")
    add("--strict", "stop if any image cannot be read", False)
    add("--skip-bad", "skip bad images up to 5 %% (default)", dest="strict", action="store_false")

    add = flag_adder(parser.add_argument_group("model"))
    add("--base", "tiny, sd15, sd21-base, sd21, sdxl, Hub id or folder", "sd21-base")
    methods = ["lora", "full", "dreambooth", "textual-inversion"]
    add("--method", "train an adapter, the UNet or a new word", "lora", choices=methods)
    add("--rank", "size of the adapter: larger learns and stores more", 16, positive)
    add("--alpha", "the adapter is scaled by alpha/rank (default: rank)", type=number(1e-6, 1e6))
    add("--dropout", "share of the adapter's inputs set to 0, 0 to 1", 0.0, share)
    add("--targets", "layers: attention, all, or name endings: to_q,to_v", "attention")
    add("--text-lora", "also train an adapter of the text encoder", False)
    add("--text-encoder", "another text encoder, of BERT's kind: Hub id or folder")
    add("--text-length", "longest caption for --text-encoder, in tokens", 256, positive)
    add("--init-lora", "adapter file to start from, trained at any resolution", type=existing_file)
    add("--class-data", "dreambooth: folder of class images (default: class-images in --out)")
    add("--class-prompt", 'dreambooth: caption of all class images: "a skin lesion"')
    add("--prior-weight", "dreambooth: weight of the class images' loss", 1.0, factor)
    add("--token", "textual-inversion: the new word, part of --prompt", "<concept>")
    add("--init-word", "textual-inversion: a known word to start from", "lesion")
    add("--vectors", "textual-inversion: how many tokens the word gets", 1, positive)

    add = flag_adder(parser.add_argument_group("training"))
    add("--snr-gamma", "gamma of the min-SNR loss weight, usually 5 (0: off)", 0.0, factor)
    add("--noise-offset", "noise added to whole channels, usually 0 to 0.05", 0.0, share)
    add("--prompt-dropout", "share of captions replaced by an empty one, 0 to 1", 0.1, share)
    add("--perceptual-weight", "weight of a perceptual loss, usually 0.1 (0: off)", 0.0, factor)
    add("--perceptual", "whose features this loss compares", "vae", choices=["vgg", "vae"])
    add("--steps", "optimizer steps of the run", 1000, positive)
    add("--epochs", "passes over the data, instead of --steps (0: use --steps)", 0.0, factor)
    add("--batch-size", "images in a forward pass, on each process", 8, positive)
    add("--accumulate", "forward passes in an optimizer step", 1, positive)
    add("--lr", "highest learning rate, above 0", 1e-4, number(1e-12, 10.0))
    add("--lr-schedule", "lr after the warm-up", "cosine", choices=["cosine", "linear", "constant"])
    add("--warmup", "steps of rising lr (default: a tenth of the run, at most 100)", type=count)
    add("--weight-decay", "weight decay of AdamW, 0 to 1", 1e-2, share)
    add("--max-grad-norm", "clip the gradient norm to this (0: off)", 1.0, factor)
    optimizer = "adamw8bit needs less memory, and the package bitsandbytes"
    add("--optimizer", optimizer, "adamw", choices=["adamw", "adamw8bit"])
    add("--gradient-checkpointing", "less memory, but a fifth slower", False)
    add("--compile", "compile the UNet: starts minutes later, then trains faster", False)
    add("--ema", "decay of the averaged weights, 0 to 1 (0: no average)", 0.9999, share)

    group = parser.add_argument_group("watching and keeping")
    add = flag_adder(group)
    every = "steps between validations (default: a tenth of the run; 0: at the end)"
    add("--validate-every", every, type=count)
    add("--val-prompts", "grid prompt, may be repeated (default: top 4 captions)", action="append")
    add("--val-samples", "pictures of each prompt in the grid (0: no grid)", 2, count)
    add("--val-steps", "denoising steps of the grid's pictures, 1 to 999", 25, number(1, 999))
    add("--val-guidance-scale", "guidance of the grid's pictures (1: off)", 5.0, factor)
    add("--select-by", "decides the best weights", "val-loss", choices=["val-loss", "kid", "fid"])
    add("--patience", f"stop if N validations gain under {100 * MIN_GAIN} %% (0: off)", 0, count)
    add("--tensorboard", "also write the log for TensorBoard, into --out", False)
    add("--wandb", "also send log, flags and grids to Weights & Biases, online", False)
    add("--log-every", "steps between two writes to the log", 10, positive)
    add("--out", "folder for all that the run writes", "runs/train")
    add_card_flags(group)
    add("--save-every", "steps between two checkpoints", 500, positive)
    add("--keep-last", "how many of the newest checkpoints to keep (0: all)", 3, count)
    add("--resume", "checkpoint: auto (latest if any), latest, best, a file or its folder", "auto")
    add("--audit", "repeat the membership audit of a finished run", False)
    add_common_flags(group)
    args = parser.parse_args()
    if args.alpha is None:
        args.alpha = float(args.rank)
    if args.variants is None:
        args.variants = 4 if args.augment or args.crop == "random" else 1
    check_flags(args)
    check_packages(args)
    return args


def check_flags(args):
    """Fail if flags contradict each other or lack another."""
    folder = Path(args.preview or args.out)
    if folder.resolve().is_relative_to(Path(args.data).resolve()):
        fail(f"{folder} lies in --data {args.data}, and would be trained on: give another folder")
    for name in args.augment.split(","):
        if name and name not in AUGMENT:
            fail(f"--augment {name}: give some of these, joined by commas: {', '.join(AUGMENT)}")
    if (args.variants > 1) != (args.augment != "" or args.crop == "random"):
        fail(f"--variants {args.variants}: give 2 or more with --augment or --crop random, else 1")
    if args.method == "dreambooth" and not args.class_prompt:
        fail('--method dreambooth: needs --class-prompt, such as "a skin lesion"')
    is_used = args.token in (args.prompt or "") and " " not in args.token
    if args.method == "textual-inversion" and not is_used:
        fail(f'--method textual-inversion: --prompt needs the new word "{args.token}" (no spaces)')
    for flag, value in (("--text-lora", args.text_lora), ("--init-lora", args.init_lora)):
        if value and args.method in ("full", "textual-inversion"):
            fail(f"{flag}: needs --method lora or dreambooth")
    if args.text_encoder and (args.text_lora or args.method != "lora"):
        fail("--text-encoder: needs --method lora, without --text-lora")


def check_packages(args):
    """Fail now, not after all images are encoded, if a flag needs a package that is missing."""
    if args.optimizer == "adamw8bit":
        need("bitsandbytes", "--optimizer adamw8bit")
    if args.tensorboard or args.wandb:
        need("tensorboard", "--tensorboard or --wandb")
    if args.wandb:
        need("wandb", "--wandb")


def with_defaults(args, rows, base):
    """A copy of the flags in which the base (its folder, or None) and the rows fill in the rest."""
    captions = Counter(row.caption for row in rows).most_common(4)
    args = argparse.Namespace(**vars(args))
    if args.epochs:
        args.steps = math.ceil(args.epochs * len(rows) / effective_batch(args))
    if args.validate_every is None:
        args.validate_every = math.ceil(args.steps / 10)
    own = own_resolution(base) if base else args.resolution or 512
    args.resolution = args.resolution or own
    if args.resolution < own:
        note(f"--resolution {args.resolution}: below {own} pixels, {args.base} draws less well")
    args.val_prompts = args.val_prompts or [caption for caption, _ in captions]
    return args


def check_validation(val_rows, args):
    """Fail if flags ask for more validation than there is: now, not after an hour."""
    if args.select_by != "val-loss" and len(val_rows) < 50:
        fail(f"--select-by {args.select_by}: needs 50 validation images, there are {len(val_rows)}")
    if args.patience and not (val_rows and args.validate_every):
        fail("--patience: needs --val-split or --val-data, and --validate-every above 0")
    if args.select_by == "fid":
        need_weights(FID_WEIGHTS, "--select-by fid (kid needs no file)")


# ---------------------------------------------------------------- main


def run(args, device):
    """Train from the flags to the report; continue a run that was stopped."""
    rows = list_data(args)
    splits = by_split(rows)
    train_rows = splits["train"]
    val_rows = splits.get("val", [])
    args = with_defaults(args, train_rows, find_base(args.base))
    check_validation(val_rows, args)
    class_rows = list_class_images(len(train_rows), args)
    made_of = fixed_settings(train_rows, val_rows, args)
    checkpoint = read_checkpoint(made_of, args)
    if checkpoint and is_finished(checkpoint, args) and not args.audit:
        if RANK == 0:
            print(f"{args.out} is finished: {args.steps} steps; more need --lr-schedule constant")
        return

    base = prepare_base(args, device)
    perceptual = load_perceptual(base, args)
    weights = trainable_weights(base, args)  # before captions are encoded: adds new words
    streams, validation = load_data(base, train_rows + val_rows + class_rows, args)
    release_memory(base, args)
    data = streams[0]
    state = start(base, weights, args, made_of, checkpoint)
    state.images = len(data.rows)
    state.is_grey = data.is_grey
    log = Log(state, args)
    if RANK == 0:
        write_args(args)
        describe_run(rows, state, data, validation, args)
        if checkpoint:  # --resume may name another one
            point(Path(args.out, "checkpoints", "latest.pt"), checkpoint_path(args))
    if checkpoint and is_due(state.step, args.validate_every, args):
        draw_grid(base, state, args, log)  # a kill may have come between a checkpoint and its grid
    fit(base, streams, perceptual, validation, state, args, log)
    if RANK == 0:
        finish(base, state, data, validation, args)


def main(args):
    """Train or, with --preview, describe the data; under torchrun, in each process."""
    device = start_processes(args)
    if not args.preview:
        with lock(args.out):
            run(args, device)
    elif RANK == 0:
        preview(args, device)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main, parse_args)
