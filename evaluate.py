"""How good are generated images, next to what chance alone gives at this number of images?

    python evaluate.py REAL GENERATED
    python evaluate.py REAL GENERATED1 GENERATED2 --out report.html --json report.json
    python evaluate.py REAL GENERATED --run runs/dfu --utility --by sex
    python evaluate.py REAL GENERATED --run runs/dfu --utility --board board.html
    python evaluate.py REAL --checkpoint runs/dfu/checkpoints --num-samples 100
    python evaluate.py --download

REAL and GENERATED are folders of images, or tables such as metadata.csv. Prints a table, writes a
report for any browser (--out), a page for an ethics board (--board), and the same figures for
programs (--json):

{"format": 2, "settings": {...}, "real": {"path", "n"}, "generated": [{"path", "n", "p", "metrics":
{NAME: {"value", "null", "null_low", "null_high", "excess", "p_high", "p_low", "real_vs_real",
"band"}}, "memorisation": {"likely_copies", "copies": [{"generated", "train", "kind", "label",
"similarity"}], "pairs": [{"generated", "train", "distance", "p"}]},
"subgroups": [...], "findings": sentences that name no label,
"labels": {"table": [{"label", "set", "images", "looks_like"}], "sentences"},
"people": [{"by", "group", "train images", "train patients", …}], "by_label": [{"label", "copies",
"precision", "precision by chance", "recall", "recall by chance"}], "sentences": on labels and
utility, "marked": files that say they are synthetic, "searched": real images, for copies,
"utility": [{"share", "auroc", "low", "high", "gain", "gain_low", "gain_high"}]}],
"run": {"base", "method", "steps", "audit"}}

"p" is of all metrics together. "utility" is of the linear probe, "classifiers" of all. share is in
percent, low and high hold 95 %, those of the gain 99 %; what does not apply is null or absent.
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

HALVES = 20  # random halves of the real set
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
    half_gaps: np.ndarray = np.nan  # same_size less real_vs_real, half by half, (HALVES,)
    band: str = None


def yardstick(values, lower_is_better):
    """The Figure of values[0] next to what chance gives, values[1:]."""
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
    """p of all figures together, and {name: "worse" or "too good"} of those that differ.

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


def measure(name, joint, draws, halves):
    """The Figure of a metric from the sets' matrices, the permutations and the halves or None."""
    function, lower_is_better, need = METRICS[name]
    figure = yardstick(function(joint[need], draws), lower_is_better)
    if halves:
        against_real = function(joint[need], halves[0])
        against_fake = function(joint[need], halves[1])
        figure.real_vs_real = np.median(against_real)
        figure.same_size = np.median(against_fake)
        figure.half_gaps = against_fake - against_real
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
    perfect, every such division was as likely as the true one, so that p is exact. labels: numbers
    for each image; both sets keep their number of each.
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


# ---------------------------------------------------------------- the metrics


