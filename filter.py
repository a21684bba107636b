"""Keep the generated images that are as good as real ones, and say why the others are not.

    python filter.py runs/new --reference wounds/ --calibrate 0.05 --drop-copies --out runs/kept
    python filter.py runs/new --reference wounds/ --max-lpips 0.30 --min-ssim 0.40 --out runs/kept
    python filter.py runs/new --reference wounds/ --calibrate 0.05 --mix wounds/ --share 25
    python filter.py runs/new --rating-page rate.html --suggest 60 --blind wounds/
    python filter.py --agreement anna.csv ben.csv
    python filter.py --fit anna.csv ben.csv --reference wounds/ --out selector.safetensors
    python filter.py runs/new --reference wounds/ --selector selector.safetensors --keep 200

--calibrate 0.05 takes its threshold from the real images: 95 % of unseen real ones would pass all
scores together. A fixed limit prints the share of real images that it would refuse. --out holds
copies of the kept images, metadata.csv (ready for train.py), decisions.csv and filter.html.
--rating-page writes a page for any browser: an expert presses 1 (bad), 2 (usable) or 3 (good) and
saves ratings.csv. --fit learns a selector from ratings, unless they predict nothing or repeat who
rated or what.
"""

import base64
import contextlib
import hashlib
import html
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy import special, stats

from metrics import (
    BAD_SHARE,
    COLUMNS,
    CopyFinder,
    Flags,
    Row,
    add_comparison_flags,
    colour,
    command,
    content_hash,
    copy_file,
    data_set,
    existing_file,
    extract,
    fail,
    find_column,
    find_file,
    generator,
    grain,
    has_lpips,
    list_images,
    load_features,
    load_lpips,
    load_pixels,
    lpips_matrix,
    modality_of,
    name_key,
    nearest,
    note,
    number,
    page,
    pick_device,
    pick_resolution,
    read_split,
    read_table,
    run_script,
    same_unit,
    share_range,
    squared_distances,
    ssim_matrix,
    text_key,
    thumbnail,
    write_csv,
    write_file,
)

# ---------------------------------------------------------------- the judgement

NEIGHBOURS = 5  # a few odd real images, grey among photographs, must not excuse others


@dataclass
class Reference:
    """The real images as `measure_reference` measured them, and what follows for others."""

    pixels: torch.Tensor  # uint8 (n, 3, S, S)
    same_patient: np.ndarray  # bool (n, n)
    blocks: dict  # name -> Block
    comparisons: dict  # name -> function of pixels (N, 3, S, S) that gives distances (N, n)
    limits: list  # (name, largest score that passes, the flag that says so)
    real_scores: dict = field(default_factory=dict)  # name -> (n,), against other patients
    thresholds: dict = field(default_factory=lambda: {"": 1.0})  # label, "" for any -> largest rank
    copies: CopyFinder = None  # where copies are refused
    summary: list = field(default_factory=list)  # a line on each limit

    def judge(self, pixels, rows):
        """Why each image is refused ("" where it is kept), and its scores: name -> (N,).

        pixels: uint8 (N, 3, S, S). The first reason that applies is given. scores["nearest"] is the
        number of the nearest real image; scores["quality"], in (0, 1], falls with the worst rank.
        """
        vectors = {name: block.vectors(pixels) for name, block in self.blocks.items()}
        scores, nearest_real = self.score(pixels, vectors)
        is_copy = np.zeros(len(rows), bool)
        if self.copies is not None:
            copied, scores["similarity"], _ = self.copies.find(pixels)
            is_copy = scores["similarity"] >= self.copies.limit
            nearest_real = np.where(is_copy, copied, nearest_real)
        ranks = self.rank(scores)
        scores["nearest"] = nearest_real
        largest_rank = ranks.max(0)
        scores["quality"] = 1.001 - largest_rank
        reasons = [""] * len(rows)
        for i, row in enumerate(rows):
            broken = [flag for name, limit, flag in self.limits if scores[name][i] > limit]
            threshold = self.thresholds.get(text_key(row.label), self.thresholds[""])
            if is_copy[i]:
                reasons[i] = f"copy of a real image (similarity {scores['similarity'][i]:.2f})"
            elif broken:
                reasons[i] = broken[0]
            elif largest_rank[i] > threshold:
                worst = list(self.real_scores)[ranks[:, i].argmax()]
                reasons[i] = f"{worst} unlike the real images"
        return reasons, scores

    def score(self, pixels, vectors, forbidden=False):
        """Scores of pixels (N, 3, S, S), name -> (N,), large is bad; numbers of the nearest, (N,).

        vectors: name of a block -> (N, D). forbidden: bool (N, n), real images not to compare with.
        """
        count = min(NEIGHBOURS, (~self.same_patient).sum(1).min())
        scores = {}
        for name, block in self.blocks.items():
            squares = squared_distances(vectors[name], block.real)
            squares = np.where(forbidden, np.inf, squares)
            scores[name] = np.sqrt(np.partition(squares, count - 1, axis=1)[:, count - 1])
            if name == "texture":
                nearest_real = squares.argmin(1)
        for name, distances in self.comparisons.items():
            _, scores[name] = nearest(distances(pixels), forbidden)
        return scores, nearest_real

    def rank(self, scores):
        """Ranks among the real images' scores, (names, N): (1 + how many are smaller) / (n + 1)."""
        ranks = []
        for name, real in self.real_scores.items():
            smaller = np.searchsorted(np.sort(real), scores[name])
            ranks.append((1 + smaller) / (len(real) + 1))
        return np.stack(ranks)


def measure_reference(
    rows,
    pixels,
    device,
    calibrate=None,
    max_lpips=None,
    min_ssim=None,
    drop_copies=False,
    features="texture",
    lpips="auto",
    batch_size=32,
    precision="auto",
):
    """Measure the real images once, so that others can be judged against them: a Reference.

    rows, pixels: as load_pixels gives, uint8 (n, 3, S, S), S >= 64. calibrate: refuse what looks
    less real than all but this share of real images. max_lpips, min_ssim: limits to the nearest.
    Real images that are too few for that, or all of one patient, are an error.
    """
    network = load_features(features, device)

    def texture_of(images):
        return extract(images, network, device, batch_size, precision)

    blocks = {
        "texture": Block(texture_of, pixels, robust_scale),
        "colour": Block(colour_and_layout, pixels, colour_scale),
        "grain": Block(grain, pixels, partial(robust_scale, floor=0.2)),  # of logarithms: a fifth
    }
    vectors = {name: block.real for name, block in blocks.items()}
    squares = squared_distances(vectors["texture"], vectors["texture"])
    same_patient = same_unit([row.group for row in rows])
    same_patient |= squares <= 1e-6 * np.median(squares)  # stored twice
    if same_patient.all(1).any():
        fail("--reference: all its images are of one patient; it takes several")
    comparisons, limits = compare_pairs(pixels, device, max_lpips, min_ssim, lpips, batch_size)
    reference = Reference(pixels, same_patient, blocks, comparisons, limits)
    reference.real_scores, _ = reference.score(pixels, vectors, same_patient)
    for name, limit, flag in limits:
        refused = np.mean(reference.real_scores[name] > limit)
        reference.summary.append(f"{flag} would refuse {refused:.0%} of the real images")
    if drop_copies:
        reference.copies = CopyFinder(pixels, [row.group for row in rows])
    if calibrate is not None:
        set_thresholds(reference, rows, calibrate)
    return reference


