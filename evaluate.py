"""How good are generated images, beside what chance alone would give at this number of images?

    python evaluate.py REAL GENERATED
    python evaluate.py REAL GENERATED1 GENERATED2 --out report.html --json report.json
    python evaluate.py REAL GENERATED --features pt_inception-2015-12-05-6726825d.pth --lpips alex

REAL and GENERATED are folders of images, folders with metadata.csv or manifest.csv, or such tables. Prints a table,
writes a report that opens in any browser without a network (--out) and the same figures for programs (--json:
format, settings, real, generated: path, n, metrics: value, null, null_low, null_high, excess, p_high, p_low,
real_vs_real, band). Each figure stands beside its permutation null: both sets pooled and shared out anew in the same
sizes, whole patients together. p_high is how often chance is as bad or worse, p_low how often as good or better.
"""
import argparse
import contextlib
import html
import json
import os
import platform
import shlex
import sys


def fail(message):
    """Say what is wrong in one line and stop: exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: [] if line.strip("\ufeff \t")[:1] in ("", "#") else line.strip(
        "\ufeff \t").split(None, 1)
    parser.error = fail
    data = parser.add_argument_group("data")
    data.add_argument("real", metavar="REAL", help="real images: a folder or a table")
    data.add_argument("generated", metavar="GENERATED", nargs="+", help="generated images: folders or tables")
    data.add_argument("--group-column", help="column of REAL's table that names the patient (default: found by name)")
    data.add_argument("--max-images", type=int, default=1000, help="at most so many of each set, drawn by the seed")
    data.add_argument("--resolution", type=int,
                      help="pixels a side at which all are compared (default: the smallest stored one, 64 to 256)")
    numbers = parser.add_argument_group("numbers")
    numbers.add_argument("--metrics", help="comma list (default: all); fid is another word for frechet")
    numbers.add_argument("--features", metavar="texture|inception|vgg-random|PATH",
                         help="PATH: FID's Inception weights (default: inception if the cache has them, else texture)")
    numbers.add_argument("--lpips", choices=("random", "alex", "vgg", "squeeze"),
                         help="distance of two images (default: alex if its weights are there, else random)")
    numbers.add_argument("--permutations", type=int, default=999, help="draws of the null, at least 99")
    numbers.add_argument("--batch-size", type=int, default=32, help="images a forward pass")
    numbers.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    numbers.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                         help="of the feature network; auto is fp32, as published figures are")
    numbers.add_argument("--seed", type=int, default=0)
    output = parser.add_argument_group("output")
    output.add_argument("--out", default="report.html", help="the report")
    output.add_argument("--json", help="the figures for programs")
    try:
        args = parser.parse_args()
    except (UnicodeDecodeError, RecursionError):
        fail("an @file of flags is no text file, or names itself")
    for flag, least, most in (("max_images", 2, 10**6), ("resolution", 64, 4096), ("permutations", 99, 10**6),
                              ("batch_size", 1, 10**6)):
        if getattr(args, flag) is not None and not least <= getattr(args, flag) <= most:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give a number from {least} to {most}")
    return args


if __name__ == "__main__":
    args = parse_args()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402

from metrics import (FID_WEIGHTS, METRICS, extract, find_weights, generator, guarded, half_draws,  # noqa: E402
                     joint_matrices, kid, list_images, load_features, load_lpips, load_pixels, lpips_files,
                     lpips_matrix, nearest, page, permutation_draws, pick_device, pick_resolution, replacing,
                     same_unit, ssim, ssim_matrix, table, thumbnail, whole_groups, yardstick)

NOT_COMPARABLE = "not comparable with published figures"
HALVES = 20  # random halves of the real set


def chosen_metrics(text):
    """The names to compute, from --metrics."""
    names = [name.strip().replace("fid", "frechet") for name in text.split(",")] if text else list(METRICS)
    for name in names:
        if name not in METRICS:
            fail(f"--metrics: no metric {name!r}; there are {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def read_set(path, args, group_column=None):
    """The rows of a set, at most --max-images of them."""
    rows = list_images(path, group_column=group_column)
    if len(rows) > args.max_images:
        print(f"{path}: {args.max_images} of {len(rows)} images, drawn by seed {args.seed}")
        order = torch.randperm(len(rows), generator=generator(args.seed, "max-images"))[:args.max_images]
        rows = [rows[n] for n in sorted(order.tolist())]
    return rows


def load_set(path, rows, resolution):
    """(rows, uint8 pixels) of the readable images; fail() where there are not two."""
    rows, pixels = load_pixels(rows, resolution)
    if len(rows) < 2:
        fail(f"{path}: {len(rows)} readable image; a comparison of sets needs at least 2, and says little under 50")
    return rows, pixels


def joint_of(real, fake, names, networks, args, device):
    """Every matrix that the metrics `names` are read from; real, fake: (rows, uint8 pixels (N, 3, H, W))."""
    rows, pixels, n = real[0] + fake[0], torch.cat([real[1], fake[1]]), len(real[0])
    features = extract(pixels, networks["features"], device, args.batch_size, args.precision)
    for row, vector in zip(rows, features):
        if not np.isfinite(vector).all():
            fail(f"{row['path']}: its features are not finite: are the weights of --features {args.features} sound?")
    joint = joint_matrices(features[:n], features[n:], networks["features"]["standardise"])
    if any(METRICS[name][2] == "ssim" for name in names):
        joint["ssim"] = ssim_matrix(pixels, pixels, device)
    if networks["lpips"]:
        if networks["lpips"]["name"] == "random":  # its filters know no scale: the smallest size serves
            pixels = F.interpolate(pixels.float(), (64, 64), mode="area").round().byte()
        joint["lpips"] = lpips_matrix(pixels, networks["lpips"], device, args.batch_size)
    return joint


def evaluate_set(path, real, fake, args, names, networks, device):
    """One generated set against the real one: its entry of the report, `metrics` as --json has them."""
    n, m, joint = len(real[0]), len(fake[0]), joint_of(real, fake, names, networks, args, device)
    groups = [row["group"] for row in real[0] + fake[0]]
    draws = permutation_draws(n, m, args.permutations, args.seed, groups)
    halves = half_draws(n, m, HALVES, args.seed, groups) if min(n // 2, m) > 1 else ()
    figures, lines = {}, []
    for name in names:
        function, lower_is_better, _ = METRICS[name]
        f = yardstick(function(joint, draws), lower_is_better)
        at_half = [float(np.median(function(joint, half))) for half in halves] or [None, None]
        label = "fid" if name == "frechet" and networks["features"]["published"] else name
        figures[label] = f | {"real_vs_real": at_half[0], "band": None}
        error = f" ± {number(kid(joint['features'][:n], joint['features'][n:])[1], 2)}" if name == "kid" else ""
        chances = [("≤" if f[p] <= 1 / (1 + args.permutations) else "") + f"{f[p]:.2g}" for p in ("p_high", "p_low")]
        lines.append((label, "lower" if lower_is_better else "higher", number(f["value"], 4) + error,
                      f"{number(f['null'])} [{number(f['null_low'])} – {number(f['null_high'])}]",
                      number(f["excess"], sign="+"), *chances, *map(number, at_half)))
    entry = {"path": path, "n": m, "metrics": figures, "real_n": n, "table": lines,
             "copies": are_copies(figures)}
    entry["verdict"] = verdict(entry)
    entry["section"] = set_section(entry, real, fake, closest_pairs(joint, groups, real, fake), args)
    return entry


def closest_pairs(joint, groups, real, fake, count=12):
    """The generated images that lie nearest to a real one: [(number, number of the real one, distance, SSIM)], and
    the median distance of a real image to the nearest of another patient."""
    n = len(real[0])
    index, squared = nearest(joint["distance"][n:, :n])
    _, own = nearest(joint["distance"][:n, :n], same_unit(groups[:n]))
    order = np.argsort(squared, kind="stable")[:count]
    values = ssim(fake[1][order] / 255, real[1][index[order]] / 255).tolist()
    pairs = [(int(i), int(index[i]), float(squared[i]) ** 0.5, value) for i, value in zip(order, values)]
    return pairs, float(np.median(own)) ** 0.5


def number(value, digits=3, sign=""):
    """A figure for a table: `digits` significant digits, no exponent for everyday sizes."""
    if value is None or not np.isfinite(value):
        return "–"
    value = 0.0 if abs(value) < 1e-9 else value
    digits = max(digits, len(str(int(abs(value)))))
    return f"{value:{sign}.1e}" if 0 < abs(value) < 1e-4 else f"{value:{sign}.{digits}g}"


HEADER = ("metric", "better", "value", "by chance: median [95 %]", "excess", "p_high", "p_low", "real halves",
          "same size")


def are_copies(figures):
    """Whether a set lies closer to the real one than chance allows, as a whole or image by image."""
    whole, single = ([figures[name]["p_low"] <= 0.01 for name in names if name in figures]
                     for names in (("fid", "frechet", "kid"), ("ssim_nearest", "lpips_nearest")))
    return any(whole[:1]) or (any(single) and all(single))  # a blurred image is near by SSIM alone


def verdict(entry):
    """What the figures say, in sentences for someone who reads no statistics."""
    figures, main, said = entry["metrics"], next(iter(entry["metrics"])), []
    f, worse = figures[main], {name for name in figures if figures[name]["p_high"] <= 0.05}
    beside = f"{main} is {number(f['value'])}, chance alone gives {number(f['null'])}"
    if entry["copies"]:
        said.append(f"These images lie closer to the real ones than fresh ones would ({beside}): they may be copies. "
                    "Look at the nearest pairs.")
    elif main not in worse:
        said.append(f"At this number of images they cannot be told from the real ones: {beside} (p_high "
                    f"{f['p_high']:.2g}).")
    if main in worse:  # only then: of ten figures one is often low by chance
        said.append(f"These images can be told from the real ones: {beside} (p_high {f['p_high']:.2g}).")
        said += ["Many of them look like no real image (precision)."] if "precision" in worse else []
        said += ["They show less variety than the real ones (recall)."] if worse & {"recall", "coverage"} else []
    if min(entry["n"], entry["real_n"]) < 50:
        said.append("With fewer than 50 images only gross differences show.")
    return " ".join(said)


def caveats(settings):
    """What features and LPIPS the figures rest on, and whether others' figures may stand beside them."""
    return [f"{kind} {settings[kind]}" + ("" if settings["comparable"][kind] else f" ({NOT_COMPARABLE})")
            for kind in ("features", "lpips") if settings[kind]]


