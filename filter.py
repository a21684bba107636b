"""Keep the generated images that are as good as real ones, and say why the others are not.

    python filter.py runs/new --reference wounds/ --calibrate 0.05 --drop-copies --out runs/kept
    python filter.py runs/new --reference wounds/ --max-lpips 0.30 --min-ssim 0.40 --out runs/kept
    python filter.py runs/new --reference wounds/ --run runs/dfu --keep 50 --mix wounds/ --share 25
    python filter.py runs/new --rating-page rate.html --suggest 60 --blind wounds/
    python filter.py --agreement anna.csv ben.csv
    python filter.py --fit anna.csv ben.csv --reference wounds/ --out selector.safetensors
    python filter.py runs/new --reference wounds/ --selector selector.safetensors --keep 200

--calibrate 0.05 takes its limit from the real images: 95 % of unseen real ones would pass all
scores together. For --max-lpips and --min-ssim it says what share of real images they would refuse.
--out then holds copies of the kept images, metadata.csv (ready for train.py), README.md (a card
that names nobody), decisions.csv and filter.html. The images themselves stay where they are.
--rating-page writes a page for any browser: an expert presses 1 (bad), 2 (usable) or 3 (good) and
saves ratings-NAME.csv. --fit learns a selector from these ratings. It writes none if the ratings
predict no better than chance, or follow who rated or what was rated.
"""

import base64
import contextlib
import html
import itertools
import json
import os
import re
import textwrap
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import scipy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy import special

from metrics import (
    BAD_SHARE,
    COLUMNS,
    MISSING,
    CopyFinder,
    Flags,
    LabelCheck,
    Row,
    add_card_flags,
    add_comparison_flags,
    auroc,
    block_scale,
    colour,
    colour_and_layout,
    colour_scale,
    command,
    content_hash,
    copy_file,
    counts_table,
    cross_validate,
    data_set,
    draw_order,
    existing_file,
    extract,
    fail,
    find_column,
    find_file,
    fit_logistic,
    fit_square,
    flag_adder,
    generator,
    grain,
    grey_kind,
    in_grey,
    list_images,
    list_real,
    load_features,
    load_lpips,
    load_pixels,
    load_real,
    lpips_matrix,
    modality_of,
    near_duplicates,
    nearest,
    need_flags,
    note,
    number,
    page,
    pair,
    paragraph,
    pick_device,
    pick_resolution,
    predict,
    read_audit,
    read_run,
    read_table,
    read_text,
    reading_words,
    report_enlarged,
    resamples,
    resolve_auto,
    robust_scale,
    run_script,
    same_unit,
    shows_colour,
    square_side,
    squared_distances,
    ssim_matrix,
    table,
    text_key,
    thumbnail,
    write_card,
    write_csv,
    write_file,
)

# ---------------------------------------------------------------- the judgement

NEIGHBOURS = 5  # distance to the 5th: a few odd real images must not excuse others


@dataclass
class Reference:
    """The n real images as `measure_reference` measured them, and the limits for others."""

    same_patient: np.ndarray  # bool (n, n)
    blocks: dict  # name -> Block
    comparisons: dict  # name -> function of pixels (N, 3, S, S) that gives distances (N, n)
    limits: list  # (name, largest score that passes, the flag that says so)
    real_scores: dict = field(default_factory=dict)  # name -> (n,), against other patients
    threshold: float = 1.0  # the largest rank that passes
    copies: CopyFinder = None  # where copies are refused
    in_colour: np.ndarray = None  # (n,), of a grey kind those few that show a colour
    labels: LabelCheck = None  # where labels are checked
    summary: list = field(default_factory=list)  # a line on each limit

    def judge(self, pixels, rows):
        """Why each image is refused ("" where it is kept), and its scores: name -> (N,).

        pixels: uint8 (N, 3, S, S), S as of the reference. The first reason that applies is given.
        scores["nearest"]: number of the nearest real image; "quality": 1.001 minus the worst rank.
        """
        in_colour = np.zeros(len(rows), bool)
        if self.in_colour is not None:
            in_colour = shows_colour(pixels)
            pixels = in_grey(pixels)
        vectors = {name: block.vectors(pixels) for name, block in self.blocks.items()}
        scores, nearest_real = self.score(pixels, vectors)
        is_copy = np.zeros(len(rows), bool)
        if self.copies is not None:
            copied, scores["similarity"], _, is_copy = self.copies.find(pixels)
            nearest_real = np.where(is_copy, copied, nearest_real)
        ranks = self.rank(scores)
        scores["nearest"] = nearest_real
        largest_rank = ranks.max(0)
        scores["quality"] = 1.001 - largest_rank
        reasons = [""] * len(rows)
        for i in range(len(rows)):
            broken = [flag for name, limit, flag in self.limits if scores[name][i] > limit]
            if is_copy[i]:
                reasons[i] = f"copy of a real image (similarity {scores['similarity'][i]:.2f})"
            elif broken:
                reasons[i] = broken[0]
            elif in_colour[i] and self.threshold < 1:  # with --calibrate
                reasons[i] = "in colour, but the real images are grey (sample.py --grey)"
            elif largest_rank[i] > self.threshold:
                worst = list(self.real_scores)[ranks[:, i].argmax()]
                reasons[i] = f"{worst} unlike the real images"
        if self.labels:
            self.check_labels(vectors, rows, reasons, scores)
        return reasons, scores

    def check_labels(self, vectors, rows, reasons, scores):
        """Refuse images that look like another label than theirs; sets scores["label_p"]."""
        names = self.labels.names
        own, looks, p, is_other = self.labels.judge([vectors["texture"], vectors["colour"]], rows)
        scores["label_p"] = p
        for i in np.flatnonzero(is_other):
            text = f"looks like {names[looks[i]]}, not {names[own[i]]} (p {p[i]:.2g})"
            reasons[i] = reasons[i] or text

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
    """A Reference: measure the real images once, so that others can be judged against them.

    rows, pixels: as load_pixels gives, uint8 (n, 3, S, S), S >= 64. calibrate: in (0, 1), refuse
    what looks less real than all but this share of real images. max_lpips, min_ssim: limits to the
    nearest one. Too few real images, or all of one patient, are an error. Where hardly any real
    image has a colour, all are compared in grey.
    """
    pixels, in_colour = grey_kind(pixels)
    if max_lpips is not None and lpips == "auto":
        lpips = "alex"
    features, lpips = resolve_auto(features, lpips)
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
        fail("--reference: all images are of one patient; give images of several patients")
    comparisons, limits = compare_pairs(pixels, device, max_lpips, min_ssim, lpips, batch_size)
    reference = Reference(same_patient, blocks, comparisons, limits, in_colour=in_colour)
    reference.real_scores, _ = reference.score(pixels, vectors, same_patient)
    for name, limit, flag in limits:
        refused = np.mean(reference.real_scores[name] > limit)
        reference.summary.append(f"{flag} would refuse {refused:.0%} of the real images")
    if drop_copies:
        reference.copies = CopyFinder(rows, pixels, most=200)
    if calibrate is not None:
        set_threshold(reference, calibrate)
    return reference


def compare_pairs(real, device, max_lpips, min_ssim, lpips, batch_size):
    """The comparisons and limits of a Reference by LPIPS and SSIM; real: its pixels."""
    comparisons = {}
    limits = []
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


def set_threshold(reference, alpha):
    """Let a Reference refuse what ranks worse than all but this share of real images, in (0, 1)."""
    ranks = real_ranks(reference)
    reference.threshold = conformal_threshold(ranks, alpha)
    if np.isinf(reference.threshold):
        fail(f"--calibrate {alpha:g}: {len(ranks)} real images, needs {np.ceil(1 / alpha - 1):g}")
    text = f"calibrated on {len(ranks)} real images by {', '.join(reference.real_scores)}"
    reference.summary.append(f"{text}: about {1 - alpha:.0%} of unseen real ones would pass")