def compare_pairs(real, device, max_lpips, min_ssim, lpips, batch_size):
    """The comparisons and limits of a Reference by LPIPS, if asked for or there, and by SSIM."""
    comparisons = {}
    limits = []
    if lpips == "auto":
        lpips = "alex" if max_lpips is not None or has_lpips("alex") else "none"
    if lpips != "none":
        network = load_lpips(lpips, device)
        comparisons["lpips"] = partial(
            lpips_matrix, network=network, device=device, batch_size=batch_size, others=real
        )
    if max_lpips is not None:
        limits.append(("lpips", max_lpips, f"--max-lpips {max_lpips:g}"))
    if min_ssim is not None:
        comparisons["dissimilarity"] = lambda pixels: 1 - ssim_matrix(pixels, real, device)
        limits.append(("dissimilarity", 1 - min_ssim, f"--min-ssim {min_ssim:g}"))
    return comparisons, limits


def set_thresholds(reference, rows, alpha):
    """The largest rank that passes: of any image, and of each label with enough real images."""
    worst = reference.rank(reference.real_scores).max(0)
    reference.thresholds[""] = conformal_threshold(worst, alpha)
    if np.isinf(reference.thresholds[""]):
        fail(f"--calibrate {alpha:g}: {len(rows)} real images are too few, see --reference")
    text = f"calibrated on {len(rows)} real images by {', '.join(reference.real_scores)}"
    reference.summary.append(f"{text}: about {1 - alpha:.0%} of unseen real ones would pass")
    labels = np.array([text_key(row.label) for row in rows])
    for label in sorted(set(labels) - {""}):
        threshold = conformal_threshold(worst[labels == label], alpha)
        if np.isfinite(threshold):
            reference.thresholds[label] = threshold
            reference.summary.append(f'label "{label}" has its own threshold')


def conformal_threshold(ranks, alpha):
    """The rank that 1 - alpha of unseen images stay within; infinite for too few ranks (n,)."""
    place = int(np.ceil((1 - alpha) * (len(ranks) + 1) - 1e-9))
    if place > len(ranks):
        return np.inf
    return np.sort(ranks)[place - 1]


# ---------------------------------------------------------------- three blocks of descriptors


class Block:
    """Descriptors of one kind: vectors (N, D) in units of the real images' spread."""

    def __init__(self, describe, real_pixels, make_scale):
        self.describe = describe
        descriptors = describe(real_pixels)
        self.scale = make_scale(descriptors)
        self.real = self.scale(descriptors)

    def vectors(self, pixels):
        return self.scale(self.describe(pixels))


def robust_scale(real, floor=1e-6):
    """A function: descriptors less the real ones' median, over their median absolute deviation.

    floor: the least deviation, so that what hardly differs among real images decides nothing.
    """
    middle = np.median(real, axis=0)
    spread = 1.4826 * np.median(np.abs(real - middle), axis=0)
    spread = np.maximum(spread, max(floor, 0.2 * np.median(spread)))
    return lambda descriptors: (descriptors - middle) / spread


def colour_and_layout(pixels):
    """uint8 (N, 3, S, S) -> (N, 104): `colour`, and 8 x 8 pixels, made symmetric and of length 1.

    Texture sees neither a colour nor that a film is a negative.
    """
    parts = [F.adaptive_avg_pool2d(part.float(), 8) for part in pixels.split(64)]
    small = torch.cat(parts).double()
    small = (small + small.flip(3))[..., :4].flatten(1)
    layouts = F.normalize(small - small.mean(1, keepdim=True))
    return np.hstack([colour(pixels), layouts.numpy()])


def colour_scale(real):
    """The scale of colour_and_layout: a colour counts as at most three deviations.

    Otherwise one tinted film among grey ones would hide all differences of layout.
    """
    tint_scale = robust_scale(real[:, :8], floor=0.01)  # two or three grey levels
    layout_spread = 0.8 * np.linalg.norm(real[:, 8:].std(0)) + 1e-6

    def scale(vectors):
        tint = 3 * np.tanh(tint_scale(vectors[:, :8]) / 3) / 8**0.5
        return np.hstack([tint, vectors[:, 8:] / layout_spread])

    return scale


# ---------------------------------------------------------------- a selector, learnt from ratings

FORMAT = "medlora-selector-2"  # the key of the settings in the file's header
BLOCKS = (368, 8, 11)  # numbers of texture, colour and grain
ARRAYS = ("mean", "spread", "quality_weights", "class_weights")


@dataclass
class Selector:
    """What experts' ratings taught: is a picture good, and does it show its label?"""

    size: int  # pixels a side at which it judges
    good: int  # the least rating of a good picture
    min_quality: float
    modalities: list  # those that were rated
    classes: list  # the labels that it tells apart
    warnings: list  # what spoke against it
    measured: dict  # how well it predicts the ratings of images left out
    mean: np.ndarray  # (D,), D = sum(BLOCKS)
    spread: np.ndarray  # (D,)
    quality_weights: np.ndarray  # (D + 1, 1), the last is the intercept
    class_weights: np.ndarray  # (D + 1, classes)

    def judge(self, pixels, rows, min_quality=None, min_alignment=None):
        """Why each image is refused ("" where it is kept), and its scores, (N,) each, in [0, 1].

        quality: the probability that an expert calls it good; alignment: that it shows its row's
        label (else caption), NaN where that is unknown.
        """
        if min_quality is None:
            min_quality = self.min_quality
        features = (describe(pixels) - self.mean) / self.spread
        quality = special.expit(predict(features, self.quality_weights))[:, 0]
        chances = special.expit(predict(features, self.class_weights))
        alignment = np.full(len(rows), np.nan)
        reasons = [""] * len(rows)
        for i, row in enumerate(rows):
            name = name_of(row)
            if name in self.classes:
                alignment[i] = chances[i, self.classes.index(name)] / chances[i].sum()
            if quality[i] < min_quality:
                reasons[i] = f"quality {quality[i]:.2f} below {min_quality:.2f}"
            elif min_alignment is not None and not alignment[i] >= min_alignment:
                reasons[i] = f"alignment {alignment[i]:.2f} below {min_alignment:.2f}"
        return reasons, {"quality": quality, "alignment": alignment}

    def check_rows(self, rows, min_alignment=None):
        """Fail for a modality that was not rated or, with min_alignment, for an unknown label."""
        for row in rows:
            modality = text_key(modality_of(row))
            if len(self.modalities) > 1 and modality not in self.modalities:
                rated = ", ".join(self.modalities)
                fail(f"the selector was fitted on {rated}, not on {modality or 'no modality'}")
            name = name_of(row)
            if min_alignment is not None and name not in self.classes:
                fail(f'--min-alignment: the selector knows no label "{name}"; --fit --reference')


def name_of(row):
    """What an image shows by its label, else by its caption."""
    return text_key(row.label or row.caption)


def describe(pixels):
    """The three blocks of descriptors of uint8 pixels (N, 3, S, S): float64 (N, D)."""
    texture = extract(pixels, load_features("texture", "cpu"), "cpu")
    return np.hstack([texture, colour(pixels), grain(pixels)])


def predict(features, weights):
    """Logits (N, m) by weights (D + 1, m) of `fit_logistic`."""
    return features @ weights[:-1] + weights[-1]