def methods(args, settings, real, entries):
    """The paragraph for a paper or an ethics board."""
    sets = "; ".join(f"{entry['path']}, {entry['n']}" for entry in entries)
    groups = [row["group"] for row in real[0]]
    patients = len(set(groups) - {""})
    together = whole_groups(groups, len(groups), min(entry["n"] for entry in entries))
    whole = ", whole patients kept together" if together else ", patients too few to be kept whole" if patients else ""
    return (f"Real images: {args.real}, {len(real[0])} of {patients or 'unknown'} patients. Generated images: {sets}. "
            f"All were cropped to their central square and resized to {settings['resolution']} pixels (Lanczos). "
            f"{'; '.join(caveats(settings))}. SSIM at 64 pixels, grey. Precision and recall with 3 neighbours, density "
            f"and coverage with 5. Null: {args.permutations} permutations of the pooled images{whole}, seed {args.seed}; excess is the value less the null's median. “Real halves” is the median over "
            f"{HALVES} random halves of the real set against each other, “same size” that of as many generated images "
            f"against a half: these two may be compared. Python {settings['versions']['python']}, torch "
            f"{settings['versions']['torch']}, numpy {settings['versions']['numpy']}, on {settings['device']}. "
            "Not for diagnosis.")


def set_section(entry, real, fake, pairs, args):
    """One generated set's part of the report: verdict, table, pictures, nearest pairs."""
    parts = [f"<h2>{html.escape(entry['path'])}</h2>", f'<p class="verdict">{html.escape(entry["verdict"])}</p>',
             table(HEADER, entry["table"])]
    for title, (rows, pixels) in (("Real", real), ("Generated", fake)):
        shown = torch.randperm(len(rows), generator=generator(args.seed, "shown"))[:24].sort().values
        pictures = "".join(thumbnail(pixels[n], 128) for n in shown)
        parts.append(f'<h3>{title}: {len(shown)} of {len(rows)}</h3><div class="grid">{pictures}</div>')
    pairs, usual = pairs
    parts.append("<h3>Nearest pairs: generated left, real right</h3><p>The generated images that lie nearest to a "
                 "real one by features. From a real image to the nearest of another patient it is "
                 f"{usual:.3g} in the median: pairs far below that, or with an SSIM near 1, are copies.</p>")
    for i, j, distance, value in pairs:
        names = "<br>".join(html.escape(rows[n]["file_name"]) for (rows, _), n in ((fake, i), (real, j)))
        parts.append(f'<figure><div class="grid">{thumbnail(fake[1][i], 128)}{thumbnail(real[1][j], 128)}</div>'
                     f"<figcaption>distance {distance:.3g}, SSIM {value:.2f}<br>{names}</figcaption></figure>")
    return "\n".join(parts)


