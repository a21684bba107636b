"""How good are generated images, beside what chance alone would give at this number of images?

    python evaluate.py REAL GENERATED
    python evaluate.py REAL GENERATED1 GENERATED2 --out report.html --json report.json
    python evaluate.py REAL GENERATED --split runs/dfu/split.csv --utility --by sex
    python evaluate.py REAL --checkpoint runs/dfu/checkpoints --num-samples 100
    python evaluate.py REAL GENERATED --features pt_inception-2015-12-05-6726825d.pth --lpips alex

REAL and GENERATED are folders of images, folders with metadata.csv or manifest.csv, or such tables. Prints a table,
writes a report that opens in any browser without a network (--out) and the same figures for programs (--json). Each
figure stands beside its permutation null: both sets pooled and shared out anew in the same sizes, whole patients
together. p_high is how often chance is as bad or worse, p_low how often as good or better.

The JSON: {"format": 1, "settings": {...}, "real": {"path", "n"}, "generated": [{"path", "n", "metrics": {NAME: {"value",
"null", "null_low", "null_high", "excess", "p_high", "p_low", "real_vs_real", "band"}}, "memorisation": {"likely_copies",
"pairs": [{"generated", "train", "distance", "p"}]}, "utility": [{"share", "auroc", "low", "high"}]}]}; with --utility also
"classifiers", with --by or labels "subgroups". share is in percent, low and high hold 95 %. A figure that does not apply
is null. ssim, lpips: _nearest is the mean over generated images of the most similar
real one, _pairs the mean over pairs of generated images; colour is the Frechet distance of chroma statistics, grain
that of blocks and grain as stored.
"""

import collections
import contextlib
import functools
import html
import itertools
import json
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import special
from scipy.stats import binom
from tqdm import tqdm

from metrics import (
    FID_WEIGHTS,
    Flags,
    colour,
    command,
    copy_chances,
    copy_distances,
    curve,
    extract,
    fail,
    find_weights,
    frechet,
    generator,
    kid,
    list_images,
    load_features,
    load_lpips,
    load_pixels,
    lpips_files,
    lpips_matrix,
    near_duplicates,
    nearest,
    page,
    pick_device,
    pick_resolution,
    precision_recall,
    read_split,
    read_table,
    run_script,
    same_unit,
    set_hash,
    share_range,
    split_rows,
    squared_distances,
    ssim,
    ssim_matrix,
    stored_grain,
    table,
    thumbnail,
    write_file,
)

HALVES = 20  # random halves of the real set
SHARES = (0, 10, 25, 50, 100, 200)  # per cent of generated images that are added for --utility
SEEDS = 5
BANDS = {
    "fid": (30, 50, 100),
    "ssim_nearest": (0.8, 0.7, 0.6),
    "lpips_nearest": (0.2, 0.3, 0.4),
    "inception_score": (3, 2, 1.5),
}


# ---------------------------------------------------------------- the table of metrics


def pooled(real, fake, standardise):
    """Both sets' features stacked, (N, D), (M, D) -> float64 (N + M, D); standardise: centred and divided by the pooled
    standard deviation (the real set's own would favour the real set)."""
    features = np.concatenate([real, fake], dtype=np.float64)
    if standardise:  # in place: they may be large
        features -= features.mean(0)
        spread = np.sqrt(np.einsum("nd,nd->d", features, features) / len(features))
        features /= np.where(spread > 1e-9, spread, 1)
    return features


def joint_matrices(real, fake, standardise):
    """What every number below is read from: both sets' features as `pooled`, their KID kernel and distances."""
    features = pooled(real, fake, standardise)
    centred = features - features.mean(0)  # a large common mean costs digits
    return {
        "features": features,
        "gram": centred @ centred.T,
        "distance": squared_distances(centred, centred),
        "kernel": (features @ features.T / features.shape[1] + 1) ** 3,
    }


def frechet_draws(joint, draws):
    """The Frechet distance of each draw, by the nuclear norm of a block of the one Gram matrix."""

    def one(draw):
        i, j = np.flatnonzero(draw == 1), np.flatnonzero(draw == -1)
        if "gram" not in joint or max(len(i), len(j)) > joint["features"].shape[1]:
            return frechet(joint["features"][i], joint["features"][j])
        a, b, c = (joint["gram"][np.ix_(*pair)] for pair in ((i, i), (j, j), (i, j)))
        traces = sum((x.trace() - len(x) * x.mean()) / (len(x) - 1) for x in (a, b))
        centred = c - c.mean(0) - c.mean(1, keepdims=True) + c.mean()
        nuclear = np.linalg.svd(centred, compute_uv=False).sum() / np.sqrt(
            (len(i) - 1) * (len(j) - 1)
        )
        return max(0.0, a.mean() + b.mean() - 2 * c.mean() + traces - 2 * nuclear)

    return np.array([one(draw) for draw in tqdm(draws, desc="Frechet", leave=False, disable=None)])


def pair_means(matrix, draws):
    """Means of a symmetric matrix over pairs, diagonals left out: within the first, the second set, between them.

    One product with the draws' indicators serves them all.
    """
    first, second = (draws == 1).T.astype(float), (draws == -1).T.astype(float)  # (n+m, draws)
    n, m, diagonal = first.sum(0), second.sum(0), matrix.diagonal()
    to_first, to_second = matrix @ first, matrix @ second
    return (
        ((first * to_first).sum(0) - diagonal @ first) / (n * (n - 1)),
        ((second * to_second).sum(0) - diagonal @ second) / (m * (m - 1)),
        (first * to_second).sum(0) / (n * m),
    )


def kid_draws(joint, draws):
    """KID of each draw."""
    first, second, between = pair_means(joint["kernel"], draws)
    return first + second - 2 * between


def neighbour_draws(joint, draws, number):
    """Number 0-3 of precision, recall (k = 3), density, coverage (k = 5) for each draw; computed once for all four."""

    def one(draw):
        i, j = np.flatnonzero(draw == 1), np.flatnonzero(draw == -1)
        blocks = [joint["distance"][np.ix_(*pair)] for pair in ((i, i), (j, j), (i, j))]
        return precision_recall(*blocks, 3)[:2] + precision_recall(*blocks, 5)[2:]

    key = "neighbours", draws.tobytes()
    if key not in joint:
        joint[key] = np.array(
            [one(draw) for draw in tqdm(draws, desc="neighbours", leave=False, disable=None)]
        )
    return joint[key][:, number]


def inception_draws(joint, draws):
    """Inception Score (Salimans et al. 2016) of the second set of each draw, in one split; joint["logits"]: (n + m, 1008),
    without bias, all columns, as torch-fidelity has them."""
    shares = special.softmax(joint["logits"], 1)
    second = (draws == -1) / (draws == -1).sum(1, keepdims=True)
    return np.exp(special.entr(second @ shares).sum(1) - second @ special.entr(shares).sum(1))


def nearest_draws(matrix, draws):
    """Mean over the second set of the smallest entry towards the first, for each draw."""
    return np.array([matrix[np.ix_(draw == 1, draw == -1)].min(0).mean() for draw in draws])