def save_selector(path, selector):
    """Write safetensors with all settings as JSON under one key of the header; no paths."""
    settings = asdict(selector)
    arrays = {name: np.float32(settings.pop(name)) for name in ARRAYS}
    write_file(path, save(arrays, {FORMAT: json.dumps(settings)}))


def load_selector(path):
    """A Selector that `fit` wrote; any other file is an error."""
    try:
        with safe_open(path, "np") as file:
            settings = json.loads(file.metadata()[FORMAT])
            arrays = {name: file.get_tensor(name).astype(float) for name in ARRAYS}
        return Selector(**settings, **arrays)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        fail(f"{path}: is not a selector of this version; filter.py --fit writes one")


# ---------------------------------------------------------------- which images stay

LIMITS = ("calibrate", "max_lpips", "min_ssim", "drop_copies")
REFERENCE_FLAGS = (*LIMITS, "features", "lpips", "batch_size", "precision")


def filter_images(args):
    """The main job: judge the generated images, copy those that stay, say why the others do not."""
    out = Path(args.out).resolve()
    check_folders(out, args)
    selector = load_selector(args.selector) if args.selector else None
    real_rows = list_real(args.reference, args)
    all_rows = list_images(args.generated)
    size = pick_size(selector, real_rows, all_rows, args)
    real_rows, real = load_pixels(real_rows, size)
    rows, pixels = load_pixels(all_rows, size)
    flags = {name: getattr(args, name) for name in REFERENCE_FLAGS}
    reference = measure_reference(real_rows, real, pick_device(args.device), **flags)

    mixed, wanted = plan_mix(len(rows), args)
    reasons, scores, summary = decide(reference, selector, rows, pixels, wanted, args)
    kept = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    write_decisions(out, real_rows, all_rows, rows, reasons, scores)
    body = report(rows, pixels, real, reasons, scores["nearest"], summary)
    write_file(out / "filter.html", page("What the filter kept", body))
    if not args.dry_run:
        copy_images(out, kept, mixed)
    print(*summary, f"kept {len(kept)} of {len(rows)} images: {args.out}", sep="\n")
    print_what_is_next(kept, mixed, args)


def print_what_is_next(kept, mixed, args):
    if not kept:
        print("nothing is kept: is --reference of the same kind? filter.html shows why")
    elif args.dry_run:
        print("nothing is copied: --dry-run")
    elif args.mix:
        share = len(kept) / (len(kept) + len(mixed))
        print(f"mixed with {len(mixed)} real images: {share:.0%} of all are generated")
        if any(row.label and not row.caption for row in mixed):
            print('some have a label and no caption: train with --prompt "… {labels}"')
        print("next: " + command("train.py", "--data", args.out))
    else:
        print("next: " + command("evaluate.py", args.reference, args.generated, args.out))


def check_folders(out, args):
    """--out must neither hold a data set, nor lie in one, nor hold other files."""
    for data in filter(None, (args.generated, args.reference, args.mix)):
        folder = Path(data).resolve()
        if folder in out.parents:
            fail(f"--out {args.out} lies in {data}: its images would be read again; give another")
        if not folder.is_dir():
            folder = folder.parent
        if out == folder or out in folder.parents:
            fail(f"--out {args.out} holds {data}: give another folder")
    if out.is_dir() and any(out.glob("[!.]*")) and not (out / "decisions.csv").is_file():
        fail(f"--out {args.out} holds files that are not of a filtering: give another folder")


def list_real(data, args):
    """The rows of a real set without those that --split keeps for testing."""
    rows = share_range(list_images(data, group_column=args.group_column))
    if args.split:
        read_split(rows, args.split)
    return [row for row in rows if row.split != "test"]


def pick_size(selector, real_rows, all_rows, args):
    """Pixels a side at which images are compared: the selector's, if there is one."""
    if not selector:
        return args.resolution or pick_resolution(real_rows, all_rows)
    if args.resolution not in (None, selector.size):
        fail(f"--resolution {args.resolution}: the selector judges at {selector.size} pixels")
    selector.check_rows(all_rows, args.min_alignment)
    return selector.size


def plan_mix(count, args):
    """The real rows to mix in, and how many of `count` generated images are wanted."""
    wanted = args.keep or count
    if not args.mix:
        return [], wanted
    mixed = list_real(args.mix, args)
    share = args.share or 25
    return mixed, min(wanted, round(share / (100 - share) * len(mixed)))


def decide(reference, selector, rows, pixels, wanted, args):
    """Reasons ("" keeps an image), scores, and lines that say what was done; sets row.quality."""
    reasons, scores = reference.judge(pixels, rows)
    summary = [f"all are compared at {pixels.shape[-1]} pixels a side", *reference.summary]
    if selector:
        for warning in selector.warnings:
            summary.append(f"the selector was written in spite of: {warning}")
        more, judged = selector.judge(pixels, rows, args.min_quality, args.min_alignment)
        reasons = [first or second for first, second in zip(reasons, more, strict=True)]
        scores.update(judged)
    for row, quality in zip(rows, scores["quality"], strict=True):
        row.quality = f"{quality:.4g}"
    vectors = reference.blocks["texture"].vectors(pixels)
    if args.drop_duplicates:
        refuse_duplicates(reference, reasons, rows, vectors, scores["quality"])
    passed = np.flatnonzero(np.array(reasons) == "")
    if len(passed) > wanted:
        best = best_and_diverse(vectors[passed], scores["quality"][passed], wanted)
        for i in set(passed) - set(passed[best]):
            reasons[i] = f"not among the best {wanted}"
    # without details: copy, --max-lpips, quality, duplicate, not among the best
    kinds = Counter(re.split(r" of | \(| \d", reason)[0] or "kept" for reason in reasons)
    summary.append("; ".join(f"{kind}: {count}" for kind, count in kinds.most_common()))
    return reasons, scores, summary


def refuse_duplicates(reference, reasons, rows, vectors, quality):
    """Of images nearer than real ones of two patients hardly ever are, refuse all but the best."""
    texture = reference.blocks["texture"].real
    _, apart = nearest(squared_distances(texture, texture), reference.same_patient)
    order = np.flatnonzero(np.array(reasons) == "")
    order = order[np.argsort(-quality[order], kind="stable")]
    near = squared_distances(vectors[order], vectors[order]) <= np.quantile(apart, 0.01)
    for place, i in enumerate(order):
        better = [j for j in order[:place][near[place, :place]] if not reasons[j]]
        if better:
            reasons[i] = f"duplicate of {rows[better[0]].file_name}"


def best_and_diverse(vectors, quality, count, given=()):
    """Numbers of `count` images of high quality in [0, 1], unlike one another and those `given`.

    The greedy mode of a determinantal point process (Chen et al. 2018) with the kernel
    q_i q_j exp(-|x_i - x_j|^2 / 2s), s the median squared distance. Ties go to the first.
    """
    squares = squared_distances(vectors[:500], vectors[:500])
    scale = np.median(squares[squares > 0]) if squares.any() else 1.0  # equal images tell none
    x = np.float32((vectors - vectors.mean(0)) / np.sqrt(2 * scale))
    gain = 2 * np.log(np.maximum(quality, 1e-6))
    remaining = np.ones(len(x), np.float32)  # variance that the chosen ones leave unexplained
    # of Cholesky's factor, a row for each chosen one
    factor = np.zeros((len(given) + count, len(x)), np.float32)
    chosen = list(given)
    for step in range(len(factor)):
        if step == len(chosen):
            chosen.append(int(np.argmax(gain + np.log(remaining))))
        i = chosen[step]
        kernel = np.exp(-squared_distances(x, x[[i]])[:, 0])
        factor[step] = (kernel - factor[:step, i] @ factor[:step]) / np.sqrt(remaining[i])
        remaining = np.maximum(remaining - factor[step] ** 2, 1e-6)
        gain[i] = -np.inf
    return chosen[len(given) :]