GUIDE = """<h2>How to read the table</h2><p>Two samples of the same patients' images never score zero: at a hundred
images chance alone moves every figure. So each value stands beside what chance gives when both sets are pooled and
shared out anew. <b>excess</b> is what is left. <b>p_high</b> is how often chance is as bad or worse: under 0.05, the
sets differ. <b>p_low</b> is how often chance is as good or better: under 0.01, the images are closer than fresh ones
would be, as copies are. frechet, kid: distance of the two sets. precision, density: generated images that look real.
recall, coverage: real variety that is reached. ssim, lpips: likeness to the nearest real image, and of generated images
to one another.</p>"""


def write_report(args, settings, real, entries):
    """The report: ranking where there are several sets, a section a set, guide, methods."""
    body = [f'<p class="soft">{html.escape("; ".join(caveats(settings)))}</p>']
    if len(entries) > 1:
        rows = [(entry["path"], entry["n"], *(number(f["excess"], sign="+") for f in entry["metrics"].values()),
                 "may be copies" if entry["copies"] else "") for entry in entries]
        body += ["<h2>Ranking, by excess over chance; copies last</h2>",
                 table(("set", "images", *entries[0]["metrics"], ""), rows)]
    body += [entry["section"] for entry in entries]
    body += [GUIDE, f"<h2>How it was made</h2><p>{html.escape(methods(args, settings, real, entries))}</p>",
             f'<p class="soft">python evaluate.py {html.escape(shlex.join(sys.argv[1:]))}</p>']
    with replacing(args.out) as file:
        file.write(page("Generated against real images", "\n".join(body)).encode())