def real_ranks(reference):
    """The worst rank of each real image, (n,), in (0, 1]."""
    ranks = reference.rank(reference.real_scores).max(0)
    if reference.in_colour is not None:  # refused, too
        ranks[reference.in_colour] = ranks.max()
    return ranks


def learn_labels(reference, rows, seed):
    """Let a Reference check labels, where at least two labels have 8 real images or more each."""
    blocks = [reference.blocks[name].real for name in ("texture", "colour")]
    check = LabelCheck(rows, blocks, seed)
    if check.names:
        reference.labels = check
        names = textwrap.shorten(", ".join(check.names), 300, placeholder=" …")
        reference.summary.append(f"labels are checked: {names}")
        if check.sentences:
            text = "no image of these labels is refused for looking like the other"
            reference.summary.append(f"{' '.join(check.sentences)} So {text}.")


def conformal_threshold(ranks, alpha):
    """The rank that 1 - alpha of unseen images stay within (conformal); inf where ranks are few."""
    place = int(np.ceil((1 - alpha) * (len(ranks) + 1) - 1e-9))
    return np.sort(np.append(ranks, np.inf))[place - 1]


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


# ---------------------------------------------------------------- a selector, learnt from ratings

FORMAT = "medlora-selector-3"  # the key of the settings in the file's header
BLOCKS = (368, 8, 11)  # numbers of texture, colour and grain


@dataclass
class Selector:
    """What experts' ratings taught: is an image good, and does it show its label?"""

    size: int  # pixels a side at which it judges
    good: int  # the least rating of a good image, 2 or 3
    classes: list  # the labels that it tells apart
    measured: dict  # how well it predicts the ratings of images left out
    weights: np.ndarray  # (D + 1, 1 + classes): quality, classes; D = sum(BLOCKS), the intercept

    def judge(self, pixels, rows, min_quality=None, min_alignment=None):
        """Why each image is refused ("" where it is kept), and its scores, (N,) each, in [0, 1].

        quality: the probability that an expert calls it good; alignment: that it shows its row's
        label (else caption), NaN where that is unknown. min_quality: 0.5 where it is None.
        """
        if min_quality is None:
            min_quality = 0.5
        logits = predict(describe(pixels), self.weights)
        quality = special.expit(logits[:, 0])
        alignment = np.full(len(rows), np.nan)
        reasons = [""] * len(rows)
        for i, row in enumerate(rows):
            name = name_of(row)
            if name in self.classes:
                alignment[i] = special.softmax(logits[i, 1:])[self.classes.index(name)]
            if quality[i] < min_quality:
                reasons[i] = f"quality too low ({quality[i]:.2f} < {min_quality:g})"
            elif min_alignment is not None and not alignment[i] >= min_alignment:
                reasons[i] = f"alignment too low ({alignment[i]:.2f} < {min_alignment:g})"
        return reasons, {"quality": quality, "alignment": alignment}

    def check_rows(self, rows, min_alignment):
        """Fail if --min-alignment is given and an image has a label that the selector never saw."""
        for row in rows:
            name = name_of(row)
            if min_alignment is not None and name not in self.classes:
                fail(f'--min-alignment: --fit saw no label "{name}"; fit with --reference again')


def name_of(row):
    """What an image shows by its label, else by its caption."""
    return text_key(row.label or row.caption)


def describe(pixels):
    """The three blocks of descriptors of uint8 pixels (N, 3, S, S): float64 (N, sum(BLOCKS))."""
    texture = extract(pixels, load_features("texture", "cpu"), "cpu")
    return np.hstack([texture, colour(pixels), grain(pixels)])


def save_selector(path, selector):
    """Write safetensors with all settings as JSON under one key of the header; no paths."""
    settings = asdict(selector)
    arrays = {"weights": settings.pop("weights")}
    write_file(path, save(arrays, {FORMAT: json.dumps(settings)}))


def load_selector(path):
    """A Selector that `fit` wrote; any other file is an error."""
    try:
        with safe_open(path, "np") as file:
            settings = json.loads(file.metadata()[FORMAT])
            return Selector(**settings, weights=file.get_tensor("weights"))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        fail(f"{path}: is not a selector of this version; filter.py --fit writes one")


# ---------------------------------------------------------------- which images stay

LIMITS = ("calibrate", "max_lpips", "min_ssim", "drop_copies")
REFERENCE_FLAGS = (*LIMITS, "features", "lpips", "batch_size", "precision")


def filter_images(args):
    """The main job: judge the generated images, copy the kept ones, say why others are refused."""
    out = Path(args.out).resolve()
    check_folders(out, args)
    origin = read_origin(args)
    selector = load_selector(args.selector) if args.selector else None
    real_rows = list_training(args.reference, args)
    all_rows = list_images(args.generated)
    size = pick_size(selector, all_rows, args)
    print(f"reading {len(real_rows)} real and {len(all_rows)} generated images at {size} px")
    real_rows, real = load_real(real_rows, size, args)
    report_enlarged(real_rows, size, args.crop)
    rows, pixels = load_pixels(all_rows, size)
    flags = {name: getattr(args, name) for name in REFERENCE_FLAGS}
    reference = measure_reference(real_rows, real, pick_device(args.device), **flags)
    if not args.no_label_check:
        learn_labels(reference, real_rows, args.seed)

    mixed, wanted = plan_mix(len(rows), args)
    reasons, scores, summary = decide(reference, selector, rows, pixels, wanted, args)
    kept = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    write_decisions(out, real_rows, all_rows, rows, reasons, scores)
    body = report(rows, pixels, real_rows, real, reasons, scores, reference, summary)
    write_file(out / "filter.html", page("What the filter kept", body))
    if not args.dry_run:
        copy_images(out, kept, mixed)
        if kept:
            write_image_card(kept, mixed, real_rows, reasons, origin, args)
    print(*summary, f"kept {len(kept)} of {len(rows)} images: {args.out}", sep="\n")
    print_what_is_next(kept, mixed, args)


def print_what_is_next(kept, mixed, args):
    if not kept:
        print(
            "nothing is kept: is --reference of the same kind? If it is, train longer: the images "
            "are still unlike it. filter.html says why for each image"
        )
    elif args.dry_run:
        print("no image is copied: --dry-run")
    elif args.mix:
        share = len(kept) / (len(kept) + len(mixed))
        print(f"mixed with {len(mixed)} real images: {share:.0%} of all are generated")
        print("next: " + command("train.py", "--data", args.out))
    else:
        words = [args.reference, args.generated, args.out, *reading_words(args)]
        print("next: " + command("evaluate.py", *words))


def check_folders(out, args):
    """Fail if --out holds a data set, lies in one, or holds files of another origin."""
    for data in filter(None, (args.generated, args.reference, args.mix)):
        folder = Path(data).resolve()
        lies_inside = folder in out.parents  # of a table's folder it may
        if not folder.is_dir():
            folder = folder.parent
        if lies_inside or out in (folder, *folder.parents):
            fail(f"--out {args.out} lies in {data}, or {data} in it: give another folder")
    if out.is_dir() and any(out.glob("[!.]*")) and not (out / "decisions.csv").is_file():
        fail(f"--out {args.out}: holds files that filter.py did not write: give another folder")


def list_training(data, args):
    """The rows of a real set, with --run only those that it was trained on; none is an error."""
    if not args.run:
        return list_real(data, args)
    rows = list_real(data, args, read_run(args.run).get("prompt"))
    training = [row for row in rows if row.split == "train"]
    if not training:
        fail(f"--run {args.run}: was trained on none of the images of {data}")
    note(f"{data}: of {len(rows)} images, {len(training)} are used: {args.run} was trained on them")
    return training


