"""Measure what a tiny base draws: does each picture show what its caption says?

    python tests/judge_tiny_base.py --base tests/tiny-base --data POOL --out JUDGED

POOL is the pool of phantoms that make_tiny_base.py names. A small network is trained on it, and on
other phantoms, to name kind, side, size and skin tone; OUT/judge.pt keeps it for the next base. It
names what is drawn at guidance 4. How far textures and dark spots are from those of phantoms is
measured at guidance 4 and at 1.5, for guidance exaggerates what a caption says. Every figure is
also given for unseen phantoms that went through the base's autoencoder, the best that its UNet
could do. About an hour on two cores. Writes OUT/judged.json and a sheet of pictures for each kind:
phantoms above, drawn ones below.
"""

import argparse
import json
import pathlib
import string
import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import make_tiny_base
import phantoms
import sample
from metrics import frechet, pooled, texture_in_parts

ROOT = pathlib.Path(__file__).resolve().parent.parent
KINDS = list(phantoms.KINDS)
MPOX = "mpox lesion"
# Phantoms that the judge learns from besides the pool: the kinds that are hardest to tell apart.
MORE = {
    MPOX: 4000,
    "remodelling ulcer": 2500,
    "normal fundus": 6000,
    "retinal haemorrhages": 6000,
}
ASKED, REAL, OTHER, MPOX_DATA = 600_000, 610_000, 620_000, 630_000  # first seeds, never trained on
MORE_DATA = 3_000_000  # first seed of MORE
ANSWERS = {
    "kind": KINDS,
    "side": ["left", "right"],
    "size": ["small", "large"],  # nobody can tell a large medium one from a small large one
    "tone": ["light", "brown", "dark"],
}
FIELDS = {"side": ("side", "eye"), "size": ("extent",), "tone": ("tone",)}


# ---- the judge


def truth(kind, attributes):
    """The number of the right answer to each question, -1 where it does not apply."""
    answers = {"kind": KINDS.index(kind)}
    for question, fields in FIELDS.items():
        answers[question] = -1
        for field in fields:
            if attributes.get(field) in ANSWERS[question]:
                answers[question] = ANSWERS[question].index(attributes[field])
    return answers


def asked(kind, caption, attributes):
    """As truth(), but only what the caption says."""
    answers = truth(kind, attributes)
    for wording in phantoms.CAPTIONS[kind]:
        if phantoms.is_true(wording, attributes) and wording.format(**attributes) == caption:
            named = {field for _, field, _, _ in string.Formatter().parse(wording)}
            for question, fields in FIELDS.items():
                if not named.intersection(fields):
                    answers[question] = -1
            return answers
    raise ValueError(f"no wording of {kind} gives {caption!r}")


