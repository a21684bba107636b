"""Keep the generated images that are as good as real ones, say of each other one why not, and learn from experts.

    python filter.py runs/new --reference wounds/ --calibrate 0.05 --drop-copies --drop-duplicates --out runs/kept
    python filter.py runs/new --reference wounds/ --max-lpips 0.30 --min-ssim 0.40 --lpips alex --out runs/kept
    python filter.py runs/new --rating-page rate.html --suggest 60 --blind wounds/
    python filter.py --agreement anna.csv ben.csv
    python filter.py --fit anna.csv ben.csv --reference wounds/ --out selector.safetensors
    python filter.py runs/new --reference wounds/ --selector selector.safetensors --keep 200 --out runs/kept
    python filter.py runs/new --reference wounds/ --calibrate 0.05 --mix wounds/ --share 25 --out runs/mixed

--calibrate 0.05 takes its threshold from the real images themselves, so that 95 % of unseen real ones would pass all
scores together (a label with enough real images has its own); a fixed threshold prints the share of real images that
it would refuse. Leaves in --out: the kept images, metadata.csv (ready for train.py), decisions.csv and filter.html.
Nothing is deleted: the kept images are copies.
--rating-page leaves a page for any browser, no server: keys 1 (bad), 2 (usable) and 3 (good); it saves ratings.csv.
--fit turns ratings into a selector: ridge regression on what `hand` and `texture` of metrics.py see, cross-validated
with whole patients or prompts left out, calibrated to a probability. Ratings that it cannot predict better than chance,
or that merely repeat who rated or what, give none. From metrics: reading, features, the quality head, the page.
"""

import base64
import hashlib
import html
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import optimize, special, stats

from metrics import (
    COLUMNS,
    Flags,
    colour,
    command,
    content_hash,
    copy_chances,
    copy_distances,
    copy_file,
    copy_limit,
    extract,
    fail,
    generator,
    list_images,
    load_features,
    load_lpips,
    load_pixels,
    lpips_files,
    lpips_matrix,
    modality_of,
    nearest,
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
    table,
    thumbnail,
    to_grey,
    write_csv,
    write_file,
)

PENALTIES = np.logspace(
    -2, 2.5, 10
)  # of the ridge; the rows of its features have a squared length near 2


def draw_order(count, seed, *key):
    """A permutation of range(count), int64, the same everywhere."""
    return torch.randperm(count, generator=generator(seed, *key)).numpy()


# ---------------------------------------------------------------- calibration: what a real image scores


def text_key(text):
    """A label or caption as a selector's classes are named."""
    return " ".join(text.lower().split())


def plain_scores(grey):
    """Log variance of the Laplacian and contrast of (B, 1, H, W) in [0, 1]: two (B,)."""

    def variance(maps):  # torch.var takes five times as long
        return (maps - maps.mean((1, 2, 3), keepdim=True)).square().sum((1, 2, 3)) / (
            maps[0].numel() - 1
        )

    down, across, middle = grey[..., 1:-1], grey[..., 1:-1, :], grey[..., 1:-1, 1:-1]
    edges = (
        down[..., :-2, :] + down[..., 2:, :] + across[..., :-2] + across[..., 2:] - 4 * middle
    )  # faster than conv2d
    return (variance(edges) + 1e-8).log(), variance(grey).sqrt()


def image_scores(pixels):
    """Scores of uint8 pixels (N, 3, H, W), each (N,): log variance of the Laplacian, contrast."""
    parts = zip(*(plain_scores(to_grey(part)) for part in pixels.split(64)))
    return {
        name: torch.cat(part).double().numpy()
        for name, part in zip(("sharpness", "contrast"), parts)
    }


def appearance(pixels):
    """uint8 (N, 3, H, W) -> (N, 200): `colour`, and the 8 x 8 pixels of a thumbnail less their mean, of length 1. The
    texture descriptor sees neither a colour nor that a film is inverted."""
    small = torch.cat(
        [F.adaptive_avg_pool2d(part.float(), 8).flatten(1) for part in pixels.split(64)]
    ).double()
    return np.hstack([colour(pixels), F.normalize(small - small.mean(1, keepdim=True)).numpy()])


def in_units_of(real, seen):
    """`appearance` (m, 200) in the spread of real images' (n, 200): a colour at most three standard deviations from the
    median, so that one tinted film among grey ones does not drown the layout, which weighs half as much again."""
    spread = np.maximum(real.std(0), 3e-3)
    tint = np.tanh((seen[:, :8] - np.median(real[:, :8], axis=0)) / spread[:8] / 3) * 3 / 8**0.5
    return np.hstack([tint, 1.5 * seen[:, 8:] / np.linalg.norm(spread[8:])])


def two_sided(reference, values):
    """Distance from the reference's median in units of its median absolute deviation: both ends are bad."""
    median = np.median(reference)
    return np.abs(values - median) / (1.4826 * np.median(np.abs(reference - median)) + 1e-9)


def ranks(real_scores, scores):
    """{name: u} of the real scores' names: u = (1 + how many real scores are smaller) / (n + 1), in (0, 1]; large is bad."""
    return {
        name: (1 + np.searchsorted(np.sort(values), scores[name])) / (len(values) + 1)
        for name, values in real_scores.items()
    }


def calibrate(real_scores, alpha, members=slice(None)):
    """The threshold on the largest rank that 1 - alpha of unseen real images pass in all their scores together.

    real_scores: name -> (n,) leave-one-out scores of real images, large is bad; members: those it is taken from, all
    or the ones of a label. The conformal quantile of the maximum of the ranks: cutting each of several scores at alpha
    would refuse too many. Infinite, so that everything passes, where there are fewer than 1/alpha - 1.
    """
    joint = np.sort(np.max(list(ranks(real_scores, real_scores).values()), axis=0)[members])
    k = int(np.ceil((1 - alpha) * (len(joint) + 1) - 1e-9))
    return float(joint[k - 1]) if k <= len(joint) else float("inf")


def judge(real_scores, scores, threshold):
    """(passes, worst): bool (N,) and, for each image, the name of the score that ranks worst among the real ones.

    threshold: one number, or (N,).
    """
    u = ranks(real_scores, scores)
    stacked = np.stack(list(u.values()))  # (scores, N)
    return stacked.max(0) <= threshold, [list(u)[n] for n in stacked.argmax(0)]


def refuse(reasons, which, why):
    """Give the images that are True in `which` (m,) the reason why(i), in place; an earlier reason stays."""
    for i in np.flatnonzero(which):
        reasons[i] = reasons[i] or why(i)


def refuse_low(reasons, given, quality, alignment):
    """Refuse, in place, what a selector gives less than these limits, each None or a number; what is not known fails it."""
    for name, least in (("quality", quality), ("alignment", alignment)):
        if least is not None:
            refuse(
                reasons,
                ~(given[name] >= least),
                lambda i, name=name, least=least: f"{name} {given[name][i]:.2f} below {least:.2f}",
            )


def label_thresholds(own, rows, alpha):
    """{label: calibrated threshold}: "" for all, and each label that has enough of the real images `rows` for its own."""
    labels = np.array([text_key(row["label"]) for row in rows])
    found = {label: calibrate(own, alpha, labels == label) for label in sorted({*labels} - {""})}
    return {"": calibrate(own, alpha)} | {label: u for label, u in found.items() if np.isfinite(u)}