# ---------------------------------------------------------------- what is written


def name_below(folder, file_name):
    """A name below `folder`: tables may say ./a.png, /data/a.png or img\\a.png."""
    parts = PurePosixPath(file_name.replace("\\", "/")).parts
    return str(PurePosixPath(folder, *[part for part in parts if part not in ("/", "..")]))


def write_decisions(out, real_rows, all_rows, rows, reasons, scores):
    """decisions.csv: for each generated image whether it is kept, why not, and its scores."""
    names = [name for name in scores if name != "nearest"]
    judged = {}
    for i, row in enumerate(rows):
        real_name = real_rows[scores["nearest"][i]].file_name
        values = [f"{scores[name][i]:.6g}" for name in names]
        judged[id(row)] = [row.file_name, int(not reasons[i]), reasons[i], real_name, *values]
    lines = []
    for row in all_rows:
        unreadable = [row.file_name, 0, "unreadable", "", *[""] * len(names)]
        lines.append(judged.get(id(row), unreadable))
    write_csv(out / "decisions.csv", ["file", "kept", "reason", "nearest", *names], lines)


def copy_images(out, kept, mixed):
    """Copy images to `out`, write metadata.csv; generated ones that only the old one lists go."""
    folder = "generated" if mixed else ""
    entries = [(name_below(folder, row.file_name), row) for row in kept]
    entries += [(name_below("real", row.file_name), row) for row in mixed]
    header = ["file_name", "text", "label", "patient_id", "synthetic", "quality"]
    extra = {}  # the other columns of all tables, in order
    for _, row in entries:
        roles = [find_column(row.fields, role) for role in ("image", "caption", "label", "group")]
        for column in row.fields:
            if column not in roles and column.lower() not in header:
                extra[column] = True
    lines = []
    paths = {}
    for name, row in entries:
        if paths.setdefault(name, row.path) != row.path:  # a table may repeat an image
            fail(f"{row.path}: another image would be called {name} too; rename one")
        quality = getattr(row, "quality", "")  # real images have none
        values = [row.fields.get(column, "") for column in extra]
        synthetic = int(quality != "")
        lines.append([name, row.caption, row.label, row.group, synthetic, quality, *values])
    if (out / "metadata.csv").is_file():
        for old in read_table(out / "metadata.csv"):
            if old.get("synthetic") == "1" and old["file_name"] not in paths:
                (out / name_below("", old["file_name"])).unlink(missing_ok=True)
    for name, path in paths.items():
        copy_file(path, out / name)
    write_csv(out / "metadata.csv", header + list(extra), lines)