def pick_size(selector, all_rows, args):
    """Pixels a side at which images are compared: the selector's, if any; another is an error."""
    if not selector:
        return args.resolution or pick_resolution(all_rows)
    if args.resolution not in (None, selector.size):
        fail(f"--resolution {args.resolution}: the selector needs {selector.size} px; give that")
    selector.check_rows(all_rows, args.min_alignment)
    return selector.size


def plan_mix(count, args):
    """The real rows to mix in, and how many of `count` generated images may stay."""
    wanted = args.keep or count
    if not args.mix:
        return [], wanted
    mixed = list_training(args.mix, args)
    share = args.share or 25
    return mixed, min(wanted, round(share / (100 - share) * len(mixed)))


def decide(reference, selector, rows, pixels, wanted, args):
    """Reasons ("" keeps an image), scores, and lines that say what was done; sets row.quality."""
    reasons, scores = reference.judge(pixels, rows)
    summary = [f"all images are compared at {pixels.shape[-1]} px", *reference.summary]
    unknown = sum(np.isnan(scores.get("label_p", [])))
    if unknown:
        summary.append(f"{unknown} of {len(rows)} images have no label that is checked")
    if selector:
        more, judged = selector.judge(pixels, rows, args.min_quality, args.min_alignment)
        reasons = [first or second for first, second in zip(reasons, more, strict=True)]
        scores.update(judged)
    for row, quality in zip(rows, scores["quality"], strict=True):
        row.quality = f"{quality:.4g}"
    if args.drop_duplicates:
        refuse_duplicates(reasons, rows, pixels, scores["quality"])
    passed = np.flatnonzero(np.array(reasons) == "")
    if len(passed) > wanted:
        vectors = reference.blocks["texture"].vectors(pixels[passed])
        best = best_and_diverse(vectors, scores["quality"][passed], wanted)
        for i in set(passed) - set(passed[best]):
            reasons[i] = f"not among the best {wanted}"
    elif args.keep and len(passed) < args.keep:
        summary.append(f"--keep {args.keep}: only {len(passed)} images pass the other limits")
    kinds = count_reasons(reasons).most_common()
    summary.append("; ".join(f"{kind}: {count}" for kind, count in kinds))
    return reasons, scores, summary


def count_reasons(reasons):
    """How many images have each reason, without details: copy, --max-lpips, kept, …"""
    return Counter(re.split(r" of | \(| \d", reason)[0] or "kept" for reason in reasons)


def refuse_duplicates(reasons, rows, pixels, quality):
    """Of images of the same picture, also mirrored or saved again, refuse all but the best."""
    kept = np.flatnonzero(np.array(reasons) == "")
    kept = kept[np.argsort(-quality[kept], kind="stable")]
    for i, j in near_duplicates(pixels[kept]):
        better, worse = kept[i], kept[j]
        if not reasons[better] and not reasons[worse]:
            reasons[worse] = f"duplicate of {rows[better].file_name}"


def best_and_diverse(vectors, quality, count):
    """Numbers of `count` images of high quality in [0, 1] that are unlike one another.

    Each is the one with the largest quality^2 (1 - exp(-d^2 / 2s)), d its distance to the nearest
    that is chosen already, s the median squared distance. Ties go to the first.
    """
    squares = squared_distances(vectors[:500], vectors[:500])
    scale = np.median(squares[squares > 0]) if squares.any() else 1.0  # equal images tell none
    novelty = np.ones(len(vectors))
    chosen = []
    for _ in range(count):
        gain = np.square(quality) * novelty
        gain[chosen] = -1
        chosen.append(int(np.argmax(gain)))
        squares = squared_distances(vectors, vectors[chosen[-1:]])[:, 0]
        novelty = np.minimum(novelty, 1 - np.exp(-squares / (2 * scale)))
    return chosen


# ---------------------------------------------------------------- what is written


def name_below(folder, file_name):
    """A name below `folder`: tables may say ./a.png, /data/a.png or img\\a.png."""
    parts = PurePosixPath(file_name.replace("\\", "/")).parts
    return str(PurePosixPath(folder, *[part for part in parts if part not in ("/", "..")]))


def write_decisions(out, real_rows, all_rows, rows, reasons, scores):
    """decisions.csv: for each generated image, whether it is kept, why not, and its scores."""
    names = [name for name in scores if name != "nearest"]
    blank = [""] * len(names)
    lines = {id(row): [row.file_name, 0, "unreadable", "", *blank] for row in all_rows}
    for i, row in enumerate(rows):
        real_name = real_rows[scores["nearest"][i]].file_name
        values = [f"{scores[name][i]:.6g}" for name in names]
        lines[id(row)] = [row.file_name, int(not reasons[i]), reasons[i], real_name, *values]
    header = ["file", "kept", "reason", "nearest", *names]
    write_csv(out / "decisions.csv", header, lines.values())


def copy_images(out, kept, mixed):
    """Copy images to `out`, write metadata.csv; delete copies that only an older run left there."""
    folder = "generated" if mixed else ""
    entries = [(name_below(folder, row.file_name), row) for row in kept]
    entries += [(name_below("real", row.file_name), row) for row in mixed]
    header = ["file_name", "text", "label", "patient_id", "synthetic", "quality"]
    columns = dict.fromkeys(header)  # and the others of all tables, in order
    lines = []
    paths = {}
    for name, row in entries:
        if paths.setdefault(name, row.path) != row.path:  # a table may repeat an image
            fail(f"{row.path}: another image would also be called {name}; rename one")
        quality = getattr(row, "quality", "")  # real images have none
        values = (name, row.caption, row.label, row.group, int(quality != ""), quality)
        line = dict(zip(header, values, strict=True))
        left_out = [find_column(row.fields, role) for role in COLUMNS]
        if quality != "":  # paths as somebody typed them; model and adapter say the same
            left_out += ["base", "lora"]
        for column, value in row.fields.items():
            if column not in left_out and column.lower() not in header:
                line[column] = value
        columns |= line
        lines.append(line)
    if (out / "metadata.csv").is_file():
        for old in read_table(out / "metadata.csv"):
            if old.get("synthetic") == "1" and old["file_name"] not in paths:
                (out / name_below("", old["file_name"])).unlink(missing_ok=True)
    for name, path in paths.items():
        copy_file(path, out / name)
    write_csv(out / "metadata.csv", columns, [map(line.get, columns) for line in lines])


REASONS = """Below, each generated image stands to the left of the real image nearest in texture, or
of the one that it copies. Texture: the pattern of edges and surfaces. Colour: tints, and where it
is bright. Grain: sharpness, noise, JPEG blocks. Quality: 1 looks most like the real images, 0
least, by the worst of these scores; with a selector, the probability that an expert calls the image
good."""