def measure_reference(
    rows,
    pixels,
    device,
    alpha=None,
    max_lpips=None,
    min_ssim=None,
    copies=False,
    features="texture",
    lpips=None,
    batch_size=32,
    precision="auto",
):
    """Measure the real images once, so that others can be judged beside them: a dict for `score` and `refusals`.

    rows, pixels: as load_pixels gives, uint8 (n, 3, S, S), S >= 64. alpha: refuse what looks less real than all but
    this share of the real images; max_lpips, min_ssim: limits towards the nearest of them; copies: refuse copies.
    features, lpips: networks by name; without lpips it is alex where its weights are. In the dict, "said" has a line on
    each limit, and "own" the real images' scores, each against those of other patients. fail() where there are too few
    real images for alpha, or all are of one patient.
    """
    enough = int(np.ceil(1 / alpha - 1e-9)) - 1 if alpha else 0
    if len(rows) < enough:
        fail(
            f"--calibrate {alpha:g} needs at least {enough} real images, --reference has {len(rows)}"
        )
    lpips = lpips or ("alex" if max_lpips is not None or all(lpips_files("alex")) else None)
    reference = dict(
        pixels=pixels,
        device=device,
        batch_size=batch_size,
        precision=precision,
        spread=1.0,
        network=load_features(features, device),
        lpips=lpips and load_lpips(lpips, device),
        limits=[],
    )
    if max_lpips is not None:
        reference["limits"].append(("lpips", max_lpips, f"--max-lpips {max_lpips:g}"))
    if min_ssim is not None:
        reference["limits"].append(("dissimilarity", 1 - min_ssim, f"--min-ssim {min_ssim:g}"))
    vectors = seen_by(reference, pixels)
    if reference["network"]["standardise"]:
        spread = vectors.std(0)  # a corner that is black in all of them must not outweigh the rest
        reference["spread"] = np.maximum(spread, 0.2 * np.median(spread)) + 1e-9
    reference |= dict(
        vectors=vectors / reference["spread"],
        simple=image_scores(pixels),
        appearance=appearance(pixels),
    )
    distances = np.sqrt(squared_distances(reference["vectors"], reference["vectors"]))
    same = same_unit([row["group"] for row in rows]) | (
        distances <= 1e-3 * np.median(distances)
    )  # there twice: one
    if same.all(1).any():
        fail("--reference: all its images are of one patient; it takes several")
    own = score(reference, pixels, reference["vectors"], same)[0]
    said = [
        f"{why} would refuse {np.mean(own[name] > limit):.0%} of the real images"
        for name, limit, why in reference["limits"]
    ]
    if copies:
        limit = copy_limit(len(rows))
        reference["copies"] = limit, copy_distances(pixels, pixels), same
        said.append(
            f"a copy is what is nearer to a real image than all but {limit:.1%} of fresh ones are"
        )
    if alpha:
        reference["thresholds"] = label_thresholds(own, rows, alpha)
        said.append(
            f"calibrated on {len(rows)} real images by {', '.join(own)}: about {1 - alpha:.0%} of unseen real "
            "ones would pass"
            + "".join(
                f'; label "{label}" has a threshold of its own'
                for label in reference["thresholds"]
                if label
            )
        )
    return reference | dict(own=own, said=said)


def seen_by(reference, pixels):
    """Features (m, D) of pixels in units of the reference's spread."""
    how = (reference[name] for name in ("network", "device", "batch_size", "precision"))
    return extract(pixels, *how) / reference["spread"]


def score(reference, pixels, vectors=None, forbidden=False):
    """Scores beside a measured reference of uint8 pixels (m, 3, S, S): ({name: (m,)}, nearest real image (m,), vectors).

    Large is bad in all but copy_chance. vectors, forbidden: of the real images themselves, their features and bool
    (m, n), who is not compared with whom.
    """
    real, device = reference["pixels"], reference["device"]
    vectors = seen_by(reference, pixels) if vectors is None else vectors
    index, distance = nearest(np.sqrt(squared_distances(vectors, reference["vectors"])), forbidden)
    scores = {"distance": distance} | {
        name: two_sided(reference["simple"][name], values)
        for name, values in image_scores(pixels).items()
    }
    seen, known = (
        in_units_of(reference["appearance"], x)
        for x in (appearance(pixels), reference["appearance"])
    )
    mirrored = np.hstack([seen[:, :8], seen[:, 8:].reshape(-1, 8)[:, ::-1].reshape(-1, 192)])
    apart = np.minimum(squared_distances(seen, known), squared_distances(mirrored, known))
    apart[np.broadcast_to(forbidden, apart.shape)] = np.inf
    fifth = (
        min(5, len(real)) - 1
    )  # a few odd real images, grey among photographs, do not excuse others
    scores["colour"] = np.sqrt(np.partition(apart, fifth)[:, fifth])
    if reference["lpips"]:
        matrix = lpips_matrix(
            pixels, reference["lpips"], device, reference["batch_size"], others=real
        )
        scores["lpips"] = nearest(matrix, forbidden)[1]
    if any(name == "dissimilarity" for name, *_ in reference["limits"]):
        scores["dissimilarity"] = 1 + nearest(-ssim_matrix(pixels, real, device), forbidden)[1]
    if "copies" in reference:
        limit, known, same = reference["copies"]
        apart = copy_distances(pixels, real)
        scores["copy_chance"] = copy_chances(known, apart, same)
        index = np.where(
            scores["copy_chance"] <= limit, apart.argmin(1), index
        )  # of a copy, what it is a copy of
    return scores, index, vectors


def refusals(reference, scores, rows):
    """Why each image goes, [str], "" where it stays: by its `score` beside a measured reference, and its row's label."""
    reasons = [""] * len(rows)
    if "copies" in reference:
        chance = scores["copy_chance"]
        refuse(
            reasons,
            chance <= reference["copies"][0],
            lambda i: f"copy of a real image (chance {chance[i]:.2g})",
        )
    for name, limit, why in reference["limits"]:
        refuse(reasons, scores[name] > limit, lambda i, why=why: why)
    if "thresholds" in reference:
        of = reference["thresholds"]
        threshold = np.array([of.get(text_key(row["label"]), of[""]) for row in rows])
        passes, worst = judge(reference["own"], scores, threshold)
        refuse(
            reasons,
            ~passes,
            lambda i: worst[i].replace("colour", "colour or layout") + " unlike the real images",
        )
    return reasons


# ---------------------------------------------------------------- the quality head, fitted on experts' ratings

QUALITY_FEATURES = (("hand-1", 21), ("texture-1", 368), ("hand-1-squared", 21))
QUALITY_TENSORS = {
    "feat.mean",
    "feat.scale",
    "head.weight",
    "head.bias",
    "head.modality_bias",
    "head.cut",
    "cal.platt",
    "align.proto",
    "align.bias",
    "align.logit",
}


def hand(pixels):
    """What spoils a picture technically: uint8 (B, 3, H, W), H, W >= 32 -> (B, 21).

    Sharpness (log variance of the Laplacian), contrast, mean chroma; both gradients; noise (Immerkaer 1996), signal to
    noise; 5-95 % range; shares of black and white; 5 % point, log red and blue over green; steps of the log power
    spectrum over six bands; steps at 8-pixel borders over those elsewhere, both ways; checkerboards.
    """
    grey, (red, green, blue) = to_grey(pixels), (pixels.float().mean((2, 3)) / 255 + 0.01).log().T
    kernels = torch.tensor(
        [
            [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]],
            [[-1, -2, -1], [0, 0, 0], [1, 2, 1]],
            [[1, -2, 1], [-2, 4, -2], [1, -2, 1]],
        ]
    ).to(grey)  # both Sobels, Immerkaer's
    mean, strength = (
        grey.mean((1, 2, 3)),
        F.conv2d(grey, kernels[:, None]).abs().mean((2, 3)) + 1e-4,
    )
    noise = strength[:, 2] / 6 * (np.pi / 2) ** 0.5
    low, high = grey[..., ::2, ::2].flatten(1).quantile(torch.tensor([0.05, 0.95]).to(grey), 1)
    y, x = torch.meshgrid(
        torch.fft.fftfreq(grey.shape[2]), torch.fft.rfftfreq(grey.shape[3]), indexing="ij"
    )
    edges = torch.logspace(np.log10(1.5 / min(grey.shape[2:])), np.log10(0.5), 7)
    bands = (
        torch.bucketize(torch.hypot(x, y), edges).flatten() == torch.arange(1, 7)[:, None]
    )  # (6, frequencies)
    bands = (bands / bands.sum(1, keepdim=True)).to(grey)
    power = (
        torch.fft.rfft2(grey[:, 0]).abs().square().flatten(1) / grey[0].numel() @ bands.T + 1e-6
    ).log()
    across, down = grey.diff(dim=3), grey.diff(dim=2)
    blocks = [
        (steps[..., 7::8].abs().mean((1, 2, 3)) + 1e-3).log()
        - (steps.abs().mean((1, 2, 3)) + 1e-3).log()
        for steps in (across, down.transpose(2, 3))
    ]
    chroma = (pixels.amax(1) - pixels.amin(1)).float().mean((1, 2)) / 255
    return torch.stack(
        [
            *plain_scores(grey),
            chroma,
            *strength[:, :2].log().T,
            noise.log(),
            (mean + 1e-4).log() - noise.log(),
            high - low,
            (grey < 0.02).float().mean((1, 2, 3)),
            (grey > 0.98).float().mean((1, 2, 3)),
            low,
            red - green,
            blue - green,
            *power.diff(dim=1).T,
            *blocks,
            (across.diff(dim=2).abs().mean((1, 2, 3)) + 1e-4).log(),
        ],
        1,
    )


def quality_features(pixels, device):
    """What the quality head sees of uint8 pixels (N, 3, H, W): float64 (N, 389), `hand` and `texture`."""
    plain = torch.cat([hand(part.to(device)).cpu() for part in pixels.split(64)]).double().numpy()
    return np.concatenate([plain, extract(pixels, load_features("texture", device), device)], 1)


