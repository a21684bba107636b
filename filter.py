"""Keep the generated images that are as good as real ones, and say of each other one why not.

    python filter.py runs/samples --reference wounds/ --calibrate 0.05 --drop-copies --drop-duplicates --out runs/kept
    python filter.py runs/samples --reference wounds/ --max-lpips 0.30 --min-ssim 0.40 --lpips alex --out runs/kept

--calibrate 0.05 takes its threshold from the real images themselves, so that 95 % of unseen real ones would pass all
scores together; a fixed threshold prints the share of real images that it would refuse.
Leaves in --out: the kept images, metadata.csv (ready for train.py), decisions.csv and filter.html. Nothing is deleted.
From metrics: reading, features, distances, the calibration, the page.
"""
import argparse
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
    parser.add_argument("generated", metavar="GENERATED", help="a folder, CSV or manifest.csv of sample.py")
    parser.add_argument("--reference", required=True, metavar="REAL", help="the real images, in any form of train.py")
    parser.add_argument("--group-column", help="the reference's column of patients (default: found by its name)")
    parser.add_argument("--out", default="runs/kept", help="a folder")
    keep = parser.add_argument_group("what stays")
    keep.add_argument("--calibrate", type=float, metavar="ALPHA", help="refuse what looks less real than all but this "
                      "share of the real images, usually 0.05")
    keep.add_argument("--max-lpips", type=float, help="refuse a distance to the nearest real image above this")
    keep.add_argument("--min-ssim", type=float, help="refuse a similarity to the nearest real image below this")
    keep.add_argument("--drop-copies", action="store_true", help="refuse what is closer to a real image than real ones are")
    keep.add_argument("--drop-duplicates", action="store_true", help="of near-equal generated images keep the best")
    how = parser.add_argument_group("how")
    how.add_argument("--features", default="texture", help="texture, vgg-random, inception or a weight file's path")
    how.add_argument("--lpips", choices=["alex", "vgg", "squeeze", "random"], help="network of the perceptual distance "
                     "(default: alex where its weights are, else none)")
    how.add_argument("--resolution", type=int, help="pixels at which all are compared (default: the smallest stored side)")
    how.add_argument("--batch-size", type=int, default=32)
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    how.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the feature network")
    how.add_argument("--seed", type=int, default=0, help="chooses the images that filter.html shows")
    how.add_argument("--dry-run", action="store_true", help="write decisions.csv and filter.html, copy nothing")
    try:
        args = parser.parse_args()
    except (UnicodeDecodeError, RecursionError):
        fail("an @file of flags is no text file, or names itself")
    if args.calibrate is not None and not 0 < args.calibrate < 1:
        fail(f"--calibrate {args.calibrate:g}: give a share between 0 and 1, usually 0.05")
    for flag, least, most in (("resolution", 64, 4096), ("batch_size", 1, 10**6), ("min_ssim", -1, 1), ("max_lpips", 0, 1e6)):
        value = getattr(args, flag)
        if value is not None and not least <= value <= most:
            fail(f"--{flag.replace('_', '-')} {value:g}: give a number from {least:g} to {most:g}")
    if not (args.calibrate or args.drop_copies or args.drop_duplicates) and args.max_lpips is args.min_ssim is None:
        fail("nothing to filter by: give --calibrate 0.05, --max-lpips, --min-ssim, --drop-copies or --drop-duplicates")
    return args


if __name__ == "__main__":
    args = parse_args()

import html  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
from collections import Counter  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from metrics import (calibrate, content_hash, copy_chances, extract, generator, guarded, image_scores, judge,  # noqa: E402
                     list_images, load_features, load_lpips, load_pixels, lpips_files, lpips_matrix, nearest, page,
                     pick_device, pick_resolution, ranks, replacing, same_unit, squared_distances, ssim_matrix, table,
                     thumbnail, two_sided, write_csv)

COPY_CHANCE = 0.01   # a generated image is a copy when a fresh one would be as close in 1 of 100 cases


# ------------------------------------------------------------------------------------------------- scores

def feature_distances(real, fake, args, device):
    """Distances in features, in units of the real images' spread: real to real, fake to real, fake to fake.

    Those to real images are the smaller of the image's and its mirror image's, so that a flipped copy is near too.
    """
    network = load_features(args.features, device)
    found = {name: extract(pixels, network, device, args.batch_size, args.precision)
             for name, pixels in (("real", real), ("fake", fake), ("mirror", real.flip(3)))}
    if not all(np.isfinite(values).all() for values in found.values()):
        fail(f"--features {args.features}: gives NaN; are its weights sound?")
    if network["standardise"]:
        spread = found["real"].std(0)
        spread[spread < 1e-9] = 1
        found = {name: values / spread for name, values in found.items()}

    def between(a, b):
        return np.sqrt(squared_distances(found[a], found[b]))
    return (np.minimum(between("real", "real"), between("real", "mirror")),
            np.minimum(between("fake", "real"), between("fake", "mirror")), between("fake", "fake"))