def report(rows, pixels, real_rows, real, reasons, scores, reference, summary):
    """HTML: how many are kept, why others are not, other limits, and images next to real ones."""
    kinds = count_reasons(reasons)
    body = f'<div class="verdict"><b>Kept {kinds["kept"]} of {len(rows)} generated images.</b>'
    body += table(("kept, or why not", "images"), kinds.most_common())
    body += f"</div>{paragraph(REASONS, 'soft')}<h2>What would pass at another --calibrate</h2>"
    body += other_limits(reference, scores)
    order = np.argsort(-scores["quality"], kind="stable")
    kept = np.array(reasons)[order] == ""
    for title, shown in (("Kept", order[kept]), ("Refused", order[~kept])):
        if not len(shown):
            continue
        some = shown[:: 1 + len(shown) // 37]
        body += f"<h2>{title}: {len(some)} of {len(shown)} are shown, the best first</h2>"
        body += '<div class="pairs">'
        for i in some:
            j = scores["nearest"][i]
            text = f"{reasons[i] or 'kept'}, quality {scores['quality'][i]:.2f}"
            body += pair((pixels[i], rows[i]), (real[j], real_rows[j]), text, 256)
        body += "</div>"
    how = "".join(map(paragraph, summary))
    return f"{body}<h2>How they were judged</h2>{how}"


def other_limits(reference, scores):
    """HTML: how many images would pass at other values of --calibrate."""
    ranks = reference.rank(scores).max(0)
    of_real_ones = real_ranks(reference)
    lines = []
    for alpha in (0.01, 0.05, 0.1, 0.2, 0.5):
        threshold = conformal_threshold(of_real_ones, alpha)
        if np.isfinite(threshold):  # else there are too few real images for it
            passing = f"{np.sum(ranks <= threshold)} of {len(ranks)}"
            lines.append((alpha, f"{1 - alpha:.0%}", passing))
    caption = (
        "This limit alone: labels, copies, duplicates, colours or other flags may refuse more."
    )
    header = ("--calibrate", "unseen real images that pass", "generated images that pass")
    return paragraph(caption) + table(header, lines)


# ---------------------------------------------------------------- the card of the kept images


def read_origin(args):
    """What the card says about the training (--run) and the evaluation (--report): a dict."""
    origin = {"images": 0, "patients": 0, "evaluation": read_report(args)}
    origin["audit"] = "No membership audit is known."
    if args.run:
        split = read_table(os.path.join(args.run, "split.csv"))
        groups = [record["group"] for record in split if record["split"] == "train"]
        origin |= {"images": len(groups), "patients": len(set(groups) - {""})}
        audit = read_audit(args.run)
        if audit:
            origin["audit"] = audit["sentence"]
        else:
            note(f"{args.run}: no audit.json: the training command with --audit says why")
    return origin


def read_report(args):
    """What evaluate.py says of the kept images, else of all generated ones; names no file."""
    if not args.report:
        return "Not evaluated."
    with contextlib.suppress(ValueError, KeyError, TypeError):
        report = json.loads(read_text(args.report))
        sets = {os.path.abspath(found["path"]): found for found in report["generated"]}
        for folder, name in ((args.out, "the kept images"), (args.generated, "all images")):
            found = sets.get(os.path.abspath(folder))
            if found and report["format"] == 2:
                copies = found["memorisation"]["likely_copies"]
                text = f"evaluate.py on {name}: {' '.join(found['findings'])}"
                return f"{text} Copies of real images: {copies}."
    fail(
        f"--report {args.report}: not written by evaluate.py --json (format 2), or not about "
        f"{args.generated}: run evaluate.py on these images"
    )


def write_image_card(kept, mixed, real_rows, reasons, origin, args):
    """README.md of the kept images. It names no file, folder, patient or caption."""
    label = "looks like another label"  # which may be somebody's name
    kinds = count_reasons(re.sub("looks like .*", label, reason) for reason in reasons)
    checks = f"Of {len(reasons)} generated images:\n\n"
    for kind, count in kinds.most_common():
        checks += f"- {kind}: {count} ({count / len(reasons):.0%})\n"
    for name in ("model", "adapter"):
        origin[name] = ", ".join(sorted({row.fields.get(name, "") for row in kept} - {""}))
    title = f"{len(kept)} synthetic medical images"
    if mixed:
        title += f" and {len(mixed)} real images of patients"
    write_card(
        args,
        header="tags: [stable-diffusion, medical, synthetic]",
        title=title,
        counts=counts_table(kept, real_rows),
        checks=f"{checks}\n{origin['evaluation']}",
        **origin,
    )


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
    "shows": ("shows",),
}
NO_VALUE = (*MISSING, "-", "?", "none")


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
    shows: str  # "1" or "0": does it show its label?
    path: str = ""  # absolute, "" where the image is not found

    @property
    def is_real(self):
        return read_number(self.real) == 1


def read_ratings(paths, rows=(), folders=()):
    """All ratings of ratings files: [Rating]. Of one expert's ratings of an image the last counts.

    rows, folders: where to look for images that were moved. Files without a rating are an error.
    """
    by_hash = {content_hash(row.path): row.path for row in rows}
    ratings = {}
    for path in paths:
        rated = read_rating_rows(path)
        places = [os.path.dirname(os.path.abspath(path)), os.getcwd(), *filter(None, folders)]
        find_images(rated, places, by_hash)
        ratings |= {(rating.path or rating.image, rating.expert): rating for rating in rated}
    if paths and not ratings:
        fail(f"{paths[0]}: holds no ratings")
    return list(ratings.values())


def read_rating_rows(path):
    """The rated rows of one file: [Rating], without paths; a value out of range is an error."""
    records = read_table(path)
    names = list(records[0]) if records else []
    columns = {role: find_column(names, role, RATING_COLUMNS) for role in RATING_COLUMNS}
    if not columns["image"] or not columns["rating"]:
        needed = "a ratings file has at least the columns image_path and rating"
        fail(f"{path}: {needed}; this one has {', '.join(names) or 'no rows'}")
    ratings = []
    for line, record in enumerate(records, 2):
        row = {}
        for role, name in columns.items():
            text = record.get(name, "")
            row[role] = "" if text_key(text) in NO_VALUE else text
        if not row["rating"] or not row["image"]:
            continue
        rating = read_number(row["rating"])
        level = read_number(row["expert_level"] or "3")
        if rating not in (1, 2, 3):
            scale = "must be 1 (bad), 2 (usable) or 3 (good)"
            advice = f"not {row['rating'][:40]!r}; divide other scales into thirds"
            fail(f"{path}: row {line}: rating {scale}, {advice}")
        if not 1 <= level < np.inf:
            wrong = f"must be a number of at least 1, not {row['expert_level'][:40]!r}"
            fail(f"{path}: row {line}: expert_level {wrong}")
        row |= {"rating": int(rating), "expert_level": level}
        row["image"] = row["image"].replace("\\", "/")  # of Windows
        row["expert"] = text_key(row["expert"]) or str(path)  # Anna is anna
        ratings.append(Rating(**row))
    unrated = len(records) - len(ratings)
    if unrated:
        note(f"{path}: {unrated} of {len(records)} rows are skipped: no rating or no image")
    return ratings


