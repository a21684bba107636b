"""Compare generated images with real ones: how good are they, next to what chance alone gives?

    python evaluate.py REAL GENERATED
    python evaluate.py REAL GENERATED1 GENERATED2 --out report.html --json report.json
    python evaluate.py REAL GENERATED --run runs/dfu --utility --by sex --board board.html
    python evaluate.py REAL --checkpoint runs/dfu/checkpoints --num-samples 100
    python evaluate.py --download

REAL and GENERATED are folders of images, or tables such as metadata.csv. It prints the metrics and
writes a report for any browser (--out), a page for an ethics board (--board), and the same results
for programs (--json).

The form of --json:

{"format": 2, "settings": {...}, "real": {"path", "n"}, "generated": [{"path", "n", "p", "metrics":
{NAME: {"value", "null", "null_low", "null_high", "excess", "p_high", "p_low", "real_vs_real",
"band"}}, "memorisation": {"likely_copies", "copies": [{"generated", "train", "kind", "label",
"similarity"}], "pairs": [{"generated", "train", "distance", "p"}]}, "subgroups": [{"group", "real",
"generated", "compared_with", "kid", "error", "real_vs_rest"}], "people": [{"by", "group",
"train images", "train patients", …}], "by_label": [{"label", "copies", "precision",
"precision by chance", "recall", "recall by chance"}], "findings", "sentences", "marked",
"searched", "labels": {"table": [{"label", "set", "images", "looks_like"}], "sentences"},
"utility": [{"share", "auroc", "low", "high", "gain", "gain_low", "gain_high"}], "classifiers":
{NAME: as in "utility"}}], "run": {"base", "method", "steps", "audit"}}

p: of all metrics together. null: median of chance. findings: name no label. marked: generated files
that say they are synthetic. searched: real images searched for copies. utility: of the linear
probe; share: percent; low to high: 95 %, of the gain 99 %. What does not apply is null or absent.
"""

import html
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy import special
from torch import nn
from tqdm import tqdm

from metrics import (
    WEIGHTS,
    CopyFinder,
    Flags,
    LabelCheck,
    Network,
    add_comparison_flags,
    auroc,
    colour,
    colour_and_layout,
    colour_scale,
    command,
    count_people,
    data_set,
    decade_of,
    dot_lines,
    extract,
    fail,
    fit_square,
    flag_adder,
    fold,
    frechet,
    generator,
    grey_kind,
    in_grey,
    is_marked,
    kid,
    label_list,
    list_images,
    list_real,
    load_features,
    load_lpips,
    load_pixels,
    load_real,
    lpips_matrix,
    need_weights,
    note,
    number,
    page,
    pair,
    paragraph,
    pick_device,
    pick_resolution,
    pooled,
    precision_recall,
    progress,
    read_audit,
    read_run,
    read_table,
    reading_words,
    report_enlarged,
    resamples,
    resolve_auto,
    run_script,
    set_hash,
    shows_colour,
    split_rows,
    squared_distances,
    ssim_matrix,
    stored_grain,
    table,
    text_key,
    write_file,
    zoom,
)

ENOUGH = 50  # images; fewer hide differences
HALVES = 20  # random halves of the real set
PARTS = 20  # left out in turn, to tell two sets apart
SHARES = (0, 10, 25, 50, 100, 200)  # percent of generated images added for --utility
SEEDS = 5  # of the classifiers of --utility
BAND_WORDS = ("excellent", "good", "fair", "poor")
BANDS = {
    "fid": (30, 50, 100),
    "ssim_nearest": (0.8, 0.7, 0.6),
    "lpips_nearest": (0.2, 0.3, 0.4),
    "inception_score": (3, 2, 1.5),
}

# ---------------------------------------------------------------- the yardstick


@dataclass
class Figure:
    """A metric of a generated set, next to what chance and the real images alone give."""

    value: float
    null: float  # median of the permutations
    null_low: float  # 95 % of them
    null_high: float
    excess: float  # value less null
    p_high: float  # how often chance is as bad or worse: small where the sets differ
    p_low: float  # how often chance is as good or better: small where images are copies
    lower_is_better: bool
    ranks: np.ndarray  # of each draw, how rare it is as bad and as good, (2, draws)
    real_vs_real: float = None  # one half of the real images against the other, median
    same_size: float = None  # as many generated images against a half, median
    without_part: np.ndarray = np.nan  # of what is ranked: without each part of both sets, (PARTS,)
    band: str = None


def yardstick(values, lower_is_better):
    """The Figure of values[0] next to what chance gives, values[1:]; values: (1 + draws,)."""
    low, median, high = np.percentile(values[1:], (2.5, 50, 97.5))
    badness = np.round(values / (np.abs(values).max() or 1), 9)  # equal but for rounding: a tie
    if not lower_is_better:
        badness = -badness
    both = np.array([-badness, badness])
    ranks = np.stack([np.searchsorted(np.sort(side), side, "right") for side in both])
    p_high, p_low = ranks[:, 0] / len(values)
    # Each metric has a draw of rank 1: among equal ranks the one further out is rarer. No z-score
    # is over sqrt(draws), so that this is less than half a rank.
    outlying = (badness - badness.mean()) / (badness.std() or 1) / (2 * np.sqrt(len(values)))
    ranks = ranks + [-outlying, outlying]
    excess = values[0] - median
    return Figure(values[0], median, low, high, excess, p_high, p_low, lower_is_better, ranks)


def test_together(figures):
    """p of all figures together, and {name: "worse" or "too good"} of those with adjusted p <= .05.

    Westfall and Young's minP (1993): the smallest rank of any figure against that of each draw. The
    rarest comes first.
    """
    ranks = np.array([figure.ranks for figure in figures.values()])  # (figures, 2, draws)
    smallest = ranks.min((0, 1))
    differences = {}
    for name, figure in sorted(figures.items(), key=lambda item: item[1].ranks[:, 0].min()):
        worse, better = figure.ranks[:, 0]
        if np.mean(smallest <= min(worse, better)) <= 0.05:
            differences[name] = "worse" if worse < better else "too good"
    return np.mean(smallest <= smallest[0]), differences


def measure(name, joint, draws, halves=None):
    """The Figure of a metric; joint: of `collect_matrices`; halves: of `half_draws`, or None."""
    function, lower_is_better, need = METRICS[name]
    figure = yardstick(function(joint[need], draws), lower_is_better)
    if halves:
        figure.real_vs_real = np.median(function(joint[need], halves[0]))
        figure.same_size = np.median(function(joint[need], halves[1]))
    return figure


# A draw is int8 (n + m,) for n real and m generated images: 1 in the first set, -1 in the second,
# 0 in neither.


def shuffles(count, size, *key):
    """`count` random orders of `size` things: (count, size)."""
    return torch.rand(count, size, generator=generator(*key)).argsort(1).numpy()


def permutation_draws(n, m, count, seed, groups=(), labels=None):
    """int8 (1 + count, n + m): the sets as they are, then the pooled images divided again.

    groups: a patient for each image; `pick_compared` leaves one image of each in a set. Those of a
    patient in both sets change places at random, all others are shuffled: if a generator is
    perfect, every such division was as likely as the true one, so that p is exact. labels: a number
    for each image; both sets keep their count of each.
    """
    draws = np.ones((1 + count, n + m), np.int8)
    draws[:, n:] = -1
    if labels is None:
        labels = np.zeros(n + m, int)
    names, first, second = np.intersect1d(groups[:n], groups[n:], return_indices=True)
    second += n
    is_pair = (names != "") & (labels[first] == labels[second])
    first, second = first[is_pair], second[is_pair]
    alone = np.setdiff1d(np.arange(n + m), [first, second])
    for label in np.unique(labels):
        members = alone[labels[alone] == label]
        order = shuffles(count, len(members), seed, "permutation", str(label))
        draws[1:, members] = draws[0, members][order]
    sides = torch.randint(2, (count, len(first)), generator=generator(seed, "swap")).numpy()
    draws[1:, first] = 1 - 2 * sides
    draws[1:, second] = 2 * sides - 1
    return draws


def half_draws(n, m, count, seed):
    """A random half of the real set against the other, and against as many generated images.

    Two int8 (count, n + m), all sides of equal size.
    """
    half = min(n, m) // 2
    real = shuffles(count, n, seed, "halves of the real set")
    fake = n + shuffles(count, m, seed, "halves of the generated set")
    against_real, against_fake = np.zeros((2, count, n + m), np.int8)
    for draws, others in ((against_real, real[:, half:]), (against_fake, fake)):
        np.put_along_axis(draws, real[:, :half], 1, 1)
        np.put_along_axis(draws, others[:, :half], -1, 1)
    return against_real, against_fake