def standardised(features, mean, scale):
    """quality_features (N, 389) in the units of mean and scale (410,), the squares of `hand` behind them: (N, 410).

    Too much is as bad as too little, which a line alone cannot say.
    """
    count, hand_count = features.shape[1], QUALITY_FEATURES[0][1]
    z = (features - mean[:count]) / scale[:count]
    squares = np.minimum(np.square(z[:, :hand_count]) * hand_count, 9)
    return np.hstack([z, (squares - mean[count:]) / scale[count:]])


def save_selector(path, spec, tensors):
    """Write a fitted head: safetensors, fp32, `spec` as JSON in the metadata; no paths, no patients.

    For D = 410 `standardised` features: feat.mean, feat.scale, head.weight (D), head.bias (1), head.modality_bias (one
    for each of spec["modalities"], none for one), head.cut (2) and cal.platt (slope, cut) of the logistic calibration,
    , align.proto (C, D), align.bias (C), align.logit (1) of
    the softmax over spec["classes"].
    """
    from safetensors.torch import save

    spec = json.loads(
        json.dumps(spec, sort_keys=True), parse_constant=lambda name: None
    )  # NaN is no JSON
    metadata = {
        "format": "medlora-selector",
        "version": "1",
        "tool": "medlora",
        "spec": json.dumps(spec),
    }
    data = save(
        {
            name: torch.tensor(value, dtype=torch.float32).contiguous()
            for name, value in tensors.items()
        }
    )
    length = int.from_bytes(
        data[:8], "little"
    )  # the library would write its metadata in random order
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8 : 8 + length])}).encode()
    header += b" " * (-len(header) % 8)
    write_file(path, len(header).to_bytes(8, "little") + header + data[8 + length :])


def load_selector(path):
    """A selector that filter.py --fit wrote: its spec and float64 arrays in one dict. fail() for anything else."""
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as file:
            found = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}
            metadata = file.metadata() or {}
        spec = json.loads(metadata.get("spec", "{}"))
        known = tuple(
            (block["name"], block["dim"]) for block in spec.get("features", ())
        ) == QUALITY_FEATURES and (
            64 <= spec["features"][0]["size"] <= 4096
            and 0 <= spec["thresholds"]["quality"] <= 1
            and spec["good"] in (2, 3)
            and all(
                isinstance(text, str)
                for key in ("modalities", "classes", "warnings")
                for text in spec[key]
            )
        )
    except Exception:  # a missing file, damaged safetensors, damaged JSON
        fail(f"{path}: is not a readable selector; filter.py --fit writes one")
    if (metadata.get("format"), metadata.get("version")) != ("medlora-selector", "1"):
        fail(f"{path}: is not a selector of version 1; filter.py --fit writes one")
    wide = ("feat.mean", "feat.scale", "head.weight", "align.proto")
    if not (
        known
        and set(found) == QUALITY_TENSORS
        and all(np.isfinite(value).all() for value in found.values())
        and {found[name].shape[-1] for name in wide} == {sum(dim for _, dim in QUALITY_FEATURES)}
    ):
        fail(
            f"{path}: its features or numbers are not those of this version; fit it again with filter.py --fit"
        )
    return {"spec": spec, **found}


RATING_COLUMNS = "image_path,rating,modality,expert_level,prompt,expert,group,comment,guess,real"


def read_ratings(paths):
    """All rows of ratings files: dicts of RATING_COLUMNS with "path" (image_path beside its file), "rating" int and
    "level" float (3 where it is empty); fail() names the rows whose rating is not 1, 2 or 3.
    """
    found = []
    for path in paths:
        if not os.path.isfile(path):
            fail(f"{path}: no such file")
        rows = read_table(path)
        if not rows or not all(row.get("image_path") and "rating" in row for row in rows):
            fail(f"{path}: a ratings file has rows and at least the columns image_path and rating")
        for name, sort in (("rating", r"[123](\.0*)?"), ("expert_level", r"([1-9]\d*(\.\d*)?)?")):
            wrong = [
                str(n) for n, row in enumerate(rows, 2) if not re.fullmatch(sort, row.get(name, ""))
            ]
            if wrong:
                fail(
                    f"{path}: row {', '.join(wrong[:5])}: {name} must be 1, 2 or 3"
                    + " or more" * (name != "rating")
                )
        for row in rows:
            name = row["image_path"].replace("\0", "?")  # no name of a file has that
            place = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), name))
            found.append(
                {name: row.get(name, "") for name in RATING_COLUMNS.split(",")}
                | dict(
                    path=place
                    if os.path.exists(place)
                    else place.replace("\\", "/"),  # written on Windows
                    rating=int(row["rating"][0]),
                    level=float(row.get("expert_level") or 3),
                    expert=row.get("expert") or Path(path).stem,
                )
            )
    return found


def apply_selector(selector, features, rows):
    """Judge images by quality_features at the selector's size, features (N, 389): a dict of values (N,).

    quality: probability that an expert gives the rating spec["good"] or better; alignment: probability that it
    shows its row's label (else caption), NaN where the selector does not know that. rows: as list_images gives; of
    "fields" only "modality" is read, and fail() says which one no expert rated.
    """
    spec, modalities = selector["spec"], [text_key(modality_of(row)) for row in rows]
    unknown = (
        sorted(set(modalities) - set(spec["modalities"])) if len(spec["modalities"]) > 1 else []
    )
    if unknown:
        fail(
            f"the selector was fitted on {', '.join(spec['modalities'])}, not on {unknown[0] or 'images without modality'}"
        )
    z = standardised(features, selector["feat.mean"], selector["feat.scale"])
    offset = [
        selector["head.modality_bias"][spec["modalities"].index(m)]
        if len(spec["modalities"]) > 1
        else 0
        for m in modalities
    ]
    slope, cut = selector["cal.platt"]
    scores = np.add(offset, z @ selector["head.weight"] + selector["head.bias"])
    logits = selector["align.logit"] * (
        z @ selector["align.proto"].T + selector["align.bias"]
    )  # (N, classes)
    shares = special.softmax(logits, 1) if logits.size else logits
    known = [
        next(
            (
                spec["classes"].index(key)
                for key in map(text_key, (row["label"], row["caption"]))
                if key in spec["classes"]
            ),
            None,
        )
        for row in rows
    ]
    alignment = np.array([np.nan if c is None else share[c] for share, c in zip(shares, known)])
    return {
        "quality": special.expit(slope * scores + cut),
        "alignment": alignment,
    }


# ------------------------------------------------------------------------------------------------- what stays


def refuse_doubles(reasons, names, vectors, quality, closest):
    """Of generated images nearer than `closest` to one another refuse all but the best, in place."""
    passed = np.array([i for i, why in enumerate(reasons) if not why], int)
    passed, vectors = (
        passed[np.argsort(-quality[passed], kind="stable")],
        np.float32(vectors - vectors.mean(0)),
    )
    for start in range(0, len(passed), 1000):  # never all pairs at once
        end = start + 1000
        near = squared_distances(vectors[passed[start:end]], vectors[passed[:end]]) <= closest**2
        for i, j in np.argwhere(near):
            if j < i + start and not reasons[passed[j]]:
                reasons[passed[i + start]] = (
                    reasons[passed[i + start]] or f"duplicate of {names[passed[j]]}"
                )


def best_and_diverse(vectors, quality, count):
    """The numbers of `count` images of high quality in (0, 1] that are unlike one another.

    The greedy mode of a determinantal point process (Chen et al. 2018) with kernel q_i q_j exp(-|x_i - x_j|^2 / 2s),
    s the median squared distance. Deterministic; ties go to the first.
    """
    x, apart = vectors - vectors.mean(0), squared_distances(vectors[:500], vectors[:500])
    x = (x / np.sqrt(np.median(apart[apart > 0]) if apart.any() else 1)).astype(
        np.float32
    )  # equal images tell no scale
    halves, gain, chosen = np.square(x).sum(1) / 2, 2 * np.log(quality), []
    left, rows = np.ones(len(x), np.float32), np.zeros((count, len(x)), np.float32)
    for t in range(count):
        i = int(np.argmax(gain + np.log(left)))
        kernel = np.exp(x @ x[i] - halves - halves[i])
        rows[t] = (kernel - rows[:t, i] @ rows[:t]) / np.sqrt(left[i])
        left = np.maximum(left - rows[t] ** 2, 1e-6)
        gain[i] = -np.inf
        chosen.append(i)
    return chosen


# ------------------------------------------------------------------------------------------------- what is left behind


def report(rows, pixels, real_pixels, reasons, index, counts, said, seed):
    """filter.html: kept and refused ones side by side, each by its nearest real image with the reason under it."""
    order = draw_order(len(rows), seed, "shown")

    def figures(refused):
        shown = sorted([i for i in order if bool(reasons[i]) == refused][:60])
        return "".join(
            f'<figure><div class="grid">{thumbnail(pixels[i])}{thumbnail(real_pixels[index[i]])}</div>'
            f"<figcaption>{html.escape(rows[i]['file_name'])}<br>{html.escape(reasons[i])}</figcaption>"
            "</figure>"
            for i in shown
        )

    return page(
        "What the filter kept",
        table(["decision", "images"], counts)
        + "".join(f"<p>{html.escape(line)}</p>" for line in said)
        + "<p>Each beside its nearest real image; up to 60 of a kind.</p><div style='display:grid;gap:1rem;"
        "grid-template-columns:repeat(auto-fit,minmax(20rem,1fr))'>"
        f"<div><h2>Kept</h2>{figures(False)}</div><div><h2>Refused</h2>{figures(True)}</div></div>",
    )