def read_number(text):
    """A text as a number, with a decimal point or comma; NaN for any other text."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return np.nan


def find_images(ratings, folders, by_hash):
    """Set the paths of the images of a ratings file, "" where they are not found.

    An image is where the file says, seen from one of the folders; after a move, where the end of
    its path leads, or what has its SHA-256 (by_hash). Of several names without it none is found.
    """
    images = defaultdict(set)
    for rating in ratings:
        parts = Path(rating.image).parts
        places = []
        for start in range(len(parts)):
            places += [os.path.join(folder, *parts[start:]) for folder in folders]
        places.append(by_hash.get(rating.sha256.lower(), ""))
        for place in places:
            path = find_file(os.path.normpath(place))
            if os.path.isfile(path) and rating.sha256.lower() in ("", content_hash(path)):
                rating.path = path
                break
        images[rating.path].add(parts)
    for rating in ratings:
        if not rating.sha256 and len(images[rating.path]) > 1:
            rating.path = ""


def drop_missing(ratings):
    """The ratings of images that are found; more than 5 % of images missing is an error."""
    images = {rating.image: rating.path for rating in ratings}
    missing = sorted(image for image, path in images.items() if not path)
    if missing:
        message = (
            f"{len(missing)} of {len(images)} rated images are missing or changed: "
            f"{', '.join(missing[:5])}"
        )
        if len(missing) > BAD_SHARE * len(images):
            fail(
                f"{message}: give the folder that holds them as GENERATED, --blind or --reference; "
                "without the column sha256 they are found by name alone"
            )
        note(f"{message}: their ratings are skipped")
    return [rating for rating in ratings if rating.path]


PAGE_SIDE = 768  # the most pixels a side of a picture on a rating page
SCALE_TEXT = """1 bad: it misleads, or does not look like such a picture
2 usable: it has faults, but shows what it should
3 good: it could be a real picture"""
RATING_STYLE = """<style>:root{color-scheme:dark;--ink:#c9d1d9;--soft:#8b949e;--line:#30363d;
--paper:#05070a;--mark:#6cb0ff}[hidden]{display:none!important}
body{max-width:none;padding:0;touch-action:manipulation}
h1,form{max-width:40rem;margin:1rem auto;padding:0 1rem}form p,#scale{margin:.8rem 0}
#scale{white-space:pre-line;padding-left:.9rem;border-left:.3rem solid var(--mark)}
button,input,select{font:inherit;color:var(--ink);background:#161b22;border:1px solid var(--soft);
border-radius:.4rem;padding:.5rem .8rem;margin:.15rem;min-height:2.8rem}
button[aria-pressed=true]{border-color:var(--mark);color:var(--mark)}#rater{color:var(--mark)}
#rate{text-align:center;padding:.5rem}#rate p{margin:.2rem}#note,progress{width:min(94%,30rem)}
#ask span{display:inline-block}#marks button{min-width:6.5rem}
#view{color:var(--soft);font-size:.85rem}#view label{white-space:nowrap}
::placeholder{color:var(--soft)}
#view input{width:5rem;min-height:1.5rem;padding:0;vertical-align:middle}
#picture{display:flex;overflow:auto;scrollbar-width:none;
height:min(58vh,100vw)}#picture img{margin:auto;flex:none;user-select:none}
@media(min-aspect-ratio:6/5){#rate{display:grid;gap:.8rem;align-items:center;
grid-template-columns:minmax(0,1fr) minmax(19rem,36vw)}#picture[hidden]+div{grid-column:1/-1}
#picture{height:calc(100vh - 1rem);height:calc(100svh - 1rem)}}
@media(max-height:34rem)and (min-aspect-ratio:6/5){#rate{font-size:.85rem;align-items:start;
grid-template-columns:minmax(0,1fr) 26rem}#rate :is(button,#note){min-height:1.9rem;
padding:.2rem .6rem}}</style>"""
RATING_BODY = """<form id="start" hidden>
<p>You see <span id="count"></span> pictures, one after the other. Rate each with the key 1, 2 or 3,
or with a button:</p><div id="scale">SCALE</div>
<p id="how-blind">Some are real. For each, press r if you think it is real, g if generated.</p>
<p id="how-shows">Does it show its label? Press y for yes, n for no, neither if you cannot tell.</p>
<p>Nothing leaves this browser. It keeps every answer at once, but not in a private window. Close
the page when you like, open it in this browser again and go on. At the end you save a file,
ratings-<i>your name</i>.csv, in your downloads folder. Send it to whoever gave you this page.</p>
<p><label>Your name <input id="name" required autocomplete="off"></label>
<select id="level" aria-label="experience"><option value="3">specialist
<option value="2">resident<option value="1">student</select> <button>Start</button></p></form>
<main id="rate" hidden><div id="picture"></div><div>
<p><b id="rater"></b> <button data-key="c">other expert (c)</button></p>
<progress id="bar"></progress><p id="where" aria-live="polite"></p>
<div id="work"><div id="ask"><span id="question"></span> <span><button data-key="y">yes (y)</button>
<button data-key="n">no (n)</button></span></div>
<div id="guesses"><button data-key="r">real (r)</button>
<button data-key="g">generated (g)</button></div>
<div id="marks"><button data-key="1">1 bad</button>
<button data-key="2">2 usable</button>
<button data-key="3">3 good</button></div><p id="text"></p>
<input id="note" placeholder="note (t), press Enter to end it"></div>
<div id="end"><p>Two things are left to do.</p><p>1. Save <span id="file"></span> in your
downloads folder.</p><p>2. Send it to whoever gave you this page.</p></div>
<button data-key="u">back (u)</button>
<button data-key="s" id="skip">skip (s)</button>
<button id="save">save the file</button>
<div id="view"><label>zoom <input id="zoom" type="range" min="1" max="8" step="any"></label>
<label>brightness <input id="brightness" type="range" min=".2" max="3" step="any"></label>
<label>contrast <input id="contrast" type="range" min=".2" max="4" step="any"></label>
<button data-key="0">reset (0)</button><div id="shown"></div></div></div></main>"""
RATING_SCRIPT = r"""<script>
const $ = id => document.getElementById(id), buttons = document.querySelectorAll("[data-key]");
const bytes = Uint8Array.from(atob(FACTS), c => c.charCodeAt(0));
const facts = JSON.parse(new TextDecoder().decode(bytes));
let rater = "", answers = {}, at = 0, safe = true, work = Promise.resolve();
let moving = false;  // to another picture: until it shows, keys are of no picture