def joint_matrices(real, fake, standardise):
    """What the metrics read of two sets' features: `pooled`, distances, KID kernel.

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
    """The Frechet distance of each draw."""
    points = joint["points"]
    values = []
    for draw in progress(draws, "Frechet"):
        values.append(frechet(points[draw == 1], points[draw == -1]))
    return np.array(values)


def pair_means(matrix, draws):
    """Mean of a symmetric matrix over pairs within the first set, the second, and between them."""
    first, second = (draws == 1).T.astype(float), (draws == -1).T.astype(float)  # (n + m, draws)
    n, m, diagonal = first.sum(0), second.sum(0), matrix.diagonal()
    to_second = matrix @ second
    within_first = ((first * (matrix @ first)).sum(0) - diagonal @ first) / (n * (n - 1))
    within_second = ((second * to_second).sum(0) - diagonal @ second) / (m * (m - 1))
    return within_first, within_second, (first * to_second).sum(0) / (n * m)


def kid_draws(joint, draws):
    """KID of each draw."""
    first, second, between = pair_means(joint["kernel"], draws)
    return first + second - 2 * between


def neighbour_draws(which, joint, draws):
    """Precision, recall (k = 3), density or coverage (k = 5): number `which`, of each draw."""
    key = "neighbours", draws.tobytes()
    if key not in joint:  # all four are computed together
        distances, order = joint["distance"], joint["order"]
        joint[key] = []
        for draw in progress(draws, "neighbours"):
            figures = precision_recall(distances, order, draw, 3)[:2]
            joint[key].append(figures + precision_recall(distances, order, draw, 5)[2:])
    return np.array(joint[key])[:, which]


def nearest_draws(matrix, draws):
    """The mean over the second set of the smallest distance to the first, for each draw."""
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
    """What figures are computed with."""

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
    all_features: np.ndarray = None  # also those of images that were not drawn
    drawn: np.ndarray = None  # bool (N,), one image of each unit

    @cached_property
    def finder(self):
        """What finds its pictures again, in it and elsewhere."""
        return CopyFinder(self.rows, self.pixels)


def load_set(path, rows, resolution, tools, load=load_pixels, measure=stored_grain):
    """Read at most --max-images of a set, drawn by the seed; of the others, only the features."""
    limit = tools.args.max_images
    order = torch.randperm(len(rows), generator=generator(tools.args.seed, "max-images")).tolist()
    others = [rows[i] for i in order[limit:]]
    if others:
        print(f"{path}: {limit} of {len(rows)} images are drawn; the Frechet value is of all")
    rows = [rows[i] for i in sorted(order[:limit])]
    rows, pixels = load(rows, resolution, measure=measure)
    if len(rows) < 2:
        fail(f"{path}: {len(rows)} readable image; a comparison needs at least 2")
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
    order = shuffles(1, count, seed, "units", images.path)[0]
    drawn = order[np.unique(images.finder.unit_of[order], return_index=True)[1]]
    if len(drawn) < 10:
        drawn = order
    if len(drawn) < count:
        text = "one of each patient and of each picture that is stored twice"
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
            print(f"{fake.path}: repeats itself more than the real set: each of its images counts")
            fake = replace(fake, drawn=np.ones(len(fake.rows), bool))
    compared = []
    for images in (real, fake):
        compared.append(replace(subset(images, images.drawn), all_features=images.all_features))
    return compared


def load_reference(rows, resolution, fakes, tools):
    """The real set, prepared as the generator saw it."""
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
    """Make images grey in which no eye sees a colour; say how many others there are."""
    in_colour = shows_colour(images.pixels)
    faint = ~in_colour
    images.pixels[faint] = in_grey(images.pixels[faint])
    if in_colour.any():
        count = f"{in_colour.sum()} of {len(faint)} images show colours"
        print(f"{images.path}: {count}, the real ones are grey: sample.py --grey draws grey ones")


def list_reference(args):
    """The real rows to compare with, those that are searched for copies, (split, row) of all."""
    rows = known = list_real(args.real, args)
    columns = rows[0].fields
    if args.by not in ("label", *columns):
        fail(f"--by {args.by}: {args.real} has no such column (it has: {', '.join(columns)})")
    if args.run:
        known = [row for row in rows if row.split == "train"]
        rows = [row for row in rows if row.split in ("val", "test")]
        print(f"{args.run}: {len(rows)} images are held out, {len(known)} were trained on")
    if args.train_data:
        known = list_real(args.train_data, args)
    if args.run and (len(rows) < 2 or not known):
        fail(
            f"--run {args.run}: too few of these images are held out, or trained on: train with "
            "--val-split 0.4, or name its --val-data as REAL and its --data as --train-data"
        )
    if all(is_marked(row.path) for row in rows[:20]):
        note(f"{args.real}: its files say that they are synthetic: are REAL and GENERATED swapped?")
    members = [(row.split or "real", row) for row in rows]
    if known is not rows:
        members = [(row.split or "train", row) for row in known] + members
    return rows, known, members


def draw_checkpoints(args):
    """Draw --num-samples images from each checkpoint with sample.py: [(folder, rows), …]."""
    checkpoints = [Path(args.checkpoint)]
    if checkpoints[0].is_dir():
        checkpoints = sorted(checkpoints[0].rglob("step-*.pt"))
    if not checkpoints:
        fail(f"--checkpoint {args.checkpoint}: no checkpoint there; give a file or a run's folder")
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
    """Generated images that are training images, and how near the others lie to them."""

    sentence: str
    copies: list = ()  # as in the JSON, the most alike first
    pairs: list = ()  # 12 as in the JSON: the copies, then the nearest
    numbers: list = ()  # (generated, known) image of each pair


@dataclass
class Entry:
    """What is said about one generated set."""

    fake: ImageSet
    real: ImageSet
    known: ImageSet  # what was searched for copies
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
    figures, mix, label_figures = measure_figures(real, fake, tools)
    drawn = [("generated", row) for row in fake.rows]
    people, by_label, rare = describe_people(members + drawn, copies, label_figures)
    p, differences = test_together(figures)
    features = pooled(real.features, fake.features, tools.network.standardise)
    labels = check_labels(real, fake, args.seed)
    subgroups = measure_subgroups(features, real.rows, fake.rows, args.by)
    utility = measure_utility(real, known, fake, tools) if args.utility else ({}, "")
    more = mix + rare, labels, subgroups, *utility, people, by_label
    return Entry(fake, real, known, figures, p, differences, copies, *more)


def measure_figures(real, fake, tools):
    """{metric: Figure}, sentences on the labels that are compared, and figures_by_label."""
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
        if name == "frechet" and compared[0].all_features is not None:
            every = pooled(real.all_features, fake.all_features, network.standardise)
            count = len(real.all_features)
            figure.value = frechet(every[:count], every[count:])
        if name == "frechet" and network.published and network.head is not None:
            name = "fid"
        figure.band = band(args.bands.get(name), figure)
        figures[name] = figure
    return figures, mix, figures_by_label(*compared, joint, draws)


def match_labels(real, fake, seed):
    """Both sets with one mix of labels, a number for the label of each image, and sentences.

    Of each label that both sets have, images are drawn by the seed, `ratio` generated ones for a
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
        text = f"{len(fake.rows)} generated and {len(real.rows)} real images of one mix"
        sentences.append(f"The mix of labels is not the real one: compared are {text}.")
    numbers = {label: k for k, label in enumerate(shared, 1)}
    labels = [*real_labels[keep_real], *fake_labels[keep_fake]]
    return real, fake, np.array([numbers.get(label, 0) for label in labels]), sentences