def place(source, target):
    """Copy one file, unless it is that file already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.realpath(source) != os.path.realpath(target):
        copy_file(source, target)


def clear(wanted, candidates, out):
    """Remove from `out` the copies that an earlier filtering left and this one refuses; fail() where it holds more.

    wanted: set of names below out; candidates: such name -> where it comes from. Only what is still there elsewhere
    goes, and only what an earlier metadata.csv lists may be overwritten by something else.
    """
    there = {path.relative_to(out).as_posix() for path in out.rglob("[!.]*") if path.is_file()}
    listed = (
        {row.get("file_name") for row in read_table(out / "metadata.csv")}
        if "metadata.csv" in there
        else set()
    )
    there -= {"metadata.csv", "decisions.csv", "filter.html"}
    foreign = sorted(
        name
        for name in there - (wanted & listed)
        if name not in candidates
        or os.path.realpath(candidates[name]) == os.path.realpath(out / name)
        or content_hash(candidates[name]) != content_hash(out / name)
    )
    if foreign:
        fail(
            f"{out}: holds {len(foreign)} files of something else, such as {foreign[0]}; give another --out"
        )
    for path in [
        *map(out.joinpath, there - wanted),
        *out.rglob(".*.[0-9]*.tmp"),
    ]:  # and what was killed in mid-write
        path.unlink()


def leave_images(entries, out):
    """Put the images into `out` with their metadata.csv. entries: [(name below out, row, is it generated)]."""
    for name, path in {
        name: row["path"] for name, row, _ in entries
    }.items():  # a table may name a file twice
        place(path, out / name)
    roles = {"synthetic", *itertools.chain(*COLUMNS.values())}
    extra = list(
        dict.fromkeys(
            field for _, row, _ in entries for field in row["fields"] if field.lower() not in roles
        )
    )
    write_csv(
        out / "metadata.csv",
        ["file_name", "text", "label", "patient_id", "synthetic", *extra],
        [
            [
                name,
                row["caption"],
                row["label"],
                row["group"],
                int(synthetic),
                *(row["fields"].get(field, "") for field in extra),
            ]
            for name, row, synthetic in entries
        ],
    )


def list_real(data, args):
    """The rows of a real set without those that --split keeps for testing."""
    rows = share_range(list_images(data, group_column=args.group_column))
    if args.split:
        read_split(rows, args.split)
    return [row for row in rows if row.get("split") != "test"]


def home_of(data):
    """The folder of a data set, or of its table."""
    return Path(data if os.path.isdir(data) else Path(data).parent).resolve()


def read_sets(args):
    """(selector or None, real rows, their pixels, all generated rows, the readable ones, their pixels)."""
    selector = load_selector(args.selector) if args.selector else None
    size = selector["spec"]["features"][0]["size"] if selector else None
    if size and args.resolution not in (None, size):
        fail(f"--resolution {args.resolution}: the selector judges at {size} pixels")
    real_rows, all_rows, root = (
        list_real(args.reference, args),
        list_images(args.generated),
        home_of(args.generated),
    )
    for row in all_rows:
        if (
            "\\" in row["file_name"] and not (root / row["file_name"]).exists()
        ):  # written on Windows
            row["file_name"] = row["file_name"].replace("\\", "/")
    outside = [
        name
        for name in (row["file_name"] for row in all_rows)
        if Path(name).is_absolute() or ".." in Path(name).parts
    ]
    if outside:
        fail(
            f"{args.generated}: names absolute paths, or some with .., such as {outside[0]}; kept images need names below --out"
        )
    resolution = size or args.resolution or pick_resolution(real_rows, all_rows)
    real_rows, real = load_pixels(real_rows, resolution)
    rows, fake = load_pixels(all_rows, resolution)
    if len(real_rows) < 3 or not rows:
        fail(
            f"{len(real_rows)} readable images in {args.reference}, {len(rows)} in {args.generated}: too few"
        )
    return selector, real_rows, real, all_rows, rows, fake


def decide(selector, real_rows, real, rows, fake, wanted, args):
    """All decisions: (reasons, lines that say what was done, nearest real image, {score: (m,)}); "" keeps an image."""
    device, names = pick_device(args.device), [row["file_name"] for row in rows]
    reference = measure_reference(
        real_rows,
        real,
        device,
        args.calibrate,
        args.max_lpips,
        args.min_ssim,
        args.drop_copies,
        args.features,
        args.lpips,
        args.batch_size,
        args.precision,
    )
    scores, index, vectors = score(reference, fake)
    reasons = refusals(reference, scores, rows)
    said = [f"all are compared at {real.shape[-1]} pixels a side", *reference["said"]]
    quality = 1.001 - np.max(list(ranks(reference["own"], scores).values()), axis=0)
    if selector:
        spec = selector["spec"]
        given = apply_selector(selector, quality_features(fake, device), rows)
        scores, quality = scores | given, given["quality"]
        args.min_quality = (
            spec["thresholds"]["quality"] if args.min_quality is None else args.min_quality
        )
        if args.min_alignment is not None and np.isnan(given["alignment"]).all():
            fail(
                f"--min-alignment: {args.selector} knows none of these images' labels; --fit it with --reference"
            )
        said += [f"the selector was written in spite of: {line}" for line in spec["warnings"]]
    refuse_low(reasons, scores, args.min_quality, args.min_alignment)
    quality = np.clip(quality, 1e-6, None)
    if args.drop_duplicates:
        closest = np.quantile(
            reference["own"]["distance"], 0.01
        )  # nearer than real images of two patients are
        refuse_doubles(reasons, names, vectors, quality, closest)
    passed = np.array([i for i, why in enumerate(reasons) if not why], int)
    if len(passed) > wanted:
        best = set(passed[best_and_diverse(vectors[passed], quality[passed], wanted)])
        for i in set(passed) - best:
            reasons[i] = f"not among the best {wanted}"
        said.append(f"the best and most diverse {wanted} of {len(passed)} that pass")
    return reasons, said, index, scores


def filter_images(args):
    """The main job: read both sets, decide, leave the kept images and say why the others went."""
    out = Path(args.out).resolve()
    for data in filter(None, (args.generated, args.reference, args.mix)):
        if out in (home_of(data), *home_of(data).parents):
            fail(
                f"--out {args.out} holds {data}: what is refused would be taken from there; give another folder"
            )
        if Path(data).resolve() in out.parents:
            fail(
                f"--out {args.out} lies in {data}: its images would be read again; give another folder"
            )
    selector, real_rows, real, all_rows, rows, fake = read_sets(args)
    mixed = list_real(args.mix, args) if args.mix else []
    most = round(args.share / (100 - args.share) * len(mixed)) if args.mix else len(rows)
    wanted = min(args.keep or len(rows), most)
    reasons, said, index, scores = decide(selector, real_rows, real, rows, fake, wanted, args)
    kept = [row for row, why in zip(rows, reasons) if not why]
    if args.mix:
        said.append(
            f"mixed: {len(kept)} generated with {len(mixed)} real images"
            + (f"; --share {args.share:g} wants {most} generated ones" if len(kept) < most else "")
        )

    def below(folder, row):  # a table may say ./a.png, or an absolute path
        return os.path.normpath(folder + row["file_name"])

    entries = [(below("generated/" if args.mix else "", row), row, True) for row in kept]
    entries += [(below("real/", row), row, False) for row in mixed]
    candidates = {
        below(folder, row): row["path"] for folder in ("", "generated/") for row in all_rows
    }
    candidates |= {below("real/", row): row["path"] for row in mixed}
    if not args.dry_run:
        clear({name for name, _, _ in entries}, candidates, out)
    readable = {row["file_name"] for row in rows}
    unreadable = [
        [row["file_name"], 0, "unreadable", "", *[""] * len(scores)]
        for row in all_rows
        if row["file_name"] not in readable
    ]
    write_csv(
        out / "decisions.csv",
        ["file", "kept", "reason", "nearest", *scores],
        [
            [
                row["file_name"],
                int(not why),
                why,
                real_rows[j]["file_name"],
                *(f"{values[i]:.6g}" for values in scores.values()),
            ]
            for i, (row, why, j) in enumerate(zip(rows, reasons, index))
        ]
        + unreadable,
    )
    if not args.dry_run:
        leave_images(entries, out)
    counts = Counter(
        re.sub(r" (of .*|\(.*|\d.*)", "", why) or "kept" for why in reasons
    ).most_common()
    write_file(
        out / "filter.html", report(rows, fake, real, reasons, index, counts, said, args.seed)
    )
    print("\n".join([*said, "; ".join(f"{why}: {count}" for why, count in counts)]))
    print(
        f"kept {len(kept)} of {len(rows)} images: {args.out}; why: {args.out}/decisions.csv, {args.out}/filter.html"
    )
    print(
        "nothing is kept: --mix has too few images for --share"
        if not wanted
        else "nothing passes: is --reference of the same kind? filter.html shows why"
        if not kept
        else "next: "
        + command("train.py", "--data", args.out)
        + (
            " --prompt '… {labels}', for real ones have labels and no captions"
            if any(row["label"] and not row["caption"] for row in mixed)
            else ""
        )
        if args.mix
        else "next: " + command("evaluate.py", args.reference, args.generated, args.out)
    )


# ------------------------------------------------------------------------------------------------- experts rate

RATING_STYLE = """<style>:root{color-scheme:dark;--ink:#c9d1d9;--soft:#8b949e;--line:#30363d;--paper:#05070a;
--mark:#6cb0ff}h1{display:none}body{text-align:center;touch-action:manipulation}
#picture img{margin:.5rem auto;width:min(94vw,62vh)}
button,input,select{font:inherit;color:var(--ink);background:#161b22;border:1px solid var(--line);border-radius:.4rem;
padding:.6rem 1rem;margin:.2rem;min-height:3rem}button[aria-pressed=true]{border-color:var(--mark);color:var(--mark)}
progress{width:min(94vw,62vh)}#guesses,#marks{display:inline-block}
[hidden]{display:none!important}#note{width:min(94vw,62vh)}</style>"""
RATING_BODY = """<form id="start"><p>Your name <input id="name" required> <select id="level">
<option value="3">specialist<option value="2">resident<option value="1">student</select></p><button>Start</button>
</form><main id="rate" hidden><progress id="bar"></progress><div id="where" aria-live="polite"></div>
<div id="picture"></div>
<p id="text"></p><div id="guesses"><button data-key="r">real (r)</button><button data-key="g">generated (g)</button>
</div><div id="marks"><button data-key="1">1 bad</button><button data-key="2">2 usable</button>
<button data-key="3">3 good</button></div><input id="note" placeholder="note (n), Enter ends it"><div>
<button data-key="u">undo (u)</button>
<button data-key="s">skip (s)</button><button id="save">save ratings.csv</button>
<button id="next">another rater</button></div></main>"""
RATING_SCRIPT = r"""<script>
const $ = id => document.getElementById(id), store = "medlora-" + PAGE;
const facts = JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(FACTS), c => c.charCodeAt(0))));
let state = null, safe = true;
function keep() { try { localStorage.setItem(store, JSON.stringify(state)); } catch { safe = false; } }
function shuffled(name) {  // the same order for the same name, another for another
  let seed = 2166136261;
  for (const c of PAGE + name) seed = Math.imul(seed ^ c.codePointAt(0), 16777619);
  const next = () => { for (const n of [13, -17, 5]) seed ^= n < 0 ? seed >>> -n : seed << n; return seed; };
  return facts.map((_, i) => [next(), i]).sort((a, b) => a[0] - b[0]).map(pair => pair[1]);
}
function show() {
  const i = state.order[state.at], answer = state.answers[i] || {};
  const rated = Object.values(state.answers).filter(a => a.rating);
  $("start").hidden = true; $("rate").hidden = false; $("bar").max = facts.length; $("bar").value = state.at;
  $("where").textContent = (i === undefined ? "Done" : `${state.at + 1} of ${facts.length}`) + `, ${rated.length} rated`
    + (safe ? "" : "; this browser keeps nothing: save before you close");
  for (const id of ["picture", "text", "guesses", "marks", "note"])
    $(id).hidden = i === undefined || id == "guesses" && !BLIND;
  if (i === undefined) return;
  $("picture").innerHTML = IMAGES[i]; $("text").textContent = BLIND ? "" : facts[i][1];
  $("note").value = answer.comment || "";
  for (const b of document.querySelectorAll("[data-key]")) b.setAttribute("aria-pressed",
    b.dataset.key == answer.rating || b.dataset.key == (answer.guess || "-")[0]);
}
function press(key) {
  const i = state.order[state.at], answer = state.answers[i] || {};
  if (key == "u") { if (state.at) { state.at--; delete (state.answers[state.order[state.at]] || {}).rating; } }
  else if (i === undefined) return;
  else if (key == "s") { delete answer.rating; state.at++; }
  else if (key == "r" || key == "g") { if (BLIND) answer.guess = key == "r" ? "real" : "generated"; }
  else { answer.rating = key; state.at++; }
  if (i !== undefined && key != "u") state.answers[i] = answer;
  keep(); show();
}
function table() {
  const cell = t => /[",\n\r]/.test(t) ? '"' + String(t).replaceAll('"', '""') + '"' : t;
  const lines = state.order.filter(i => (state.answers[i] || {}).rating).map(i => {
    const a = state.answers[i], f = facts[i];
    return [f[0], a.rating, f[2], state.level, f[1], state.name, f[3], a.comment || "", a.guess || "", f[4]]; });
  return [COLUMNS.split(","), ...lines].map(line => line.map(cell).join(",") + "\n").join("");
}
document.addEventListener("keydown", e => {
  if (e.target.id == "note" ? e.key != "Enter" && e.key != "Escape" : e.target.tagName == "INPUT") return;
  if (e.repeat || e.ctrlKey || e.metaKey || e.altKey || !state) return;
  const key = e.key == "Backspace" ? "u" : e.key.toLowerCase();
  if (e.target.id == "note") $("note").blur();
  else if (key == "n") $("note").focus();
  else if (/^[123usrg]$/.test(key)) press(key);
  else return;
  e.preventDefault();
});
for (const b of document.querySelectorAll("[data-key]")) b.onclick = () => { press(b.dataset.key); b.blur(); };
$("note").oninput = () => { (state.answers[state.order[state.at]] ||= {}).comment = $("note").value; keep(); };
$("start").onsubmit = e => { e.preventDefault(); const name = $("name").value.trim();
  state = {name, level: $("level").value, order: shuffled(name), at: 0, answers: {}}; keep(); show(); };
$("save").onclick = () => { const a = document.createElement("a");
  a.href = URL.createObjectURL(new Blob([table()], {type: "text/csv"})); a.download = "ratings.csv"; a.click(); };
$("next").onclick = () => { if (confirm("Is ratings.csv saved? This clears the page.")) {
  localStorage.removeItem(store); location.reload(); } };
try { state = JSON.parse(localStorage.getItem(store)); } catch { safe = false; }
if (state) show();
</script>"""


def suggest(vectors, quality, known, count):
    """The numbers of `count` images to rate next: half where the selector is least sure, half far from all rated ones.

    vectors (N, D); quality (N,) or None without a selector: then all far apart; known: numbers of rated images.
    """
    left = [i for i in range(len(vectors)) if i not in known]
    unsure = (
        sorted(left, key=lambda i: abs(quality[i] - 0.5))[: count // 2]
        if quality is not None
        else []
    )
    chosen, far = (
        list(unsure),
        squared_distances(vectors, vectors.mean(0)[None])[:, 0],
    )  # the usual is as if rated
    for i in [*known, *unsure]:
        far = np.minimum(far, squared_distances(vectors, vectors[i : i + 1])[:, 0])
    for _ in range(min(count, len(left)) - len(unsure)):
        far[[*known, *chosen]] = -1
        chosen.append(int(far.argmax()))
        far = np.minimum(far, squared_distances(vectors, vectors[chosen[-1:]])[:, 0])
    return chosen


def write_rating_page(args):
    """One HTML file with the images in it: rated with the keys 1 2 3, kept by the browser, saved as ratings.csv."""
    device, selector = (
        pick_device(args.device),
        load_selector(args.selector) if args.selector else None,
    )
    rows, real = list_images(args.generated), list_real(args.blind, args) if args.blind else []
    size = selector["spec"]["features"][0]["size"] if selector else args.resolution
    resolution = size or pick_resolution(rows, real)
    rows, pixels = load_pixels(rows, resolution)
    done = {os.path.realpath(row["path"]) for row in read_ratings(args.rated)}
    known = [i for i, row in enumerate(rows) if os.path.realpath(row["path"]) in done]
    count = min(args.suggest or len(rows), len(rows) - len(known))
    if args.suggest and real:
        count = min(count, args.suggest - args.suggest // 5)
    if not 0 < count <= 500:
        fail(
            f"{args.generated}: {count} images to rate: "
            + ("--suggest 60 picks some" if count else "all --rated")
        )
    chosen = [i for i in range(len(rows)) if i not in known]
    if args.suggest:
        vectors = quality_features(pixels, device)
        quality = apply_selector(selector, vectors, rows)["quality"] if selector else None
        chosen = suggest(vectors / np.maximum(vectors.std(0), 1e-9), quality, known, count)
    mixed = [real[i] for i in draw_order(len(real), args.seed, "blind")]
    mixed = [row for row in mixed if os.path.realpath(row["path"]) not in done]
    mixed, real_pixels = load_pixels(mixed[: max(1, round(count / 4))], resolution)
    shown = [(rows[i], 0) for i in chosen] + [(row, 1) for row in mixed]
    facts = json.dumps(
        [
            [
                row["path"],
                row["caption"],
                modality_of(row),
                row["group"],
                is_real if args.blind else "",
            ]
            for row, is_real in shown
        ]
    ).encode()
    texts = dict(
        PAGE=hashlib.sha256(facts).hexdigest()[:16],
        COLUMNS=RATING_COLUMNS,
        BLIND=bool(args.blind),
        FACTS=base64.b64encode(
            facts
        ).decode(),  # one encoding for all, so that none gives itself away
        IMAGES=[
            thumbnail(p, resolution, quality=95, subsampling=0)
            for p in [*pixels[chosen], *real_pixels]
        ],
    )
    constants = (
        "<script>"
        + "".join(f"const {name} = {json.dumps(value)};\n" for name, value in texts.items())
        + "</script>"
    )
    write_file(
        args.rating_page, page("Rate", RATING_STYLE + RATING_BODY + constants + RATING_SCRIPT)
    )
    print(
        f"{args.rating_page}: {count} generated and {len(mixed)} real images at {resolution} pixels (--resolution); "
        "open it in a browser\nnext: "
        + command("filter.py", "--fit", "ratings.csv", "--out", "selector.safetensors")
    )


def kappa(first, second):
    """Quadratically weighted kappa of two raters' ratings of the same images, (n,) each."""
    chance = np.square(np.subtract.outer(first, second)).mean()
    return 1 - np.square(np.subtract(first, second)).mean() / chance if chance else float("nan")


def shared_ratings(rows):
    """{(rater, rater): (n, 2) ratings of the images that both rated}."""
    raters = {}
    for row in rows:
        raters.setdefault(row["expert"], {})[row["path"]] = row["rating"]
    return {
        (a, b): np.array(
            [[raters[a][p], raters[b][p]] for p in raters[a] if p in raters[b]]
        ).reshape(-1, 2)
        for a, b in itertools.combinations(raters, 2)
    }


def agreement(args):
    """Print how far raters agree, and whether they can tell real from generated."""
    rows = read_ratings(args.agreement)
    raters = list(dict.fromkeys(row["expert"] for row in rows))
    if len(args.agreement) > 1 and len(raters) < len(
        args.agreement
    ):  # one expert twice: the files are the raters
        rows = [row | {"expert": path} for path in args.agreement for row in read_ratings([path])]
        raters = list(dict.fromkeys(args.agreement))
    if len(raters) < 2 and not any(row["real"] and row["guess"] for row in rows):
        fail(
            f"--agreement {args.agreement[0]}: one rater and no guesses of real or generated: nothing to compare"
        )
    for (a, b), both in shared_ratings(rows).items():
        if len(both) < 2:
            print(f"{a}, {b}: {len(both)} shared images, too few")
            continue
        own = kappa(*both.T)
        if np.isnan(own):
            print(f"{a}, {b}: one and the same rating for all {len(both)} shared images: no kappa")
            continue
        draws = torch.randint(
            len(both), (1000, len(both)), generator=generator(args.seed, "kappa", a, b)
        ).numpy()
        low, high = np.nanpercentile([kappa(*both[draw].T) for draw in draws], (2.5, 97.5))
        print(
            f"{a}, {b}: weighted kappa {own:.2f}, 95 % {low:.2f} to {high:.2f}, {len(both)} shared images"
        )
    for rater in raters:
        told = [
            (row["real"] == "1", row["guess"] == "real")
            for row in rows
            if row["expert"] == rater and row["real"] and row["guess"]
        ]
        count = Counter(told)
        if told:
            p = stats.fisher_exact([[count[r, g] for g in (True, False)] for r in (True, False)])[1]
            print(
                f"{rater}: real taken for real {count[True, True]}, for generated {count[True, False]}; generated "
                f"taken for real {count[False, True]}, for generated {count[False, False]}; p {p:.2g} of guessing"
            )


# ---------------------------------------------------------------------------------------------- a selector from ratings


def cramers_v(first, second):
    """How far one name tells the other, 0 to 1, corrected for chance (Bergsma 2013)."""
    counts = stats.contingency.crosstab(first, second).count
    n, (r, k) = len(first), counts.shape
    phi = max(
        0,
        stats.chi2_contingency(counts, correction=False).statistic / n
        - (r - 1) * (k - 1) / (n - 1),
    )
    least = min(side - (side - 1) ** 2 / (n - 1) for side in (r, k)) - 1
    return np.sqrt(phi / least) if least > 1e-9 else 0.0


def objections(rows, images, good):
    """What speaks against fitting these ratings, before a single image is looked at: [str]."""
    found, minority = [], int(min(good.sum(), len(good) - good.sum()))
    for name in ("modality", "expert", "expert_level", "prompt", "real"):
        v = (
            cramers_v([row["rating"] for row in rows], [row[name] for row in rows])
            if len(rows) > 2
            else 0
        )
        if v > 0.6:
            found.append(f"the ratings may encode {name} rather than quality (Cramer's V {v:.2f})")
    for pair, both in shared_ratings(rows).items():
        if len(both) >= 10 and kappa(*both.T) < 0.2:
            found.append(
                f"{pair[0]} and {pair[1]} do not agree (weighted kappa {kappa(*both.T):.2f})"
            )
    found += [f"{len(images)} rated images are fewer than 30"] * (len(images) < 30)
    kind = "good" if good.mean() < 0.5 else "not good"
    return found + [f"only {minority} images are {kind}, at least 8 are needed"] * (minority < 8)


def ridge(x, weights, penalty):
    """Weighted ridge regression with an intercept, as linear maps of the ratings y (n,): returns (A (D, n), p (n,)).

    The prediction for z is p·y + (z - p·x)·(A y). In the dual, because there are fewer images than features.
    """
    share, root = weights / weights.sum(), np.sqrt(weights / weights.mean())[:, None]
    rows = root * (x - share @ x)
    return rows.T @ np.linalg.solve(
        rows @ rows.T + penalty * np.eye(len(x)), root * (np.eye(len(x)) - share)
    ), share


def out_of_fold(x, weights, groups, seed):
    """Five-fold predictions as linear maps, one for each of PENALTIES: (penalties, n, n); no group is on both sides.

    Being linear, a map serves the ratings and all their permutations at once.
    """
    names, numbers, sizes = *np.unique(groups, return_inverse=True), np.zeros(5)
    fold = np.zeros(len(names), int)
    for group in draw_order(len(names), seed, "folds"):
        fold[group] = sizes.argmin()
        sizes[fold[group]] += (numbers == group).sum()
    maps = np.zeros((len(PENALTIES), len(x), len(x)))
    for number in np.unique(fold):
        test, train = (
            np.flatnonzero(fold[numbers] == number),
            np.flatnonzero(fold[numbers] != number),
        )
        for k, penalty in enumerate(PENALTIES):
            inner, share = ridge(x[train], weights[train], penalty)
            maps[k][np.ix_(test, train)] = share + (x[test] - share @ x[train]) @ inner
    return maps


def auroc(scores, good, strata, without=0.0):
    """Share of (good, bad) pairs of one stratum that the scores order right, ties half: scores, good (n, m) -> (m,).

    without: the answer where there is no such pair.
    """
    right, pairs = np.zeros(scores.shape[1]), np.zeros(scores.shape[1])
    for stratum in np.unique(strata):
        s, g = scores[strata == stratum], good[strata == stratum]
        positive = g.sum(0)
        right += (stats.rankdata(s, axis=0) * g).sum(0) - positive * (positive + 1) / 2
        pairs += positive * (len(g) - positive)
    return np.where(pairs > 0, right / np.maximum(pairs, 1), without)


def cross_validate(x, y, weights, good, groups, strata, seed):
    """({"auroc", "ci", "perm_p", "spearman"}, out-of-fold scores (n,), penalty).

    499 permutations within the strata go through the whole cross-validation; the interval is a bootstrap over groups.
    """
    maps = out_of_fold(x, weights, groups, seed)
    orders = np.stack([np.arange(len(y))] * 500, 1)
    for column, stratum in itertools.product(range(1, 500), np.unique(strata)):
        inside = np.flatnonzero(strata == stratum)
        orders[inside, column] = inside[draw_order(len(inside), seed, "permuted", column, stratum)]
    found = maps @ y[orders]  # (penalties, n, 500)
    best = (
        (weights[:, None] * np.square(found - y[orders])).sum(1).argmin(0)
    )  # the best penalty of each permutation
    scores = np.take_along_axis(found, best[None, None], 0)[0]
    values, own = auroc(scores, good[orders], strata), scores[:, 0]
    names, numbers = np.unique(groups, return_inverse=True)
    draws = torch.randint(
        len(names), (500, len(names)), generator=generator(seed, "interval")
    ).numpy()
    members = [np.flatnonzero(numbers == n) for n in range(len(names))]
    again = [
        auroc(own[i][:, None], good[i][:, None], strata[i], np.nan)[0]
        for i in (np.concatenate([members[n] for n in draw]) for draw in draws)
    ]
    measured = dict(
        auroc=float(values[0]),
        ci=np.nanpercentile(again, (2.5, 97.5)).tolist(),
        perm_p=float((values[1:] >= values[0]).sum() + 1) / 500,
        spearman=float(stats.spearmanr(own, y)[0]),
    )
    return measured, own, PENALTIES[best[0]]


def cumulative_logit(scores, ratings, weights):
    """(slope, cut of 2, cut of 3) of P(rating >= k) = 1 / (1 + exp(-slope score - cut_k)), by maximum likelihood."""

    def loss(p):
        two, three = (
            special.expit(np.exp(p[0]) * scores + cut) for cut in (p[1], p[1] - np.exp(p[2]))
        )
        likely = np.choose(ratings - 1, (1 - two, two - three, three))
        return -(weights * np.log(likely + 1e-12)).mean() + 1e-4 * np.square(p).sum()

    slope, cut, step = optimize.minimize(
        loss, (1.0, -2.0, 0.0), method="Nelder-Mead", options={"maxiter": 4000}
    ).x
    return np.exp(slope), cut, cut - np.exp(step)


def reliability(chance, good):
    """(Brier score, expected calibration error over ten bins) of probabilities (n,) against good (n,)."""
    bins = np.minimum((chance * 10).astype(int), 9)
    return np.square(chance - good).mean(), sum(
        abs((chance - good)[bins == b].sum()) for b in range(10)
    ) / len(good)


def fit_alignment(rows, z, seed):
    """The part that tells labels apart, from real images z (n, D): (tensors, class names, {"hard", "easy"} AUROC).

    Ridge regression to each class, the softmax of which is sharpened by maximum likelihood on left-out patients. easy:
    against classes of other modalities, hard: against those of the same. Classes with fewer than 8 images are left out.
    """
    keys = [text_key(row["label"] or row["caption"]) for row in rows]
    classes = sorted(key for key, count in Counter(keys).items() if key and count >= 8)
    used = [i for i, key in enumerate(keys) if key in classes]
    groups = [rows[i]["group"] or f"\0{i}" for i in used]
    if min(len(classes), len(set(groups))) < 2:
        return (
            {"align.proto": np.zeros((0, z.shape[1])), "align.bias": [], "align.logit": [1.0]},
            [],
            {},
        )
    own, z, weights = np.array([classes.index(keys[i]) for i in used]), z[used], np.ones(len(used))
    y = np.eye(len(classes))[own]
    maps = out_of_fold(z, weights, groups, seed)
    best = int(np.square(maps @ y - y).sum((1, 2)).argmin())
    scores, inside = maps[best] @ y, (np.arange(len(own)), own)
    sharp = np.exp(
        optimize.minimize_scalar(
            lambda t: -special.log_softmax(np.exp(t) * scores, 1)[inside].mean(),
            bounds=(-3, 5),
            method="bounded",
        ).x
    )
    chances, measured = special.softmax(sharp * scores, 1), {}
    kinds = np.array([text_key(modality_of(rows[i])) for i in used])
    alike = np.array([[kinds[own == c][0] == kind for c in range(len(classes))] for kind in kinds])
    for name, which in (("hard", alike), ("easy", ~alike)):
        values = np.append(chances[y == 1], chances[which & (y == 0)])
        if len(values) > len(own):
            measured[name] = float(
                auroc(values[:, None], np.arange(len(values))[:, None] < len(own), values * 0)[0]
            )
    inner, share = ridge(z, weights, PENALTIES[best])
    proto = (inner @ y).T
    return (
        {
            "align.proto": proto,
            "align.bias": share @ y - proto @ (share @ z),
            "align.logit": [sharp],
        },
        classes,
        measured,
    )


def gather(rows):
    """The rated images: (rows as list_images gives, mean ratings by level (n,), weights (n,), groups, strata).

    An image that several experts rated is one row, which for least squares is the same as several.
    """
    by_path = {}
    for row in rows:
        by_path.setdefault(row["path"], []).append(row)
    missing = [path for path in by_path if not os.path.isfile(path)]
    if missing:
        fail(f"{len(missing)} of {len(by_path)} rated images are not there, such as {missing[0]}")
    levels = [
        np.array([row["level"] for row in same]) / max(row["level"] for row in rows)
        for same in by_path.values()
    ]
    means = [
        np.average([row["rating"] for row in same], weights=level)
        for same, level in zip(by_path.values(), levels)
    ]
    first = [same[0] for same in by_path.values()]
    groups = next(
        (
            [row[name] or row["path"] for row in first]
            for name in ("group", "prompt")
            if len({row[name] for row in first}) >= 5
        ),
        list(by_path),
    )
    return (
        [dict(path=row["path"], file_name=row["path"], fields=row) for row in first],
        np.array(means),
        np.array([level.sum() for level in levels]),
        np.array(groups),
        np.array([text_key(row["modality"]) for row in first]),
    )


def refuse_fit(worries, args):
    """Stop for what speaks against a selector, unless --force."""
    if worries and not args.force:
        fail(f"no selector written: {'; '.join(worries)} (--force writes it and marks it)")


def fit(args):
    """Learn a selector from ratings; write it only where it predicts them better than chance."""
    rows, device = read_ratings(args.fit), pick_device(args.device)
    images, y, weights, groups, strata = gather(rows)
    good = y >= args.good - 0.5
    worries = objections(rows, images, good)
    refuse_fit(
        worries + ["fewer than 10 images cannot be fitted"] * (len(images) < 10 and not args.force),
        args,
    )
    if len(set(groups)) < 2:
        fail(
            f"{args.fit[0]}: rates one image or group alone; a selector is fitted to some and tested on others"
        )
    resolution = args.resolution or pick_resolution(images)
    features = quality_features(load_pixels(images, resolution, strict=True)[1], device)
    mean, scale = units(features)
    z, modalities = standardised(features, mean, scale), sorted(set(strata))
    x = np.hstack(
        [z, (strata[:, None] == modalities) * (len(modalities) > 1)]
    )  # an intercept for each modality
    measured, own, penalty = cross_validate(x, y, weights, good, groups, strata, args.seed)
    figures = (
        f"AUROC {measured['auroc']:.2f}, 95 % {measured['ci'][0]:.2f} to {measured['ci'][1]:.2f}, "
        f"p {measured['perm_p']:.2g}, n {len(y)}"
    )
    if measured["perm_p"] > 0.05 or measured["ci"][0] <= 0.5:
        worries.append(
            f"the ratings do not predict quality better than chance ({figures}): rate more images"
        )
    refuse_fit(worries, args)
    index = {image["path"]: i for i, image in enumerate(images)}
    of = [index[row["path"]] for row in rows]
    slope, *cuts = cumulative_logit(
        own[of], *(np.array([row[name] for row in rows]) for name in ("rating", "level"))
    )
    measured["brier"], measured["ece"] = reliability(
        special.expit(slope * own + cuts[args.good - 2]), good
    )
    inner, share = ridge(x, weights, penalty)
    slopes = inner @ y
    tensors = {
        "feat.mean": mean,
        "feat.scale": scale,
        "head.cut": cuts,
        "cal.platt": [slope, cuts[args.good - 2]],
        "head.weight": slopes[: z.shape[1]],
        "head.modality_bias": slopes[z.shape[1] :],
        "head.bias": [share @ (y - x @ slopes)],
    }
    real, pixels = (
        load_pixels(list_real(args.reference, args), resolution) if args.reference else ([], None)
    )
    seen = quality_features(pixels, device) if real else features[:0]
    aligned, classes, measured["alignment"] = fit_alignment(
        real, standardised(seen, mean, scale), args.seed
    )
    spec = dict(
        features=[dict(name=name, dim=dim, size=resolution) for name, dim in QUALITY_FEATURES],
        head="ridge",
        rating_range=[1, 3],
        good=args.good,
        calibration="platt",
        modalities=modalities,
        classes=classes,
        groups=len(set(groups)),
        n=dict(
            rows=len(rows),
            images=len(y),
            good=int(good.sum()),
            experts=len({row["expert"] for row in rows}),
        ),
        cv=measured,
        thresholds={"quality": 0.5},
        warnings=worries,
        ratings_sha256=[content_hash(path) for path in args.fit],
    )
    spec["lambda"] = float(penalty)
    known = [
        i
        for i, row in enumerate(real)
        if len(modalities) < 2 or text_key(modality_of(row)) in modalities
    ]
    judged = apply_selector(
        dict(spec=spec, **tensors, **aligned), seen[known], [real[i] for i in known]
    )
    measured["real_pass"] = passing = float((judged["quality"] >= 0.5).mean()) if known else None
    save_selector(args.out, spec, tensors | aligned)
    lines = [
        f"{len(rows)} ratings, {len(set(groups))} groups: {figures}; Brier score {measured['brier']:.3f}, "
        f"calibration error {measured['ece']:.3f}, rank correlation {measured['spearman']:.2f}"
    ]
    lines += [f"warning: {worry}" for worry in worries]
    lines += [
        f"alignment, {name} cases: AUROC {value:.2f}"
        for name, value in measured["alignment"].items()
    ]
    few = (
        ": few; do the ratings mark disease, or were other kinds rated?"
        if known and passing < 0.8
        else ""
    )
    lines += [f"{passing:.0%} of the real images pass{few}"] if known else []
    print(
        *lines,
        "next: "
        + command(
            "filter.py",
            "GENERATED",
            "--reference",
            "REAL",
            "--selector",
            args.out,
            "--out",
            "runs/kept",
        ),
        sep="\n",
    )


def units(features):
    """Mean and scale (410,) for `standardised`: a block of many features weighs no more than one of few."""
    (_, few), (_, many), _ = QUALITY_FEATURES
    mean = np.append(features.mean(0), np.zeros(few))
    weight = np.sqrt(np.repeat([few, 4 * many], [few, many]))
    scale = np.append(np.maximum(features.std(0), 1e-6) * weight, np.ones(few))
    squares = standardised(features, mean, scale)[:, -few:]
    mean[-few:], scale[-few:] = squares.mean(0), np.maximum(squares.std(0), 1e-6) * np.sqrt(4 * few)
    return mean, scale


# ---------------------------------------------------------------- flags


def parse_args():
    parser = Flags(__doc__)
    parser.add_argument(
        "generated",
        nargs="?",
        metavar="GENERATED",
        help="a folder, CSV or manifest.csv of sample.py",
    )
    parser.add_argument(
        "--reference", metavar="REAL", help="the real images, in any form of train.py"
    )
    parser.add_argument(
        "--group-column", help="the reference's column of patients (default: found by its name)"
    )
    parser.add_argument(
        "--split", metavar="CSV", help="split.csv of a run: real images of its test part stay out"
    )
    parser.add_argument(
        "--out", help="a folder, default runs/kept; with --fit a file, default selector.safetensors"
    )
    keep = parser.add_argument_group("what stays")
    keep.add_argument(
        "--calibrate",
        type=float,
        metavar="ALPHA",
        help="refuse what looks less real than all but this share of the real images, usually 0.05",
    )
    keep.add_argument(
        "--max-lpips", type=float, help="refuse a distance to the nearest real image above this"
    )
    keep.add_argument(
        "--min-ssim", type=float, help="refuse a similarity to the nearest real image below this"
    )
    keep.add_argument(
        "--drop-copies",
        action="store_true",
        help="refuse what is nearer to a real image than real ones",
    )
    keep.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="of near-equal generated images keep the best",
    )
    keep.add_argument("--selector", metavar="FILE", help="judge by what --fit wrote")
    keep.add_argument(
        "--min-quality",
        type=float,
        help="probability of a good rating (default: the selector's own)",
    )
    keep.add_argument(
        "--min-alignment", type=float, help="probability that the image shows its label"
    )
    keep.add_argument(
        "--keep", type=int, metavar="N", help="of what passes only the best and most diverse N"
    )
    left = parser.add_argument_group("how it is left")
    left.add_argument(
        "--dry-run", action="store_true", help="write decisions.csv and filter.html, copy nothing"
    )
    left.add_argument("--mix", metavar="REAL", help="put these real images beside the kept ones")
    left.add_argument("--share", type=float, help="per cent of a --mix that is generated (25)")
    rate = parser.add_argument_group("experts' ratings")
    rate.add_argument(
        "--rating-page", metavar="HTML", help="write a page on which an expert rates GENERATED"
    )
    rate.add_argument(
        "--suggest",
        type=int,
        metavar="N",
        help="only N: half where --selector doubts, half far apart",
    )
    rate.add_argument("--blind", metavar="REAL", help="mix real images in, one in five")
    rate.add_argument(
        "--rated", nargs="+", default=[], metavar="CSV", help="leave out what these ratings hold"
    )
    rate.add_argument(
        "--agreement",
        nargs="+",
        metavar="CSV",
        help="weighted kappa; real and generated told apart?",
    )
    rate.add_argument("--fit", nargs="+", metavar="CSV", help="learn a selector from ratings")
    rate.add_argument(
        "--good", type=int, choices=[2, 3], help="from which rating on an image is good (3)"
    )
    rate.add_argument(
        "--force", action="store_true", help="write a selector in spite of objections, and mark it"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--features",
        default="texture",
        help="texture, vgg-random, inception or a weight file's path",
    )
    how.add_argument(
        "--lpips",
        choices=["alex", "vgg", "squeeze", "random"],
        help="network of the perceptual distance (default: alex where its weights are, else none)",
    )
    how.add_argument(
        "--resolution",
        type=int,
        help="pixels at which all are compared or rated (default: the smallest side, 64 to 256)",
    )
    how.add_argument("--batch-size", type=int, default=32)
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    how.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="of the network",
    )
    how.add_argument(
        "--seed", type=int, default=0, help="of folds, permutations, and what the pages show"
    )
    args = parser.parse_args()
    check_args(args)
    return args


def check_args(args):
    """Refuse values and flags that do not go together; fill in what --suggest and --out leave open."""
    if args.calibrate is not None and not 0 < args.calibrate < 1:
        fail(f"--calibrate {args.calibrate:g}: give a share between 0 and 1, usually 0.05")
    for flag, least, most in (
        ("resolution", 64, 4096),
        ("batch_size", 1, 10**6),
        ("min_ssim", -1, 1),
        ("max_lpips", 0, 1e6),
        ("min_quality", 0, 1),
        ("min_alignment", 0, 1),
        ("keep", 1, 1e9),
        ("suggest", 1, 10**6),
        ("share", 0.1, 99.9),
    ):
        value = getattr(args, flag)
        if value is not None and not least <= value <= most:
            fail(f"--{flag.replace('_', '-')} {value:g}: give a number from {least:g} to {most:g}")
    args.rating_page = args.rating_page or ("rate.html" if args.suggest else None)
    modes = [flag for flag in ("rating_page", "agreement", "fit") if getattr(args, flag)]
    args.out = args.out or ("selector.safetensors" if args.fit else "runs/kept")
    if len(modes) > 1 or (modes and modes != ["rating_page"] and args.generated):
        fail(
            f"--{modes[-1].replace('_', '-')}: is a command of its own, without "
            + (args.generated if len(modes) == 1 else f"--{modes[0].replace('_', '-')}")
        )
    if (
        modes == ["rating_page"]
        and not args.generated
        or not modes
        and not (args.generated and args.reference)
    ):
        fail(
            "give GENERATED, a folder of images"
            + ("" if modes else ", and --reference, the real ones")
        )
    for needed, flags in (
        ("selector", ("min_quality", "min_alignment")),
        ("mix", ("share",)),
        ("fit", ("good", "force")),
        ("rating_page", ("suggest", "blind", "rated")),
    ):
        alone = [flag for flag in flags if getattr(args, flag) not in (None, False, [])]
        if alone and not getattr(args, needed):
            fail(f"--{alone[0].replace('_', '-')}: needs --{needed.replace('_', '-')}")
    args.share, args.good = args.share or 25, args.good or 3
    if args.mix and args.dry_run:
        fail("--mix copies images: it does not go with --dry-run")
    if (
        not (
            modes
            or args.calibrate
            or args.drop_copies
            or args.drop_duplicates
            or args.selector
            or args.keep
            or args.mix
        )
        and args.max_lpips is args.min_ssim is None
    ):
        fail(
            "nothing to filter by: give --calibrate 0.05, --max-lpips, --min-ssim, --drop-copies, --drop-duplicates, "
            "--selector or --keep"
        )


def main(args):
    if args.fit:
        fit(args)
    elif args.agreement:
        agreement(args)
    elif args.rating_page:
        write_rating_page(args)
    else:
        filter_images(args)


if __name__ == "__main__":
    run_script(main, parse_args)