class Judge(torch.nn.Module):
    """Logits {question: (N, answers)} of pictures (N, 3, 128, 128), from 0 to 255."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Conv2d(3, 24, 5, 2, 2)]
        wide = 24
        for channels in (48, 96, 128, 128):
            layers += [torch.nn.GroupNorm(8, wide), torch.nn.SiLU(), torch.nn.MaxPool2d(2)]
            layers += [torch.nn.Conv2d(wide, channels, 3, 1, 1)]
            wide = channels
        layers += [torch.nn.Flatten(), torch.nn.Linear(wide * 16, 256), torch.nn.SiLU()]
        self.trunk = torch.nn.Sequential(*layers)
        self.heads = torch.nn.ModuleDict()
        for question, answers in ANSWERS.items():
            self.heads[question] = torch.nn.Linear(256, len(answers))

    def forward(self, images):
        features = self.trunk(images / 127.5 - 1)
        return {question: head(features) for question, head in self.heads.items()}


def spoilt(images, random):
    """A batch a little out of focus and grainy, so that neither softness nor grain is a clue."""
    width = random.choice([3, 3, 5])
    blurred = F.avg_pool2d(images, width, 1, width // 2, count_include_pad=False)
    images = images.lerp(blurred, random.uniform())
    return images + random.uniform(0, 4) * torch.randn_like(images)


def train_judge(images, answers, steps=9000):
    """A Judge of uint8 images (N, 3, 128, 128) whose right answers are {question: (N,)}."""
    torch.manual_seed(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    random = np.random.default_rng(0)
    for step in range(steps):
        rows = random.integers(len(images), size=48)
        batch = spoilt(images[rows].float(), random) * random.uniform(0.9, 1.1)
        shift = random.integers(-4, 5, 2).tolist()
        logits = judge(batch.roll(shift, (2, 3)))
        loss = 0
        for question, right in answers.items():
            here = F.cross_entropy(logits[question], right[rows], ignore_index=-1, reduction="sum")
            loss = loss + here / (right[rows] >= 0).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"judge step {step}: loss {loss.item():.3f}", flush=True)
    return judge.eval()


def get_judge(data, out):
    """The judge that OUT keeps, else one trained on the pool and on mpox phantoms."""
    path = out / "judge.pt"
    if path.exists():
        judge = Judge()
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval()
    images, _, labels = make_tiny_base.read_pool(data)
    rows = make_tiny_base.read_rows(data)
    images = [images]
    truths = []
    for label, row in zip(labels, rows, strict=True):
        seed = int(row["file_name"].rsplit("-", 1)[1][:-4])
        truths.append(truth(label, phantoms.draw(label, seed, 16)[2]))
    for kind, count in MORE.items():
        more, _, attributes = drawn(kind, MORE_DATA, count)
        images.append(more)
        truths += [truth(kind, one) for one in attributes]
    answers = {q: torch.tensor([right[q] for right in truths]) for q in ANSWERS}
    judge = train_judge(torch.cat(images), answers)
    make_tiny_base.save_safely(judge.state_dict(), path)
    return judge


@torch.no_grad()
def share_right(judge, images, answers):
    """{question: (share right, asked)} and the kinds named, for uint8 images (N, 3, 128, 128)."""
    logits = {question: [] for question in ANSWERS}
    for batch in images.split(64):
        for question, values in judge(batch).items():
            logits[question].append(values)
    shares = {}
    for question in ANSWERS:
        named = torch.cat(logits[question]).argmax(1)
        right = torch.tensor([row[question] for row in answers])
        counted = right >= 0
        if counted.any():
            share = (named[counted] == right[counted]).float().mean().item()
            shares[question] = (round(share, 4), int(counted.sum()))
    return shares, torch.cat(logits["kind"]).argmax(1)


# ---- what a base draws


def drawn(kind, first, count):
    """uint8 images (count, 3, 128, 128) of phantoms, their captions and attributes."""
    rows = [phantoms.draw(kind, first + i) for i in range(count)]
    images = make_tiny_base.to_tensor([row[0] for row in rows])
    return images, [row[1] for row in rows], [row[2] for row in rows]


def generated(base, captions, guidance_scale):
    settings = sample.Settings(steps=20, scheduler="dpm", guidance_scale=guidance_scale)
    jobs = [(caption, i) for i, caption in enumerate(captions)]
    pictures = sample.generate(base, jobs, settings, batch_size=32)
    return make_tiny_base.to_tensor([np.asarray(picture.convert("RGB")) for picture in pictures])


def rebuilt(base, images):
    """uint8 images through the base's autoencoder."""
    pictures = []
    for latents in make_tiny_base.encode(base.vae, images).split(32):
        with torch.no_grad():
            pictures.append(base.vae.decode(latents).sample)
    return ((torch.cat(pictures).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def texture_of(images):
    return texture_in_parts(images).double().numpy()


def distance(first, second):
    """Fréchet distance of texture features, standardised together."""
    both = pooled(first, second, True)
    return frechet(both[: len(first)], both[len(first) :])


def dark_spots(image):
    """Number and area in pixels of a fundus's small dark spots; image: uint8 (3, 128, 128).

    The green channel against its surroundings. Long vessels are left out by their size.
    """
    green = image[1].numpy().astype(np.float32) / 255
    inside = ndimage.binary_erosion(image[0].numpy() > 50, iterations=3)
    darker = (ndimage.median_filter(green, 17) - green > 0.07) & inside
    labels, count = ndimage.label(darker)
    areas = np.bincount(labels.ravel())[1:] if count else np.zeros(0)
    spots = areas[(areas >= 4) & (areas <= 120)]
    return len(spots), int(spots.sum())


def judge_kind(base, judge, kind, count, out):
    """Every figure of one kind, and a sheet of phantoms above drawn pictures."""
    phantom_images, captions, attributes = drawn(kind, ASKED, count)
    pictures = generated(base, captions, 4)
    barely_guided = generated(base, captions, 1.5)
    answers = [asked(kind, *pair) for pair in zip(captions, attributes, strict=True)]
    real = texture_of(drawn(kind, REAL, count)[0])
    chance = distance(real, texture_of(drawn(kind, OTHER, count)[0]))
    through = rebuilt(base, phantom_images)
    shares, named = share_right(judge, pictures, answers)
    figures = {
        "right": shares,
        "right of phantoms": share_right(judge, phantom_images, answers)[0],
        "right of phantoms rebuilt": share_right(judge, through, answers)[0],
        "excess": round(distance(real, texture_of(pictures)) - chance, 2),
        "excess, guidance 1.5": round(distance(real, texture_of(barely_guided)) - chance, 2),
        "excess of phantoms rebuilt": round(distance(real, texture_of(through)) - chance, 2),
        "taken for": {KINDS[i]: int((named == i).sum()) for i in set(named.tolist())},
    }
    if kind == "retinal haemorrhages":
        drawings = {"phantoms": phantom_images, "drawn": pictures, "guidance 1.5": barely_guided}
        for name, images in drawings.items():
            spots = np.array([dark_spots(image) for image in images])
            figures[f"spots, {name}"] = np.percentile(spots, (25, 50, 75), axis=0).T.tolist()
    rows = torch.cat([phantom_images[:32], pictures[:32]])
    sheet = rows.view(4, 16, 3, 128, 128).permute(0, 3, 1, 4, 2).reshape(512, 2048, 3)
    Image.fromarray(sheet.numpy()).save(out / f"{kind.replace(' ', '-')}.png")
    return figures


def run(script, flags):
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True)


def judge_adapter(folder, judge, out):
    """Shares called mpox of the pictures drawn without and with an adapter of 300 steps."""
    phantoms.write(out / "mpox", 64, seed=MPOX_DATA, kinds=[MPOX])
    flags = ["--base", folder, "--data", out / "mpox", "--out", out / "run", "--steps", 300]
    flags += ["--lr", 3e-3, "--targets", "all", "--snr-gamma", 5, "--val-split", 0]
    flags += ["--val-samples", 0]
    run("train.py", flags)
    shares = {}
    for name, adapter in (("base alone", []), ("with the adapter", ["--lora", out / "run"])):
        flags = ["--base", folder, "--labels-from", out / "mpox", "--out", out / name]
        flags += ["--num-images", 3, "--steps", 20, "--scheduler", "dpm", "--guidance-scale", 2]
        run("sample.py", flags + adapter)
        files = sorted((out / name).glob("*.png"))
        pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        _, named = share_right(judge, make_tiny_base.to_tensor(pictures), [])
        shares[name] = float((named == KINDS.index(MPOX)).float().mean())
    return shares


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="pipeline folder to judge")
    parser.add_argument("--data", required=True, help="pool of phantoms to train the judge on")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--count", type=int, default=256, help="pictures of each kind")
    parser.add_argument("--no-adapter", action="store_true", help="leave the mpox adapter out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    judge = get_judge(args.data, args.out)
    base = sample.load_base(args.base, torch.device("cpu"))
    figures = {}
    for kind in phantoms.BASE_KINDS:
        figures[kind] = judge_kind(base, judge, kind, args.count, args.out)
        print(kind, json.dumps(figures[kind]), flush=True)
    if not args.no_adapter:
        figures["adapter"] = judge_adapter(args.base, judge, args.out)
        print(figures["adapter"])
    (args.out / "judged.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