def draw_labels(labels, counts, seed):
    """bool (N,): about so many images of each label, drawn by the seed, and all of other labels."""
    keep = np.ones(len(labels), bool)
    order = shuffles(1, len(labels), seed, "labels")[0]
    for label, count in counts.items():
        members = order[labels[order] == label]
        keep[members[max(1, round(count)) :]] = False
    return keep


def lonely_labels(real, fake):
    """Sentences on the labels of one set alone, of {label: images}, where both have labels."""
    sentences = []
    for kind, own, others in (("real", real, fake), ("generated", fake, real)):
        alone = own.keys() - others.keys() - {""}
        if alone and any(others):
            names = textwrap.shorten(", ".join(sorted(alone)), 200, placeholder=" …")
            sentences.append(f"Only the {kind} set has the labels {names}.")
    return sentences


def collect_matrices(real, fake, tools):
    """{what a metric needs: what its function reads}."""
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
    """excellent, good, fair or poor; None without limits."""
    if limits is None:
        return None
    sign = 1 if figure.lower_is_better else -1
    return BAND_WORDS[np.searchsorted(sign * np.array(limits), sign * figure.value)]


def find_copies(known, fake, args):
    """Generated images that are the same picture as a known one, and those nearer than usual."""
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
        text += ": more than by chance, look at the pairs"
    elif not copies:
        text += ": no sign of copying"
    numbers = [(i, index[i]) for i in nearest[:12]]
    return Copies(text + ".", copies, pairs[:12], numbers)


def count_near(usual, similarity):
    """p of how many generated pictures are as like a real one as few real ones are, and words.

    Fresh ones fall among the real ones' `usual` similarities at random, so that the number above
    the k-th largest is beta-binomial.
    """
    n, m = len(usual), len(similarity)
    k = min(n, max(5, round(0.1 * n)))
    count = (similarity > np.sort(usual)[-k]).sum()
    gen = np.random.default_rng(0)
    by_chance = gen.binomial(m, gen.beta(k, n + 1 - k, 9999))
    chance = (1 + (by_chance >= count).sum()) / 10_000
    text = f"{count} of {m} are as like one of these as the nearest {k / n:.0%} are to another"
    text += f" ({digits(m * k / (n + 1), 2)} by chance, p {digits(chance, 2)})"
    return chance, text


def copies_sentence(copies, count, known):
    """The first copies by name, and how many there are of each label."""
    if not copies:
        text = f"No generated image is the same picture as {known}"
        return text + " (mirrored, turned, cropped, re-saved or of other grey values)."
    parts = [f"{copy['generated']} of {copy['train']} ({copy['kind']})" for copy in copies[:3]]
    if copies[3:]:
        parts.append(f"{len(copies) - 3} more")
    text = f"{len(copies)} of {count} generated images are copies of {known}: {', '.join(parts)}."
    labels = Counter(copy["label"] for copy in copies if copy["label"])
    if labels:
        text += f" By label: {', '.join(f'{name} {n}' for name, n in labels.most_common())}."
    return text