# name: (function of the joint matrices and the draws, lower is better, what it needs: evaluate.py brings it)
METRICS = {
    "frechet": (frechet_draws, True, "features"),
    "kid": (kid_draws, True, "features"),
    **{
        name: (functools.partial(neighbour_draws, number=number), False, "features")
        for number, name in enumerate(("precision", "recall", "density", "coverage"))
    },
    "colour": (lambda joint, draws: frechet_draws(joint["colour"], draws), True, "colour"),
    "grain": (lambda joint, draws: frechet_draws(joint["grain"], draws), True, "grain"),
    "ssim_nearest": (lambda joint, draws: -nearest_draws(-joint["ssim"], draws), False, "ssim"),
    "ssim_pairs": (lambda joint, draws: pair_means(joint["ssim"], draws)[1], True, "ssim"),
    "lpips_nearest": (lambda joint, draws: nearest_draws(joint["lpips"], draws), True, "lpips"),
    "lpips_pairs": (lambda joint, draws: pair_means(joint["lpips"], draws)[1], False, "lpips"),
    "inception_score": (inception_draws, False, "logits"),
}


# ---------------------------------------------------------------- the yardstick: what chance alone would give


def whole_groups(groups, n, m):
    """`groups`, or None where a permutation cannot keep them whole: under five of them, or one that fills half a set."""
    sizes = collections.Counter(name for name in groups or () if name)
    return groups if len(sizes) >= 5 and 2 * max(sizes.values()) <= min(n, m) else None


def permutation_draws(n, m, count, seed, groups=None):
    """int8 (1 + count, n + m): 1 for the first set, -1 for the second; row 0 is the sets as they are.

    The others share out the pooled images anew in the same sizes. groups: a name an image, "" for an image on its
    own; a group stays together, and an image that no longer fits is left out (0).
    """
    names = [name or n for n, name in enumerate(whole_groups(groups, n, m) or [""] * (n + m))]
    units = {name: [] for name in names}
    for index, name in enumerate(names):
        units[name].append(index)
    units = list(units.values())
    draws = np.zeros((1 + count, n + m), np.int8)
    draws[0, :n], draws[0, n:] = 1, -1
    for row in range(1, 1 + count):
        room = {1: n, -1: m}
        for unit in torch.randperm(
            len(units), generator=generator(seed, "permutation", row)
        ).tolist():
            side = next((side for side in room if room[side] >= len(units[unit])), 0)
            draws[row, units[unit]] = side
            room[side] = room.get(side, 0) - len(units[unit])
    return draws


def half_draws(n, m, count, seed, groups=None):
    """Two kinds of int8 (count, n + m) draws at equal sizes: half of the real set against its other half, and the
    first of these halves against as many of the second set."""
    half = min(n, m) // 2
    splits = permutation_draws(
        half, n - half, count, (seed, "halves"), groups[:n] if groups else None
    )[1:]
    against_real, against_fake = (np.zeros((count, n + m), np.int8) for _ in range(2))
    for row, split in enumerate(splits):
        order = (
            torch.randperm(m, generator=generator(seed, "half of the second set", row)).numpy() + n
        )
        mixed = torch.randperm(n, generator=generator(seed, "half of the first set", row)).numpy()
        first, rest = (mixed[split[mixed] == side] for side in (1, -1))
        size = min(len(first), len(rest), m)  # whole patients can leave a half short
        against_real[row, first[:size]], against_fake[row, first[:size]] = 1, 1
        against_real[row, rest[:size]], against_fake[row, order[:size]] = -1, -1
    return against_real, against_fake


def yardstick(values, lower_is_better):
    """A value (values[0]) beside what chance gives (the rest): null median and 95 % range, excess, p_high, p_low.

    p_high: how often chance is as bad or worse; p_low: how often it is as good or better. A small p_high says
    "different from real", a small p_low "closer than two fresh samples are", which copies are.
    """
    value, null = values[0], values[1:]
    worse = null >= value if lower_is_better else null <= value
    better = null <= value if lower_is_better else null >= value
    low, median, high = np.percentile(null, (2.5, 50, 97.5))
    return {
        "value": float(value),
        "null": float(median),
        "null_low": float(low),
        "null_high": float(high),
        "excess": float(value - median),
        "p_high": float((1 + worse.sum()) / (1 + len(null))),
        "p_low": float((1 + better.sum()) / (1 + len(null))),
    }


# ------------------------------------------------------------------------------------------------- what is compared