def report(rows, pixels, real, reasons, nearest_real, summary):
    """HTML: kept and refused images, each next to its nearest real image with the reason."""
    parts = [f"<p>{html.escape(line)}</p>" for line in summary]
    parts.append("<p>Each next to its nearest real image; of many only every n-th.</p>")
    parts.append('<div style="display:grid;gap:1rem;grid-template-columns:1fr 1fr">')
    kept = np.array(reasons) == ""
    for title, shown in (("Kept", np.flatnonzero(kept)), ("Refused", np.flatnonzero(~kept))):
        parts.append(f"<div><h2>{title}</h2>")
        for i in shown[:: 1 + len(shown) // 61]:
            pair = thumbnail(pixels[i]) + thumbnail(real[nearest_real[i]])
            caption = f"{html.escape(rows[i].file_name)}<br>{html.escape(reasons[i])}"
            parts.append(f'<figure><div class="grid">{pair}</div>')
            parts.append(f"<figcaption>{caption}</figcaption></figure>")
        parts.append("</div>")
    return "".join(parts) + "</div>"


def draw_order(count, seed, *key):
    """A permutation of range(count), int64, the same everywhere."""
    return torch.randperm(count, generator=generator(seed, *key)).numpy()


# ---------------------------------------------------------------- experts rate

RATING_COLUMNS = {  # role -> usual names
    "image": COLUMNS["image"],
    "rating": ("rating", "ratings", "score"),
    "expert_level": ("expert_level", "level"),
    "expert": ("expert", "rater", "reader"),
    "modality": ("modality",),
    "prompt": COLUMNS["caption"],
    "group": COLUMNS["group"],
    "guess": ("guess",),
    "real": ("real",),
    "sha256": ("sha256",),
}
NO_VALUE = ("-", "?", "na", "n/a", "#n/a", "nan", "none", "null")  # of R, Excel and pandas
SCALE_ENDS = (1, 2, 3, 5, 7, 10, 100)


@dataclass
class Rating:
    """What one expert said of one image."""

    image: str  # its path as the ratings file has it
    rating: int  # 1 bad, 2 usable, 3 good
    expert_level: float  # how much this expert's ratings count
    expert: str
    modality: str
    prompt: str
    group: str
    guess: str  # "real" or "generated", of a blind page
    real: str  # "1" or "0", of a blind page
    sha256: str  # of the image's file, "" where the ratings file has none
    path: str = ""  # absolute, "" where the image is not found


def read_ratings(paths, files=()):
    """All ratings of ratings files: [Rating]. Of one expert's ratings of an image the last counts.

    files: where to look for images that are not where they were.
    """
    by_hash = {content_hash(file): file for file in files}
    by_end = index_ends(files)
    ratings = {}
    repeated = []
    for path in paths:
        rows = read_rating_rows(path)
        find_images(rows, os.path.dirname(os.path.abspath(path)), by_hash, by_end)
        for row in rows:
            key = (row.path or row.image, row.expert)
            if key in ratings:
                repeated.append(f"{row.expert}'s of {row.image}")
            ratings[key] = row
    if repeated:
        count = len(repeated)
        note(f"{count} ratings replace earlier ones of the same expert, such as {repeated[0]}")
    if paths and not ratings:
        fail(f"{paths[0]}: no ratings in it")
    return list(ratings.values())


def read_rating_rows(path):
    """The rated rows of one file: [Rating], without the paths of their images."""
    records = read_table(path)
    names = list(records[0]) if records else []
    columns = {role: find_column(names, role, RATING_COLUMNS) for role in RATING_COLUMNS}
    needed = "a ratings file has at least the columns image_path and rating"
    if not columns["image"] or not columns["rating"]:
        fail(f"{path}: {needed}; this one has {', '.join(names) or 'no rows'}")
    for record in records:
        for name, text in record.items():
            if text_key(text) in NO_VALUE:
                record[name] = ""
    texts = [record[columns["rating"]] for record in records]
    ratings = []
    for line, record in enumerate(records, 2):
        row = {role: record.get(name, "") for role, name in columns.items()}
        if not row["rating"]:
            continue
        image = row["image"].replace("\\", "/")  # of Windows
        rating = read_number(row["rating"])
        level = read_number(row["expert_level"] or "3")
        wrong = ""
        if not image:
            wrong = f"names no image: {needed}"
        elif rating not in (1, 2, 3):
            wrong = f"rating must be 1, 2 or 3, not {row['rating'][:40]!r} (of {image[:200]})"
            wrong = f"{wrong}; {explain_scale(set(texts) - {''})}"
        elif not 1 <= level < np.inf:
            wrong = f"expert_level must be a number from 1, not {row['expert_level'][:40]!r}"
        if wrong:
            fail(f"{path}: row {line}: {wrong}")
        expert = row["expert"] or str(path)
        row |= {"image": image, "rating": int(rating), "expert_level": level, "expert": expert}
        ratings.append(Rating(**row))
    if "" in texts:
        count = f"{texts.count('')} of {len(texts)} rows"
        note(f"{path}: {count} have no rating and are skipped")
    return ratings


def read_number(text):
    """A number with a decimal point or comma; NaN for any other text."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return np.nan


def explain_scale(texts):
    """The ratings of a column that holds others than 1 to 3, and how to write them as such.

    Numbers are cut into thirds of the least usual scale that holds them all.
    """
    found = ", ".join(repr(text[:40]) for text in sorted(texts)[:11])
    values = [read_number(text) for text in texts]
    if not np.isfinite(values).all():
        return f"found {found}: write 1 for bad, 2 for usable, 3 for good"
    low = min(1, *values)
    high = min([end for end in SCALE_ENDS if end >= max(values)], default=max(values))
    third = (high - low) / 3
    return (
        f"found {found}: write 1 for those below {low + third:.3g}, 3 for those above "
        f"{high - third:.3g}, 2 for others, or the other way round where less is better"
    )


def ends_of(path):
    """A path and the ends of it, the longest first: a/b/c.png, b/c.png, c.png."""
    parts = Path(path).parts
    return [name_key("/".join(parts[start:])) for start in range(len(parts))]


def index_ends(paths):
    """End of a path -> the paths that have it."""
    by_end = defaultdict(set)
    for path in paths:
        for end in ends_of(path):
            by_end[end].add(path)
    return by_end


def find_images(ratings, folder, by_hash, by_end):
    """Set the paths of the images of a ratings file in a folder, "" where they are not found.

    An image with a SHA-256 is known by that. Another is where the file says, seen from its folder
    or from where the command runs; else, after a move, it is the file that has an end of its path
    which no other file and no other image has.
    """
    folders = (folder, os.getcwd())
    images_by_end = index_ends(rating.image for rating in ratings)
    for rating in ratings:
        rating.path = find_below(folders, rating.image)
        if rating.sha256:
            if rating.path:
                by_hash.setdefault(content_hash(rating.path), rating.path)
            rating.path = by_hash.get(rating.sha256.lower(), "")
        elif not rating.path:
            for end in ends_of(rating.image):
                paths = by_end[end] | {find_below(folders, end)} - {""}
                if len(paths) == len(images_by_end[end]) == 1:
                    rating.path = paths.pop()
                    break


def find_below(folders, name):
    """The file of this name in the first of the folders that has it, else ""."""
    for folder in folders:
        path = find_file(os.path.normpath(os.path.join(folder, name)))
        if os.path.isfile(path):
            return path
    return ""


def drop_missing(ratings):
    """The ratings of images that are found; more than 5 % of images missing is an error."""
    images = {rating.image: rating.path for rating in ratings}
    missing = sorted(image for image, path in images.items() if not path)
    if missing:
        count = f"{len(missing)} of {len(images)} rated images"
        message = f"{count} are not there as they were rated: {', '.join(missing[:5])}"
        if len(missing) > BAD_SHARE * len(images):
            fail(
                f"{message}: name the folder that holds them, as GENERATED, --blind or --reference;"
                " without the column sha256 they are found by name alone"
            )
        note(f"{message}: skipped")
    return [rating for rating in ratings if rating.path]


RATING_STYLE = """<style>:root{color-scheme:dark;--ink:#c9d1d9;--soft:#8b949e;--line:#30363d;
--paper:#05070a;--mark:#6cb0ff}h1{display:none}body{text-align:center;touch-action:manipulation}
#picture img{margin:.5rem auto;width:min(94vw,62vh)}
button,input,select{font:inherit;color:var(--ink);background:#161b22;border:1px solid var(--line);
border-radius:.4rem;padding:.6rem 1rem;margin:.2rem;min-height:3rem}
button[aria-pressed=true]{border-color:var(--mark);color:var(--mark)}
[hidden]{display:none!important}progress,#note{width:min(94vw,62vh)}
#guesses,#marks{display:inline-block}</style>"""
RATING_BODY = """<form id="start"><p>Your name <input id="name" required> <select id="level">
<option value="3">specialist<option value="2">resident<option value="1">student</select></p>
<button>Start</button></form>
<main id="rate" hidden><progress id="bar"></progress><div id="where" aria-live="polite"></div>
<div id="picture"></div><p id="text"></p>
<div id="guesses"><button data-key="r">real (r)</button>
<button data-key="g">generated (g)</button></div>
<div id="marks"><button data-key="1">1 bad</button><button data-key="2">2 usable</button>
<button data-key="3">3 good</button></div><input id="note" placeholder="note (n), Enter ends it">
<div><button data-key="u">undo (u)</button><button data-key="s">skip (s)</button>
<button id="save">save ratings.csv</button><button id="next">another rater</button></div></main>"""
RATING_SCRIPT = r"""<script>
const $ = id => document.getElementById(id), store = "medlora-" + PAGE;
const bytes = Uint8Array.from(atob(FACTS), c => c.charCodeAt(0));
const facts = JSON.parse(new TextDecoder().decode(bytes));
let state = null, safe = true;
function keep() {
  try { localStorage.setItem(store, JSON.stringify(state)); } catch { safe = false; }
}
function show() {
  const i = state.at, done = i >= facts.length, answer = state.answers[i] || {};
  const rated = Object.values(state.answers).filter(a => a.rating);
  $("start").hidden = true; $("rate").hidden = false;
  $("bar").max = facts.length; $("bar").value = i;
  $("where").textContent = (done ? "Done" : `${i + 1} of ${facts.length}`)
    + `, ${rated.length} rated` + (safe ? "" : "; this browser keeps nothing: save before closing");
  for (const id of ["picture", "text", "guesses", "marks", "note"])
    $(id).hidden = done || id == "guesses" && !BLIND;
  if (done) return;
  $("picture").innerHTML = IMAGES[i]; $("text").textContent = BLIND ? "" : facts[i][1];
  $("note").value = answer.comment || "";
  for (const b of document.querySelectorAll("[data-key]")) b.setAttribute("aria-pressed",
    b.dataset.key == answer.rating || b.dataset.key == (answer.guess || "-")[0]);
}
function press(key) {
  const i = state.at, done = i >= facts.length, answer = state.answers[i] || {};
  if (key == "u") {
    if (i) { state.at--; delete (state.answers[i - 1] || {}).rating; }
  } else if (done) return;
  else if (key == "s") { delete answer.rating; state.at++; }
  else if (key == "r" || key == "g") {
    if (BLIND) answer.guess = key == "r" ? "real" : "generated";
  } else { answer.rating = key; state.at++; }
  if (key != "u") state.answers[i] = answer;
  keep(); show();
}
function table() {
  const cell = t => /[",\n\r]/.test(t) ? '"' + String(t).replaceAll('"', '""') + '"' : t;
  const lines = facts.map((f, i) => { const a = state.answers[i] || {};
    return a.rating && [f[0], a.rating, f[2], state.level, f[1], state.name, f[3],
      a.comment || "", a.guess || "", f[4], f[5]]; }).filter(line => line);
  const header = "image_path,rating,modality,expert_level,prompt,expert,group,comment,guess,real,"
    + "sha256";
  return [header.split(","), ...lines].map(line => line.map(cell).join(",") + "\n").join("");
}
document.addEventListener("keydown", e => {
  const typing = e.target.id == "note" && e.key != "Enter" && e.key != "Escape";
  if (typing || e.target.id == "name") return;
  if (e.repeat || e.ctrlKey || e.metaKey || e.altKey || !state) return;
  const key = e.key == "Backspace" ? "u" : e.key.toLowerCase();
  if (e.target.id == "note") $("note").blur();
  else if (key == "n") $("note").focus();
  else if (/^[123usrg]$/.test(key)) press(key);
  else return;
  e.preventDefault();
});
for (const b of document.querySelectorAll("[data-key]"))
  b.onclick = () => { press(b.dataset.key); b.blur(); };
$("note").oninput = () => { (state.answers[state.at] ||= {}).comment = $("note").value; keep(); };
$("start").onsubmit = e => { e.preventDefault(); const name = $("name").value.trim();
  state = {name, level: $("level").value, at: 0, answers: {}}; keep(); show(); };
$("save").onclick = () => { const a = document.createElement("a");
  const text = "\ufeff" + table();  // spreadsheets take a file without this mark for another code
  a.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  a.download = "ratings.csv"; a.click(); };
$("next").onclick = () => { if (confirm("Is ratings.csv saved? This clears the page.")) {
  localStorage.removeItem(store); location.reload(); } };
try { state = JSON.parse(localStorage.getItem(store)); } catch { safe = false; }
if (state) show();
</script>"""


def write_rating_page(args):
    """A page with the images in it: keys 1 2 3, kept by the browser, saved as ratings.csv."""
    rows = list_images(args.generated)
    real_rows = list_real(args.blind, args) if args.blind else []
    files = [row.path for row in rows + real_rows]
    ratings = drop_missing(read_ratings(args.rated, files))
    rated = {content_hash(rating.path) for rating in ratings}
    size = args.resolution or pick_resolution(rows, real_rows)
    rows, pixels = load_pixels(rows, size)
    chosen = choose_images(rows, pixels, rated, args)
    real_rows = [row for row in real_rows if content_hash(row.path) not in rated]
    drawn = draw_order(len(real_rows), args.seed, "blind")[: max(1, round(len(chosen) / 4))]
    real_rows, real = load_pixels([real_rows[i] for i in drawn], size)

    facts = []
    images = []
    shown = torch.cat([pixels[chosen], real])
    shown_rows = [rows[i] for i in chosen] + real_rows
    for place in draw_order(len(shown), args.seed, "page"):
        row = shown_rows[place]
        is_real = int(place >= len(chosen))
        facts.append(facts_of(row, is_real, args.rating_page))
        # one encoding for all, so that none gives itself away
        images.append(thumbnail(shown[place], size, quality=95, subsampling=0))
    write_file(args.rating_page, page("Rate", rating_page(facts, images, bool(args.blind))))
    print(f"{args.rating_page}: {len(chosen)} generated, {len(real)} real images, {size} pixels")
    print("open it in a browser\nnext: " + command("filter.py", "--fit", "ratings.csv"))


def facts_of(row, is_real, page_path):
    """What a page knows of an image: path, caption, modality, group, is real, SHA-256.

    The path is as seen from the page's folder, so that both can be moved together.
    """
    path = row.path
    with contextlib.suppress(ValueError):  # on another drive of Windows
        path = os.path.relpath(path, os.path.dirname(os.path.abspath(page_path)))
    path = Path(path).as_posix()
    return [path, row.caption, modality_of(row), row.group, is_real, content_hash(row.path)]


def rating_page(facts, images, blind):
    """The body of a rating page; facts: those of each image, see facts_of."""
    facts = json.dumps(facts).encode()
    constants = {
        "PAGE": hashlib.sha256(facts).hexdigest()[:16],
        "BLIND": blind,
        "FACTS": base64.b64encode(facts).decode(),
        "IMAGES": images,
    }
    parts = [RATING_STYLE, RATING_BODY]
    for name, value in constants.items():
        parts.append(f"<script>const {name} = {json.dumps(value)};</script>\n")
    return "".join(parts) + RATING_SCRIPT


def choose_images(rows, pixels, rated, args):
    """The numbers of the images to rate, all or --suggest; rated: hashes of rated images' files."""
    done = [i for i, row in enumerate(rows) if content_hash(row.path) in rated]
    count = len(rows) - len(done)
    if args.suggest:
        blind = args.suggest // 5 if args.blind else 0
        count = min(count, args.suggest - blind)
    if not 0 < count <= 500:
        fail(f"{args.generated}: {count} images to rate (--suggest picks some)")
    if not args.suggest:
        return [i for i in range(len(rows)) if i not in done]
    worth = np.ones(len(rows))
    if args.selector:
        selector = load_selector(args.selector)
        _, scores = selector.judge(load_pixels(rows, selector.size)[1], rows)
        worth = 1 - np.abs(scores["quality"] - 0.5)  # most where it is least sure
    vectors = describe(pixels)
    return best_and_diverse(vectors / (vectors.std(0) + 1e-9), worth, count, done)


def kappa(first, second):
    """Quadratically weighted kappa of two raters' ratings of the same images, (n,) each."""
    by_chance = np.square(np.subtract.outer(first, second)).sum() / max(1, len(first))
    if by_chance == 0:
        return np.nan
    return 1 - np.square(first - second).sum() / by_chance


def print_agreement(args):
    """Print how far raters agree, and whether they can tell real from generated."""
    ratings = {}
    guesses = {}
    for rating in read_ratings(args.agreement):
        ratings.setdefault(rating.expert, {})[rating.path or rating.image] = rating.rating
        if rating.real and rating.guess:
            counts = guesses.setdefault(rating.expert, np.zeros((2, 2), int))
            is_generated = int(read_number(rating.real) != 1)
            counts[is_generated, int(text_key(rating.guess) != "real")] += 1
    if len(ratings) < 2 and not guesses:
        fail("--agreement: one rater and no guesses: nothing to compare")
    for (a, first), (b, second) in itertools.combinations(ratings.items(), 2):
        shared = [path for path in first if path in second]
        a_ratings = np.array([first[path] for path in shared])
        b_ratings = np.array([second[path] for path in shared])
        gen = generator(args.seed, "kappa", a, b)
        print(f"{a}, {b}: {describe_agreement(a_ratings, b_ratings, gen)}")
    for rater, counts in guesses.items():
        p = stats.fisher_exact(counts).pvalue
        (hits, misses), (fooled, caught) = counts
        print(
            f"{rater}: real taken for real {hits}, for generated {misses}; generated taken for "
            f"real {fooled}, for generated {caught}; p {p:.2g} of guessing"
        )


def describe_agreement(first, second, gen):
    """Weighted kappa of two raters' ratings, (n,) each, with its bootstrap interval, in words."""
    count = len(first)
    value = kappa(first, second)
    if np.isnan(value):
        return f"one and the same rating for all {count} shared images: no kappa"
    draws = torch.randint(count, (1000, count), generator=gen).numpy()
    values = [kappa(first[draw], second[draw]) for draw in draws]
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return f"weighted kappa {value:.2f}, 95 % {low:.2f} to {high:.2f}, {count} shared images"


# ---------------------------------------------------------------- ratings teach a selector

PENALTIES = np.logspace(-1, 1.5, 6)  # the features of an image have a squared length near 3
PERMUTATIONS = 199


@dataclass
class Rated:
    """The rated images, each once however many experts rated it."""

    rows: list
    labels: np.ndarray  # (n, 1), the share of its ratings that call it good, by their levels
    weights: np.ndarray  # (n,), the sum of those levels
    groups: np.ndarray  # (n,), patients, else prompts: whole ones are left out of a fit
    modalities: np.ndarray  # (n,)


def fit(args):
    """Learn a selector from ratings; write it only where it predicts them better than chance."""
    rows = list_images(args.generated) if args.generated else []
    real_rows = list_real(args.reference, args) if args.reference else []
    files = [row.path for row in rows + real_rows]
    ratings = drop_missing(read_ratings(args.fit, files))
    good = args.good or 3
    rated = gather(ratings, good)
    if len(set(rated.groups)) < 2:
        fail(f"{args.fit[0]}: rates one image or group alone; others are needed to test it on")
    warnings = objections(ratings, rated)
    refuse_fit(warnings, args)
    size = args.resolution or pick_resolution(rated.rows)
    _, pixels = load_pixels(rated.rows, size, strict=True)
    descriptors = describe(pixels)
    mean = descriptors.mean(0)
    # by the root of its size, a block of many descriptors weighs no more than one of few
    spread = np.maximum(descriptors.std(0), 1e-6) * np.sqrt(np.repeat(BLOCKS, BLOCKS))
    weights, measured = fit_quality((descriptors - mean) / spread, rated, args.seed)
    low, high = measured["interval"]
    figures = f"AUROC {measured['auroc']:.2f}, 95 % {low:.2f} to {high:.2f}, p {measured['p']:.2g}"
    if not (measured["p"] <= 0.05 and low > 0.5):
        warnings.append(f"the ratings do not predict quality better than chance ({figures})")
    refuse_fit(warnings, args)
    print(f"{len(ratings)} ratings of {len(rated.rows)} images: {figures}")
    classes, class_weights = fit_classes(real_rows, size, mean, spread, args.seed)
    modalities = sorted(set(rated.modalities))
    settings = (size, good, 0.5, modalities, classes, warnings, measured)
    save_selector(args.out, Selector(*settings, mean, spread, weights, class_weights))
    print("next:", command("filter.py", "GENERATED", "--reference", "REAL", "--selector", args.out))


def refuse_fit(warnings, args):
    """Stop for what speaks against a selector, unless --force."""
    if warnings and not args.force:
        fail(f"no selector written: {'; '.join(warnings)} (--force writes it and marks it)")


def gather(ratings, good):
    """The Rated images of ratings; good: the least rating of a good one."""
    by_path = {}
    for rating in ratings:
        by_path.setdefault(rating.path, []).append(rating)
    labels = []
    weights = []
    for same in by_path.values():
        levels = [rating.expert_level for rating in same]
        labels.append([np.average([rating.rating >= good for rating in same], weights=levels)])
        weights.append(sum(levels))
    firsts = [same[0] for same in by_path.values()]
    groups = list(by_path)
    for name in ("prompt", "group"):
        if len({getattr(rating, name) for rating in firsts}) >= 5:
            groups = [getattr(rating, name) or rating.path for rating in firsts]
    modalities = [text_key(rating.modality) for rating in firsts]
    rows = [Row(path, path) for path in by_path]
    return Rated(rows, *map(np.array, (labels, weights, groups, modalities)))


def objections(ratings, rated):
    """What speaks against fitting these ratings, before an image is looked at: [str]."""
    found = []
    values = [rating.rating for rating in ratings]
    for name in ("modality", "expert", "expert_level", "prompt", "real"):
        v = cramers_v(values, [getattr(rating, name) for rating in ratings])
        if v > 0.6:
            found.append(f"the ratings may encode {name} rather than quality (Cramer's V {v:.2f})")
    count = len(rated.rows)
    good = (rated.labels >= 0.5).sum()
    if count < 30:
        found.append(f"{count} rated images are fewer than 30")
    if min(good, count - good) < 8:
        found.append(f"{good} images are good and {count - good} are not: 8 of each are needed")
    return found


def cramers_v(first, second):
    """How far one name tells the other, 0 to 1, corrected for chance (Bergsma 2013)."""
    n = len(first)
    counts = stats.contingency.crosstab(first, second).count
    chi2 = stats.chi2_contingency(counts, correction=False).statistic
    sides = np.array(counts.shape)
    phi = max(0, chi2 / n - np.prod(sides - 1) / (n - 1))
    least = min(sides - (sides - 1) ** 2 / (n - 1)) - 1
    return np.sqrt(phi / least) if least > 1e-9 else 0.0


def fit_quality(features, rated, seed):
    """Weights (D + 1, 1) of a calibrated logistic regression, and how well it predicts: a dict.

    Permutations of the ratings, within modalities, go through the whole cross-validation and the
    choice of the penalty. The AUROC's interval is a bootstrap over groups.
    """
    labels = np.tile(rated.labels, 1 + PERMUTATIONS)
    for column in range(1, 1 + PERMUTATIONS):
        for name in np.unique(rated.modalities):
            same = np.flatnonzero(rated.modalities == name)
            order = draw_order(len(same), seed, "permuted", column, name)
            labels[same, column] = rated.labels[same[order], 0]
    logits, penalties = cross_validate(features, labels, rated.weights, rated.groups, seed)
    good = labels >= 0.5
    values = auroc(logits, good, rated.modalities)
    weights = fit_logistic(features, rated.labels, rated.weights, penalties[0])
    # the logits of images left out calibrate it (Platt 1999)
    slope, offset = fit_logistic(logits[:, :1], rated.labels, rated.weights, 0.1)[:, 0]
    weights *= slope
    weights[-1] += offset
    return weights, {
        "auroc": values[0],
        "interval": auroc_interval(logits[:, :1], good[:, :1], rated, seed),
        "p": (1 + (values[1:] >= values[0]).sum()) / (1 + PERMUTATIONS),
    }


def auroc_interval(logits, good, rated, seed):
    """95 % of the AUROC over 500 draws of the groups, each with all its images."""
    members = [np.flatnonzero(rated.groups == name) for name in np.unique(rated.groups)]
    size = (500, len(members))
    draws = torch.randint(len(members), size, generator=generator(seed, "interval"))
    values = []
    for draw in draws.tolist():
        drawn = np.concatenate([members[n] for n in draw])
        values.append(auroc(logits[drawn], good[drawn], rated.modalities[drawn])[0])
    return np.nanpercentile(values, (2.5, 97.5)).tolist()


def auroc(scores, good, strata):
    """Share of (good, bad) pairs of one stratum that the scores order right, ties half: (m,).

    scores, good: (n, m); strata: (n,). NaN where there is no such pair.
    """
    right, pairs = np.zeros((2, scores.shape[1]))
    for stratum in np.unique(strata):
        inside = strata == stratum
        positive = good[inside].sum(0)
        ranks = stats.rankdata(scores[inside], axis=0)
        right += (ranks * good[inside]).sum(0) - positive * (positive + 1) / 2
        pairs += positive * (inside.sum() - positive)
    return right / np.where(pairs > 0, pairs, np.nan)


def cross_validate(features, labels, weights, groups, seed):
    """Predict each column of labels (n, m) five-fold by its best penalty, whole groups left out.

    Returns logits (n, m) and the penalties (m,).
    """
    names, numbers = np.unique(groups, return_inverse=True)
    folds = draw_order(len(names), seed, "folds")[numbers] % 5
    u, scale, _ = np.linalg.svd(features, full_matrices=False)
    x = u * scale  # the same fit in at most n dimensions
    logits = np.zeros((len(PENALTIES), *labels.shape))
    for k, penalty in enumerate(PENALTIES):
        for fold in np.unique(folds):
            train = folds != fold
            fitted = fit_logistic(x[train], labels[train], weights[train], penalty)
            logits[k, ~train] = predict(x[~train], fitted)
    losses = np.logaddexp(0, logits) - labels * logits
    best = (losses * weights[:, None]).sum(1).argmin(0)
    return np.take_along_axis(logits, best[None, None], 0)[0], PENALTIES[best]


def fit_logistic(features, labels, weights, penalty):
    """Logistic regressions of each column of labels (n, m) in [0, 1]: weights (D + 1, m).

    Minimises the weighted log loss + penalty / 2 |w|^2; the last weight, the intercept, is free.
    Newton's method with the bound X'X / 4 on the Hessian (Boehning and Lindsay 1988), so that one
    inverse serves all columns and steps.
    """
    x = np.hstack([features, np.ones((len(features), 1))])
    ridge = np.full((x.shape[1], 1), penalty)
    ridge[-1] = 1e-6
    weights = (weights / weights.mean())[:, None]
    inverse = np.linalg.inv(x.T @ (weights * x) / 4 + np.diag(ridge[:, 0]))
    fitted = np.zeros((x.shape[1], labels.shape[1]))
    for _ in range(500):
        residuals = weights * (labels - special.expit(x @ fitted))
        step = inverse @ (x.T @ residuals - ridge * fitted)
        fitted += step
        if np.abs(step).max() < 1e-3:
            break
    return fitted


def fit_classes(rows, size, mean, spread, seed):
    """One logistic regression for each label of 8 real images or more: (labels, (D + 1, m))."""
    counts = Counter(name_of(row) for row in rows)
    classes = sorted(name for name in counts if name and counts[name] >= 8)
    rows, pixels = load_pixels([row for row in rows if name_of(row) in classes], size)
    groups = np.array([row.group or row.path for row in rows])
    if len(classes) < 2 or len(set(groups)) < 2:
        return [], np.zeros((len(mean) + 1, 0))
    features = (describe(pixels) - mean) / spread
    labels = np.array([np.equal(classes, name_of(row)) for row in rows], float)
    ones = np.ones(len(rows))
    logits, penalties = cross_validate(features, labels, ones, groups, seed)
    right = np.mean(logits.argmax(1) == labels.argmax(1))
    print(f"{len(classes)} labels; {right:.0%} of real images left out look most like their own")
    return classes, fit_logistic(features, labels, ones, np.median(penalties))


# ---------------------------------------------------------------- flags


def parse_args(argv=None):
    parser = Flags(__doc__)
    add = parser.add_argument
    add("generated", nargs="?", type=data_set, metavar="GENERATED", help="folder or table")
    add("--reference", type=data_set, help="the real images, folder or table")
    add("--out", help="default: runs/kept, with --fit selector.safetensors")
    share = number(0.0, 1.0)
    add = parser.add_argument_group("what stays").add_argument
    add("--calibrate", type=number(0.0001, 0.9), help="share of real ones refused")
    add("--max-lpips", type=number(0.0, 1e6), help="largest distance to the nearest real image")
    add("--min-ssim", type=number(-1.0, 1.0), help="least similarity to the nearest real image")
    add("--drop-copies", action="store_true", help="refuse copies of real images")
    add("--drop-duplicates", action="store_true", help="of near-equal images keep the best")
    add("--selector", type=existing_file, help="judge by what --fit wrote")
    add("--min-quality", type=share, help="probability of a good rating (default: the selector's)")
    add("--min-alignment", type=share, help="probability that the image shows its label")
    add("--keep", type=number(1, 10**9), help="only the best and most diverse N")
    add = parser.add_argument_group("how it is left").add_argument
    add("--dry-run", action="store_true", help="write decisions.csv and filter.html, copy nothing")
    add("--mix", type=data_set, help="put these real images with the kept ones")
    add("--share", type=number(0.1, 99.9), help="per cent generated in a --mix (default: 25)")
    rate = parser.add_argument_group("experts' ratings")
    add = rate.add_argument
    add("--suggest", type=number(1, 500), help="only N, those that teach most")
    add("--blind", type=data_set, help="mix real images in, one in five")
    add("--rated", nargs="+", type=existing_file, default=[], metavar="CSV", help="leave these out")
    add("--good", type=int, choices=[2, 3], help="least rating of a good image (default: 3)")
    add("--force", action="store_true", help="write a selector in spite of objections, marked")
    add = rate.add_mutually_exclusive_group().add_argument
    add("--rating-page", help="write a page on which an expert rates GENERATED")
    add("--agreement", nargs="+", type=existing_file, metavar="CSV", help="how far raters agree")
    add("--fit", nargs="+", type=existing_file, metavar="CSV", help="learn a selector from ratings")
    how = parser.add_argument_group("comparison")
    how.add_argument("--features", default="texture", help="texture, inception, HUB-ID or PATH")
    add_comparison_flags(how)
    args = parser.parse_args(argv)
    check_args(args)
    if args.out is None:
        args.out = "selector.safetensors" if args.fit else "runs/kept"
    return args


def check_args(args):
    """What flags mean together."""
    filters = not (args.rating_page or args.agreement or args.fit)
    if not args.generated and (args.rating_page or filters):
        fail("give GENERATED, a folder of images")
    if filters and not args.reference:
        fail("give --reference, the real images")
    needs = {
        "selector": ("min_quality", "min_alignment"),
        "mix": ("share",),
        "fit": ("good", "force"),
        "rating_page": ("suggest", "blind", "rated"),
    }
    for needed, names in needs.items():
        for name in names:
            if getattr(args, name) not in (None, False, []) and not getattr(args, needed):
                fail(f"--{name}: needs --{needed}".replace("_", "-"))
    if args.max_lpips is not None and args.lpips == "none":
        fail("--max-lpips: needs another --lpips than none")
    rules = (*LIMITS, "drop_duplicates", "selector", "keep", "mix")
    given = [getattr(args, name) for name in rules]
    if filters and all(value is None or value is False for value in given):
        fail("nothing to filter by: give --calibrate 0.05, --drop-copies, --selector or --keep")


def main(args):
    if args.fit:
        fit(args)
    elif args.agreement:
        print_agreement(args)
    elif args.rating_page:
        write_rating_page(args)
    else:
        filter_images(args)


if __name__ == "__main__":
    run_script(main, parse_args)