def may_be_copies(entry):
    """Whether a set is too close to the real one: as a whole, or one in ten images."""
    name, _ = entry.first()
    too_many = len(entry.copies.copies) > 0.1 * len(entry.fake.rows)
    return too_many or entry.differences.get(name) == "too good"


def check_labels(real, fake, seed):
    """What images of each label look like, as in the JSON: {} without labels that can be checked.

    table: of the generated images of a label, and of the real ones as images left out, how many
    look most like each label. A label is not reached where fewer generated images look like it than
    real ones, by Fisher's exact test.
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
            text = f"{fake_share} generated pictures look like it, {real_share} real ones"
            sentences.append(f"The generator does not reach {label}: {text}.")
    return {"table": records, "sentences": sentences}


def subgroup_masks(rows, column):
    """{subgroup: bool (N,), which images belong to it}, sorted.

    Subgroups are findings one by one, ages by decade, and "unknown" for an image without any.
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
    """KID of each subgroup to generated ones, as in the JSON; None for fewer than 10 images.

    compared_with: its own generated images or, where these name no subgroups, all of them.
    real_vs_rest: KID of its real images to the other real ones, how special they are.
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
    """{label: precision and recall, as in the JSON}, where `least` images of both sets show it."""
    labels = [label_list(text_key(row.label)) for row in real.rows + fake.rows]
    found = {}
    for label in set().union(*labels):
        own_draws = draws[:100] * np.array([label in names for names in labels])
        if min((own_draws[0] == 1).sum(), (own_draws[0] == -1).sum()) < least:
            continue
        found[label] = {}
        for name in ("precision", "recall"):
            figure = measure(name, joint, own_draws, None)
            found[label] |= {name: figure.value, f"{name} by chance": figure.null_low}
    return found


def describe_people(members, copies, figures, rare=10):
    """Who is in the sets, copies and figures of each label, both as in the JSON, and sentences.

    members: see count_people, the first set was searched for copies. The sentence, if any, names
    labels that few patients show.
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
    text += "their pictures are the ones most likely to be learnt by heart."
    return people, by_label, [text]


# ---------------------------------------------------------------- do they help a classifier?


def measure_utility(real, known, fake, tools):
    """What each dose of generated images does to a classifier: {classifier: doses of the JSON}.

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

    Without --run, by a hash of the patient, as train.py splits.
    """
    if args.run:
        return known, real, "Classifiers are tested on images that the generator never saw."
    split_rows(real.rows, 0.3)
    held_out = np.array([row.split == "val" for row in real.rows])
    sentence = (
        "The generator may have seen the images that classifiers are tested on (--run DIR takes "
        "those that its run held out): gains are an upper bound."
    )
    return subset(real, ~held_out), subset(real, held_out), sentence


NO_UTILITY = (
    "Whether they help a classifier is not measured: it takes a label that five images to train "
    "on, to test on and generated show, and as many real ones lack. Hold out more (train.py "
    "--val-split 0.4), label generated images (sample.py --label), or join labels into fewer."
)


def shared_classes(train, test, fake):
    """Findings that five images of each set show, and as many real ones of each part lack."""
    masks = [subgroup_masks(images.rows, "label") for images in (train, test, fake)]
    classes = []
    for name in sorted(set.intersection(*map(set, masks)) - {"unknown"}):
        shown = [part[name].sum() for part in masks]
        lacking = [(~part[name]).sum() for part in masks[:2]]
        if min(shown + lacking) >= 5:
            classes.append(name)
    return classes


def prepare(images, classes, tools):
    """What classifiers read of N images: features (N, D), small pictures, targets (N, classes)."""
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

    train, test, fake: what `prepare` gives of the sets.
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
    """Ridge regression on z-scored features (N, D): weights (D, classes) for them as they are."""
    spread = features.std(0) + 1e-6
    x = (features - features.mean(0)) / spread
    gram = x.T @ x + x.shape[1] * torch.eye(x.shape[1])
    return torch.linalg.solve(gram, x.T @ targets) / spread[:, None]