// Answers are kept by rater and by the hash of the picture's file. The database is on the disk
// before the next picture shows; localStorage alone would lose seconds when a browser is killed.
const database = new Promise(done => {
  try {
    const request = indexedDB.open("medlora ratings", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("answers");
    request.onsuccess = () => done(request.result);
    request.onerror = request.onblocked = () => done(null);
  } catch { done(null); }
});
async function keep(answer) {
  const key = "medlora " + JSON.stringify([answer.rater, answer.hash]);
  answer.time = Date.now(); answer.level = $("level").value; safe = false;
  try { localStorage.setItem(key, JSON.stringify(answer)); safe = true; } catch {}
  const db = await database;
  await new Promise(done => {
    try {
      const write = db.transaction("answers", "readwrite", {durability: "strict"});
      write.objectStore("answers").put(answer, key);
      write.oncomplete = () => { safe = true; done(); };
      write.onabort = done;
    } catch { done(); }
  });
}
async function recall() {  // all answers, the newest last
  const found = [], db = await database;
  try {
    for (const key of Object.keys(localStorage))
      if (key.startsWith("medlora [")) found.push(JSON.parse(localStorage[key]));
  } catch {}
  if (db) await new Promise(done => {
    const read = db.transaction("answers").objectStore("answers").getAll();
    read.onsuccess = () => { found.push(...read.result); done(); };
    read.onerror = done;
  });
  return found.sort((a, b) => a.time - b.time);
}
function setStart(isOpen) {
  $("start").hidden = document.querySelector("h1").hidden = !isOpen; $("rate").hidden = isOpen;
}
async function begin() {
  const last = (await recall()).at(-1);
  if (last) { $("name").value = last.rater; $("level").value = last.level; }
  setStart(true); $("name").focus(); $("name").select();
}
async function start() {
  rater = $("name").value.trim(); answers = {};
  const name = rater.toLowerCase();
  for (const answer of await recall())
    if (answer.rater.toLowerCase() == name) answers[answer.hash] = answer;
  at = facts.findIndex(f => !answers[f[5]]?.rating && !answers[f[5]]?.skipped);
  if (at < 0) at = facts.findIndex(f => !answers[f[5]]?.rating);  // the skipped ones again
  if (at < 0) at = facts.length;
  setStart(false); show();
}
function answerHere() { const hash = facts[at][5]; return answers[hash] ||= {rater, hash}; }
function show() {
  const done = at >= facts.length, marked = facts.filter(f => answers[f[5]]?.rating).length;
  const guessed = facts.filter(f => answers[f[5]]?.guess).length;
  $("bar").max = facts.length; $("bar").value = at; $("rater").textContent = rater;
  $("where").textContent = (done ? "The end" : `${at + 1} of ${facts.length}`)
    + `, ${marked} rated`
    + (done && BLIND ? `, real or generated guessed for ${guessed} of ${facts.length}` : "")
    + (done && marked < facts.length ? "; to see the skipped ones, press c, then Start" : "")
    + (safe ? "" : "; this browser keeps nothing: save the file before you close the page");
  for (const id of ["picture", "work", "view", "skip"]) $(id).hidden = done;
  $("end").hidden = !done;
  $("file").textContent = `ratings-${rater.replace(/[^\p{L}\p{N}]+/gu, "-")}.csv`;
  if (done) return;
  const fact = facts[at], answer = answerHere();
  $("picture").innerHTML = IMAGES[at];
  const image = $("picture").firstChild;
  image.alt = `picture ${at + 1}`; image.draggable = false; image.onload = draw;
  $("text").textContent = BLIND || fact[1] == fact[6] ? "" : fact[1];
  $("question").textContent = `Shows: ${fact[6].replaceAll("|", ", ")}?`;
  $("ask").hidden = !fact[6]; $("guesses").hidden = !BLIND; $("note").value = answer.comment || "";
  const chosen = [answer.rating, {1: "y", 0: "n"}[answer.shows], answer.guess?.[0]];
  for (const b of buttons) b.setAttribute("aria-pressed", chosen.includes(b.dataset.key));
  reset();
}
async function press(key) {
  if (key == "c") return begin();
  if (key == "0") return reset();
  if (key == "u" ? !at : at >= facts.length) return;
  if (key == "u") { at--; return show(); }
  const answer = answerHere();
  if (key == "y" || key == "n") answer.shows = key == "y" ? 1 : 0;
  else if (key == "r" || key == "g") answer.guess = key == "r" ? "real" : "generated";
  else if (key == "s") answer.skipped = !answer.rating;  // what is marked stays so
  else { answer.rating = key; answer.skipped = false; }
  await keep(answer);
  if (/[123s]/.test(key)) at++;
  show();
}
function queue(job) { work = work.then(job); }  // one after another
function take(key) {
  if (moving) return;
  moving = /[123su]/.test(key);
  queue(async () => { await press(key); moving = false; });
}
function keyOf(e) {  // rows of digits write others on some keyboards; some write no Latin letters
  const digit = /^(?:Digit|Numpad)([0-3])$/.exec(e.code), key = e.key.toLowerCase();
  if (digit) return digit[1];
  if (e.key == "Backspace") return "u";
  return /^[a-z0-9]$/.test(key) ? key : (/^Key([A-Z])$/.exec(e.code) || ["", ""])[1].toLowerCase();
}
document.addEventListener("keydown", e => {
  if (e.repeat || e.ctrlKey || e.metaKey || e.altKey || $("rate").hidden) return;
  if (e.target.id == "note") {
    if (e.key == "Enter" || e.key == "Escape") $("note").blur();
    return;
  }
  const key = keyOf(e), button = document.querySelector(`[data-key="${key}"]`);
  if (key == "t") { if (!moving) $("note").focus(); }
  else if (button?.offsetParent) take(key);
  else return;
  e.preventDefault();
});
for (const b of buttons) b.onclick = () => { take(b.dataset.key); b.blur(); };
$("note").oninput = () => {
  const answer = answerHere(); answer.comment = $("note").value; queue(() => keep(answer));
};
$("start").onsubmit = e => { e.preventDefault(); queue(start); };
$("save").onclick = () => {
  const cell = t => /[",\n\r]/.test(t) ? '"' + String(t).replaceAll('"', '""') + '"' : t;
  let text = "\ufeff"  // spreadsheets take a file without this mark for another code
    + "image_path,rating,modality,expert_level,prompt,expert,group,comment,guess,real,sha256,label,"
    + "shows\n";
  for (const f of facts) {
    const a = answers[f[5]];
    if (a?.rating) text += [f[0], a.rating, f[2], a.level, f[1], rater, f[3], a.comment ?? "",
      a.guess ?? "", f[4], f[5], f[6], a.shows ?? ""].map(cell).join(",") + "\n";
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  link.download = $("file").textContent; link.click(); $("save").blur();
  $("save").textContent = `saved at ${new Date().toLocaleTimeString()}; save again`;
};

// The view. Fingers drag and pinch by themselves; the mouse's wheel zooms, its left button moves
// the picture, its right one changes brightness and contrast, as sliders do.
const box = $("picture"), level = id => Number($(id).value);
function reset() { for (const id of ["zoom", "brightness", "contrast"]) $(id).value = 1; draw(); }
function draw() {  // as stored; larger than the room: shrunk; of few pixels: an integer times
  const image = box.firstChild, w = image?.naturalWidth, h = image?.naturalHeight;
  if (!w) return;
  const room = Math.min(box.clientWidth / w, box.clientHeight / h);
  const fit = Math.min(room, Math.max(1, Math.floor(Math.min(room, 512 / Math.max(w, h)))));
  const times = fit * level("zoom");
  const x = (box.scrollLeft + box.clientWidth / 2) / box.scrollWidth;  // the middle stays
  const y = (box.scrollTop + box.clientHeight / 2) / box.scrollHeight;
  image.style.width = w * times + "px";
  image.style.filter = `brightness(${level("brightness")}) contrast(${level("contrast")})`;
  box.scrollLeft = x * box.scrollWidth - box.clientWidth / 2;
  box.scrollTop = y * box.scrollHeight - box.clientHeight / 2;
  let shown = "";
  if (times > 1) shown = `, enlarged ${+times.toFixed(1)} times`;
  if (times < 1) shown = `, shown at ${Math.round(100 * times)} %`;
  $("shown").textContent = `${w} × ${h} pixels${shown}`;
}
box.onwheel = e => {
  e.preventDefault(); $("zoom").value = level("zoom") * 1.002 ** -e.deltaY; draw();
};
box.oncontextmenu = e => e.preventDefault();
box.onpointermove = e => {
  if (e.pointerType != "mouse" || !e.buttons) return;
  if (e.buttons == 1) return box.scrollBy(-e.movementX, -e.movementY);
  $("brightness").value = level("brightness") - e.movementY / 200;
  $("contrast").value = level("contrast") + e.movementX / 200;
  draw();
};
$("view").oninput = window.onresize = draw;
$("count").textContent = facts.length;
$("how-blind").hidden = !BLIND; $("how-shows").hidden = !facts.some(f => f[6]);
queue(begin);
</script>"""


def write_rating_page(args):
    """Write a page that holds its images, on which an expert rates them: ratings-NAME.csv."""
    scale = read_text(args.scale_text) if args.scale_text else SCALE_TEXT
    rows = list_images(args.generated)
    real_rows = list_training(args.blind, args) if args.blind else []
    folders = (args.generated, args.blind)
    ratings = drop_missing(read_ratings(args.rated, rows + real_rows, folders))
    rated = {content_hash(rating.path) for rating in ratings}
    rows = choose_images(not_rated(rows, rated), args)
    size = args.resolution or PAGE_SIDE
    if args.blind:
        real_rows, size = draw_blind(rows, not_rated(real_rows, rated), size, args)

    def embed(image, crop="center"):
        if args.blind:
            image = fit_square(image, size, crop.replace("random", "center"))
        # one encoding for all, so that none gives itself away
        return thumbnail(image, size, quality=95, subsampling=0)

    rows, _ = load_pixels(rows, 64, measure=embed)
    real_rows, _ = load_real(real_rows, 64, args, measure=partial(embed, crop=args.crop))
    facts = []
    images = []
    shown = rows + real_rows
    labels = labels_to_ask(rows, real_rows)
    for place in draw_order(len(shown), args.seed, "page"):
        facts.append(facts_of(shown[place], place >= len(rows), labels[place], args.rating_page))
        images.append(shown[place].measured)
    body = rating_page(facts, images, bool(args.blind), scale)
    write_file(args.rating_page, page("Rate pictures", body))
    print(
        f"{args.rating_page}: {len(rows)} generated and {len(real_rows)} real images, at most "
        f"{size} px a side; open it in a browser"
    )
    print("next: " + command("filter.py", args.generated, "--fit", "ratings-NAME.csv"))


def not_rated(rows, rated):
    """The rows whose files have none of these SHA-256 sums."""
    return [row for row in rows if content_hash(row.path) not in rated]


def draw_blind(rows, real_rows, size, args):
    """Real rows to mix in, one image in five, and the pixels a side at which none is enlarged.

    Sharpness must not tell which are real: real images that would be enlarged are left out.
    """
    wanted = max(1, round(len(rows) / 4))
    drawn = draw_order(len(real_rows), args.seed, "blind")[: 4 * wanted]
    rows, _ = load_pixels(rows, 64)
    real_rows, _ = load_real([real_rows[i] for i in drawn], 64, args)
    sides = [square_side(row, args.crop) for row in real_rows]
    size = min(size, int(np.median(sides or size)), *[min(row.size) for row in rows])
    return [row for row in real_rows if square_side(row, args.crop) >= size][:wanted], size


def labels_to_ask(rows, real_rows):
    """The label that the page asks about, for each image; with real ones, one of generated images.

    Otherwise a label, or that there is none, would tell which are real.
    """
    own = [row.label or row.caption for row in rows + real_rows]
    if not real_rows:
        return own
    known = {text_key(name): name for name in own[: len(rows)] if name}
    others = list(known.values()) or [""]
    return [known.get(text_key(name), others[i % len(others)]) for i, name in enumerate(own)]


def facts_of(row, is_real, label, page_path):
    """What a page knows of an image: path, caption, modality, group, is real, SHA-256, label.

    The path is as seen from the page's folder, so that both can be moved together.
    """
    path = row.path
    with contextlib.suppress(ValueError):  # on another drive of Windows
        path = os.path.relpath(path, os.path.dirname(os.path.abspath(page_path)))
    path = Path(path).as_posix()
    digest = content_hash(row.path)
    return [path, row.caption, modality_of(row), row.group, int(is_real), digest, label]


def rating_page(facts, images, blind, scale):
    """HTML: the body of a rating page; facts: `facts_of` each image; images: <img>; scale: text."""
    unread = base64.b64encode(json.dumps(facts).encode()).decode()  # nor seen in the source
    return f"""{RATING_STYLE}{RATING_BODY.replace("SCALE", html.escape(scale))}<script>
const BLIND = {json.dumps(blind)};
const FACTS = "{unread}";
const IMAGES = {json.dumps(images)};
</script>{RATING_SCRIPT}"""


def choose_images(rows, args):
    """The rows to rate, 1 to 500 (else an error): all, or --suggest of them, diverse and unsure."""
    count = min(len(rows), args.suggest or len(rows))
    if args.suggest and args.blind:
        count = min(count, args.suggest - args.suggest // 5)
    if not 0 < count <= 500:
        fail(f"{args.generated}: {count} images to rate; a page takes 1 to 500, see --suggest")
    if not args.suggest:
        return rows
    selector = load_selector(args.selector) if args.selector else None
    rows, pixels = load_pixels(rows, selector.size if selector else pick_resolution(rows))
    worth = np.ones(len(rows))
    if selector:
        _, scores = selector.judge(pixels, rows)
        worth = 1 - np.abs(scores["quality"] - 0.5)  # most where it is least sure
    vectors = describe(pixels)
    vectors /= vectors.std(0) + 1e-9
    return [rows[i] for i in best_and_diverse(vectors, worth, min(count, len(rows)))]


def kappa(first, second):
    """Quadratically weighted kappa (Cohen 1968) of ratings (n,) by two; NaN where all are equal."""
    by_chance = np.square(np.subtract.outer(first, second)).sum()
    if by_chance == 0:
        return np.nan
    return 1 - len(first) * np.square(first - second).sum() / by_chance


def print_agreement(args):
    """Print how far experts agree, and whether they can tell real from generated images."""
    ratings = defaultdict(dict)
    guesses = defaultdict(partial(np.zeros, (2, 2), int))
    for rating in read_ratings(args.agreement):
        if not rating.is_real:  # real ones are easy, and would flatter
            ratings[rating.expert][rating.path or rating.image] = rating.rating
        if rating.real and rating.guess:
            taken_for_generated = int(text_key(rating.guess) != "real")
            guesses[rating.expert][int(not rating.is_real), taken_for_generated] += 1
    if len(ratings) < 2 and not guesses:
        fail("--agreement: give ratings of two experts, or of a --blind page: nothing to compare")
    for (a, first), (b, second) in itertools.combinations(ratings.items(), 2):
        shared = [path for path in first if path in second]
        a_ratings = np.array([first[path] for path in shared])
        b_ratings = np.array([second[path] for path in shared])
        gen = generator(args.seed, "kappa", a, b)
        print(f"{a}, {b}: {describe_agreement(a_ratings, b_ratings, gen)}")
    for rater, counts in guesses.items():
        p = scipy.stats.fisher_exact(counts).pvalue
        (hits, misses), (fooled, caught) = counts
        print(
            f"{rater}: of real images {hits} called real, {misses} generated; of generated images "
            f"{fooled} called real, {caught} generated; p {p:.2g} against guessing"
        )


def describe_agreement(first, second, gen):
    """Weighted kappa of two experts' ratings, (n,) each, with its bootstrap interval, in words."""
    count = len(first)
    value = kappa(first, second)
    if np.isnan(value):
        return f"no kappa: the {count} images that both rated all have the same rating"
    draws = torch.randint(count, (1000, count), generator=gen).numpy()
    values = [kappa(first[draw], second[draw]) for draw in draws]
    low, high = np.nanpercentile(values, (2.5, 97.5))
    text = f"weighted kappa {value:.2f} (95 %: {low:.2f} to {high:.2f}) on {count} shared images"
    return f"{text}; 0: as by chance, 1: always equal (Cohen 1968)"


# ---------------------------------------------------------------- ratings teach a selector

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
    """Learn a selector from ratings; one that predicts them no better than chance is an error."""
    ratings = read_generated(args)
    good = args.good or 3
    rated = gather(ratings, good)
    check_ratings(ratings, rated)
    size = args.resolution or pick_resolution(rated.rows)
    _, pixels = load_pixels(rated.rows, size, strict=True)
    descriptors = describe(pixels)
    mean, spread = block_scale(descriptors, BLOCKS)
    weights, measured = fit_quality((descriptors - mean) / spread, rated, args.seed)
    if not (measured["p"] <= 0.05 and measured["interval"][0] > 0.5):
        chance = "it predicts ratings no better than chance; rate more images"
        fail(f"no selector is written: {chance} ({in_words(measured)})")
    print(f"selector: {in_words(measured)}; {len(ratings)} ratings of {len(rated.rows)} images")
    shown = [read_number(rating.shows) for rating in ratings if rating.shows]
    if shown:
        print(f"{shown.count(0)} of {len(shown)} ratings say that the label is not shown")
    classes, class_weights = fit_classes(size, args)
    weights = np.hstack([unscaled(weights, mean, spread), class_weights])
    save_selector(args.out, Selector(size, good, classes, measured, weights))
    generated = args.generated or os.path.dirname(rated.rows[0].path)
    words = (generated, "--reference", args.reference or "REAL", "--selector", args.out)
    print("next:", command("filter.py", *words))


def unscaled(weights, mean, spread):
    """Weights (D + 1, m) that give of x what `weights` give of (x - mean) / spread."""
    slopes = weights[:-1] / spread[:, None]
    return np.vstack([slopes, weights[-1] - mean @ slopes])


def in_words(measured):
    """How well a selector predicts ratings, in words."""
    low, high = measured["interval"]
    return (
        f"of a good and a bad image it picks the good one in {measured['auroc']:.0%} of cases "
        f"(AUROC {measured['auroc']:.2f}, 95 %: {low:.2f} to {high:.2f}, p {measured['p']:.2g})"
    )


def read_generated(args):
    """The ratings of generated images; from real ones a selector could learn that real is good."""
    rows = list_images(args.generated) if args.generated else []
    ratings = read_ratings(args.fit, rows, (args.generated, args.reference))
    generated = [rating for rating in ratings if not rating.is_real]
    if len(generated) < len(ratings):
        note(f"{len(ratings) - len(generated)} ratings are skipped: their images are real")
    if not generated:
        fail(f"{args.fit[0]}: all rated images are real: a selector needs generated ones")
    return drop_missing(generated)


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


def check_ratings(ratings, rated):
    """Fail if there is too little to learn from, or if ratings follow who rated or what."""
    found = []
    values = [rating.rating for rating in ratings]
    for name in ("modality", "expert", "expert_level", "prompt"):
        names = [getattr(rating, name) for rating in ratings]
        if len(set(names)) > len(names) / 5:  # of names that hardly repeat chance makes V large
            continue
        counts = scipy.stats.contingency.crosstab(values, names).count
        with np.errstate(invalid="ignore"):  # NaN where all are the same
            v = scipy.stats.contingency.association(counts, method="cramer")
        if v > 0.6:
            found.append(f"the ratings may follow {name}, not quality (Cramer's V {v:.2f} > 0.6)")
    count = len(rated.rows)
    good = (rated.labels >= 0.5).sum()
    if count < 30:
        found.append(f"{count} images are rated: 30 are needed")
    if min(good, count - good) < 8:
        text = f"{good} images are good and {count - good} are not: 8 of each are needed"
        found.append(f"{text}; --good 2 counts usable ones as good")
    if found:
        fail(f"no selector is written: {'; '.join(found)}")


def fit_quality(features, rated, seed):
    """Weights (D + 1, 1) of a calibrated logistic regression, and {"auroc", "interval", "p"} of it.

    Permutations of the ratings, within modalities, go through the whole cross-validation and the
    choice of the penalty. The AUROC's 95 % interval is a bootstrap over groups.
    """
    labels = np.tile(rated.labels, 1 + PERMUTATIONS)
    for column in range(1, 1 + PERMUTATIONS):
        for name in np.unique(rated.modalities):
            same = np.flatnonzero(rated.modalities == name)
            order = draw_order(len(same), seed, "permuted", column, name)
            labels[same, column] = rated.labels[same[order], 0]
    logits, penalties = cross_validate(features, labels, rated.weights, rated.groups, seed)
    good = labels >= 0.5
    columns = zip(logits.T, good.T, strict=True)
    values = [auroc(*column, strata=rated.modalities)[0] for column in columns]
    drawn = auroc(logits[:, 0], good[:, 0], resamples(rated.groups, seed), rated.modalities)
    weights = fit_logistic(features, rated.labels, rated.weights, penalties[0])
    # the logits of images left out calibrate it (Platt 1999)
    slope, offset = fit_logistic(logits[:, :1], rated.labels, rated.weights, 0.1)[:, 0]
    weights *= slope
    weights[-1] += offset
    return weights, {
        "auroc": values[0],
        "interval": np.nanpercentile(drawn[1:], (2.5, 97.5)).tolist(),
        "p": sum(value >= values[0] for value in values) / (1 + PERMUTATIONS),
    }


def fit_classes(size, args):
    """Labels that 8 real images or more have, and weights (D + 1, labels) that tell them apart."""
    nothing = [], np.zeros((sum(BLOCKS) + 1, 0))
    if not args.reference:
        return nothing
    rows = list_training(args.reference, args)
    for row in rows:
        row.label = name_of(row)
    rows, pixels = load_real(rows, size, args)
    descriptors = describe(pixels)
    descriptors[:, -BLOCKS[-1] :] = 0  # how a file was made tells nothing of generated ones
    blocks = np.split(descriptors, np.cumsum(BLOCKS)[:-1], axis=1)
    check = LabelCheck(rows, blocks, args.seed)
    if not check.names:
        return nothing
    right = np.mean(check.looks == check.own)
    print(f"{len(check.names)} labels; {right:.0%} of real images, left out, look like their own")
    return check.names, unscaled(check.weights, check.mean, check.spread)


# ---------------------------------------------------------------- flags


def parse_args(argv=None):
    parser = Flags(__doc__)
    add = flag_adder(parser)
    add("generated", "images, as a folder or table", nargs="?", type=data_set, metavar="GENERATED")
    add("--reference", "real images to compare with: folder or table", type=data_set)
    add("--out", "folder (default: runs/kept), with --fit a file (selector.safetensors)")
    share = number(0.0, 1.0)
    add = flag_adder(parser.add_argument_group("what is kept"))
    add("--calibrate", "share of unseen real images to refuse, up to 0.9", type=number(0.0001, 0.9))
    add("--max-lpips", "largest LPIPS to the nearest real image, from 0", type=number(0.0, 1e6))
    add("--min-ssim", "least SSIM to the nearest real image, -1 to 1", type=number(-1.0, 1.0))
    add("--drop-copies", "refuse copies of real images", False)
    add("--drop-duplicates", "of generated images of one picture keep only the best", False)
    add("--selector", "judge also by a selector that --fit wrote", type=existing_file)
    add("--min-quality", "least quality by --selector, 0 to 1 (default: 0.5)", type=share)
    add("--min-alignment", "least alignment to its label by --selector, 0 to 1", type=share)
    add("--no-label-check", "keep images that look like another label", False)
    add("--keep", "most images to keep: the best and most diverse", type=number(1, 10**9))
    group = parser.add_argument_group("what is written")
    add_card_flags(group)
    add = flag_adder(group)
    add("--report", "results of evaluate.py --json, for README.md", type=existing_file)
    add("--dry-run", "write decisions.csv and filter.html, copy no image", False)
    add("--mix", "real images to copy next to the kept ones", type=data_set)
    add("--share", "%% of generated images in a --mix (default: 25)", type=number(0.1, 99.9))
    rate = parser.add_argument_group("experts' ratings")
    add = flag_adder(rate)
    add("--suggest", "images on a --rating-page, at most 500 (default: all)", type=number(1, 500))
    add("--blind", "real images to mix into a --rating-page, one in five", type=data_set)
    add("--scale-text", "text file: what 1, 2, 3 mean on a --rating-page", type=existing_file)
    add("--rated", "rated before: left off the page", [], existing_file, nargs="+", metavar="CSV")
    add("--good", "for --fit: least rating of a good image (default: 3)", type=int, choices=[2, 3])
    add = flag_adder(rate.add_mutually_exclusive_group())
    add("--rating-page", "page to write, HTML, on which an expert rates GENERATED")
    add("--agreement", "print how far experts agree", nargs="+", type=existing_file, metavar="CSV")
    add("--fit", "learn a selector from ratings", nargs="+", type=existing_file, metavar="CSV")
    how = parser.add_argument_group("comparison")
    add = flag_adder(how)
    add("--features", "texture, inception, auto (inception if there), HUB-ID or PATH", "texture")
    add_comparison_flags(how)
    args = parser.parse_args(argv)
    check_args(args)
    if args.out is None:
        args.out = "selector.safetensors" if args.fit else "runs/kept"
    return args


def check_args(args):
    """What flags mean together: the first that is missing, or does not fit, is an error."""
    filters = not (args.rating_page or args.agreement or args.fit)
    if not args.generated and (args.rating_page or filters):
        fail("GENERATED is missing: give a folder or a table of generated images")
    if filters and not args.reference:
        fail("--reference is missing: give a folder or a table of real images")
    needs = {
        "selector": ("min_quality", "min_alignment"),
        "mix": ("share",),
        "fit": ("good",),
        "rating_page": ("suggest", "blind", "rated", "scale_text"),
    }
    need_flags(args, needs)
    if args.max_lpips is not None and args.lpips == "none":
        fail("--max-lpips: needs --lpips alex, vgg or squeeze, not none")
    rules = (*LIMITS, "drop_duplicates", "selector", "keep", "mix")
    given = [getattr(args, name) for name in rules]
    if filters and all(value is None or value is False for value in given):
        fail("no limit to filter by: give --calibrate 0.05, --drop-copies, --selector or --keep")


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