def part_draws(n, m, count, seed):
    """Both sets without a random part, each of `count` parts in turn: int8 (count, n + m)."""
    real = shuffles(1, n, seed, "parts of the real set")[0] % count
    fake = shuffles(1, m, seed, "parts of the generated set")[0] % count
    draws = np.ones((count, n + m), np.int8)
    draws[:, n:] = -1
    draws[np.arange(count)[:, None] == np.append(real, fake)] = 0
    return draws


# ---------------------------------------------------------------- the metrics


def joint_matrices(real, fake, standardise):
    """What the metrics read of features (N, D), (M, D): `pooled`, squared distances, KID's kernel.

    points: the features, centred and turned so that N + M numbers an image are enough.
    """
    features = pooled(real, fake, standardise)
    centred = features - features.mean(0)  # a large common mean costs digits
    distances = squared_distances(centred, centred)
    return {
        "features": features,
        "points": np.linalg.qr(centred.T, mode="r").T,
        "distance": distances,
        "order": distances.argsort(1).astype(np.int32),
        "kernel": (features @ features.T / features.shape[1] + 1) ** 3,
    }


def frechet_draws(joint, draws):
    """The Fréchet distance of each draw, see metrics.frechet: (draws,)."""
    points = joint["points"]
    values = []
    for draw in progress(draws, "Frechet"):
        values.append(frechet(points[draw == 1], points[draw == -1]))
    return np.array(values)


def pair_means(matrix, draws):
    """Means of a symmetric (n + m, n + m) over pairs in the first set, the second, and between."""
    first, second = (draws == 1).T.astype(float), (draws == -1).T.astype(float)  # (n + m, draws)
    n, m, diagonal = first.sum(0), second.sum(0), matrix.diagonal()
    to_second = matrix @ second
    within_first = ((first * (matrix @ first)).sum(0) - diagonal @ first) / (n * (n - 1))
    within_second = ((second * to_second).sum(0) - diagonal @ second) / (m * (m - 1))
    return within_first, within_second, (first * to_second).sum(0) / (n * m)


def kid_draws(joint, draws):
    """KID (Binkowski et al. 2018) of each draw, unbiased: (draws,)."""
    first, second, between = pair_means(joint["kernel"], draws)
    return first + second - 2 * between


def neighbour_draws(which, joint, draws):
    """Number `which` of precision, recall (k = 3), density and coverage (k = 5): (draws,)."""
    key = "neighbours", draws.tobytes()
    if key not in joint:  # all four are computed together
        distances, order = joint["distance"], joint["order"]
        joint[key] = []
        for draw in progress(draws, "neighbours"):
            figures = precision_recall(distances, order, draw, 3)[:2]
            joint[key].append(figures + precision_recall(distances, order, draw, 5)[2:])
    return np.array(joint[key])[:, which]


def nearest_draws(matrix, draws):
    """Mean over the second set of the least distance to the first, (n + m, n + m) -> (draws,)."""
    return np.array([matrix[draw == 1][:, draw == -1].min(0).mean() for draw in draws])


def inception_draws(logits, draws):
    """Inception Score (Salimans et al. 2016) of the second set; logits (n + m, 1008), no bias."""
    shares = special.softmax(logits, 1)
    second = (draws == -1) / (draws == -1).sum(1, keepdims=True)
    return np.exp(special.entr(second @ shares).sum(1) - second @ special.entr(shares).sum(1))


# name: (function of what it needs and the draws, lower is better, what it needs)
METRICS = {
    "frechet": (frechet_draws, True, "features"),
    "kid": (kid_draws, True, "features"),
    "precision": (partial(neighbour_draws, 0), False, "features"),
    "recall": (partial(neighbour_draws, 1), False, "features"),
    "density": (partial(neighbour_draws, 2), False, "features"),
    "coverage": (partial(neighbour_draws, 3), False, "features"),
    "colour": (frechet_draws, True, "colour"),
    "grain": (frechet_draws, True, "grain"),
    "ssim_nearest": (lambda ssim, draws: -nearest_draws(-ssim, draws), False, "ssim"),
    "ssim_pairs": (lambda ssim, draws: pair_means(ssim, draws)[1], True, "ssim"),
    "lpips_nearest": (nearest_draws, True, "lpips"),
    "lpips_pairs": (lambda lpips, draws: pair_means(lpips, draws)[1], False, "lpips"),
    "inception_score": (inception_draws, False, "logits"),
}


# ---------------------------------------------------------------- what is compared


@dataclass
class Tools:
    """What the metrics are computed with."""

    names: list  # of metrics
    network: Network
    lpips: Network | None
    device: torch.device
    args: object

    def extract(self, pixels):
        args = self.args
        return extract(pixels, self.network, self.device, args.batch_size, args.precision)


@dataclass
class ImageSet:
    """The images of a folder or table that are compared."""

    path: str
    rows: list
    pixels: torch.Tensor  # uint8 (N, 3, S, S)
    features: np.ndarray = None  # (N, D)
    all_features: np.ndarray = None  # also those of images beyond --max-images
    drawn: np.ndarray = None  # bool (N,), one image of each unit

    @cached_property
    def finder(self):
        """Finds copies of its images, in itself and in other sets."""
        return CopyFinder(self.rows, self.pixels)


def load_set(path, rows, resolution, tools, load=load_pixels, measure=stored_grain):
    """An ImageSet of at most --max-images, picked by the seed; fewer than 2 are an error."""
    limit = tools.args.max_images
    order = torch.randperm(len(rows), generator=generator(tools.args.seed, "max-images")).tolist()
    others = [rows[i] for i in order[limit:]]
    if others:
        print(f"{path}: {limit} of {len(rows)} images are picked (--max-images); frechet uses all")
    rows = [rows[i] for i in sorted(order[:limit])]
    rows, pixels = load(rows, resolution, measure=measure)
    if len(rows) < 2:
        fail(f"{path}: readable images: {len(rows)}; a comparison needs at least 2")
    features = [tools.extract(pixels)]
    if "frechet" in tools.names:
        for start in range(0, len(others), 500):
            more_pixels = load(others[start : start + 500], resolution)[1]
            features.append(tools.extract(more_pixels))
    images = ImageSet(path, rows, pixels, features[0], np.concatenate(features))
    images.drawn = draw_units(images, tools.args.seed)
    return images


def draw_units(images, seed):
    """One image of each unit, bool (N,).

    A unit is a patient, or a picture stored several times, which may join patients. Of fewer than
    ten units each image counts: then the figures hold for these patients alone.
    """
    count = len(images.rows)
    names = "|".join(row.file_name for row in images.rows)  # the same wherever the folder is
    order = shuffles(1, count, seed, "units", names)[0]
    drawn = order[np.unique(images.finder.unit_of[order], return_index=True)[1]]
    if len(drawn) < 10:
        drawn = order
    if len(drawn) < count:
        text = "one of each patient and one of each picture that is stored twice"
        print(f"{images.path}: {len(drawn)} of {count} images are compared, {text}")
    return np.isin(np.arange(count), drawn)


def pick_compared(real, fake):
    """Both sets with one image of each unit: these are exchangeable, a unit's images are alike.

    A perfect generator need not repeat itself as the real set does. Where it repeats itself more,
    that is its fault, and its repeats stay.
    """
    copies = [np.bincount(images.finder.picture_of) for images in (real, fake)]
    if copies[1].max() > 1:  # else scipy.stats, which takes a second, is not imported
        test = scipy.stats.mannwhitneyu(copies[1], copies[0], alternative="greater")
        if test.pvalue < 0.001:
            print(f"{fake.path}: repeats pictures more often than the real set: all images count")
            fake = replace(fake, drawn=np.ones(len(fake.rows), bool))
    compared = []
    for images in (real, fake):
        compared.append(replace(subset(images, images.drawn), all_features=images.all_features))
    return compared


def load_reference(rows, resolution, fakes, tools):
    """The ImageSet of real images, prepared as the generator saw them."""
    args = tools.args
    sides = {side for fake in fakes for row in fake.rows for side in row.size}

    def grain_as_seen(image):
        if len(sides) == 1:  # squares of one size, as generators draw
            image = fit_square(image, *sides, args.crop.replace("random", "center"))
        return stored_grain(image)

    load = partial(load_real, args=args)
    real = load_set(args.real, rows, resolution, tools, load, grain_as_seen)
    report_enlarged(real.rows, resolution, args.crop)
    return real