def small_cnn(stages, seed, steps=200):
    """Train a network, stage by stage, on [(images (N, 3, 64, 64), targets (N, classes)), …].

    Targets are in {0, 1}. Returns images -> scores.
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
    """A figure for a table: `count` significant digits, no exponent."""
    if isinstance(value, int | str):
        return str(value)
    if value is None or not np.isfinite(value):
        return "–"
    value = round(value, 9)
    return np.format_float_positional(value, count, fractional=False, trim="-", sign=sign)


HEADER = "metric,better,value,differs,band,by chance: median [95 %],excess,p_high,p_low".split(",")
HEADER += ["real halves", "same size"]


def figure_rows(entry):
    """The figures as text, under HEADER."""
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
    "ssim_nearest": "nearness to a real image",
    "lpips_nearest": "nearness to a real image",
    "ssim_pairs": "likeness to one another",
    "lpips_pairs": "likeness to one another",
    "inception_score": "clear contents",
}


def verdict(entry):
    """What the figures say, in sentences for someone who reads no statistics."""
    _, text = findings(entry)
    text += entry.mix + entry.labels.get("sentences", []) + help_sentences(entry)
    text.append(entry.copies.sentence)
    return " ".join(text)


def findings(entry):
    """Whether and how the sets differ: a mark of few words, and sentences."""
    seen = {"worse": [], "too good": []}
    for name, difference in entry.differences.items():
        if PLAIN_NAMES[name] not in seen[difference]:
            seen[difference].append(PLAIN_NAMES[name])
    mark = "✓ not told apart"
    opening = "By these figures they cannot be told from the real ones"
    if seen["worse"]:
        mark = "✗ told apart"
        opening = "They can be told from the real ones"
    elif seen["too good"]:
        mark = "! too good"
        opening = "They are too good: better than fresh real images would be"
    text = [f"{opening} (p = {digits(entry.p, 2)} for all figures together)."]
    if seen["worse"]:
        text.append(f"What differs, the clearest first: {', '.join(seen['worse'])}.")
    if seen["too good"]:
        text.append(f"Too good for fresh images: {', '.join(seen['too good'])}.")
        text.append("Copies do this; too smooth, too noisy or repeated images can do it too.")
    return mark, text


def help_sentences(entry):
    """Whether the images help a classifier, if that was measured."""
    text = []
    if entry.utility_note:
        text.append(entry.utility_note)
    for classifier, doses in entry.utility.items():
        text.append(f"A {classifier}: {dose_sentence(doses)}.")
    return text


def dose_sentence(doses):
    """Whether any dose helps, by its interval of 99 %, and the best one."""
    if len(doses) == 1:
        return "too few generated images for a dose"
    best = max(doses[1:], key=lambda dose: dose["gain"])
    text = f"AUROC from {doses[0]['auroc']:.3f} to {best['auroc']:.3f} with {best['share']} %"
    text += f" added (99 % of the gain: {best['gain_low']:.3f} to {best['gain_high']:.3f})"
    if best["gain_low"] <= 0:
        return f"no gain beyond chance, at best {text}"
    if best is not doses[-1]:
        text += "; larger doses gained less"
    return f"a gain, {text}"


def rank_key(entry):
    """For sorting: copies last, then the excess of the first metric, turned so that low is good."""
    _, figure = entry.first()
    return may_be_copies(entry), figure.excess * (1 if figure.lower_is_better else -1)


def ranking(entries):
    """Header and rows: each set's excess, and whether the first one is really better.

    The spread over random halves of a set is the delete-half jackknife's error of the whole; sets
    of one size meet the same halves of the real one, so that differences are paired.
    """
    rows = []
    name, first = entries[0].first()
    for entry in entries:
        figure = entry.metrics[name]
        gap = abs(figure.excess - first.excess)
        note = "noise: not told apart from the first"
        if may_be_copies(entry):
            note = "may be copies"
        elif figure is first:
            note = "the first"
        elif gap > 1.96 * np.std(figure.half_gaps - first.half_gaps):
            note = "worse"
        rows.append([entry.fake.path, len(entry.fake.rows), digits(figure.excess, sign=True), note])
    return ["set", "images", f"{name}: excess (0: like real)", "next to the first"], rows


def print_entry(entry):
    """Print one set's verdict, the guide and the table."""
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

GUIDE = """Chance is what a figure is when both sets are mixed and divided again, many times.
p_high is how often chance is as bad as the generated images or worse, p_low how often it is as good
or better. Of so many p one is often small by chance: only rows with a word in the column "differs"
count."""

HALVES_GUIDE = """real halves: one half of the real images against the other half. same size: as
many generated images against one half, which can be compared with it."""

PAGE_GUIDE = """The bar is what chance gives where both sets are of one kind: 95 % of many mixtures
of them, divided again. The dot is the generated set: further right it is worse, further left better
than fresh real images would be, as copies are. Of so many figures one is often outside by chance:
only those count that are said to differ. Of fewer than 50 images only gross differences show."""