def score(real, fake, same, args, device):
    """What is known of each image: scores of the real (each against the others) and of the generated, large is bad.

    Returns ({name: (n,)}, {name: (m,)}, distances as above, `same` with real images that are there twice, nearest real
    image of each generated one (m,)).
    """
    distances = feature_distances(real, fake, args, device)
    same = same | (distances[0] < 1e-3 * np.median(distances[0]))   # a picture twice in the reference is one
    index, to_real = nearest(distances[1])
    own, other = {"distance": nearest(distances[0], same)[1]}, {"distance": to_real}
    simple_real, simple_fake = image_scores(real), image_scores(fake)
    for name, reference in simple_real.items():
        own[name], other[name] = two_sided(reference, reference), two_sided(reference, simple_fake[name])
    if args.lpips or args.max_lpips is not None or all(lpips_files("alex")):
        both = lpips_matrix(torch.cat([real, fake]), load_lpips(args.lpips or "alex", device), device, args.batch_size)
        own["lpips"] = nearest(both[:len(real), :len(real)], same)[1]
        other["lpips"] = nearest(both[len(real):, :len(real)])[1]
    if args.min_ssim is not None:
        own["dissimilarity"] = 1 + nearest(-ssim_matrix(real, real, device), same)[1]
        other["dissimilarity"] = 1 + nearest(-ssim_matrix(fake, real, device))[1]
    if not all(np.isfinite(values).all() for values in own.values()):
        fail(f"{args.reference}: all its images are of one patient; a calibration needs several")
    return own, other, distances, same, index


def decide(own, other, distances, same, names, args):
    """The reason to refuse each generated image, "" to keep it: [str] (m,), and the lines that say what was done."""
    reasons, said = [""] * len(names), []

    def refuse(which, why):
        for i in np.flatnonzero(which):
            reasons[i] = reasons[i] or why(i)

    if args.drop_copies:
        chance = copy_chances(distances[0], distances[1], same)
        limit = max(COPY_CHANCE, 2 / (len(same) + 1))   # the smallest chance that few real images can show
        refuse(chance <= limit, lambda i: f"copy of a real image (chance {chance[i]:.2g})")
        said.append(f"copies: {(chance <= limit).sum()} at chance ≤ {limit:.2g}, "
                    f"{limit * len(chance):.1f} expected of fresh images")
    for name, limit, shown in (("lpips", args.max_lpips, args.max_lpips),
                               ("dissimilarity", None if args.min_ssim is None else 1 - args.min_ssim, args.min_ssim)):
        if limit is not None:
            flag = "--max-lpips" if name == "lpips" else "--min-ssim"
            refuse(other[name] > limit, lambda i: f"{flag} {shown:g}")
            said.append(f"{flag} {shown:g} would refuse {np.mean(own[name] > limit):.0%} of the real images")
    if args.calibrate:
        threshold = calibrate(own, args.calibrate)
        if not np.isfinite(threshold):
            fail(f"--calibrate {args.calibrate:g} needs at least {int(np.ceil(1 / args.calibrate - 1e-9)) - 1} real images, "
                 f"{args.reference} has {len(same)}")
        passes, worst = judge(own, other, threshold)
        refuse(~passes, lambda i: f"{worst[i]} unlike the real images")
        said.append(f"calibrated on {len(same)} real images by {', '.join(own)}: {passes.mean():.0%} of the generated "
                    f"ones pass, about {1 - args.calibrate:.0%} of unseen real ones would")
    if args.drop_duplicates:
        quality = np.max(list(ranks(own, other).values()), axis=0)
        closest = np.quantile(nearest(distances[0], same)[1], 0.01)   # nearer than real images of two patients are
        kept = []
        for i in sorted((i for i, why in enumerate(reasons) if not why), key=lambda i: (quality[i], i)):
            twin = next((j for j in kept if distances[2][i, j] <= closest), None)
            kept += [i] if twin is None else []
            reasons[i] = "" if twin is None else f"duplicate of {names[twin]}"
        said.append(f"duplicates: {sum(why.startswith('duplicate') for why in reasons)}")
    return reasons, said