def drop_faint_colours(images):
    """Make images grey in which no eye sees a colour; print how many others there are."""
    in_colour = shows_colour(images.pixels)
    faint = ~in_colour
    images.pixels[faint] = in_grey(images.pixels[faint])
    if in_colour.any():
        count = f"{in_colour.sum()} of {len(faint)} images show colours"
        print(f"{images.path}: {count}, but the real images are grey: see sample.py --grey")


def list_reference(args):
    """The real rows to compare with, those to search for copies, and (split, row) of all."""
    rows = known = list_real(args.real, args)
    columns = rows[0].fields
    if args.by not in ("label", *columns):
        fail(f"--by {args.by}: {args.real} has no such column (it has: {', '.join(columns)})")
    if args.run:
        known = [row for row in rows if row.split == "train"]
        rows = [row for row in rows if row.split in ("val", "test")]
        print(f"{args.run}: {len(rows)} images were held out, {len(known)} were trained on")
    if args.train_data:
        known = list_real(args.train_data, args)
    if args.run and (len(rows) < 2 or not known):
        fail(
            f"--run {args.run}: too few images of REAL were held out, or trained on: train with "
            "--val-split 0.4, or give its --val-data as REAL and its --data as --train-data"
        )
    if all(is_marked(row.path) for row in rows[:20]):
        note(f"{args.real}: the files say that they are synthetic: are REAL and GENERATED swapped?")
    members = [(row.split or "real", row) for row in rows]
    if known is not rows:
        members = [(row.split or "train", row) for row in known] + members
    return rows, known, members