FIGURES = """<p><b>excess</b>: the value less the median of chance. <b>frechet, kid</b>: distance of
the two sets; <b>colour</b>: the same of their colours, <b>grain</b> of the files as stored:
sharpness, noise, JPEG's blocks. <b>precision, density</b>: generated images that look real.
<b>recall, coverage</b>: real variety that is reached. <b>ssim, lpips</b>: likeness to the nearest
real image, and of generated images to one another. <b>band</b>: by a fixed table; compare it with
real halves.</p>"""

LABELS_GUIDE = """Labels: what images look like to a classifier that learnt from the real ones.
Real images are judged by one that never saw their patients."""

COPIES = """Here are the nearest: a generated image left, the real one right. p: the share of real
images that are as near to another. This is no guarantee of privacy."""

SUBGROUPS = """kid: how far the real images of a subgroup are from the generated ones that
compared_with names; error: one standard deviation of it; real_vs_rest: how far they are from the
other real images; – where there are too few."""

PEOPLE = """All real images, and the generated ones that were compared. train: the model learnt from
these; val and test: held out from it. Sex and age by the table or DICOM's headers; – where nobody
says who the patients are. A patient with several labels counts in each."""

BY_LABEL = """copies: generated images that are copies of a real one with this label. Where ten
images of both sets are compared, precision: the share of generated ones that look real, recall: the
share of the real variety that is reached; by chance: what nearly all random divisions reach."""

METHODS = """Real images: SHA-256 {real_hash}, made square by --crop {crop}; generated ones by their
central square. All were resized to {resolution} pixels (Lanczos); {resize} resizing before the
network; {networks}. SSIM at 64 pixels, grey. Precision and recall with 3 neighbours, density and
coverage with 5; Inception Score in one split. Copies: pictures are laid over each other by an
affine map, and the local contrast of 70 % of squares (8 x 8 of 64 x 64 pixels) correlates better
than any two real images' is likely to; distance: 1 less this correlation. Null: {permutations}
permutations, seed {seed}, within each label, of one image of each patient and picture; a patient's
real and generated image change places. p of all figures: Westfall and Young's minP. Of more than
{max_images} images so many were drawn; the Frechet value alone is of all, where the mix of labels
is the same. Real halves: median of {halves} random ones. Utility: ridge regression on the features
and a network of three layers (200 steps of 32 images at 64 pixels), on real and generated images
together or, generated first, 200 steps on these and 200 on real ones; {seeds} paired seeds; tested
on the held-out images of --run, else on 30 % of the real ones; 1000 bootstraps of whole patients.
{versions}, {device}. Not for diagnosis."""


def records_table(guide, records):
    """HTML: a guide, and a table of dicts with the same keys, as in the JSON."""
    return paragraph(guide) + table(
        records[0], [map(digits, record.values()) for record in records]
    )


def verdict_box(entry):
    """HTML: the verdict at a glance, a sign and words in a colour, then in sentences."""
    mark, text = findings(entry)
    marks = f'<b class="badge {mark}">{mark}</b>'
    if entry.copies.copies or may_be_copies(entry):
        marks += '<b class="badge copies">! may be copies</b>'
    sentences = paragraph(" ".join([*text, entry.copies.sentence]))
    return f'<div class="verdict">{marks}{sentences}</div>'


def gallery(title, images, seed):
    """HTML: 12 images of a set, drawn by the seed."""
    order = torch.randperm(len(images.rows), generator=generator(seed, "shown"))[:12]
    tiles = [zoom(images.pixels[i], f"{title}: {images.rows[i].file_name}") for i in order]
    heading = f"<h4>{title}: {len(order)} of {len(images.rows)}</h4>"
    return f'<div>{heading}<div class="tiles">{"".join(tiles)}</div></div>'


def figure_lines(entry):
    """HTML: each figure next to what chance gives."""
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
    """Where its dot is, in percent: chance gives 40 to 60, worse is right, far is logarithmic."""
    limit = figure.null_high if figure.excess > 0 else figure.null_low
    steps = np.arcsinh(figure.excess / max(abs(limit - figure.null), 1e-12)) / np.arcsinh(1)
    return 50 + 10 * steps * (1 if figure.lower_is_better else -1)