def chosen_metrics(text):
    """The names to compute, from --metrics."""
    usual = [name for name, row in METRICS.items() if row[2] != "logits"]
    words = [name.strip().replace("-", "_") for name in text.split(",")] if text else usual
    names = ["frechet" if name == "fid" else name for name in words]
    for name in names:
        if name not in METRICS:
            fail(f"--metrics: no metric {name!r}; there are {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def read_bands(path):
    """{metric: (excellent, good, fair)} from --bands, or the table built in."""
    if path is None:
        return BANDS
    try:
        found = {
            row["metric"].replace("-", "_"): tuple(
                float(row[word]) for word in ("excellent", "good", "fair")
            )
            for row in read_table(path)
        }
    except (KeyError, ValueError):
        fail(
            f"--bands {path}: needs the columns metric,excellent,good,fair and numbers in the last three"
        )
    for name in found.keys() - {"fid", *METRICS}:
        fail(f"--bands {path}: no metric {name!r}; there are fid, {', '.join(METRICS)}")
    return {"fid": found["frechet"]} | found if "frechet" in found else found


def band(limits, value, lower_is_better):
    """excellent, good, fair or poor; None where there is no table for it."""
    words = [
        word
        for word, limit in zip(("excellent", "good", "fair"), limits or ())
        if (value <= limit if lower_is_better else value >= limit)
    ]
    return (words + ["poor"])[0] if limits else None


def at_most(path, rows, args):
    """At most --max-images of the rows, drawn by the seed."""
    if len(rows) > args.max_images:
        print(f"{path}: {args.max_images} of {len(rows)} images, drawn by seed {args.seed}")
        order = torch.randperm(len(rows), generator=generator(args.seed, "max-images"))[
            : args.max_images
        ]
        rows = [rows[n] for n in sorted(order.tolist())]
    return rows


def list_real(args):
    """(the rows to compare with, the rows that the generator learnt from) by --split and --train-data."""
    rows, known = (
        share_range(list_images(args.real, group_column=args.group_column)),
        None,
    )  # before it is parted
    columns = dict.fromkeys(name for row in rows for name in row["fields"])
    if args.by not in (None, "label", *columns):
        fail(
            f"--by {args.by}: {args.real} has no such column; it has {', '.join(columns) or 'no table'}"
        )
    if args.split:
        read_split(rows, args.split)
        known, rows = (
            [row for row in rows if (row["split"] in ("val", "test")) == held]
            for held in (False, True)
        )
        known = [row for row in known if row["split"] == "train"]
        print(
            f"{args.split}: {len(rows)} held-out images are the reference, {len(known)} were trained on"
        )
        if len(rows) < 2:
            fail(
                f"--split {args.split}: holds out {len(rows)} images; a comparison needs at least 2"
            )
    elif len(rows) > args.max_images:  # copies are looked for among them all
        known = rows
    known = share_range(list_images(args.train_data)) if args.train_data else known
    return at_most(args.real, rows, args), known


def draw_checkpoints(args):
    """[(folder, rows of --num-samples images)], one a checkpoint, drawn with the prompts that validated the run; they are
    kept."""
    import sample

    found = [Path(args.checkpoint)]
    if os.path.isdir(args.checkpoint):
        found = [
            path
            for place in (".", "checkpoints")
            for path in sorted(Path(args.checkpoint, place).glob("step-*.pt"))
        ]
    if not found or not found[0].is_file():
        fail(
            f"--checkpoint {args.checkpoint}: no checkpoint there; give a file, a run's folder or its checkpoints/"
        )
    drawn = []
    for path in found:
        prompts, of_prompt = sample.read_checkpoint(path)[1].get("val_prompts") or [""], {}
        folder = (
            str(Path(args.out).with_suffix("")) + f"-samples/{path.parent.parent.name}-{path.stem}"
        )
        sample.main(
            sample.parse_args(
                [
                    "--checkpoint",
                    str(path),
                    *(f"--prompt={prompt}" for prompt in prompts),
                    "--num-images",
                    str(-(-args.num_samples // len(prompts))),
                    "--steps",
                    str(args.steps),
                    "--guidance-scale",
                    str(args.guidance_scale),
                    "--batch-size",
                    str(args.batch_size),
                    "--device",
                    args.device,
                    "--seed",
                    str(args.seed),
                    "--out",
                    folder,
                ]
            )
        )
        own = {
            " ".join(prompt.split()) for prompt in prompts
        }  # a run of the same name may have left others
        for row in (row for row in list_images(folder) if row["caption"] in own):
            of_prompt.setdefault(row["caption"], []).append(row)
        in_turn = [
            row for turn in itertools.zip_longest(*of_prompt.values()) for row in turn if row
        ]
        drawn.append((folder, in_turn[: args.num_samples]))
    return drawn


def load_set(path, rows, resolution, networks, args, device):
    """A set: {"path", "n", "rows", "pixels" uint8 (N, 3, S, S), "features" (N, D)}."""
    kept, pixels = load_pixels(rows, resolution, measure=stored_grain)
    if len(kept) < 2:
        fail(
            f"{path}: {len(kept)} readable image; a comparison of sets needs at least 2, and says little under 50"
        )
    features = extract(pixels, networks["features"], device, args.batch_size, args.precision)
    return {
        "path": path,
        "n": len(kept),
        "rows": kept,
        "pixels": pixels,
        "features": features,
    }


# ------------------------------------------------------------------------------------------------- the figures


def joint_of(real, fake, names, networks, args, device):
    """Every matrix that the metrics `names` are read from."""
    sets, needs = (real["pixels"], fake["pixels"]), {METRICS[name][2] for name in names}
    joint = {
        name: {"features": pooled(seen(real), seen(fake), True)}
        for name, seen in (
            ("colour", lambda part: colour(part["pixels"])),
            ("grain", lambda part: np.array([row["measured"] for row in part["rows"]])),
        )
        if name in needs
    }
    if "lpips" in needs:  # first: it takes the most memory
        joint["lpips"] = lpips_matrix(torch.cat(sets), networks["lpips"], device, args.batch_size)
    joint |= joint_matrices(real["features"], fake["features"], networks["features"]["standardise"])
    if "ssim" in needs:
        own, cross, other = (
            ssim_matrix(sets[a], sets[b], device) for a, b in ((0, 0), (0, 1), (1, 1))
        )
        joint["ssim"] = np.block([[own, cross], [cross.T, other]])
    if "logits" in needs:
        joint["logits"] = joint["features"] @ networks["features"]["head"].T
    return joint


HEADER = (
    "metric",
    "better",
    "value",
    "band",
    "by chance: median [95 %]",
    "excess",
    "p_high",
    "p_low",
    "real halves",
    "same size",
)


def evaluate_set(real, fake, known, args, names, networks, device):
    """One generated set against the real one: its entry of the report; known: the set searched for copies."""
    found = memorisation(
        known, fake, not (args.split or args.train_data)
    )  # the largest matrices come and go first
    entry = {
        "path": fake["path"],
        "n": fake["n"],
        "real_n": real["n"],
        "metrics": {},
        "table": [],
        "halves": None,
        "memorisation": found,
    }
    n, m, joint = (
        len(real["rows"]),
        len(fake["rows"]),
        joint_of(real, fake, names, networks, args, device),
    )
    groups = [row["group"] for row in real["rows"] + fake["rows"]]
    draws = permutation_draws(n, m, args.permutations, args.seed, groups)
    halves = half_draws(n, m, HALVES, args.seed, groups) if min(n, m) > 3 else ()
    for name in names:
        function, lower_is_better, need = METRICS[name]
        f = yardstick(function(joint, draws), lower_is_better)
        at_half = [function(joint, half) for half in halves]
        entry["halves"] = at_half if name == names[0] else entry["halves"]
        middle = [float(np.median(values)) for values in at_half] or [None, None]
        label = (
            "fid"
            if name == "frechet"
            and networks["features"].get("head") is not None
            and networks["features"]["published"]
            else name
        )
        limits = args.limits.get(label)
        f |= {"real_vs_real": middle[0], "band": band(limits, f["value"], lower_is_better)}
        entry["metrics"][label] = f
        error = (
            f" ± {number(kid(joint['features'][:n], joint['features'][n:])[1], 2)}"
            if name == "kid"
            else ""
        )
        chances = [
            ("≤" if f[p] <= 1 / (1 + args.permutations) else "") + f"{f[p]:.2g}"
            for p in ("p_high", "p_low")
        ]
        entry["table"].append(
            (
                label,
                "lower" if lower_is_better else "higher",
                number(f["value"], 4) + error,
                f["band"] or "–",
                f"{number(f['null'])} [{number(f['null_low'])} – {number(f['null_high'])}]",
                number(f["excess"], sign="+"),
                *chances,
                *map(number, middle),
            )
        )
    entry["copies"] = are_copies(entry)
    entry["subgroups"] = subgroups(joint, real, fake, args)
    if args.utility:
        entry["utility"] = utility(real, known, fake, networks, args, device)
    entry["verdict"] = verdict(entry)
    entry["section"] = set_section(entry, real, fake, known, joint, args)
    return entry


def memorisation(known, fake, is_real):
    """The generated images that lie nearer to a training image than training images of two patients to one another.

    {"likely_copies": how many are that near in one of a hundred fresh images or fewer, "pairs": the 12 nearest}, and what
    the report needs: "expected", "chance" (binomial, of so many), "limit".
    """
    pixels, m = known["pixels"], len(fake["rows"])
    same = same_unit([row["group"] for row in known["rows"]])
    for i, j, _ in near_duplicates(pixels):  # a picture that is there twice is one
        same[i, j] = same[j, i] = True
    if len(pixels) < 3 or same.all(1).any():
        return {"likely_copies": None, "pairs": []}
    to_known = copy_distances(fake["pixels"], pixels)
    p, limit = (
        copy_chances(copy_distances(pixels, pixels), to_known, same),
        max(0.01, 2 / (len(pixels) + 1)),
    )
    index, distance = nearest(to_known)
    count = int((p <= limit).sum())
    pairs = [
        {
            "generated": fake["rows"][i]["file_name"],
            "train": known["rows"][index[i]]["file_name"],
            "distance": float(distance[i]),
            "p": float(p[i]),
            "numbers": (int(i), int(index[i])),
        }
        for i in np.lexsort((distance, p))[:12]
    ]
    return {
        "likely_copies": count,
        "pairs": pairs,
        "expected": limit * m,
        "chance": float(binom.sf(count - 1, m, limit)),
        "limit": limit,
        "n": len(pixels),
        "m": m,
        "is_real": is_real,
    }


def are_copies(entry):
    """Whether a set lies closer to the real one than chance allows, as a whole or image by image."""
    figures, found = entry["metrics"], entry["memorisation"]
    whole, single = (
        [figures[name]["p_low"] <= 0.01 for name in names if name in figures]
        for names in (("fid", "frechet", "kid"), ("ssim_nearest", "lpips_nearest"))
    )
    many = (
        found["likely_copies"]
        and found["chance"] <= 0.001
        and found["likely_copies"] > 0.1 * found["m"]
    )
    return bool(
        any(whole[:1]) or many or (any(single) and all(single))
    )  # a blurred image is near by SSIM alone


def values_of(row, column):
    """The subgroups that an image belongs to: findings one by one, an age as its decade."""
    text = row["label"] if column == "label" else row["fields"].get(column, "")
    if column.lower() != "age":
        return [part.strip() for part in text.split("|") if part.strip()]
    decade = int((re.search(r"[0-9]+", text) or ["-1"])[0]) // 10 * 10
    return [f"{decade}–{decade + 9}"] * (decade >= 0)


def subgroups(joint, real, fake, args, least=10):
    """KID by subgroup: [{"group", "real", "generated", "kid", "error", "real_vs_rest"}], those with 10 real images.

    Against the generated images of the same subgroup where they say theirs, else against all; beside it the KID of these
    real images and the other real ones: how special they are.
    """
    column, n = args.by or "label", len(real["rows"])
    own, other = ([values_of(row, column) for row in part["rows"]] for part in (real, fake))
    said, found = any(other), []
    for group in sorted({value for values in own for value in values}):
        inside = np.array([group in values for values in own])
        same = (
            np.array([group in values for values in other]) if said else np.ones(len(other), bool)
        )
        if inside.sum() >= least and same.sum() >= least:
            features, drawn = joint["features"][:n], joint["features"][n:][same]
            value, error = kid(features[inside], drawn)
            rest = kid(features[inside], features[~inside])[0] if (~inside).sum() > 2 else None
            found.append(
                {
                    "group": group,
                    "real": int(inside.sum()),
                    "generated": int(same.sum()),
                    "kid": float(value),
                    "error": float(error),
                    "real_vs_rest": rest if rest is None else float(rest),
                }
            )
    return found


# ------------------------------------------------------------------------------------------------- utility


def small_cnn(images, targets, steps, seed):
    """Train three convolutions of stride 2 (16, 32, 64 maps) and a linear layer on (N, 3, 64, 64), (N, classes) in {0, 1}.

    Returns a function: images -> scores (N, classes). The number of steps is the same whatever N is.
    """
    sizes = [(16, 3), (32, 16), (64, 32)]
    weights = [
        torch.randn(*size, 3, 3, generator=generator(seed, "init", k)) * (2 / (9 * size[1])) ** 0.5
        for k, size in enumerate(sizes)
    ] + [torch.zeros(64, targets.shape[1]), torch.zeros(targets.shape[1])]
    weights = [w.to(images.device).requires_grad_() for w in weights]
    optimizer = torch.optim.Adam(weights, 2e-3)
    share = targets.mean(0).clamp(0.02, 0.98)

    def scores(x):
        for w in weights[:3]:
            x = F.group_norm(F.relu(F.conv2d(x, w, stride=2, padding=1)), 4)
        return x.mean((2, 3)) @ weights[3] + weights[4]

    for step in range(steps):
        picked = torch.randint(len(images), (32,), generator=generator(seed, "order", step)).to(
            images.device
        )
        F.binary_cross_entropy_with_logits(
            scores(images[picked]), targets[picked], pos_weight=(1 - share) / share
        ).backward()
        optimizer.step()
        optimizer.zero_grad()

    def predict(x):
        with torch.inference_mode():
            return torch.cat([scores(part) for part in x.split(256)]).double().cpu().numpy()

    return predict


def linear_probe(features, targets):
    """Ridge regression on z-scored features (N, D) of (N, classes) in {0, 1}: a function, features -> scores (M, classes),
    0 half way between the training scores of both kinds."""
    mean, spread = features.mean(0), features.std(0) + 1e-6
    x = (features - mean) / spread
    weights = np.linalg.solve(
        x.T @ x + x.shape[1] * np.eye(x.shape[1]), x.T @ (targets - targets.mean(0))
    )
    middle = sum((x @ weights * part).sum(0) / part.sum(0) for part in (targets, 1 - targets)) / 2
    return lambda other: (other - mean) / spread @ weights - middle


def utility_parts(real, known, fake, networks, args, device, least=5):
    """(training, test, generated), each {"rows", "small" (N, 3, 64, 64), "features", "targets" (N, classes)}, and the
    classes: every finding that all three show in `least` images and lack in as many (generated ones need not lack it)."""
    if args.split:
        parts = [known, real, fake]
    else:
        split_rows(real["rows"], 0.3)
        parts = [
            {"rows": [real["rows"][n] for n in which], "pixels": real["pixels"][which]}
            for which in (
                [n for n, row in enumerate(real["rows"]) if row["split"] == kind]
                for kind in ("train", "val")
            )
        ] + [fake]
    labels = [[set(values_of(row, "label")) for row in part["rows"]] for part in parts]

    def common(name):
        counts = [sum(name in values for values in part) for part in labels]
        return min(counts) >= least and all(
            len(part) - count >= least for part, count in zip(labels[:2], counts)
        )

    classes = [name for name in sorted(set().union(*labels[0])) if common(name)]
    if not classes:
        fail(
            f"--utility: no label that {least} training, {least} held-out and {least} generated images have, and others "
            f"lack; {args.real} has {', '.join(sorted(set().union(*labels[0])))[:200] or 'no labels'}"
        )
    for part, values in zip(parts, labels):
        part["targets"] = np.array([[float(name in own) for name in classes] for own in values])
        part["small"] = F.interpolate(
            part["pixels"].to(device).float() / 64 - 2, (64, 64), mode="area"
        )
        if part.get("features") is None:
            part["features"] = extract(
                part["pixels"], networks["features"], device, args.batch_size, args.precision
            )
    return parts, classes


def fit_arms(parts, args, steps=200):
    """{classifier: {share: (orders, hits)}}, means over seeds. orders: a class each, how often a positive test image scores
    above a negative one, (positive, negative); their weighted mean is the AUROC. hits: (classes, N), how often a test image
    is told right."""
    train, test, fake = parts
    shares = [share for share in SHARES if share * len(train["rows"]) <= 100 * len(fake["rows"])]
    count = test["targets"].shape[1]
    found = {
        name: {share: [[0] * count, 0] for share in shares}
        for name in ("linear probe", "small CNN")
    }
    positive = test["targets"].T > 0
    for seed, share in tqdm(
        [(seed, share) for seed in range(SEEDS) for share in shares], desc="utility", disable=None
    ):
        added = torch.randperm(len(fake["rows"]), generator=generator(args.seed, "added", seed))
        added = added[: share * len(train["rows"]) // 100]
        targets = np.concatenate([train["targets"], fake["targets"][added]])
        probe = linear_probe(np.concatenate([train["features"], fake["features"][added]]), targets)
        cnn = small_cnn(
            torch.cat([train["small"], fake["small"][added]]),
            torch.from_numpy(targets).float().to(train["small"].device),
            steps,
            (args.seed, seed),
        )
        for name, scores in (
            ("linear probe", probe(test["features"])),
            ("small CNN", cnn(test["small"])),
        ):
            arm = found[name][share]
            for k, (s, y) in enumerate(zip(scores.T, positive)):
                arm[0][k] = arm[0][k] + np.heaviside(s[y][:, None] - s[~y], 0.5) / SEEDS
            arm[1] = arm[1] + ((scores.T > 0) == positive) / SEEDS
    return found


def aurocs(orders, targets, weights):
    """AUROC under each row of weights (B, test images): (B,), the mean of the classes that have both kinds, NaN without."""
    return mean_of_classes(
        targets,
        weights,
        [lambda a, b, y, order=order: ((a @ order) * b).sum(1) for order in orders],
    )


def balanced_accuracies(hits, targets, weights):
    """Balanced accuracy under each row of weights, as `aurocs`; hits: (classes, test images) in [0, 1]."""
    return mean_of_classes(
        targets,
        weights,
        [lambda a, b, y, hit=hit: a @ hit[y] / 2 + b @ hit[~y] / 2 for hit in hits],
    )


def mean_of_classes(targets, weights, figures):
    """The mean of figure(a, b, y) over the classes that have both kinds, (B,), NaN where none has; a, b: the weights of
    positive and negative images (B, …), each row of sum 1; y: which images are positive."""
    total, count = np.zeros(len(weights)), np.zeros(len(weights))
    for y, figure in zip(targets.T > 0, figures):
        a, b = weights[:, y], weights[:, ~y]
        both = (a.sum(1) > 0) & (b.sum(1) > 0)
        a, b = (part / np.maximum(part.sum(1, keepdims=True), 1e-12) for part in (a, b))
        total, count = total + both * figure(a, b, y), count + both
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def resamples(rows, args, count=1000):
    """(1 + count, N): how often each image counts; row 0 all once, the others bootstrap whole patients."""
    names = [row["group"] or str(n) for n, row in enumerate(rows)]
    units = {name: k for k, name in enumerate(dict.fromkeys(names))}
    drawn = torch.randint(
        len(units), (count, len(units)), generator=generator(args.seed, "bootstrap")
    ).numpy()
    counts = np.stack([np.bincount(row, minlength=len(units)) for row in drawn])
    return np.concatenate(
        [np.ones((1, len(names))), counts[:, [units[name] for name in names]]]
    ).astype(float)


def utility(real, known, fake, networks, args, device):
    """What generated images add to a classifier: {"rows": {classifier: [...]}, "said", "views": by label and --by}."""
    parts, classes = utility_parts(real, known, fake, networks, args, device)
    test, weights, found = (
        parts[1],
        resamples(parts[1]["rows"], args),
        {"rows": {}, "said": [], "views": []},
    )
    groups = [values_of(row, args.by) if args.by else [] for row in test["rows"]]
    views = [
        (label, [k], weights[:1], test["targets"][:, k].sum()) for k, label in enumerate(classes)
    ]
    for group in sorted({value for values in groups for value in values}):
        inside = weights[:1] * [group in values for values in groups]
        views.append((group, range(len(classes)), inside, inside.sum()))
    for name, arms in fit_arms(parts, args).items():
        boots = {
            share: aurocs(orders, test["targets"], weights) for share, (orders, _) in arms.items()
        }
        right = {
            share: balanced_accuracies(hits, test["targets"], weights)
            for share, (_, hits) in arms.items()
        }
        found["rows"][name] = rows = []
        for share, values in boots.items():
            low, high = np.nanquantile(values[1:], (0.025, 0.975)).tolist()
            row = {"share": share, "auroc": float(values[0]), "low": low, "high": high}
            for which, gains in (("", values - boots[0]), ("balanced_", right[share] - right[0])):
                row |= {
                    f"{which}gain": float(gains[0]),
                    **dict(
                        zip(
                            (f"{which}gain_low", f"{which}gain_high"),
                            np.nanquantile(gains[1:], (0.005, 0.995)).tolist(),
                        )
                    ),
                }
            rows.append(row | {"balanced_accuracy": float(right[share][0])})
        found["said"].append(f"{name}: " + dose_sentence(rows, boots))
        best = max(arms, key=lambda share: boots[share][0])
        for title, which, counted, count in views:
            alone, helped = (
                aurocs([arms[share][0][k] for k in which], test["targets"][:, which], counted)[0]
                for share in (0, best)
            )
            found["views"].append(
                (name, title, int(count), number(alone), f"{number(helped)} at {best} %")
            )
    found["sizes"] = [len(part["rows"]) for part in parts]
    return found


def dose_sentence(rows, boots):
    """ "no gain", or what helps and where more of it stops helping; intervals of 99 %, as several doses are tried."""
    best = max(rows[1:], key=lambda row: row["gain"], default=None)
    if best is None:
        return "too few generated images for a dose"
    if best["gain_low"] <= 0:
        harm = [row["share"] for row in rows[1:] if row["gain_high"] < 0]
        return (
            f"no gain (AUROC {rows[0]['auroc']:.3f} on real images alone, at best {best['auroc']:.3f} with "
            f"{best['share']} % generated ones, within chance)"
            + (f"; from {harm[0]} % on they do harm" if harm else "")
        )
    enough = next(
        row["share"]
        for row in rows[1:]
        if np.nanquantile(boots[best["share"]] - boots[row["share"]], 0.005) <= 0
    )
    return (
        f"AUROC rises from {rows[0]['auroc']:.3f} to {best['auroc']:.3f} with {best['share']} % generated images (gain "
        f"{best['gain']:.3f}, 99 % interval {best['gain_low']:.3f} to {best['gain_high']:.3f})"
        + (
            f"; more than {enough} % adds nothing: stop at {enough} %"
            if enough < rows[-1]["share"]
            else ""
        )
    )


# ------------------------------------------------------------------------------------------------- what they say


def number(value, digits=3, sign=""):
    """A figure for a table: `digits` significant digits, no exponent for everyday sizes."""
    if value is None or not np.isfinite(value):
        return "–"
    value = 0.0 if abs(value) < 1e-9 else value
    digits = max(digits, len(str(int(abs(value)))))
    return f"{value:{sign}.1e}" if 0 < abs(value) < 1e-4 else f"{value:{sign}.{digits}g}"


def copies_sentence(found):
    """The count of likely copies beside the count that chance gives."""
    if found["likely_copies"] is None:
        return "Copies were not looked for: it takes images of at least three patients, those trained on (--train-data)."
    said = (
        f"{found['likely_copies']} of {found['m']} generated images lie as near to one of {found['n']} "
        f"{'real' if found['is_real'] else 'training'} images as 1 in {1 / found['limit']:.0f} fresh ones would; "
        f"{number(found['expected'], 2)} expected (p {number(found['chance'], 2)})"
    )
    return said + (
        ": likely copies, look at the pairs."
        if found["chance"] <= 0.01
        else ": no sign of copying."
    )


def verdict(entry):
    """What the figures say, in sentences for someone who reads no statistics."""
    figures, said = entry["metrics"], []
    main = next(iter(figures))
    f, worse = figures.get(main), {name for name in figures if figures[name]["p_high"] <= 0.05}
    beside = (
        f and f"{main} is {number(f['excess'] + f['null'])}, chance alone gives {number(f['null'])}"
    )
    if entry["copies"]:
        said.append(
            (
                f"These images lie closer to the real ones than fresh ones would ({beside})"
                if f["p_low"] <= 0.01
                else "Too many of these images lie closer to a real one than fresh ones would"
            )
            + ": they may be copies. Look at the nearest pairs."
        )
    elif main not in worse:
        said.append(
            f"At this number of images they cannot be told from the real ones: {beside} (p_high "
            f"{f['p_high']:.2g})."
        )
    if main in worse:  # only then: of ten figures one is often low by chance
        said.append(
            f"These images can be told from the real ones: {beside} (p_high {f['p_high']:.2g})."
        )
        said += (
            ["Many of them look like no real image (precision)."] if "precision" in worse else []
        )
        said += (
            ["They show less variety than the real ones (recall)."]
            if worse & {"recall", "coverage"}
            else []
        )
    for name, what in (
        ("colour", "colours"),
        ("grain", "grain, sharpness or JPEG blocks as stored"),
    ):
        if name in figures and figures[name]["p_high"] <= 0.01:
            said.append(f"Their {what} differ from the real ones'.")
    said += (
        ["Do they help a classifier? " + "; ".join(entry["utility"]["said"]) + "."]
        if entry.get("utility")
        else []
    )
    said.append(copies_sentence(entry["memorisation"]))
    if min(entry["n"], entry["real_n"]) < 50:
        said.append("With fewer than 50 images only gross differences show.")
    return " ".join(said)


def compare(entries, names):
    """Rows of the ranking: excess of the first metric with a 95 % interval, and whether the first set is really better.

    The spread over random halves of a set is the delete-half jackknife's error of the whole; sets of one size meet the same
    halves of the real one, so that differences are paired.
    """

    def steps(entry):
        return (
            entry["halves"][1] - entry["halves"][0] if entry["halves"] else np.full(HALVES, np.nan)
        )

    rows, first = [], entries[0]
    for entry in entries:
        excess, *others = (f["excess"] for f in entry["metrics"].values())
        gap = abs(excess - next(iter(first["metrics"].values()))["excess"])
        worse = gap > 1.96 * np.std(steps(entry) - steps(first))
        note = (
            "the first"
            if entry is first
            else "worse"
            if worse
            else "noise: not told apart from the first"
        )
        rows.append(
            (
                entry["path"],
                entry["n"],
                f"{number(excess, sign='+')} ± {number(1.96 * np.std(steps(entry)), 2)}",
                "may be copies" if entry["copies"] else note,
                *(number(value, sign="+") for value in others),
            )
        )
    return (
        "set",
        "images",
        f"{names[0]}: excess ± 95 %",
        "",
        *list(entries[0]["metrics"])[1:],
    ), rows


def caveats(settings):
    """What features and LPIPS the figures rest on, and whether others' figures may stand beside them."""
    return [
        f"{kind} {settings[kind]}"
        + ("" if settings["comparable"][kind] else " (not comparable with published figures)")
        for kind in ("features", "lpips")
        if settings[kind]
    ]


def methods(args, settings, real, entries):
    """The paragraph for a paper or an ethics board."""
    sets = "; ".join(
        f"{entry['path']}, {entry['n']} (SHA-256 {entry['hash'][:12]})" for entry in entries
    )
    groups = [row["group"] for row in real["rows"]]
    patients = len(set(groups) - {""})
    together = whole_groups(groups, len(groups), min(entry["n"] for entry in entries))
    whole = (
        ", whole patients kept together"
        if together
        else ", patients too few to be kept whole"
        if patients
        else ""
    )
    used = (
        ""
        if not args.utility
        else " Utility: ridge regression on the features and a convolutional network of three "
        f"layers (200 steps of 32 images at 64 pixels, whatever the dose), {SEEDS} paired seeds, held-out real images"
        + (
            ""
            if args.split
            else f", 30 %{' by patient' * bool(patients)}, which the generator may have learnt from (no --split)"
        )
        + f"; intervals from 1000 bootstraps of the held-out {'patients' if patients else 'images'}."
    )
    return (
        f"Real images: {args.real}, {entries[0]['real_n']} of {patients or 'unknown'} patients (SHA-256 "
        f"{settings['real_hash'][:12]}). Generated images: {sets}. All were cropped to their central square and resized to "
        f"{settings['resolution']} pixels (Lanczos); {args.resize} resizing before the network. "
        f"{'; '.join(caveats(settings))}. SSIM at 64 pixels, grey; grain of the files as stored. Precision and recall "
        "with 3 neighbours, density and coverage with 5; Inception Score in one split. Copies: correlation of 16-pixel "
        "thumbnails over mirror images and 90 % crops, conformal p-values of the distance and of its ratio to the second nearest. Null: "
        f"{args.permutations} permutations of the pooled images{whole}, seed {args.seed}; excess is the value less the "
        f"null's median. “Real halves” is the median over {HALVES} random halves of the real set against each other, "
        "“same size” that of as many generated images against a half: these two may be compared; the ranking's "
        f"intervals come from the spread over these halves.{used} Python {settings['versions']['python']}, torch "
        f"{settings['versions']['torch']}, numpy {settings['versions']['numpy']}, on {settings['device']}. "
        "Not for diagnosis."
    )


def pictures(pairs, captions):
    """Figures of two pictures side by side with a caption under them."""
    return "".join(
        f'<figure><div class="grid">{"".join(thumbnail(pixels, 128) for pixels in pair)}</div><figcaption>'
        f"{'<br>'.join(html.escape(line) for line in lines)}</figcaption></figure>"
        for pair, lines in zip(pairs, captions)
    )


def best_and_worst(real, fake, joint, count=4):
    """The generated images nearest to and farthest from the real ones by each score, each beside its nearest real one."""
    n, parts = len(real["rows"]), []
    matrices = {
        "features": np.sqrt(joint["distance"]),
        "SSIM": 1 - joint["ssim"] if "ssim" in joint else None,
        "LPIPS": joint.get("lpips"),
    }
    for name, matrix in matrices.items():
        if matrix is None:
            continue
        index, distance = nearest(matrix[n:, :n])
        order = np.argsort(distance, kind="stable")
        for word, which in (("Most", order[:count]), ("Least", order[::-1][:count])):
            parts.append(
                f"<h4>{word} like a real image by {name}</h4>"
                + pictures(
                    [(fake["pixels"][i], real["pixels"][index[i]]) for i in which],
                    [
                        (
                            fake["rows"][i]["file_name"],
                            f"{'SSIM' if name == 'SSIM' else 'distance'} "
                            + number(1 - distance[i] if name == "SSIM" else distance[i]),
                        )
                        for i in which
                    ],
                )
            )
    return parts


def feature_map(joint, n, width=560, height=360):
    """Both sets on the first two principal axes of their pooled features, as inline SVG."""
    shown = np.linspace(0, len(joint["gram"]) - 1, min(len(joint["gram"]), 1000)).astype(int)
    values, axes = np.linalg.eigh(joint["gram"][np.ix_(shown, shown)])
    places = axes[:, :-3:-1] * np.sqrt(np.maximum(values[:-3:-1], 0))
    low, span = places.min(0), np.maximum(np.ptp(places, axis=0), 1e-12)
    x, y = ((places - low) / span * (width - 20, height - 40) + (10, 30)).T
    dots = "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="var(--{"mark" if k < n else "two"})" fill-opacity=".6"/>'
        for k, a, b in zip(shown, x, y)
    )
    share = np.maximum(values[-2:], 0).sum() / max(values.sum(), 1e-12)
    return (
        f'<h3>Map of the features</h3><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-size="13"><text x="10" y="16" fill="var(--mark)">real</text><text x="60" y="16" '
        f'fill="var(--two)">generated</text>{dots}</svg><p class="soft">The two main axes hold {share:.0%} of the '
        "variation: sets apart here are apart; sets that overlap here may still differ.</p>"
    )


def utility_section(found):
    """Dose curve and tables of --utility."""
    lines = {
        name: [(row["share"], row["auroc"]) for row in rows] for name, rows in found["rows"].items()
    }
    top = found["rows"]["linear probe"][-1]["share"]
    parts = [
        f"<h3>Do they help a classifier?</h3><p>Trained on {found['sizes'][0]} real images and generated ones, tested on "
        f"{found['sizes'][1]} held-out real ones."
        + f" There are too few generated ones for more than {top} %." * (top < SHARES[-1])
        + "</p>",
        *(f"<p>{html.escape(line)}.</p>" for line in found["said"]),
        curve(lines, "generated images added, % of the real ones", "AUROC"),
    ]
    for name, rows in found["rows"].items():
        parts.append(
            "<br>"
            + table(
                (name, "AUROC [95 %]", "gain [99 %]", "balanced accuracy", "gain [99 %]"),
                [
                    (
                        f"{row['share']} %",
                        f"{row['auroc']:.3f} [{row['low']:.3f} – {row['high']:.3f}]",
                        f"{row['gain']:+.3f} [{row['gain_low']:+.3f} – {row['gain_high']:+.3f}]",
                        f"{row['balanced_accuracy']:.3f}",
                        f"{row['balanced_gain']:+.3f} "
                        f"[{row['balanced_gain_low']:+.3f} – {row['balanced_gain_high']:+.3f}]",
                    )
                    for row in rows
                ],
            )
        )
    return "".join(
        [
            *parts,
            table(
                (
                    "classifier",
                    "label or subgroup",
                    "test images",
                    "AUROC, real alone",
                    "with generated ones",
                ),
                found["views"],
            ),
        ]
    )


def set_section(entry, real, fake, known, joint, args):
    """One generated set's part of the report: verdict, table, utility, nearest pairs, pictures, subgroups, map."""
    found = entry["memorisation"]
    parts = [
        f"<h2>{html.escape(entry['path'])}</h2>",
        f'<p class="verdict">{html.escape(entry["verdict"])}</p>',
        table(HEADER, entry["table"]),
        utility_section(entry["utility"]) if entry.get("utility") else "",
    ]
    parts.append(
        "<h3>Nearest pairs: generated left, "
        f"{'real' if found.get('is_real', True) else 'training image'} right</h3><p>{html.escape(copies_sentence(found))} "
        "“No sign” is no guarantee of privacy. p: how often a fresh image would be as near.</p>"
    )
    pairs = [
        (fake["pixels"][i], known["pixels"][j])
        for i, j in (pair.pop("numbers") for pair in found["pairs"])
    ]
    parts.append(
        pictures(
            pairs,
            [
                (
                    f"distance {number(said['distance'])}, p {number(said['p'], 2)}, SSIM {likeness(*pair):.2f}",
                    said["generated"],
                    said["train"],
                )
                for said, pair in zip(found["pairs"], pairs)
            ],
        )
    )
    for title, part in (("Real", real), ("Generated", fake)):
        shown = (
            torch.randperm(len(part["rows"]), generator=generator(args.seed, "shown"))[:24]
            .sort()
            .values
        )
        grid = "".join(thumbnail(part["pixels"][n], 128) for n in shown)
        parts.append(
            f'<h3>{title}: {len(shown)} of {len(part["rows"])}</h3><div class="grid">{grid}</div>'
        )
    parts += [
        "<h3>Best and worst, generated left, its nearest real right</h3>",
        *best_and_worst(real, fake, joint),
    ]
    if entry["subgroups"]:
        rows = [
            (
                row["group"],
                row["real"],
                row["generated"],
                f"{number(row['kid'])} ± {number(row['error'], 2)}",
                number(row["real_vs_rest"]),
            )
            for row in entry["subgroups"]
        ]
        header = ("", "real", "generated", "kid", "kid to the other real ones")
        parts.append(f"<h3>By {html.escape(args.by or 'label')}</h3>" + table(header, rows))
    return "\n".join([*parts, feature_map(joint, len(real["rows"]))])


def likeness(a, b):
    """SSIM of two uint8 pictures at the smaller one's size."""
    side = min(a.shape[1], b.shape[1])
    return ssim(
        *(F.interpolate(x[None].float(), (side, side), mode="area") / 255 for x in (a, b))
    ).item()


GUIDE = """<h2>How to read the table</h2><p>Two samples of the same patients' images never score zero: at a hundred
images chance alone moves every figure. So each value stands beside what chance gives when both sets are pooled and
shared out anew. <b>excess</b> is what is left. <b>p_high</b> is how often chance is as bad or worse: under 0.05, the
sets differ. <b>p_low</b> is how often chance is as good or better: under 0.01, the images are closer than fresh ones
would be, as copies are. <b>frechet, kid</b>: distance of the two sets; <b>colour</b>: the same of their colours, which
the texture descriptor does not see; <b>grain</b>: the same of the files as stored: JPEG's blocks, grain, blur (images
saved in another format or size differ here by that alone). <b>precision, density</b>: generated images that look real.
<b>recall, coverage</b>: real variety that is reached. <b>ssim, lpips</b>:
likeness to the nearest real image, and of generated images to one another. <b>band</b>: excellent, good, fair or poor by a fixed table; read it
beside what the real images score against one another (real halves).</p>"""


def write_report(args, settings, real, entries, names):
    """The report: ranking where there are several sets, a section a set, guide, methods."""
    body = [f'<p class="soft">{html.escape("; ".join(caveats(settings)))}</p>']
    if len(entries) > 1:
        header, rows = compare(entries, names)
        body += ["<h2>Ranking, by excess over chance; copies last</h2>", table(header, rows)]
    body += [entry["section"] for entry in entries]
    body += [
        GUIDE,
        f"<h2>How it was made</h2><p>{html.escape(methods(args, settings, real, entries))}</p>",
        '<p class="soft">' + html.escape(command("evaluate.py", *sys.argv[1:])) + "</p>",
    ]
    write_file(args.out, page("Generated against real images", "\n".join(body)))


def print_rows(header, rows, left=2):
    """A table as plain text."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(header))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths)]
        print(
            "  ".join(cells + [cell.rjust(width) for cell, width in zip(row[left:], widths[left:])])
        )


# ------------------------------------------------------------------------------------------------- the whole


def load_networks(args, names, device):
    """The feature network and, where a metric needs it, LPIPS; fills in the defaults of --features and --lpips."""
    lpips, features = None, args.features
    if args.lpips == "auto" and not all(lpips_files("alex")):
        print("LPIPS is left out: its weights are not in the cache")
    elif args.lpips != "none" and any(METRICS[name][2] == "lpips" for name in names):
        lpips = load_lpips("alex" if args.lpips == "auto" else args.lpips, device)
    if lpips is None:
        names[:] = [name for name in names if METRICS[name][2] != "lpips"]
    if features == "auto":
        features = "inception" if find_weights(FID_WEIGHTS) else "texture"
    features = load_features(features, device, args.resize)
    if "inception_score" in names and features.get("head") is None:
        fail(
            "--metrics inception_score: needs the Inception's classes: --features inception or its weight file"
        )
    return {"features": features, "lpips": lpips}


def has_side(row, side):
    """True for an image that is stored at side x side pixels: neither cropped nor resized before its features."""
    with contextlib.suppress(Exception), Image.open(row["path"]) as image:
        return image.size == (side, side)


def describe(args, names, networks, resolution, native, device):
    """The settings that the report and --json name; native: no image was resized, so that figures can be compared."""
    lpips = networks["lpips"] and networks["lpips"]["name"]
    return {
        "features": networks["features"]["name"],
        "lpips": lpips,
        "resolution": resolution,
        "resize": args.resize,
        "metrics": names,
        "precision": args.precision,
        "comparable": {
            "features": native
            and networks["features"]["published"]
            and args.precision in ("auto", "fp32"),
            "lpips": lpips is not None,
        },
        "permutations": args.permutations,
        "seed": args.seed,
        "max_images": args.max_images,
        "device": str(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def check_sets(args, names, real_rows, sets):
    """Stop, before anything is computed, where a set lacks what a flag asks of it."""
    for path, rows in [(args.real, real_rows), *sets]:
        if args.utility and not any(row["label"] for row in rows):
            fail(
                f"--utility: no labels in {path}: it needs a column label, or a folder for each class"
            )


def rank_key(entry):
    """For sorting: copies last, then the excess of the first metric, turned so that small is good."""
    name, figures = next(iter(entry["metrics"].items()))
    sign = 1 if METRICS["frechet" if name == "fid" else name][1] else -1
    return entry["copies"], sign * figures["excess"]


def write_json(args, settings, real, entries):
    """The figures for programs, in the form that the docstring gives."""

    def figures(entry):
        kept = {key: entry[key] for key in ("path", "n", "metrics")}
        kept["memorisation"] = {
            key: entry["memorisation"][key] for key in ("likely_copies", "pairs")
        }
        if entry.get("utility"):
            rows = entry["utility"]["rows"]
            kept["utility"] = [
                {key: row[key] for key in ("share", "auroc", "low", "high")}
                for row in rows["linear probe"]
            ]
            kept["classifiers"] = rows
        return kept | ({"subgroups": entry["subgroups"]} if entry["subgroups"] else {})

    text = json.dumps(
        {
            "format": 1,
            "settings": settings,
            "real": {"path": args.real, "n": entries[0]["real_n"]},
            "generated": [figures(entry) for entry in entries],
        }
    )
    write_file(
        args.json, json.dumps(json.loads(text, parse_constant=lambda name: None), indent=1)
    )  # NaN is no JSON


# ---------------------------------------------------------------- flags


def parse_args():
    parser = Flags(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("real", metavar="REAL", help="real images: a folder or a table")
    data.add_argument(
        "generated", metavar="GENERATED", nargs="*", help="generated images: folders or tables"
    )
    data.add_argument(
        "--checkpoint",
        metavar="PATH|DIR",
        help="draw from a checkpoint, or from each of a folder, and rank",
    )
    data.add_argument(
        "--num-samples", type=int, default=200, help="images drawn from each checkpoint"
    )
    data.add_argument("--steps", type=int, default=50, help="denoising steps for --checkpoint")
    data.add_argument("--guidance-scale", type=float, default=7.5, help="for --checkpoint")
    data.add_argument(
        "--train-data",
        metavar="DIR",
        help="what the generator learnt from, searched for copies (default: "
        "the training part of --split, else REAL)",
    )
    data.add_argument(
        "--split",
        metavar="CSV",
        help="split.csv of the run: REAL's held-out images become the reference",
    )
    data.add_argument(
        "--group-column",
        help="column of REAL's table that names the patient (default: found by name)",
    )
    data.add_argument(
        "--max-images",
        type=int,
        default=1000,
        help="at most so many of each set, drawn by the seed",
    )
    data.add_argument(
        "--resolution",
        type=int,
        help="pixels a side at which all are compared (default: the smallest stored one, 64 to 256)",
    )
    numbers = parser.add_argument_group("numbers")
    numbers.add_argument(
        "--metrics",
        help="comma list (default: all but inception_score); fid is another word for frechet",
    )
    numbers.add_argument(
        "--features",
        default="auto",
        metavar="auto|texture|inception|HUB-ID|FOLDER|PATH",
        help="PATH: FID's Inception weights (auto: inception if the cache has it, else texture)",
    )
    numbers.add_argument(
        "--resize",
        choices=("legacy", "clean"),
        default="legacy",
        help="how the feature network's input is resized: as pytorch-fid and CMMD, or as clean-fid",
    )
    numbers.add_argument(
        "--lpips",
        choices=("auto", "none", "alex", "vgg", "squeeze"),
        default="auto",
        help="distance of two images (auto: alex where its weights are, else none)",
    )
    numbers.add_argument(
        "--bands", metavar="CSV", help="metric,excellent,good,fair: replaces the table of bands"
    )
    numbers.add_argument(
        "--utility",
        action="store_true",
        help="do the images help a classifier? needs labels on both sides",
    )
    numbers.add_argument(
        "--by",
        metavar="COLUMN",
        help="also by subgroup: a column such as sex, age, view (default: label)",
    )
    numbers.add_argument(
        "--permutations", type=int, default=999, help="draws of the null, at least 99"
    )
    numbers.add_argument("--batch-size", type=int, default=32, help="images a forward pass")
    numbers.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    numbers.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of the feature network; auto is fp32, as published figures are",
    )
    numbers.add_argument("--seed", type=int, default=0)
    output = parser.add_argument_group("output")
    output.add_argument("--out", default="report.html", help="the report")
    output.add_argument("--json", help="the figures for programs")
    args = parser.parse_args()
    for flag, least, most in (
        ("max_images", 2, 5000),
        ("resolution", 64, 4096),
        ("permutations", 99, 10**6),
        ("steps", 1, 999),
        ("batch_size", 1, 10**6),
        ("num_samples", 2, 10**6),
        ("guidance_scale", 0, 1000),
    ):
        if getattr(args, flag) is not None and not least <= getattr(args, flag) <= most:
            fail(
                f"--{flag.replace('_', '-')} {getattr(args, flag):g}: give a number from {least} to {most}"
            )
    if not args.generated and not args.checkpoint:
        fail("nothing to compare REAL with: give GENERATED, one or more folders, or --checkpoint")
    for path in filter(None, (args.out, args.json)):  # now, not after an hour
        folder = os.path.dirname(os.path.abspath(path))
        if os.path.isdir(path) or os.path.isdir(folder) and not os.access(folder, os.W_OK):
            fail(
                f"{path}: is a directory, or in one that cannot be written to; give another --out or --json"
            )
    return args


def main(args):
    device, names, args.limits = (
        pick_device(args.device),
        chosen_metrics(args.metrics),
        read_bands(args.bands),
    )
    networks = load_networks(args, names, device)
    real_rows, known_rows = list_real(args)
    sets = [(path, list_images(path)) for path in args.generated] + (
        draw_checkpoints(args) if args.checkpoint else []
    )
    sets = [(path, at_most(path, share_range(rows), args)) for path, rows in sets]
    check_sets(args, names, real_rows, sets)
    everything = sum((rows for _, rows in sets), real_rows)
    resolution = args.resolution or pick_resolution(real_rows, *(rows for _, rows in sets))
    native = all(has_side(row, resolution) for row in everything)
    settings = describe(args, names, networks, resolution, native, device) | {
        "real_hash": set_hash(real_rows)
    }
    real = load_set(args.real, real_rows, resolution, networks, args, device)
    known = real
    if known_rows is not None:  # searched for copies, read small
        known = dict(
            zip(
                ("rows", "pixels"),
                load_pixels(known_rows, resolution if args.utility else min(80, resolution)),
            )
        )
    print(f"{len(real_rows)} real images at {resolution} px; " + "; ".join(caveats(settings)))
    entries = []
    for path, rows in sets:
        if os.path.realpath(path) == os.path.realpath(args.real):
            print(f"{path} is the REAL set itself: these are the figures of perfect copies")
        fake = load_set(path, rows, resolution, networks, args, device)
        entries.append(
            evaluate_set(real, fake, known, args, names, networks, device)
            | {"hash": set_hash(rows)}
        )
        print(f"\n{path}: {entries[-1]['n']} generated against {entries[-1]['real_n']} real images")
        print_rows(HEADER, entries[-1]["table"])
        print(entries[-1]["verdict"])
    entries.sort(key=rank_key)
    if len(entries) > 1:
        print("\nranking:")
        header, rows = compare(entries, names)
        print_rows(header[:4], [row[:4] for row in rows], left=1)
    write_report(args, settings, real, entries, names)
    if args.json:
        write_json(args, settings, real, entries)
    print(
        f"\nreport: {os.path.abspath(args.out)}"
        + (f"\nfigures: {os.path.abspath(args.json)}" if args.json else "")
    )
    print(
        "next:",
        command(
            "filter.py",
            entries[0]["path"],
            "--reference",
            args.real,
            "--out",
            "kept",
            "--calibrate",
            "0.05",
        ),
    )


if __name__ == "__main__":
    run_script(main, parse_args)