def draw_checkpoints(args):
    """Generate --num-samples images with each checkpoint by sample.py: [(folder, rows), …]."""
    checkpoints = [Path(args.checkpoint)]
    if checkpoints[0].is_dir():
        checkpoints = sorted(checkpoints[0].rglob("step-*.pt"))
    if not checkpoints:
        fail(f"--checkpoint {args.checkpoint}: no step-*.pt in it; give a file or a run's folder")
    sets = []
    for path in checkpoints:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            prompts = [" ".join(prompt.split()) for prompt in state["args"]["val_prompts"]]
        except Exception as why:  # torch has many for a damaged file
            fail(f"--checkpoint {path}: not a checkpoint of train.py ({type(why).__name__})")
        folder = f"{Path(args.out).with_suffix('')}-samples/{path.parent.parent.name}-{path.stem}"
        words = ["--checkpoint", path, "--out", folder]
        words += ["--num-images", -(-args.num_samples // len(prompts))]
        for name in ("steps", "guidance_scale", "batch_size", "device", "seed"):
            words += [f"--{name}".replace("_", "-"), getattr(args, name)]
        script = Path(__file__).with_name("sample.py")
        status = subprocess.run([sys.executable, script, *map(str, words)]).returncode
        if status:
            sys.exit(status)
        # a run of the same name may have left other prompts' images
        rows = [row for row in list_images(folder) if row.caption in prompts]
        sets.append((folder, rows[: args.num_samples]))
    return sets


# ---------------------------------------------------------------- one set against the real one


@dataclass
class Copies:
    """Generated images that are copies of real ones, and how near the others lie to them."""

    sentence: str
    copies: list = ()  # as in the JSON, the most alike first
    pairs: list = ()  # 12 as in the JSON: the copies, then the nearest
    numbers: list = ()  # (generated, known) image of each pair


@dataclass
class Entry:
    """All results of one generated set."""

    fake: ImageSet
    real: ImageSet
    known: ImageSet  # real images that were searched for copies
    compared: tuple  # of these, how many real and generated images the metrics compare
    metrics: dict  # name: Figure
    p: float  # of all metrics together
    differences: dict  # metric: "worse" or "too good", rarest first
    copies: Copies
    mix: list  # sentences on the labels
    labels: dict  # what images with them look like, as in the JSON
    subgroups: list  # as in the JSON
    utility: dict  # classifier: list of doses, as in the JSON
    utility_note: str  # what they are worth, or why there are none
    people: list  # who is in the sets, as in the JSON
    by_label: list  # copies, precision and recall, as in the JSON

    def first(self):
        """Name and Figure of the first metric, by which sets are ranked."""
        return next(iter(self.metrics.items()))


def evaluate_set(real, fake, known, tools, members):
    """The Entry of a generated set; members: (split, row) of all real images."""
    args = tools.args
    copies = find_copies(known, fake, args)  # the largest matrices come and go first
    compared, figures, mix, label_figures = measure_figures(real, fake, tools)
    drawn = [("generated", row) for row in fake.rows]
    people, by_label, rare = describe_people(members + drawn, copies, label_figures)
    p, differences = test_together(figures)
    features = pooled(real.features, fake.features, tools.network.standardise)
    labels = check_labels(real, fake, args.seed)
    subgroups = measure_subgroups(features, real.rows, fake.rows, args.by)
    utility = measure_utility(real, known, fake, tools) if args.utility else ({}, "")
    more = mix + rare, labels, subgroups, *utility, people, by_label
    return Entry(fake, real, known, compared, figures, p, differences, copies, *more)


def measure_figures(real, fake, tools):
    """Images compared, {metric: Figure}, sentences on labels that differ, `figures_by_label`."""
    args, network = tools.args, tools.network
    *compared, labels, mix = match_labels(*pick_compared(real, fake), args.seed)
    joint = collect_matrices(*compared, tools)
    n, m = [len(images.rows) for images in compared]
    groups = [row.group for images in compared for row in images.rows]
    draws = permutation_draws(n, m, args.permutations, args.seed, groups, labels)
    halves = half_draws(n, m, HALVES, args.seed) if min(n, m) > 3 else None
    figures = {}
    for name in tools.names:
        figure = measure(name, joint, draws, halves)
        if halves and name == tools.names[0]:  # sets are ranked by the first metric
            function, _, need = METRICS[name]
            figure.without_part = function(joint[need], part_draws(n, m, PARTS, args.seed))
        if name == "frechet" and compared[0].all_features is not None:
            every = pooled(real.all_features, fake.all_features, network.standardise)
            count = len(real.all_features)
            figure.value = frechet(every[:count], every[count:])
        if name == "frechet" and network.published and network.head is not None:
            name = "fid"
        figure.band = band(args.bands.get(name), figure)
        figures[name] = figure
    return (n, m), figures, mix, figures_by_label(*compared, joint, draws)


def match_labels(real, fake, seed):
    """Both sets with equal shares of labels, int (n + m,) the label of each image, and sentences.

    Of each label that both sets have, images are picked by the seed, `ratio` generated ones for a
    real one: all real ones of a typical real image's label. All other labels are as one, 0.
    """
    real_labels = np.array([text_key(row.label) for row in real.rows])
    fake_labels = np.array([text_key(row.label) for row in fake.rows])
    in_real, in_fake = Counter(real_labels), Counter(fake_labels)
    shared = sorted((in_real.keys() & in_fake.keys()) - {""})
    ratios = [in_fake[label] / in_real[label] for label in real_labels if label in shared]
    ratio = np.quantile(ratios or [1], 0.5, method="higher")
    fake_counts = {label: min(in_fake[label], ratio * in_real[label]) for label in shared}
    real_counts = {label: count / ratio for label, count in fake_counts.items()}
    keep_real = draw_labels(real_labels, real_counts, seed)
    keep_fake = draw_labels(fake_labels, fake_counts, seed)
    sentences = lonely_labels(in_real, in_fake)
    if not (keep_real.all() and keep_fake.all()):
        real, fake = subset(real, keep_real), subset(fake, keep_fake)
        text = f"{len(fake.rows)} generated and {len(real.rows)} real images with the same shares"
        sentences.append(f"The two sets have different shares of labels: {text} are compared.")
    numbers = {label: k for k, label in enumerate(shared, 1)}
    labels = [*real_labels[keep_real], *fake_labels[keep_fake]]
    return real, fake, np.array([numbers.get(label, 0) for label in labels]), sentences


def draw_labels(labels, counts, seed):
    """bool (N,): counts[label] images of each label, picked by the seed; all of other labels."""
    keep = np.ones(len(labels), bool)
    order = shuffles(1, len(labels), seed, "labels")[0]
    for label, count in counts.items():
        members = order[labels[order] == label]
        keep[members[max(1, round(count)) :]] = False
    return keep


def lonely_labels(real, fake):
    """Sentences on labels that only one set has, from {label: images}, where both have labels."""
    sentences = []
    for kind, own, others in (("real", real, fake), ("generated", fake, real)):
        alone = own.keys() - others.keys() - {""}
        if alone and any(others):
            names = textwrap.shorten(", ".join(sorted(alone)), 200, placeholder=" …")
            sentences.append(f"Only the {kind} set has these labels: {names}.")
    return sentences


def collect_matrices(real, fake, tools):
    """{what a metric needs: what its function reads}, see METRICS."""
    needs = {METRICS[name][2] for name in tools.names}
    pixels = torch.cat([real.pixels, fake.pixels])
    joint = {}
    if "lpips" in needs:  # first: it takes the most memory
        joint["lpips"] = lpips_matrix(pixels, tools.lpips, tools.device, tools.args.batch_size)
    joint["features"] = joint_matrices(real.features, fake.features, tools.network.standardise)
    joint["colour"] = {"points": pooled(colour(real.pixels), colour(fake.pixels), True)}
    grains = [[row.measured for row in images.rows] for images in (real, fake)]
    joint["grain"] = {"points": pooled(*grains, True)}
    if "ssim" in needs:
        joint["ssim"] = ssim_matrix(pixels, pixels, tools.device)
    if "logits" in needs:
        joint["logits"] = joint["features"]["features"] @ tools.network.head.T
    return joint


def band(limits, figure):
    """The band of a Figure: excellent, good, fair or poor by three limits; None without limits."""
    if limits is None:
        return None
    sign = 1 if figure.lower_is_better else -1
    return BAND_WORDS[np.searchsorted(sign * np.array(limits), sign * figure.value)]


def find_copies(known, fake, args):
    """The Copies: generated images that are the same picture as a known one, and the nearest."""
    index, similarity, kinds, is_copy = known.finder.find(fake.pixels)
    usual = known.finder.usual
    nearest = np.lexsort((-similarity, ~is_copy))  # copies first
    copies = []
    pairs = []
    for i in nearest[: max(12, is_copy.sum())]:
        match = known.rows[index[i]]
        names = {"generated": fake.rows[i].file_name, "train": match.file_name}
        if is_copy[i]:
            kind = {"kind": kinds[i], "label": match.label}
            copies.append(names | kind | {"similarity": similarity[i]})
        p = (1 + (usual >= similarity[i]).sum()) / (1 + len(usual))
        pairs.append(names | {"distance": 1 - similarity[i], "p": p})
    kind = "training" if args.run or args.train_data else "real"
    text = copies_sentence(copies, len(fake.rows), f"one of {len(known.rows)} {kind} images")
    chance, words = count_near(usual, similarity[fake.finder.first])
    text += f" {words}"
    if chance <= 0.01:
        text += ": more than by chance, so look at the pairs"
    elif not copies:
        text += ": no sign of copying"
    numbers = [(i, index[i]) for i in nearest[:12]]
    return Copies(text + ".", copies, pairs[:12], numbers)


def count_near(usual, similarity):
    """p of how many generated images are nearer to a real one than most real ones are, and words.

    usual (n,), similarity (m,): to the nearest, of real and generated ones. Fresh ones fall among
    the usual at random: the number above the k-th largest is beta-binomial (9,999 draws of it).
    """
    n, m = len(usual), len(similarity)
    k = min(n, max(5, round(0.1 * n)))
    count = (similarity > np.sort(usual)[-k]).sum()
    gen = np.random.default_rng(0)
    by_chance = gen.binomial(m, gen.beta(k, n + 1 - k, 9999))
    chance = (1 + (by_chance >= count).sum()) / 10_000
    text = f"{count} of {m} are as close to one of these as the closest {k / n:.0%} are to another"
    text += f" (by chance {digits(m * k / (n + 1), 2)}, p {digits(chance, 2)})"
    return chance, text


def copies_sentence(copies, count, known):
    """A sentence that names the first copies, and how many there are of each label."""
    if not copies:
        text = f"No generated image is a copy of {known}"
        return text + ", not even mirrored, turned, cropped, saved again or with other grey values."
    parts = [f"{copy['generated']} of {copy['train']} ({copy['kind']})" for copy in copies[:3]]
    if copies[3:]:
        parts.append(f"{len(copies) - 3} more")
    text = f"{len(copies)} of {count} generated images are copies of {known}: {', '.join(parts)}."
    labels = Counter(copy["label"] for copy in copies if copy["label"])
    if labels:
        text += f" By label: {', '.join(f'{name} {n}' for name, n in labels.most_common())}."
    return text


def may_be_copies(entry):
    """Whether a set is too close to the real one: as a whole, or by over 10 % of copies."""
    name, _ = entry.first()
    too_many = len(entry.copies.copies) > 0.1 * len(entry.fake.rows)
    return too_many or entry.differences.get(name) == "too good"


def check_labels(real, fake, seed):
    """What images of each label look like, as in the JSON: {} without labels that can be checked.

    table: of the generated images of a label, and of real ones left out of the fit, how many look
    most like each label. A sentence names a label that too few generated images look like: fewer
    than of the real ones, by Fisher's exact test at p <= .01.
    """
    real_colours = colour_and_layout(real.pixels)
    scale = colour_scale(real_colours)
    real_blocks = [real.features, scale(real_colours)]
    fake_blocks = [fake.features, scale(colour_and_layout(fake.pixels))]
    check = LabelCheck(real.rows, real_blocks, seed)
    if not check.names or (check.numbers(fake.rows) < 0).all():
        return {}
    own, looks, *_ = check.judge(fake_blocks, fake.rows)
    records = []
    sentences = list(check.sentences)
    for k in np.intersect1d(own, check.own):
        label = check.names[k]
        reached = []
        for kind, shown in (("generated", looks[own == k]), ("real", check.looks[check.own == k])):
            counts = Counter(check.names[j] for j in shown).most_common()
            record = {"label": label, "set": kind, "images": len(shown)}
            records.append(record | {"looks_like": dict(counts)})
            reached.append([(shown == k).sum(), (shown != k).sum()])
        if check.apart[k].all() and scipy.stats.fisher_exact(reached, "less").pvalue <= 0.01:
            fake_share, real_share = [f"{hits} of {hits + misses}" for hits, misses in reached]
            text = f"{fake_share} look like it, {real_share} of the real images do"
            sentences.append(f"Generated images of {label} look like other labels: {text}.")
    return {"table": records, "sentences": sentences}


def subgroup_masks(rows, column):
    """{subgroup: bool (N,), which images belong to it}, sorted.

    Subgroups are labels one by one, ages by decade, and "unknown" for an image without any.
    """
    masks = {}
    for i, row in enumerate(rows):
        text = row.label if column == "label" else row.fields.get(column, "")
        names = label_list(text)
        if column.lower() == "age":
            names = label_list(decade_of(text))
        for name in names or ["unknown"]:
            masks.setdefault(name, np.zeros(len(rows), bool))[i] = True
    return dict(sorted(masks.items()))


def measure_subgroups(features, real_rows, fake_rows, column):
    """KID of each subgroup to generated images, as in the JSON; None for fewer than 10 of a set.

    features: (n + m, D), real ones first. compared_with: the subgroup's own generated images or,
    where no generated image names one, all. real_vs_rest: KID of its real images to the other ones.
    """
    real, fake = features[: len(real_rows)], features[len(real_rows) :]
    real_masks = subgroup_masks(real_rows, column)
    fake_masks = subgroup_masks(fake_rows, column)
    compared_with = "its own"
    if set(fake_masks) == {"unknown"}:
        fake_masks = dict.fromkeys(real_masks, fake_masks["unknown"])
        compared_with = "all generated"
    records = []
    for name, inside in real_masks.items():
        own = fake_masks.get(name, np.zeros(len(fake), bool))
        counts = {"real": int(inside.sum()), "generated": int(own.sum())}
        value = error = rest = None
        if min(counts.values()) >= 10:
            value, error = kid(real[inside], fake[own])
            if (~inside).sum() > 2:
                rest = kid(real[inside], real[~inside])[0]
        record = {"group": name, **counts, "compared_with": compared_with}
        records.append(record | {"kid": value, "error": error, "real_vs_rest": rest})
    return records


# ---------------------------------------------------------------- who is in the sets, by label


def figures_by_label(real, fake, joint, draws, least=10):
    """{label: precision and recall, as in the JSON}, where `least` images of each set show it."""
    labels = [label_list(text_key(row.label)) for row in real.rows + fake.rows]
    found = {}
    for label in set().union(*labels):
        own_draws = draws[:100] * np.array([label in names for names in labels])
        if min((own_draws[0] == 1).sum(), (own_draws[0] == -1).sum()) < least:
            continue
        found[label] = {}
        for name in ("precision", "recall"):
            figure = measure(name, joint, own_draws)
            found[label] |= {name: figure.value, f"{name} by chance": figure.null_low}
    return found


def describe_people(members, copies, figures, rare=10):
    """Who is in the sets, copies and metrics of each label, both as in the JSON, and sentences.

    members: see metrics.count_people; the first set was searched for copies. figures: of
    `figures_by_label`. The sentence, if any, names labels that fewer than `rare` patients show.
    """
    copied = Counter()
    for copy in copies.copies:
        copied.update(label_list(text_key(copy["label"])) or ["unknown"])
    searched = members[0][0]
    nothing = dict.fromkeys(["precision", "precision by chance", "recall", "recall by chance"])
    people = count_people(members)
    by_label = []
    few = []
    for record in people:
        label = record["group"]
        if record["by"] == "label":
            copies_of_it = {"label": label, "copies": copied[label]}
            by_label.append(copies_of_it | figures.get(label, nothing))
            count = record[f"{searched} patients"] or record[f"{searched} images"]
            if 0 < count < rare and label != "unknown":
                few.append(f"{label} ({count})")
    if not few:
        return people, by_label, []
    text = f"Fewer than {rare} patients, or images of unknown patients, show {', '.join(few)}: "
    text += "the model is most likely to repeat these images."
    return people, by_label, [text]


# ---------------------------------------------------------------- do they help a classifier?


def measure_utility(real, known, fake, tools):
    """What each share of generated images does to a classifier, {classifier: as in the JSON}.

    Also a sentence on what that is worth or, with {}, what was missing.
    """
    *real_sets, sentence = real_parts(real, known, tools.args)
    classes = shared_classes(*real_sets, fake)
    if not classes:
        return {}, NO_UTILITY
    groups = [row.group for row in real_sets[1].rows]
    examples = [prepare(images, classes, tools) for images in (*real_sets, fake)]
    found = fit_classifiers(*examples, resamples(groups, tools.args.seed), tools.args.seed)
    results = {}
    for (name, share), values in found.items():
        gain = values - found[name, 0]
        low, high = np.nanquantile(values[1:], (0.025, 0.975))
        dose = {"share": share, "auroc": values[0], "low": low, "high": high, "gain": gain[0]}
        low, high = np.nanquantile(gain[1:], (0.005, 0.995))  # several doses are tried
        results.setdefault(name, []).append(dose | {"gain_low": low, "gain_high": high})
    return results, sentence


def real_parts(real, known, args):
    """The real images to train classifiers on and to test them on; what a test on these is worth.

    Without --run, 30 % are to test on, by a hash of the patient, as train.py splits.
    """
    if args.run:
        return known, real, "Classifiers are tested on images that the generator never saw."
    split_rows(real.rows, 0.3)
    held_out = np.array([row.split == "val" for row in real.rows])
    sentence = (
        "The generator may have seen the images that classifiers are tested on: gains are an upper "
        "bound. With --run DIR they are tested on images that this run held out."
    )
    return subset(real, ~held_out), subset(real, held_out), sentence


NO_UTILITY = (
    "Whether the images help a classifier is not measured. It takes a label that 5 images to train "
    "on, 5 to test on and 5 generated ones show, and that 5 of both real parts lack. Hold out more "
    "(train.py --val-split 0.4), label generated images (sample.py --label), or merge labels."
)


def shared_classes(train, test, fake):
    """Labels that five images of each set show, and that five of each real set lack."""
    masks = [subgroup_masks(images.rows, "label") for images in (train, test, fake)]
    classes = []
    for name in sorted(set.intersection(*map(set, masks)) - {"unknown"}):
        shown = [part[name].sum() for part in masks]
        lacking = [(~part[name]).sum() for part in masks[:2]]
        if min(shown + lacking) >= 5:
            classes.append(name)
    return classes


def prepare(images, classes, tools):
    """What classifiers read: features (N, D), small images (N, 3, 64, 64), targets (N, classes)."""
    masks = subgroup_masks(images.rows, "label")
    targets = np.stack([masks[name] for name in classes], 1)
    features = images.features
    if features is None:
        features = tools.extract(images.pixels)
    pixels = images.pixels.to(tools.device) / 64 - 2
    small = nn.functional.interpolate(pixels, (64, 64), mode="area")
    return torch.tensor(features).double(), small, torch.tensor(targets).double()


def subset(images, mask):
    """The images of a set where the mask is True."""
    rows = [images.rows[i] for i in np.flatnonzero(mask)]
    return ImageSet(images.path, rows, images.pixels[mask], images.features[mask])


def fit_classifiers(train, test, fake, weights, seed):
    """{(classifier, share): AUROC under each row of weights (B,), mean over SEEDS}.

    train, test, fake: what `prepare` gives of the sets. share: images added, in % of the real ones.
    """
    n, m = len(train[0]), len(fake[0])
    shares = [share for share in SHARES if share * n <= 100 * m]
    found = {}
    for repeat, share in tqdm(list(product(range(SEEDS), shares)), "utility", disable=None):
        order = torch.randperm(m, generator=generator(seed, "added", repeat))
        more = [part[order[: share * n // 100]] for part in fake]
        features, *both = [torch.cat(parts) for parts in zip(train, more, strict=True)]
        scores = {
            "linear probe": test[0] @ linear_probe(features, both[1]),
            "small CNN": small_cnn([both], (seed, repeat))(test[1]),
        }
        if share in (0, shares[-1]):  # not each dose: it takes twice the time
            first = more if share else train
            network = small_cnn([first[1:], train[1:]], (seed, repeat))
            scores["small CNN, generated first"] = network(test[1])
        for name, score in scores.items():
            values = aurocs(score.numpy(), test[2].numpy(), weights) / SEEDS
            found[name, share] = found.get((name, share), 0) + values
    return found


def linear_probe(features, targets):
    """Ridge regression on z-scored features (N, D): weights (D, classes) for unscaled features."""
    spread = features.std(0) + 1e-6
    x = (features - features.mean(0)) / spread
    gram = x.T @ x + x.shape[1] * torch.eye(x.shape[1])
    return torch.linalg.solve(gram, x.T @ targets) / spread[:, None]


def small_cnn(stages, seed, steps=200):
    """Train a network, `steps` on each stage of [(images (N, 3, 64, 64), targets (N, classes)), …].

    Images are in [-2, 2), targets in {0, 1}. Returns a function, images -> scores (N, classes).
    """
    classes = stages[0][1].shape[1]
    layers = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "init").initial_seed())
        for channels, maps in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(channels, maps, 3, stride=2, padding=1), nn.ReLU()]
            layers += [nn.GroupNorm(4, maps)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    net = nn.Sequential(*layers).to(stages[0][0].device)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    gen = generator(seed, "order")
    for images, targets in stages:
        for _ in range(steps):
            picked = torch.randint(len(images), (32,), generator=gen)
            logits = net(images[picked])
            loss = nn.functional.binary_cross_entropy_with_logits(
                logits, targets[picked].to(logits)
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    net.requires_grad_(False)
    return lambda images: net(images).cpu()


def aurocs(scores, targets, weights):
    """AUROC of scores (N, classes), mean over classes, under each row of weights (B, N): (B,)."""
    values = []
    for score, target in zip(scores.T, targets.T, strict=True):
        values.append(auroc(score, target > 0, weights))
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)  # of classes that have both kinds


# ---------------------------------------------------------------- in words


def digits(value, count=3, sign=False):
    """A number as text: `count` significant digits, no exponent, "–" for None, NaN or infinity."""
    if isinstance(value, int | str):
        return str(value)
    if value is None or not np.isfinite(value):
        return "–"
    value = round(value, 9)
    return np.format_float_positional(value, count, fractional=False, trim="-", sign=sign)


HEADER = "metric,better,value,differs,band,by chance: median [95 %],excess,p_high,p_low".split(",")
HEADER += ["real halves", "same size"]


def figure_rows(entry):
    """The metrics as rows of text, under HEADER."""
    rows = []
    for name, f in entry.metrics.items():
        chance = f"{digits(f.null)} [{digits(f.null_low)} – {digits(f.null_high)}]"
        better = "lower" if f.lower_is_better else "higher"
        row = [name, better, digits(f.value), entry.differences.get(name, "–"), f.band or "–"]
        row += [chance, digits(f.excess, sign=True), digits(f.p_high, 2), digits(f.p_low, 2)]
        rows.append(row + [digits(f.real_vs_real), digits(f.same_size)])
    return rows


PLAIN_NAMES = {
    "fid": "likeness as a whole",
    "frechet": "likeness as a whole",
    "kid": "likeness as a whole",
    "precision": "realism",
    "density": "realism",
    "recall": "variety",
    "coverage": "variety",
    "colour": "colour",
    "grain": "sharpness or noise",
    "ssim_nearest": "closeness to a real image",
    "lpips_nearest": "closeness to a real image",
    "ssim_pairs": "likeness to one another",
    "lpips_pairs": "likeness to one another",
    "inception_score": "clear contents",
}


def verdict(entry):
    """What the metrics say, in sentences for someone who reads no statistics."""
    _, text = findings(entry)
    text += entry.mix + entry.labels.get("sentences", []) + help_sentences(entry)
    text.append(entry.copies.sentence)
    return " ".join(text)


def findings(entry):
    """Whether and how the sets differ: a mark of a few words, and sentences."""
    seen = {"worse": [], "too good": []}
    for name, difference in entry.differences.items():
        if PLAIN_NAMES[name] not in seen[difference]:
            seen[difference].append(PLAIN_NAMES[name])
    is_few = min(entry.compared) < ENOUGH
    draws = len(entry.first()[1].ranks[0])
    mark = "? undecided" if is_few else "✓ not told apart"
    opening = "By these metrics the generated images cannot be told from real ones"
    if seen["worse"]:
        mark = "✗ told apart"
        opening = "The generated images can be told from real ones"
    elif seen["too good"]:
        mark = "! too good"
        opening = "The generated images are too good: better than fresh real images would be"
    elif entry.p <= 2 * len(entry.metrics) / draws:  # no less, even if it is outside all chance
        mark = "? undecided"
        opening = f"{draws - 1} permutations are too few to tell: type --permutations 999"
    text = [f"{opening} (p = {digits(entry.p, 2)} for all metrics together)."]
    if seen["worse"]:
        text.append(f"They are worse in (clearest first): {', '.join(seen['worse'])}.")
    if seen["too good"]:
        text.append(f"They are too good in: {', '.join(seen['too good'])}.")
        text.append("Copies cause this; images that are too smooth, too noisy or repeated can too.")
    if is_few:
        counts = "{} real and {} generated images".format(*entry.compared)
        text.append(f"Only {counts} were compared: below {ENOUGH}, only large differences show.")
    return mark, text


def help_sentences(entry):
    """Sentences on whether the images help a classifier; none without --utility."""
    text = []
    if entry.utility_note:
        text.append(entry.utility_note)
    for classifier, doses in entry.utility.items():
        text.append(f"A {classifier}: {dose_sentence(doses)}.")
    return text


def dose_sentence(doses):
    """Whether any share of generated images helps, by its 99 % interval, and the best one."""
    if len(doses) == 1:
        return f"too few generated images: {SHARES[1]} % of the real ones are needed"
    best = max(doses[1:], key=lambda dose: dose["gain"])
    text = f"AUROC from {doses[0]['auroc']:.3f} to {best['auroc']:.3f} with {best['share']} %"
    text += f" more images (gain, 99 % interval: {best['gain_low']:.3f} to {best['gain_high']:.3f})"
    if best["gain_low"] <= 0:
        return f"no gain beyond chance, at best {text}"
    if best is not doses[-1]:
        text += "; larger shares gained less"
    return f"a gain, {text}"


def rank_key(entry):
    """For sorting: copies last, then the excess of the first metric, turned so that low is good."""
    _, figure = entry.first()
    return may_be_copies(entry), figure.excess * (1 if figure.lower_is_better else -1)


def gap_error(figure, other):
    """Standard error of the difference of two sets' values, by the grouped jackknife.

    Both lose the same parts of the real set, so that the difference is paired. Of Fréchet distances
    of about 100 images it is 1.2 to 2 times the true error.
    """
    return np.std(figure.without_part - other.without_part) * np.sqrt(PARTS - 1)


def ranking(entries):
    """Header and rows: each set's excess, and whether the first set is really better.

    A set is worse where the excess differs by 1.96 standard errors.
    """
    rows = []
    name, first = entries[0].first()
    for entry in entries:
        figure = entry.metrics[name]
        gap = abs(figure.excess - first.excess)
        note = "not told apart from the first"
        if may_be_copies(entry):
            note = "may be copies"
        elif figure is first:
            note = "the first"
        elif gap > 1.96 * gap_error(figure, first):
            note = "worse"
        rows.append([entry.fake.path, len(entry.fake.rows), digits(figure.excess, sign=True), note])
    return ["set", "images", f"{name}: excess (0: like real)", "next to the first"], rows


def print_entry(entry):
    """Print one set's verdict, the guides and the table."""
    print(f"\n{entry.fake.path}: {len(entry.fake.rows)} images")
    print(f"{verdict(entry)}\n\n{GUIDE}\n")
    print_table(HEADER, figure_rows(entry))
    print(HALVES_GUIDE)


def print_table(header, rows):
    """Print a table as plain text."""
    rows = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


# ---------------------------------------------------------------- the report

GUIDE = """Chance is what a metric gives when both sets are mixed and divided at random, many times.
p_high: how often chance is as bad as the generated images or worse. p_low: how often it is as good
or better. Of many p values, one is often small by chance: only rows with a word in the column
"differs" count."""

HALVES_GUIDE = """real halves: one half of the real images against the other half. same size: as
many generated images against one half; compare it with real halves."""

PAGE_GUIDE = """The bar is what chance gives: 95 % of many random divisions of both sets, mixed. The
dot is the generated set. To the right of the bar it is worse. To the left it is better than fresh
real images would be, as copies are. Of so many metrics one is often outside by chance: only those
marked "worse" or "too good" count."""

FIGURES = """<p><b>excess</b>: the value minus the median of chance. <b>frechet, kid</b>: distance
between the two sets; <b>colour</b>: the same for their colours; <b>grain</b>: the same for
sharpness, noise and JPEG blocks of the files as stored. <b>precision, density</b>: how many
generated images look real. <b>recall, coverage</b>: how much of the real variety is reached.
<b>ssim, lpips</b>: likeness to the nearest real image (nearest) or of generated images to one
another (pairs). <b>band</b>: by a fixed table; read it next to real halves.</p>"""

LABELS_GUIDE = """What images look like to a classifier that learnt from the real ones. Each real
image is judged by a classifier that never saw its patient."""

COPIES = """Below are the most similar pairs: left the generated image, right the real one. p: the
share of real images that are as similar to another real one. This does not guarantee privacy."""

SUBGROUPS = """kid: distance of a subgroup's real images to the generated ones that compared_with
names; error: its standard error; real_vs_rest: distance to the other real images. Smaller is more
alike; – where there are too few images."""

PEOPLE = """All real images, and the generated ones that were compared. train: the model was trained
on these; val and test: held out. Sex and age come from the table or DICOM headers. Sex, age, labels
and patients that are not listed are unknown. A patient with several labels counts in each."""

BY_LABEL = """copies: generated images that are copies of a real one with this label. Where ten
images of each set show it, precision: the share of generated images that look real; recall: the
share of the real variety that is reached; by chance: what nearly all random divisions reach."""

METHODS = """Real images: SHA-256 {real_hash}, made square by --crop {crop}; generated ones by their
central square. All were resized to {resolution} px (Lanczos); {resize} resizing before the network;
{networks}. SSIM at 64 px, grey. Precision and recall with 3 neighbours, density and coverage with
5; Inception Score in one split. Copies: an affine map lays one image over the other, and 70 % of
squares (8 x 8 of 64 x 64 px) correlate better in local contrast than two different real images
usually do; distance: 1 minus this correlation. Chance: {permutations} permutations, seed {seed},
within each label, of one image of each patient and picture; a patient's real and generated image
change places. p of all metrics: Westfall and Young's minP. Of more than {max_images} images so many
were picked at random; the Frechet value alone is of all, where the labels have equal shares. Real
halves: median of {halves} random ones. Utility: ridge regression on the features, and a network of
three layers (200 steps of 32 images at 64 px), on real and generated images together or, generated
first, 200 steps on these and 200 on real ones; {seeds} paired seeds; tested on the held-out images
of --run, else on 30 % of the real ones; 1000 bootstraps of whole patients. {versions}, {device}.
Not for diagnosis."""


def records_table(guide, records):
    """HTML: a guide, and a table of dicts with the same keys, as in the JSON."""
    rows = [map(digits, record.values()) for record in records]
    return paragraph(guide) + table(records[0], rows)


def people_tables(entry):
    """HTML: who is in the sets, and figures by label; not what is unknown of all images."""
    first = entry.people[0]  # counts them all
    columns = [name for name, value in first.items() if value is not None]
    people = []
    for record in entry.people:
        if record["group"] != "unknown" or record | {"by": "", "group": "all"} != first:
            people.append({name: record[name] for name in columns})
    by_label = ""
    if {record["label"] for record in entry.by_label} != {"unknown"}:
        by_label = records_table(BY_LABEL, entry.by_label)
    return records_table(PEOPLE, people), by_label


def verdict_box(entry):
    """HTML: the verdict, first as a coloured mark of a few words, then in sentences."""
    mark, text = findings(entry)
    marks = f'<b class="badge {mark}">{mark}</b>'
    if entry.copies.copies or may_be_copies(entry):
        marks += '<b class="badge copies">! may be copies</b>'
    sentences = paragraph(" ".join([*text, entry.copies.sentence]))
    return f'<div class="verdict">{marks}{sentences}</div>'


def gallery(title, images, seed):
    """HTML: at most 12 images of a set, picked by the seed."""
    order = torch.randperm(len(images.rows), generator=generator(seed, "shown"))[:12]
    tiles = [zoom(images.pixels[i], f"{title}: {images.rows[i].file_name}") for i in order]
    heading = f"<h4>{title}: {len(order)} of {len(images.rows)} images</h4>"
    return f'<div>{heading}<div class="tiles">{"".join(tiles)}</div></div>'


def figure_lines(entry):
    """HTML: each metric next to what chance gives."""
    lines = []
    for name, figure in entry.metrics.items():
        better = "lower" if figure.lower_is_better else "higher"
        note = f"{name}, {better} is better"
        chance = f"{digits(figure.null_low)} to {digits(figure.null_high)}"
        title = f"{digits(figure.value)}; chance gives {chance}"
        words = entry.differences.get(name, "no clear difference")
        lines.append((PLAIN_NAMES[name], note, 40, 60, place(figure), title, words))
    return dot_lines(("", "too good", "chance", "worse", "verdict"), lines)


def place(figure):
    """Where its dot is, in percent from the left: 40 to 60 is chance, worse is right, log scale."""
    limit = figure.null_high if figure.excess > 0 else figure.null_low
    steps = np.arcsinh(figure.excess / max(abs(limit - figure.null), 1e-12)) / np.arcsinh(1)
    return 50 + 10 * steps * (1 if figure.lower_is_better else -1)


def copies_section(entry, args):
    """HTML: copies, then the pairs nearest to each other."""
    copies = entry.copies
    figures = ""
    for k, (i, j) in enumerate(copies.numbers):
        match = copies.pairs[k]
        text = f"distance {digits(match['distance'])}, p {digits(match['p'], 2)}"
        if k < len(copies.copies):
            text = f"a copy: {copies.copies[k]['kind']}"
        row = entry.known.rows[j]
        side = entry.fake.pixels.shape[-1]
        _, pixels = load_real([row], side, args, bad_share=1)  # was searched small
        figures += pair((entry.fake.pixels[i], entry.fake.rows[i]), (pixels[0], row), text)
    return f'{paragraph(f"{copies.sentence} {COPIES}")}<div class="pairs">{figures}</div>'


def labels_section(labels):
    """HTML: what images of each label look like."""
    rows = []
    for *cells, looks_like in map(dict.values, labels["table"]):
        counts = [f"{name}: {count}" for name, count in looks_like.items()]
        rows.append([*cells, ", ".join(counts)])
    text = paragraph(" ".join([LABELS_GUIDE, *labels["sentences"]]))
    return text + table(["label", "set", "images", "look most like"], rows)


def utility_section(entry):
    """HTML: whether generated images help a classifier."""
    body = paragraph(entry.utility_note)
    header = ("generated added, % of real", "0.5: guesses", "", "1: never wrong", "AUROC")
    for name, doses in entry.utility.items():
        lines = []
        for dose in doses:
            places = [200 * dose[key] - 100 for key in ("low", "high", "auroc")]
            title = f"95 % interval: {dose['low']:.3f} to {dose['high']:.3f}"
            lines.append((f"{dose['share']} %", title, *places, title, f"{dose['auroc']:.3f}"))
        body += paragraph(f"{name}: {dose_sentence(doses)}.") + dot_lines(header, lines)
    return body


def set_section(entry, args):
    """HTML: the report's section on one generated set, in the order in which people ask."""
    fake = entry.fake
    numbers = paragraph(GUIDE) + table(HEADER, figure_rows(entry)) + paragraph(HALVES_GUIDE)
    body = f"<h2>{html.escape(fake.path)}: {len(fake.rows)} images</h2>{verdict_box(entry)}"
    body += '<h3>What do they look like?</h3><div class="sides">'
    body += gallery("Real", entry.real, args.seed) + gallery("Generated", fake, args.seed)
    guide = " ".join([PAGE_GUIDE, *entry.mix])
    body += f"</div><h3>Do they differ, and how?</h3>{paragraph(guide)}{figure_lines(entry)}"
    body += fold("The numbers", numbers + FIGURES)
    body += f"<h3>Are they copies?</h3>{copies_section(entry, args)}"
    if entry.labels:
        body += f"<h3>Do they show their labels?</h3>{labels_section(entry.labels)}"
    if entry.utility_note:
        body += f"<h3>Do they help a classifier?</h3>{utility_section(entry)}"
    if len(entry.subgroups) > 1:  # not all unknown
        body += f"<h3>By {html.escape(args.by)}</h3>{records_table(SUBGROUPS, entry.subgroups)}"
    body += fold("Who is in the sets, label by label", "".join(people_tables(entry)))
    return body


def write_report(args, settings, entries):
    """Write --out: ranking where there are several sets, a section for each set, methods."""
    body = paragraph(f"REAL: {args.real}, {len(entries[0].real.rows)} images", "soft")
    if len(entries) > 1:
        body += f"<h2>Ranking by excess over chance, copies last</h2>{table(*ranking(entries))}"
    for entry in entries:
        body += set_section(entry, args)
    methods = METHODS.format(halves=HALVES, seeds=SEEDS, **settings)
    how = paragraph(methods) + paragraph(command("evaluate.py", *sys.argv[1:]), "soft")
    body += fold("How it was made", how)
    write_file(args.out, page("Generated against real images", body))


JSON_KEYS = "value null null_low null_high excess p_high p_low real_vs_real band".split()


def collect_results(args, settings, entries):
    """What --json holds, in the form that the docstring gives."""
    generated = []
    for entry in entries:
        figures = {}
        for name, figure in entry.metrics.items():
            figures[name] = {key: getattr(figure, key) for key in JSON_KEYS}
        copies = entry.copies.copies
        memorisation = {"likely_copies": len(copies), "copies": copies, "pairs": entry.copies.pairs}
        result = {"path": entry.fake.path, "n": len(entry.fake.rows), "p": entry.p}
        result |= {"metrics": figures, "memorisation": memorisation, "subgroups": entry.subgroups}
        result |= {"people": entry.people, "by_label": entry.by_label}
        helps = help_sentences(entry)
        result["sentences"] = entry.mix + helps
        result["marked"] = sum(is_marked(row.path) for row in entry.fake.rows)
        result["searched"] = len(entry.known.rows)
        result["findings"] = findings(entry)[1] + helps
        if entry.labels:
            result["labels"] = entry.labels
        if entry.utility:
            result |= {"utility": entry.utility["linear probe"], "classifiers": entry.utility}
        generated.append(result)
    real = {"path": args.real, "n": len(entries[0].real.rows)}
    content = {"format": 2, "settings": settings, "real": real, "generated": generated}
    content["run"] = describe_run(args.run)
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def describe_run(folder):
    """What the JSON says of --run: its model, and its membership audit, a dict with "sentence"."""
    flags = read_run(folder) if folder else {}
    run = {name: flags.get(name, "unknown") for name in ("base", "method", "steps")}
    run["audit"] = read_audit(folder) if folder else None
    if not run["audit"]:
        run["audit"] = {"sentence": "No membership audit: --run is not given or has none."}
    return run


# ---------------------------------------------------------------- the page for a board

BOARD = """<h2>What are these images?</h2><p>{made[n]} generated images ({folder}). The model that
generated them is {base}, trained further (method {run[method]}) for {run[steps]} steps. They are
for research, not for diagnosis.</p>
<h2>From whom were they made?</h2>{people}
<h2>How are they marked?</h2><p>{made[marked]} of {made[n]} files carry a mark that says they are
synthetic.</p>
<h2>Are patients copied, or known to the model?</h2><p>{made[memorisation][likely_copies]} of
{made[n]} are copies of one of {made[searched]} real images, also mirrored, turned, cropped or saved
again. Is the set as a whole too close to real images? {near}.</p><p>{audit}</p><p>Privacy method:
none; not differentially private. If no copy is found, somebody may still be recognised: only whole
images are compared, and an audit says little about a single patient.</p>
<h2>How do they differ from real images?</h2><p>{differs} In each row, the bar is what chance gives
if both sets are alike, and the dot is these images: further right is worse.</p>{figures}
{by_label}
<h2>Do they help?</h2><p>{helps}</p>
<h2>What are the known limits?</h2><p>The images inherit the biases of the images they were made
from. They do not represent people whom the table does not count. No expert was asked what they
show. A selection of them needs this evaluation again. {limits}</p>
<h2>Whom to ask</h2><p>{contact}</p>"""


def write_board(args, results, entry):
    """Write --board: what a board asks, in its order; no file's name, all numbers of `results`."""
    made = results["generated"][0]
    run = results["run"]
    texts = {
        "folder": Path(made["path"]).resolve().name,
        "base": Path(run["base"]).name,
        "near": "Yes" if may_be_copies(entry) else "No",
        "audit": run["audit"]["sentence"],
        "differs": " ".join(findings(entry)[1]),
        "helps": " ".join(help_sentences(entry)) or "Not measured (--utility).",
        "limits": " ".join(entry.mix + entry.labels.get("sentences", [])),
        "contact": args.contact or "_" * 40,
    }
    parts = {name: html.escape(text) for name, text in texts.items()}
    parts["figures"] = figure_lines(entry)
    parts["people"], parts["by_label"] = people_tables(entry)
    body = BOARD.format(made=made, run=run, **parts)
    write_file(args.board, page("Generated images: a page for your board", body))


def write_results(args, settings, entries):
    """Write --out, --board and --json, and say where they are."""
    write_report(args, settings, entries)
    print(f"report: {os.path.abspath(args.out)}")
    if not (args.board or args.json):
        return
    results = collect_results(args, settings, entries)  # looks into each generated file
    if args.board:
        write_board(args, results, entries[0])
        print(f"page for your board: {os.path.abspath(args.board)}")
    if args.json:
        write_file(args.json, json.dumps(results, indent=1))
        print(f"results for programs: {os.path.abspath(args.json)}")


# ---------------------------------------------------------------- flags


def metric_names(text):
    """An argument type: a comma list of metrics; fid is another word for frechet."""
    words = text.replace(" ", "").replace("-", "_").split(",")
    names = ["frechet" if word == "fid" else word for word in words]
    for name in names:
        if name not in METRICS:
            fail(f"--metrics: {name!r} is not a metric; choose from {', '.join(METRICS)}")
    return names


def bands_table(path):
    """An argument type: a CSV of metric,excellent,good,fair as {metric: [three limits]}."""
    bands = {}
    try:
        for row in read_table(path):
            bands[row["metric"].replace("-", "_")] = [float(row[word]) for word in BAND_WORDS[:3]]
    except (KeyError, ValueError):
        fail(f"--bands {path}: needs columns metric,excellent,good,fair, numbers in the last three")
    return bands


def parse_args():
    description, heading, form = __doc__.partition("The form of --json")
    parser = Flags(description, epilog=heading + form)
    add = flag_adder(parser.add_argument_group("data"))
    add("real", "real images: a folder or a table", None, data_set, metavar="REAL", nargs="?")
    add("generated", "generated images, likewise", None, data_set, metavar="GENERATED", nargs="*")
    add("--checkpoint", "generate with this checkpoint, or each of a folder", type=data_set)
    add("--num-samples", "images to generate with each checkpoint", 200, number(2, 10**6))
    add("--steps", "denoising steps for --checkpoint, 1 to 998", 50, number(1, 998))
    add("--guidance-scale", "weight of the prompt for --checkpoint", 7.5, number(0.0, 1000))
    add("--train-data", "search these for copies (default: of --run, else REAL)", type=data_set)
    add("--max-images", "most images of a set to compare, 2 to 5000", 1000, number(2, 5000))
    add = flag_adder(parser.add_argument_group("metrics"))
    usual = [name for name in METRICS if name != "inception_score"]
    add("--metrics", f"of {', '.join(METRICS)} (default: all but the last)", usual, metric_names)
    add("--features", "inception, texture, auto (inception if there), HUB-ID or PATH", "auto")
    add("--resize", "inception: as pytorch-fid or clean-fid", "legacy", choices=("legacy", "clean"))
    add("--bands", "CSV: metric,excellent,good,fair (default: built in)", BANDS, bands_table)
    add("--utility", "do generated images help a classifier? needs labels", False)
    add("--by", "subgroups by a column such as sex or age", "label")
    add("--permutations", "random divisions that show chance, from 99", 999, number(99, 10**6))
    add = flag_adder(parser.add_argument_group("output"))
    add("--out", "report to write, HTML", "report.html")
    add("--json", "results to write for programs, JSON")
    add("--board", "page to write for an ethics board, HTML; one GENERATED")
    add("--contact", "whom to ask, on --board (default: a line to fill in)")
    add("--download", "download the weights of published networks, and end", False)
    add_comparison_flags(parser.add_argument_group("comparison"))
    args = parser.parse_args()
    for path in (args.out, args.json or "", args.board or ""):  # known before an hour of work
        if os.path.isdir(path):
            fail(f"{path}: is a folder; give a file to write to")
    if args.download:  # it ends here, as --help does
        for name in WEIGHTS:
            print(need_weights(name, "--download"))
        sys.exit()
    if not args.real or not (args.generated or args.checkpoint):
        fail("nothing to compare: give REAL, and GENERATED (one or more) or --checkpoint")
    if args.board and (args.checkpoint or len(args.generated) > 1):
        fail("--board: the page is about one set: give one GENERATED and no --checkpoint")
    return args


def load_tools(args):
    """The Tools; LPIPS metrics are left out where there are no weights. No metric is an error."""
    device = pick_device(args.device)
    without_lpips = [name for name in args.metrics if METRICS[name][2] != "lpips"]
    net = "none" if without_lpips == args.metrics else args.lpips
    features, net = resolve_auto(args.features, net)
    names = args.metrics
    lpips = None
    if net == "none":
        names = without_lpips
    else:
        lpips = load_lpips(net, device)
    if not names:
        fail("--metrics: only LPIPS is asked for, but --lpips is none or has no weights")
    network = load_features(features, device, args.resize)
    if "inception_score" in names and network.head is None:
        fail("--metrics inception_score: needs --features inception or its weight file")
    return Tools(names, network, lpips, device, args)


def describe(tools, resolution, entries):
    """A dict of the settings that the report and --json name."""
    args = tools.args
    features = tools.network.name
    lpips = tools.lpips.name if tools.lpips else None
    rows = [row for entry in entries for row in entry.real.rows + entry.fake.rows]
    native = all(row.size == (resolution, resolution) for row in rows)  # none was resized
    published = native and args.precision in ("auto", "fp32") and tools.network.published
    networks = f"features {features}, LPIPS {lpips or 'none'}"
    if not published:
        networks += "; not comparable with published values"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}"
    return vars(args) | {
        "metrics": tools.names,
        "features": features,
        "lpips": lpips,
        "resolution": resolution,
        "device": str(tools.device),
        "versions": versions,
        "comparable": {"features": published, "lpips": lpips is not None},
        "networks": networks,
        "real_hash": set_hash(entries[0].real.rows),
    }


def main(args):
    print(f"listing {args.real}")
    real_rows, known_rows, members = list_reference(args)
    sets = [(path, list_images(path)) for path in args.generated]
    tools = load_tools(args)
    if args.checkpoint:
        sets += draw_checkpoints(args)
    resolution = args.resolution or pick_resolution([row for _, rows in sets for row in rows])
    print(f"reading {len(real_rows)} real images, and the generated ones, at {resolution} px")
    fakes = [load_set(path, rows, resolution, tools) for path, rows in sets]
    real = load_reference(real_rows, resolution, fakes, tools)
    real.pixels, in_colour = grey_kind(real.pixels)
    if in_colour is not None:
        for fake in fakes:
            drop_faint_colours(fake)
    known = real
    if known_rows is not real_rows or len(known_rows) > args.max_images:
        size = resolution if args.utility else min(80, resolution)  # copies are searched small
        known = ImageSet(args.real, *load_real(known_rows, size, args))
    entries = []
    for fake in fakes:
        entry = evaluate_set(real, fake, known, tools, members)
        entries.append(entry)
        print_entry(entry)
    entries.sort(key=rank_key)
    if len(entries) > 1:
        print("\nranking, the best first:")
        print_table(*ranking(entries))

    settings = describe(tools, resolution, entries)
    print(f"\n{settings['networks']}")
    write_results(args, settings, entries)
    reference = args.train_data or args.real
    words = [entries[0].fake.path, "--reference", reference, "--calibrate", "0.05"]
    print("next:", command("filter.py", *words, *reading_words(args)))


if __name__ == "__main__":
    run_script(main, parse_args)