def copies_section(entry, args):
    """HTML: copies, then the nearest pairs."""
    copies = entry.copies
    figures = ""
    for k, (i, j) in enumerate(copies.numbers):
        text = (
            f"distance {digits(copies.pairs[k]['distance'])}, p {digits(copies.pairs[k]['p'], 2)}"
        )
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
    return text + table(["label", "set", "images", "look like"], rows)


def utility_section(entry):
    """HTML: whether generated images help a classifier."""
    body = paragraph(entry.utility_note)
    header = ("generated images", "0.5 guesses", "", "1 never errs", "AUROC")
    for name, doses in entry.utility.items():
        lines = []
        for dose in doses:
            places = [200 * dose[key] - 100 for key in ("low", "high", "auroc")]
            title = f"95 %: {dose['low']:.3f} to {dose['high']:.3f}"
            lines.append((f"{dose['share']} %", title, *places, title, f"{dose['auroc']:.3f}"))
        body += paragraph(f"{name}: {dose_sentence(doses)}.") + dot_lines(header, lines)
    return body


def set_section(entry, args):
    """HTML: one generated set's part of the report, in the order in which people ask."""
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
    tables = records_table(PEOPLE, entry.people) + records_table(BY_LABEL, entry.by_label)
    body += fold("Who is in the sets, label by label", tables)
    return body


def write_report(args, settings, entries):
    """Write --out: ranking where there are several sets, a section for each set, methods."""
    body = paragraph(f"{args.real}: {len(entries[0].real.rows)} real images", "soft")
    if len(entries) > 1:
        body += f"<h2>Ranking, by excess over chance; copies last</h2>{table(*ranking(entries))}"
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
    """What the JSON says of --run: the model, and whether it tells who was in its training set."""
    flags = read_run(folder) if folder else {}
    run = {name: flags.get(name, "unknown") for name in ("base", "method", "steps")}
    run["audit"] = read_audit(folder) if folder else None
    if not run["audit"]:
        run["audit"] = {"sentence": "No membership audit: --run names no run that has one."}
    return run


# ---------------------------------------------------------------- the page for a board

BOARD = """<h2>What is this?</h2><p>{made[n]} generated images ({folder}). Their model:
{base}, trained further (method {run[method]}) for {run[steps]} steps. For research, not for
diagnosis.</p>
<h2>From whom was it made?</h2>{people}
<h2>How is it marked?</h2><p>{made[marked]} of {made[n]} files say in themselves that they are
synthetic.</p>
<h2>Are patients copied, or known to the model?</h2><p>{made[memorisation][likely_copies]} of
{made[n]} are the same picture as one of {made[searched]} real images, also mirrored, turned,
cropped or re-saved. Too near to real images, as a set: {near}.</p><p>{audit}</p><p>Privacy method:
none; not differentially private. That no copy is found is no proof that nobody can be recognised:
whole pictures are compared, and an audit says little of a single patient.</p>
<h2>How does it differ from real images?</h2><p>{differs} The bar is what chance gives where both
sets are of one kind, the dot these images: further right is worse.</p>{figures}
{by_label}
<h2>Does it help?</h2><p>{helps}</p>
<h2>What are the known limits?</h2><p>The images inherit the biases of those they were made from,
and do not stand for whom the table does not count. No expert was asked what they show. What is
selected from them needs this evaluation again. {limits}</p>
<h2>Whom to ask</h2><p>{contact}</p>"""


def write_board(args, results, entry):
    """Write --board: what a board asks, in its order, no file's name, no figure but of results."""
    made = results["generated"][0]
    run = results["run"]
    texts = {
        "folder": Path(made["path"]).resolve().name,
        "base": Path(run["base"]).name,
        "near": "yes" if may_be_copies(entry) else "no",
        "audit": run["audit"]["sentence"],
        "differs": " ".join(findings(entry)[1]),
        "helps": " ".join(help_sentences(entry)) or "Not measured (--utility).",
        "limits": " ".join(entry.mix + entry.labels.get("sentences", [])),
        "contact": args.contact or "_" * 40,
    }
    parts = {name: html.escape(text) for name, text in texts.items()}
    parts |= {"people": records_table(PEOPLE, entry.people), "figures": figure_lines(entry)}
    parts["by_label"] = records_table(BY_LABEL, entry.by_label)
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
        print(f"for your board: {os.path.abspath(args.board)}")
    if args.json:
        write_file(args.json, json.dumps(results, indent=1))
        print(f"figures: {os.path.abspath(args.json)}")


# ---------------------------------------------------------------- flags