def print_table(entry):
    """One generated set's figures as plain text."""
    rows = [HEADER, *entry["table"]]
    widths = [max(len(row[n]) for row in rows) for n in range(len(HEADER))]
    print(f"\n{entry['path']}: {entry['n']} generated against {entry['real_n']} real images")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:2], widths)]
        print("  ".join(cells + [cell.rjust(width) for cell, width in zip(row[2:], widths[2:])]))
    print(entry["verdict"])


def load_networks(args, names, device):
    """The feature network and, where a metric needs it, LPIPS; fills in the defaults of --features and --lpips."""
    args.features = args.features or ("inception" if find_weights(FID_WEIGHTS) else "texture")
    args.lpips = args.lpips or ("alex" if all(lpips_files("alex")) else "random")
    wanted = any(METRICS[name][2] == "lpips" for name in names)
    lpips = load_lpips(args.lpips, device) if wanted else None
    return {"features": load_features(args.features, device), "lpips": lpips}


def has_side(row, side):
    """True for an image that is stored at side x side pixels: neither cropped nor resized before its features."""
    with contextlib.suppress(Exception), Image.open(row["path"]) as image:
        return image.size == (side, side)


def describe(args, names, networks, resolution, native, device):
    """The settings that the report and --json name; native: no image was resized, so that figures can be compared."""
    lpips = networks["lpips"] and networks["lpips"]["name"]
    return {"features": networks["features"]["name"], "lpips": lpips, "resolution": resolution, "metrics": names,
            "precision": args.precision,
            "comparable": {"features": native and networks["features"]["published"] and args.precision in ("auto", "fp32"),
                           "lpips": lpips not in (None, "random")},
            "permutations": args.permutations, "seed": args.seed, "max_images": args.max_images, "device": str(device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def rank_key(entry):
    """For sorting: copies last, then the excess of the first metric, turned so that small is good."""
    name, figures = next(iter(entry["metrics"].items()))
    sign = 1 if METRICS["frechet" if name == "fid" else name][1] else -1
    return entry["copies"], sign * figures["excess"]


def main(args):
    device, names = pick_device(args.device), chosen_metrics(args.metrics)
    networks = load_networks(args, names, device)
    real_rows = read_set(args.real, args, args.group_column)
    fake_rows = [read_set(path, args) for path in args.generated]
    resolution = args.resolution or pick_resolution(sum(fake_rows, real_rows))
    native = all(has_side(row, resolution) for row in sum(fake_rows, real_rows))
    settings = describe(args, names, networks, resolution, native, device)
    real = load_set(args.real, real_rows, resolution)
    print(f"{len(real[0])} real images at {resolution} px; " + "; ".join(caveats(settings)))
    entries = []
    for path, rows in zip(args.generated, fake_rows):
        if os.path.realpath(path) == os.path.realpath(args.real):
            print(f"{path} is the REAL set itself: these are the figures of perfect copies")
        entries.append(evaluate_set(path, real, load_set(path, rows, resolution), args, names, networks, device))
        print_table(entries[-1])
    entries.sort(key=rank_key)
    summary = {"path": args.real, "n": len(real[0])}
    write_report(args, settings, real, entries)
    if args.json:
        figures = {"format": 1, "settings": settings, "real": summary,
                   "generated": [{key: entry[key] for key in ("path", "n", "metrics")} for entry in entries]}
        with replacing(args.json) as file:
            file.write(json.dumps(figures, indent=1).encode())
    print(f"\nreport: {os.path.abspath(args.out)}" + (f"\nfigures: {os.path.abspath(args.json)}" if args.json else ""))
    print(f"next: python filter.py {shlex.quote(entries[0]['path'])} --reference {shlex.quote(args.real)} --out kept "
          "--calibrate 0.05")


if __name__ == "__main__":
    guarded(main, args)