# ------------------------------------------------------------------------------------------------- what is left behind

def report(rows, pixels, real_pixels, reasons, index, said, seed):
    """filter.html: up to 60 kept and 60 refused ones, each beside its nearest real image with the reason under it."""
    order = torch.randperm(len(rows), generator=generator(seed, "shown")).tolist()

    def figures(refused):
        shown = sorted([i for i in order if bool(reasons[i]) == refused][:60])
        return "".join(f'<figure><div class="grid">{thumbnail(pixels[i])}{thumbnail(real_pixels[index[i]])}</div><figcaption>'
                       f'{html.escape(rows[i]["file_name"])} {html.escape(reasons[i])}</figcaption></figure>' for i in shown)
    counts = Counter(re.sub(r" (of .*|\(.*)", "", why) or "kept" for why in reasons)
    return page("What the filter kept", table(["decision", "images"], counts.most_common())
                + "".join(f"<p>{html.escape(line)}</p>" for line in said)
                + "<h2>Kept, each beside its nearest real image</h2>" + figures(False)
                + "<h2>Refused</h2>" + figures(True))


def copy_kept(kept, rows, out):
    """The kept images under their own names, and metadata.csv, which train.py reads.

    Copies that an earlier filtering left and this one refuses go, as long as their source is still there.
    """
    there = {path.relative_to(out).as_posix() for path in out.rglob("[!.]*") if path.is_file()}
    stale = there - {row["file_name"] for row in kept} - {"metadata.csv", "decisions.csv", "filter.html"}
    sources = {row["file_name"]: row["path"] for row in rows}
    foreign = sorted(n for n in stale if n not in sources or content_hash(sources[n]) != content_hash(out / n))
    if foreign:
        fail(f"{out}: holds {len(foreign)} files of something else, such as {foreign[0]}; give another --out")
    for name in stale:
        (out / name).unlink()
    for row in kept:
        with replacing(Path(out, row["file_name"])) as file, open(row["path"], "rb") as source:
            shutil.copyfileobj(source, file)
    write_csv(Path(out, "metadata.csv"), ["file_name", "text", "label", "modality"],
              [[row["file_name"], row["caption"], row["label"], row["fields"].get("modality", "")] for row in kept])


def main(args):
    device, out = pick_device(args.device), Path(args.out).resolve()
    for folder in (args.generated, args.reference):
        if out == Path(folder).resolve() or Path(folder).resolve() in out.parents:
            fail(f"--out {args.out} lies in {folder}: its images would be read again; give another folder")
    real_rows = list_images(args.reference, group_column=args.group_column)
    all_rows = list_images(args.generated)
    absolute = [row["file_name"] for row in all_rows if Path(row["file_name"]).is_absolute()]
    if absolute:
        fail(f"{args.generated}: names absolute paths, such as {absolute[0]}; kept images need names below --out")
    resolution = args.resolution or pick_resolution(real_rows + all_rows)
    real_rows, real = load_pixels(real_rows, resolution)
    rows, fake = load_pixels(all_rows, resolution)
    if len(real_rows) < 3 or not rows:
        fail(f"{len(real_rows)} readable images in {args.reference} and {len(rows)} in {args.generated}: too few to filter")
    same, names = same_unit([row["group"] for row in real_rows]), [row["file_name"] for row in rows]
    own, other, distances, same, index = score(real, fake, same, args, device)
    reasons, said = decide(own, other, distances, same, names, args)
    kept = [row for row, why in zip(rows, reasons) if not why]
    if not args.dry_run:
        copy_kept(kept, all_rows, out)
    unreadable = [[row["file_name"], 0, "unreadable", "", *[""] * len(other)] for row in all_rows if row not in rows]
    write_csv(Path(out, "decisions.csv"), ["file", "kept", "reason", "nearest", *other],
              [[name, int(not why), why, real_rows[j]["file_name"], *(f"{values[i]:.6g}" for values in other.values())]
               for i, (name, why, j) in enumerate(zip(names, reasons, index))] + unreadable)
    with replacing(Path(out, "filter.html")) as file:
        file.write(report(rows, fake, real, reasons, index, said, args.seed).encode())
    print("\n".join(said))
    print(f"kept {len(kept)} of {len(rows)} images: {args.out}; why: {args.out}/decisions.csv, {args.out}/filter.html\n"
          f"next: python evaluate.py {shlex.join([args.reference, args.generated, args.out])}")


if __name__ == "__main__":
    guarded(main, args)