def metric_names(text):
    """An argument type: a comma list of metrics; fid is another word for frechet."""
    words = text.replace(" ", "").replace("-", "_").split(",")
    names = ["frechet" if word == "fid" else word for word in words]
    for name in names:
        if name not in METRICS:
            fail(f"--metrics: no metric {name!r}; there are {', '.join(METRICS)}")
    return names


def bands_table(path):
    """An argument type: a CSV of metric,excellent,good,fair as {metric: three limits}."""
    bands = {}
    try:
        for row in read_table(path):
            bands[row["metric"].replace("-", "_")] = [float(row[word]) for word in BAND_WORDS[:3]]
    except (KeyError, ValueError):
        fail(f"--bands {path}: needs metric,excellent,good,fair, the last three numbers")
    return bands


def parse_args():
    parser = Flags(__doc__)
    add = flag_adder(parser.add_argument_group("data"))
    add("real", "real images: a folder or a table", None, data_set, metavar="REAL", nargs="?")
    add("generated", "folders or tables", None, data_set, metavar="GENERATED", nargs="*")
    add("--checkpoint", "draw from a checkpoint, or from each of a folder", type=data_set)
    add("--num-samples", "images from each checkpoint", 200, number(2, 10**6))
    add("--steps", "denoising steps for --checkpoint", 50, number(1, 999))
    add("--guidance-scale", "for --checkpoint", 7.5, number(0.0, 1000))
    add("--train-data", "searched for copies instead of REAL", type=data_set)
    add("--max-images", "of a set, drawn by the seed", 1000, number(2, 5000))
    add = flag_adder(parser.add_argument_group("numbers"))
    usual = [name for name in METRICS if name != "inception_score"]
    add("--metrics", "default: all but inception_score", usual, metric_names)
    add("--features", "auto (inception, else texture), HUB-ID or PATH", "auto")
    add("--resize", "as pytorch-fid, clean-fid", "legacy", choices=("legacy", "clean"))
    add("--bands", "metric,excellent,good,fair; else default", BANDS, bands_table)
    add("--utility", "do the images help a classifier? needs labels", False)
    add("--by", "subgroups: a column such as sex or age", "label")
    add("--permutations", "draws of the null", 999, number(99, 10**6))
    add = flag_adder(parser.add_argument_group("output"))
    add("--out", "the report", "report.html")
    add("--json", "the figures for programs")
    add("--board", "a printable page for an ethics board, of one GENERATED")
    add("--contact", "whom to ask, on --board (default: a line to fill in)")
    add("--download", "get the published networks' weights, and end", False)
    add_comparison_flags(parser.add_argument_group("comparison"))
    args = parser.parse_args()
    for path in (args.out, args.json or "", args.board or ""):  # known before an hour of work
        if os.path.isdir(path):
            fail(f"{path}: is a directory; give a file to write to")
    if args.download:  # it ends here, as --help does
        for name in WEIGHTS:
            print(need_weights(name, "--download"))
        sys.exit()
    if not args.real or not (args.generated or args.checkpoint):
        fail("nothing to compare: give REAL and GENERATED, one or more folders, or --checkpoint")
    if args.board and (args.checkpoint or len(args.generated) > 1):
        fail("--board: is about one set of images: give one GENERATED")
    return args


def load_tools(args):
    """Metrics and networks; LPIPS is left out where its weights cannot be had."""
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
        fail("--metrics: only LPIPS is asked for, and it is left out")
    network = load_features(features, device, args.resize)
    if "inception_score" in names and network.head is None:
        fail("--metrics inception_score: needs --features inception or its weight file")
    return Tools(names, network, lpips, device, args)


def describe(tools, resolution, entries):
    """The settings that the report and --json name."""
    args = tools.args
    features = tools.network.name
    lpips = tools.lpips.name if tools.lpips else None
    rows = [row for entry in entries for row in entry.real.rows + entry.fake.rows]
    native = all(row.size == (resolution, resolution) for row in rows)  # none was resized
    published = native and args.precision in ("auto", "fp32") and tools.network.published
    networks = f"features {features}, lpips {lpips}"
    if not published:
        networks += "; not comparable with published figures"
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
        print("\nranking:")
        print_table(*ranking(entries))

    settings = describe(tools, resolution, entries)
    print(f"\n{settings['networks']}")
    write_results(args, settings, entries)
    words = [entries[0].fake.path, "--reference", args.real, "--calibrate", "0.05"]
    if args.run:
        words += ["--run", args.run]
    print("next:", command("filter.py", *words))


if __name__ == "__main__":
    run_script(main, parse_args)
