"""Draw medical-looking pictures from a seed alone. The tiny base is trained on them.

    python tests/phantoms.py OUT --count 128 --seed 0 --size 128 --kinds "normal chest,lung nodule"

Writes PNG files and metadata.csv (file_name, text, label, modality, patient_id) into OUT. The same
(kind, seed) is always the same picture, and at another size the same scene: every shape and every
noise lattice is laid out in unit coordinates. Seeds 2k and 2k+1 of a kind are one patient, who
keeps skin tone, build or fundus hue.

By convention the tests draw from seeds below 1,000,000, the quick start from 1,000,000 on, and
training pools from 2,000,000 on, so that no picture is both learned and measured on.

These are drawings. They show no disease and are of no use for any clinical purpose.
"""

import argparse
import collections
import csv
import functools
import hashlib
import itertools
import multiprocessing
import pathlib
import string

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

KINDS = {
    "inflammatory ulcer": "wound photograph",
    "remodelling ulcer": "wound photograph",
    "normal chest": "chest X-ray",
    "pleural effusion": "chest X-ray",
    "lung nodule": "chest X-ray",
    "normal fundus": "fundus photograph",
    "retinal haemorrhages": "fundus photograph",
    "mpox lesion": "skin photograph",
}
# The tiny base never sees these: they are what an adapter is there to teach it.
HELD_OUT = ("mpox lesion",)
BASE_KINDS = [kind for kind in KINDS if kind not in HELD_OUT]

# A wording is used only where every field it names is true of the picture.
CAPTIONS = {
    "inflammatory ulcer": [
        "an inflammatory diabetic foot ulcer with red edges on {tone} skin",
        "inflammatory phase wound on {tone} skin",
        "photo of a {extent} inflamed ulcer, {tone} skin",
        "wound in the inflammatory phase with {slough} slough",
        "inflamed diabetic foot ulcer, {extent}",
        "a {extent} red wound with {slough} yellow slough, inflamed",
        "clinical photo of an inflammatory ulcer on {tone} skin",
        "an inflammatory ulcer with {necrosis} necrosis",
    ],
    "remodelling ulcer": [
        "a diabetic foot ulcer in the remodelling phase on {tone} skin",
        "remodelling phase wound on {tone} skin",
        "photo of a healed {extent} wound with pale scar, {tone} skin",
        "wound in the remodelling phase, {scar} scar",
        "closing ulcer with a smooth {scar} scar, {extent}",
        "a {extent} remodelling ulcer with contracted edges",
        "clinical photo of a remodelling ulcer on {tone} skin",
        "healing ulcer with a {residual} open centre",
    ],
    "normal chest": [
        "a normal chest x-ray",
        "chest x-ray, no finding",
        "frontal chest radiograph with clear lungs",
        "normal chest x-ray of a {build} patient",
        "chest x-ray without abnormality, {exposure} exposure",
        "healthy lungs on a chest film, {build} build",
        "chest film, clear lungs, normal heart",
    ],
    "pleural effusion": [
        "chest x-ray with a {side} pleural effusion",
        "a {extent} {side} pleural effusion on a chest radiograph",
        "chest film, {side}-sided pleural effusion",
        "chest x-ray showing {extent} pleural fluid on the {side}",
        "pleural effusion, {extent}, {side} side, chest x-ray",
        "frontal chest radiograph with pleural effusion",
        "fluid in the {side} pleural space, {build} patient",
    ],
    "lung nodule": [
        "chest x-ray with a lung nodule in the {side} {zone} zone",
        "a {extent} {side} lung nodule, chest radiograph",
        "chest film, solitary nodule, {side} lung",
        "chest x-ray showing a {extent} nodule in the {side} lung",
        "lung nodule, {zone} zone, {side} side",
        "frontal chest radiograph with a pulmonary nodule",
        "a {density} round lung nodule, {side} lung",
    ],
    "normal fundus": [
        "a normal fundus photograph",
        "fundus photo of a healthy retina",
        "normal retina, {eye} eye",
        "fundus photograph of a {eye} eye, no lesion",
        "healthy {hue} fundus with clear macula",
        "colour fundus photo, normal, {eye} eye",
        "normal optic disc and macula, {hue} fundus",
    ],
    "retinal haemorrhages": [
        "fundus photograph with retinal haemorrhages",
        "{amount} retinal haemorrhages, {eye} eye",
        "fundus photo with {amount} {form} haemorrhages",
        "diabetic retinopathy with {amount} {form} haemorrhages",
        "colour fundus photo, {form} haemorrhages, {eye} eye",
        "retina with {amount} dark red bleedings, {hue} fundus",
        "haemorrhages in the retina of a {eye} eye",
    ],
    "mpox lesion": [
        "an mpox skin lesion on {tone} skin",
        "{amount} mpox lesions on {tone} skin",
        "clinical photo of a monkeypox skin lesion",
        "monkeypox rash, {amount} {stage} lesions",
        "skin with {amount} umbilicated mpox {stage} lesions",
        "photo of {stage} mpox lesions, {tone} skin",
    ],
}

SKIN_TONES = np.array(
    [
        [0.94, 0.80, 0.71],
        [0.87, 0.68, 0.55],
        [0.74, 0.52, 0.39],
        [0.54, 0.36, 0.26],
        [0.34, 0.22, 0.16],
    ],
    np.float32,
)
CLOTHS = np.array(
    [
        [0.36, 0.55, 0.72],
        [0.30, 0.52, 0.44],
        [0.86, 0.86, 0.84],
        [0.52, 0.54, 0.58],
        [0.16, 0.24, 0.38],
    ],
    np.float32,
)


# ---- the brushes


def keyed(*key):
    """A numpy generator for this key, the same on every machine."""
    return np.random.default_rng(
        int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
    )


@functools.lru_cache(maxsize=8)
def plane(size):
    """x to the right and y downwards at the pixel centres, each (size, size) in -1..1."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
    return np.broadcast_to(axis[None, :], (size, size)), np.broadcast_to(
        axis[:, None], (size, size)
    )


def ramp(low, high, value):
    """Smoothstep: 0 below `low`, 1 above `high` (or the reverse when low > high)."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def fractal(random, size, cells, octaves=3, wide=1):
    """Smooth noise (size, size), mean 0, deviation 0.6: cells lumps down, cells/wide across."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        count = cells * 2**octave
        lattice = random.standard_normal((count, max(2, round(count / wide))), dtype=np.float32)
        total += (
            np.asarray(Image.fromarray(lattice).resize((size, size), Image.BICUBIC)) * 0.5**octave
        )
    return total


def blend(image, colour, mask):
    """Paint `colour` (3,) or (H, W, 3) over `image` in place where `mask` (H, W) is 1."""
    image += (np.asarray(colour, np.float32) - image) * np.clip(mask, 0, 1)[..., None]


def relief(height, light):
    """Lambert-like shading of a height map (H, W) lit from angle `light`, about -1..1."""
    down, across = np.gradient(height)
    return (across * np.cos(light) + down * np.sin(light)) * np.float32(height.shape[0] / 4)


def soften(image, radius):
    """`image` (H, W, 3) out of focus by `radius` pixels of a picture of 128."""
    sigma = radius * image.shape[0] / 128
    return gaussian_filter(image, (sigma, sigma, 0))


def outline(random, size, centre, radius, irregularity, warp=0.05):
    """Signed distance-like field (size, size) of an irregular closed outline: negative inside."""
    x, y = plane(size)
    x = x - centre[0] + warp * fractal(random, size, 5, 2)
    y = y - centre[1] + warp * fractal(random, size, 5, 2)
    turn, squeeze = random.uniform(0, np.pi), random.uniform(0.62, 1.0)
    u = x * np.cos(turn) + y * np.sin(turn)
    v = (y * np.cos(turn) - x * np.sin(turn)) / squeeze
    angle, edge = np.arctan2(v, u), np.ones_like(u)
    for wave in range(2, 7):
        edge += (
            irregularity
            / wave
            * np.cos(wave * angle + random.uniform(0, 2 * np.pi))
            * random.uniform(0.4, 1.2)
        )
    return (np.hypot(u, v) - radius * edge).astype(np.float32)


def named(value, low, high, names):
    """The first name below `low`, the second below `high`, else the third."""
    if value < low:
        return names[0]
    if value < high:
        return names[1]
    return names[2]


# ---- skin and wounds


def skin(body, random, size):
    """Lit skin, whole frame or a limb on a cloth, and its attributes; the tone is the patient's."""
    x, y = plane(size)
    tone, ruddy = body.uniform(0, 1), body.uniform(-0.02, 0.04)
    colour = np.array(
        [np.interp(tone * 4, range(5), SKIN_TONES[:, channel]) for channel in range(3)]
    ) + [ruddy, 0, 0]
    mottle = fractal(random, size, 4, 4)
    image = (colour * (1 + 0.05 * mottle[..., None] * np.array([0.7, 1.0, 1.1]))).astype(np.float32)
    light = random.uniform(0, 2 * np.pi)
    turn = random.uniform(-0.5, 0.5) + np.pi / 2 * random.integers(0, 2)
    limb = random.random() < 0.5
    offset = random.uniform(-0.12, 0.12)
    half = random.uniform(0.66, 0.92)
    cloth = CLOTHS[random.integers(len(CLOTHS))]
    folds = fractal(random, size, 3, 2)
    weave = fractal(random, size, 48, 1)
    across = x * np.cos(turn) + y * np.sin(turn) - offset
    if limb:
        bulge = np.abs(across + 0.05 * np.sin(2.5 * (y * np.cos(turn) - x * np.sin(turn)))) / half
        image *= (0.62 + 0.4 * np.sqrt(np.clip(1 - bulge**2, 0, 1)))[..., None]
        shadow = 0.5 + 0.5 * ramp(0.98, 1.35, bulge)
        lit = (1 + 0.09 * folds + 0.05 * weave) * shadow
        blend(image, cloth * lit[..., None], ramp(0.99, 1.01, bulge))
    return image, {
        "tone_value": tone,
        "light": light,
        "limb": limb,
        "limb_offset": (offset, turn),
        "tone": named(tone, 0.33, 0.66, ("light", "brown", "dark")),
    }


def photograph(image, random, light, ruler):
    """Add a ruler, if any, the room's light and the white balance to `image` (in place)."""
    size = image.shape[0]
    x, y = plane(size)
    edge, pitch = random.uniform(0.70, 0.84), random.uniform(0.09, 0.14)
    along, across = ((x, y), (y, x), (x, -y), (y, -x))[random.integers(4)]
    warmth = random.uniform(-0.07, 0.09)
    falloff = random.uniform(0.05, 0.22)
    exposure = random.uniform(0.88, 1.1)
    if ruler:
        phase = np.abs(((along / pitch) % 1) - 0.5) * pitch
        long = ((along / pitch // 1) % 5) == 0
        tick = ramp(0.022, 0.008, phase) * ramp(
            edge + 0.10 + 0.08 * long, edge + 0.08 + 0.08 * long, across
        )
        strip = ramp(edge - 0.012, edge + 0.012, across)
        blend(image, np.array([0.93, 0.92, 0.88]), strip)
        blend(image, np.array([0.15, 0.15, 0.17]), strip * tick)
    image *= (exposure * (1 + falloff * (x * np.cos(light) + y * np.sin(light))))[..., None]
    image *= np.array([1 + warmth, 1, 1 - warmth], np.float32)
    image += random.uniform(0.7, 1.3) * 0.021 * fractal(random, size, 128, 1)[..., None]


def wound_place(random, attributes):
    """Centre and radius of a wound that stays on the limb."""
    offset, turn = attributes["limb_offset"] if attributes["limb"] else (0.0, 0.0)
    centre = np.array([np.cos(turn), np.sin(turn)]) * offset + random.uniform(-0.22, 0.22, 2)
    radius = random.uniform(0.24, 0.52)
    attributes.update(
        centre=tuple(centre.round(3)),
        radius=radius,
        extent=named(radius, 0.33, 0.43, ("small", "medium", "large")),
    )
    return centre, radius


def inflammatory(body, random, size):
    """An open red ulcer: granular bed, slough, perhaps necrosis, swollen edge, red halo."""
    image, attributes = skin(body, random, size)
    centre, radius = wound_place(random, attributes)
    irregularity, light = random.uniform(0.08, 0.34), attributes["light"]
    distance = outline(random, size, centre, radius, irregularity)
    halo, reach = random.uniform(0.45, 0.95), random.uniform(0.10, 0.26)
    bed = random.uniform(0, 1)
    slough = random.uniform(0, 0.62)
    necrosis = max(0.0, random.uniform(-0.9, 0.45))
    grain = fractal(random, size, 9, 3)
    granules = fractal(random, size, 26, 3)
    patches = fractal(random, size, 4, 3)
    dead = fractal(random, size, 3, 2)
    bright = 0.45 + 0.55 * image.mean(-1, keepdims=True) / 0.6
    inside = ramp(0.012, -0.012, distance)
    limb = 1.0 if not attributes["limb"] else ramp(0.5, 1.4, bright[..., 0] + 0.6)
    blend(
        image,
        np.array([0.80, 0.27, 0.24]) * bright,
        halo * np.exp(-np.maximum(distance, 0) / reach) * limb,
    )
    blend(
        image,
        np.array([0.62, 0.20, 0.20]) * bright,
        0.55 * np.exp(-(((distance - 0.03) / 0.035) ** 2)),
    )
    flesh = np.array([0.46, 0.05, 0.07]) + bed * np.array([0.30, 0.09, 0.07])
    blend(image, flesh * (1 + 0.20 * grain + 0.16 * granules)[..., None], inside)
    blend(
        image,
        np.array([0.86, 0.74, 0.42]) * (1 + 0.08 * grain + 0.06 * granules)[..., None],
        inside * ramp(0.60 - 1.1 * slough, 1.20 - 1.1 * slough, patches) * 0.88 * (slough > 0.08),
    )
    blend(
        image,
        np.array([0.13, 0.09, 0.08]),
        inside * ramp(0.75 - 1.1 * necrosis, 1.15 - 1.1 * necrosis, dead) * 0.9 * (necrosis > 0.05),
    )
    height = (
        -0.10 * ramp(0.06, -0.10, distance)
        + (0.012 * grain + 0.006 * granules) * inside
        + 0.03 * np.exp(-((distance / 0.07) ** 2))
    )
    shade = relief(height, light)
    image *= (1 + 0.42 * np.clip(shade, -1, 1))[..., None]
    blend(image, np.ones(3), inside * 0.55 * random.uniform(0.2, 1) * ramp(0.34, 0.8, shade))
    attributes.update(
        irregularity=irregularity,
        halo=halo,
        bed=bed,
        slough_value=slough,
        necrosis_value=necrosis,
        slough=named(slough, 0.16, 0.38, ("", "some", "much")),
        necrosis="black" if necrosis > 0.18 else "",
        ruler=random.random() < 0.4,
    )
    photograph(image, random, light, attributes["ruler"])
    return image, attributes


def remodelling(body, random, size):
    """A closed wound: shiny pink to pale scar, dark rim, puckered skin, at most a small centre."""
    x, y = plane(size)
    image, attributes = skin(body, random, size)
    centre, radius = wound_place(random, attributes)
    irregularity = random.uniform(0.05, 0.26)
    light = attributes["light"]
    pink = random.uniform(0, 1)
    distance = outline(random, size, centre, radius * 0.92, irregularity)
    folds = random.integers(6, 14)
    depth = random.uniform(0.3, 1.0)
    sheen = random.uniform(0.25, 0.9)
    grain = random.uniform(0, np.pi)
    smooth, wander = fractal(random, size, 3, 2), fractal(random, size, 4, 3)
    creases = fractal(random, size, 30, 2)
    bright = 0.30 + 0.70 * image.mean(-1, keepdims=True) / 0.65
    inside = ramp(0.02, -0.02, distance + 0.015 * creases)
    around = np.exp(-np.maximum(distance, 0) / 0.18)
    rim = np.exp(-(((distance - 0.035 - 0.02 * wander) / 0.04) ** 2))
    blend(image, image * np.array([0.70, 0.58, 0.56]), random.uniform(0.35, 0.9) * rim)
    scar = np.array([0.94, 0.82, 0.77]) + pink * np.array([-0.08, -0.36, -0.30])
    paint = scar * np.clip(bright, 0.5, 1.05) * (1 + 0.05 * smooth + 0.03 * creases)[..., None]
    blend(image, paint, inside * (0.74 + 0.20 * smooth))
    border = np.exp(-(((distance + 0.025) / 0.018) ** 2))
    fresh = np.array([0.80, 0.38, 0.36]) + (1 - pink) * np.array([0.14, 0.40, 0.40])
    blend(image, fresh * np.clip(bright, 0.5, 1.0), random.uniform(0.3, 0.7) * border)
    angle = np.arctan2(y - centre[1], x - centre[0])
    pucker = np.sin(angle * folds + 3.0 * wander) * around * ramp(-0.10, 0.02, distance)
    along = x * np.cos(grain) + y * np.sin(grain)
    wrinkle = np.sin(along * random.uniform(50, 75) + 3.0 * wander) * inside
    residual = random.uniform(0, 1)
    spot = outline(
        random,
        size,
        centre + random.uniform(-0.06, 0.06, 2),
        radius * 0.22 * (0.4 + residual),
        0.2,
        0.02,
    )
    height = 0.022 * depth * pucker + 0.003 * wrinkle - 0.04 * ramp(0.04, -0.08, distance)
    if residual > 0.55:
        opened = ramp(0.015, -0.015, spot)
        blend(image, np.array([0.70, 0.20, 0.20]) * (1 + 0.15 * creases[..., None]), 0.9 * opened)
        height -= 0.02 * ramp(0.03, -0.03, spot)
    shade = relief(height, light)
    image *= (1 + 0.45 * np.clip(shade, -1, 1))[..., None]
    gloss = ramp(0.05, 0.45, relief(0.3 * smooth + height, light))
    blend(image, np.ones(3), 0.6 * sheen * inside * gloss)
    attributes.update(
        irregularity=irregularity,
        pink=pink,
        folds=int(folds),
        depth=depth,
        residual_value=residual,
        scar="pink" if pink > 0.5 else "pale",
        residual="small" if residual > 0.55 else "",
        ruler=random.random() < 0.4,
    )
    photograph(image, random, light, attributes["ruler"])
    return image, attributes


def first_free(spots, radius, placed):
    """The first spot where a circle keeps clear of all `placed` (spot, radius), or None."""
    for spot in spots:
        gaps = [np.hypot(*(spot - other)) - 1.25 * (radius + r) for other, r in placed]
        if not gaps or min(gaps) > 0:
            return spot
    return None


def mpox(body, random, size):
    """Umbilicated papules or pustules, some crusted, on red bases; softly focused."""
    x, y = plane(size)
    image, attributes = skin(body, random, size)
    count, light = int(random.integers(1, 12)), attributes["light"]
    stage = ("papular", "pustular", "crusted")[random.integers(3)]
    redness = random.uniform(0.35, 0.9)
    bright = 0.40 + 0.60 * image.mean(-1, keepdims=True) / 0.6
    largest = random.uniform(0.13, 0.30) / count**0.22
    placed = []
    height = np.zeros((size, size), np.float32)
    dome_colour = {
        "papular": [0.78, 0.36, 0.33],
        "pustular": [0.90, 0.74, 0.60],
        "crusted": [0.42, 0.22, 0.16],
    }[stage]
    for _ in range(count):
        spots = random.uniform(-0.68, 0.68, (12, 2))
        radius = largest * random.uniform(0.6, 1.0)
        pit = random.uniform(0.16, 0.30)
        warp = random.uniform(0, 6.3)
        waves = random.integers(2, 6)
        spot = first_free(spots, radius, placed)
        if spot is None:
            continue
        placed.append((spot, radius))
        u, v = x - spot[0], y - spot[1]
        r = np.hypot(u, v) / (radius * (1 + 0.05 * np.cos(waves * np.arctan2(v, u) + warp)))
        dome, pitted = ramp(1.15, 0.72, r), np.exp(-((r / pit) ** 2))
        blend(
            image,
            np.array([0.80, 0.27, 0.25]) * bright,
            redness * np.exp(-np.maximum(r - 0.9, 0) / 0.45),
        )
        blend(image, np.array(dome_colour) * np.clip(bright, 0.6, 1.1), 0.9 * dome)
        blend(image, np.array(dome_colour) * np.array([0.52, 0.38, 0.36]) * bright, 0.8 * pitted)
        height += radius * (0.42 * np.sqrt(np.clip(1.1 - r**2, 0, 1)) - 0.30 * pitted)
    rough = fractal(random, size, 14, 2) * (0.05 if stage == "crusted" else 0.015)
    image *= (
        1 + 0.55 * np.clip(relief(height + 0.10 * rough * (height > 0.005), light + np.pi), -1, 1)
    )[..., None]
    attributes.update(
        count=len(placed),
        stage=stage,
        redness=redness,
        largest=largest,
        amount="a few" if len(placed) < 5 else "many",
        ruler=random.random() < 0.12,
    )
    photograph(image, random, light, attributes["ruler"])
    return soften(image, 0.55), attributes


# ---- chest films


def chest(body, random, size, finding):
    """A frontal film; `finding` is "", "effusion" or "nodule".

    The patient's right is on the left of the picture.
    """
    x, y = plane(size)
    width = body.uniform(0.82, 1.0)
    lung = body.uniform(0.80, 0.88)
    heart = body.uniform(0.80, 1.15)
    ribs = body.uniform(3.9, 5.2)
    slope = body.uniform(0.20, 0.5)
    top = body.uniform(-0.86, -0.74)
    base = random.uniform(0.46, 0.66)
    dome = random.uniform(0.14, 0.24)
    clavicle = random.uniform(-0.10, 0.10)
    x = x - random.uniform(-0.06, 0.06)
    shoulder = ramp(-1.08, -0.66, y)
    tissue = ramp(
        0.05, -0.05, np.abs(x) - (0.30 + (width - 0.26) * shoulder) - 0.10 * ramp(0.2, -0.6, y)
    )
    film = (0.52 + 0.03 * fractal(random, size, 3, 2)) * tissue
    lungs, zones, fluid = np.zeros_like(film), {}, np.zeros_like(film)
    side = ("right", "left")[random.integers(2)]
    level = random.uniform(-0.12, 0.28)
    fog = random.uniform(0.75, 1.0)
    climb = random.uniform(0.28, 0.50)
    markings = fractal(random, size, 10, 4)
    for name, sign in (("right", -1), ("left", 1)):
        u = sign * x
        floor = base + (0.05 if name == "left" else 0.0) - dome * (1 - ((u - 0.36) / 0.36) ** 2)
        t = np.clip((y - top) / (base + 0.12 - top), 0, 1)
        outer = 0.30 + (lung * width - 0.30) * np.sqrt(1 - (1 - t) ** 2.2) * (1 - 0.05 * t**4)
        inner = 0.13 + 0.19 * (1 - t) ** 6
        zones[name] = (
            ramp(-0.02, 0.02, u - inner)
            * ramp(0.02, -0.02, u - outer)
            * ramp(0.012, -0.012, y - floor)
        )
        lungs += zones[name] * ramp(0, 0.04, t)
        if finding == "effusion" and name == side:
            # The fluid climbs both walls of the pleural space, higher and thinner on the outside.
            wall = np.exp(-np.maximum(outer - u, 0) / 0.13)
            meniscus = level - climb * wall - 0.06 * np.exp(-np.maximum(u - inner, 0) / 0.07)
            fluid = (
                (0.80 * ramp(-0.04, 0.05, y - meniscus) + 0.20 * ramp(0, 0.45, y - meniscus))
                * ramp(0.06, 0.14, u)
                * ramp(0.05, -0.04, u - outer - 0.02)
                * fog
            )
    film += lungs * (-0.39 + 0.035 * markings)
    hilum = np.exp(-(((np.abs(x) - 0.22) / 0.15) ** 2) - ((y + 0.02) / 0.26) ** 2)
    below = y - base + 0.30
    shadow = ramp(1.10, 0.80, np.hypot((x - 0.13 - 0.28 * below) / (0.34 * heart), below / 0.44))
    film += (0.56 - film) * shadow * 0.95
    lungs *= 1 - 0.9 * shadow
    film += lungs * hilum * (0.13 + 0.10 * markings)
    film += 0.20 * np.exp(-((x / 0.14) ** 2)) * tissue * ramp(-1.0, -0.5, y)
    film -= 0.10 * np.exp(-((x / 0.045) ** 2)) * ramp(0.0, -0.35, y) * ramp(-1.0, -0.8, y)
    film += 0.025 * np.sin(y * 24) * np.exp(-((x / 0.10) ** 2)) * tissue
    bow = np.abs(x) * (1 - 0.5 * np.abs(x)) * slope
    wave = np.abs(((y - bow + 0.9 * x**2 * slope * 2) * ribs) % 1 - 0.5)
    front = np.abs(((y - 0.55 * x**2 + slope * 1.1 * np.abs(x)) * ribs * 0.92 + 0.3) % 1 - 0.5)
    bone = (0.12 * ramp(0.23, 0.12, wave) + 0.06 * ramp(0.21, 0.11, front)) * ramp(-0.98, -0.8, y)
    film += bone * (0.20 + 0.80 * lungs) * tissue * ramp(0.06, 0.16, np.abs(x))
    collar = np.abs(
        y - (top + 0.10 + clavicle * 0.5 - 0.30 * (np.abs(x) - 0.12) + 0.18 * np.abs(x) ** 2)
    )
    film += (
        0.15 * ramp(0.05, 0.032, collar) * ramp(0.06, 0.12, np.abs(x)) * ramp(0.86, 0.7, np.abs(x))
    )
    film += (0.72 - film) * fluid
    attributes = {
        "width": width,
        "heart": heart,
        "ribs": ribs,
        "slope": slope,
        "lung": lung,
        "diaphragm": base,
        "build": named(width, 0.86, 0.94, ("slim", "medium", "broad")),
    }
    if finding == "effusion":
        attributes.update(
            side=side, level=level, extent=named(level, 0.01, 0.15, ("large", "moderate", "small"))
        )
    if finding == "nodule":
        attributes.update(nodule(film, random, size, side, lung * width))
    bright = random.uniform(-0.04, 0.06)
    contrast = random.uniform(0.95, 1.2)
    gamma = random.uniform(0.8, 1.25)
    film += random.uniform(0.7, 1.3) * 0.006 * fractal(random, size, 128, 1)
    film = np.clip(film * contrast + bright, 0, 1) ** gamma
    attributes.update(gamma=gamma, exposure=named(gamma, 0.93, 1.1, ("soft", "normal", "dark")))
    return np.repeat(film[..., None], 3, 2).astype(np.float32), attributes


def nodule(film, random, size, side, reach):
    """Add a round density to the lung on `side` of `film` (in place) and say what it is."""
    sign = -1 if side == "right" else 1
    radius = random.uniform(0.085, 0.16)
    density = random.uniform(0.30, 0.48)
    height = random.uniform(-0.46, 0.16)
    centre = np.array(
        [sign * random.uniform(0.36, (0.60 + 0.35 * (height + 0.46)) * reach), height]
    )
    field = outline(random, size, centre, radius, 0.08, 0.01)
    film += density * ramp(0.25 * radius, -0.55 * radius, field) * np.clip(1.25 - film, 0, 1)
    return {
        "side": side,
        "radius": radius,
        "density_value": density,
        "centre": tuple(centre.round(3)),
        "extent": named(radius, 0.108, 0.135, ("small", "medium", "large")),
        "zone": named(centre[1], -0.27, -0.05, ("upper", "middle", "lower")),
        "density": "dense" if density > 0.39 else "faint",
    }


# ---- fundi


def vessel_tree(random, size, disc, sign):
    """Coverage (size, size) of arteries and of veins, and points (N, 2) along both.

    They are branching walks that leave the disc and arch around the macula.
    """
    scale = 4 * size
    canvases = [Image.new("L", (scale, scale)) for _ in range(2)]
    pens = [ImageDraw.Draw(canvas) for canvas in canvases]
    points = []
    walks = []
    for vertical in (-1, 1):
        for kind in (0, 1):
            for direction, bend, width, length in ((-0.55, 1.0, 0.040, 30), (0.85, 0.3, 0.028, 16)):
                heading = np.arctan2(vertical, sign * direction) + random.uniform(-0.35, 0.35)
                root = (
                    disc[0] + random.uniform(-0.05, 0.05),
                    disc[1] + random.uniform(-0.05, 0.05),
                )
                turn = vertical * sign * -bend
                walks.append((kind, root, heading, turn, width * (0.8 + 0.4 * kind), length))
    while walks:
        kind, point, heading, bend, width, length = walks.pop()
        for step in range(length):
            heading += bend * -0.052 + random.normal(0, 0.085)
            ahead = (point[0] + 0.05 * np.cos(heading), point[1] + 0.05 * np.sin(heading))
            ends = [((a + 1) / 2 * scale, (b + 1) / 2 * scale) for a, b in (point, ahead)]
            pens[kind].line(ends[0] + ends[1], fill=255, width=max(1, round(width * scale / 2)))
            point, width = ahead, width * 0.968
            points.append(point)
            if random.random() < 0.13 and step > 2 and width > 0.013:
                fork = heading + random.choice([-1, 1]) * random.uniform(0.4, 0.8)
                walks.append((kind, point, fork, 0.0, width * 0.62, int((length - step) * 0.7)))
    covered = []
    for canvas in canvases:
        covered.append(np.asarray(canvas.resize((size, size), Image.BOX), np.float32) / 255)
    return *covered, np.array(points)


def fundus(body, random, size, bleeding):
    """The back of the eye in its round field; with `bleeding`, with haemorrhages."""
    x, y = plane(size)
    pigment, eye = body.uniform(0, 1), ("left", "right")[random.integers(2)]
    sign = 1 if eye == "right" else -1
    disc = (sign * random.uniform(0.40, 0.58), random.uniform(-0.10, 0.10))
    radius = random.uniform(0.135, 0.18)
    cup = random.uniform(0.25, 0.6)
    oval = random.uniform(0.84, 1.0)
    colour = np.array([0.86, 0.42, 0.20]) + pigment * np.array([-0.22, -0.19, -0.09])
    choroid, streak = fractal(random, size, 4, 3), fractal(random, size, 7, 2)
    image = (colour * (1 + 0.055 * choroid + 0.03 * streak)[..., None]).astype(np.float32)
    macula = (disc[0] - sign * random.uniform(0.62, 0.76), disc[1] + random.uniform(0.0, 0.08))
    dark = random.uniform(0.25, 0.5)
    far = np.hypot(x - macula[0], y - macula[1])
    spot = dark * np.exp(-((far / 0.19) ** 2)) + 0.3 * np.exp(-((far / 0.06) ** 2))
    blend(image, colour * np.array([0.48, 0.36, 0.38]), spot)
    near = np.hypot((x - disc[0]) / oval, y - disc[1])
    blend(image, np.array([0.98, 0.70, 0.40]), 0.35 * np.exp(-np.maximum(near - radius, 0) / 0.09))
    blend(image, np.array([0.97, 0.80, 0.50]), 0.92 * ramp(radius + 0.025, radius - 0.025, near))
    blend(image, np.array([1.00, 0.94, 0.76]), ramp(radius * cup + 0.03, radius * cup - 0.03, near))
    artery, vein, points = vessel_tree(random, size, disc, sign)
    clear = 1 - 0.75 * np.exp(-((far / 0.16) ** 2))
    blend(image, colour * np.array([0.74, 0.42, 0.42]), 0.80 * artery * clear)
    blend(image, colour * np.array([0.52, 0.26, 0.34]), 0.85 * vein * clear)
    attributes = {
        "pigment": pigment,
        "eye": eye,
        "disc": disc,
        "disc_radius": radius,
        "cup": cup,
        "macula": dark,
        "hue": named(pigment, 0.33, 0.66, ("orange", "red", "brown")),
    }
    if bleeding:
        attributes.update(haemorrhages(image, random, disc, points, colour))
    field = random.uniform(0.90, 0.98)
    vignette = random.uniform(0.15, 0.5)
    glow = random.uniform(0, 2 * np.pi)
    centre = np.hypot(x, y)
    image *= (1 - vignette * (centre / field) ** 3 + 0.10 * (x * np.cos(glow) + y * np.sin(glow)))[
        ..., None
    ]
    image *= np.float32(random.uniform(0.88, 1.12))
    image *= ramp(field + 0.015, field - 0.015, centre)[..., None]
    cut = random.uniform(0.72, 1.3)
    image *= ramp(cut + 0.01, cut - 0.01, np.abs(y))[..., None]
    attributes.update(vignette=vignette, field=field)
    return soften(image, 0.65), attributes


def haemorrhages(image, random, disc, points, colour):
    """Paint dark red bleedings (in place) and say what they are.

    Most lie beside a vessel: blots among dots, or flames that follow the nerve fibres away from
    the disc. points: (N, 2), along the vessels.
    """
    size = image.shape[0]
    count = int(random.integers(6, 32))
    form = ("blot", "flame-shaped")[random.integers(2)]
    scale, largest = 4 * size, random.uniform(0.045, 0.075)
    within = points[np.hypot(points[:, 0], points[:, 1]) < 0.85]
    canvas = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(canvas)
    for _ in range(count):
        turn = random.uniform(0, 2 * np.pi)
        away = 0.85 * np.sqrt(random.uniform(0.02, 1))
        spot = away * np.array([np.cos(turn), np.sin(turn)])
        beside = within[random.integers(len(within))] + random.normal(0, 0.05, 2)
        if random.random() < 0.7:
            spot = beside
        radius = largest * random.uniform(0.35, 1.0) ** 1.5
        along = np.arctan2(spot[1] - disc[1], spot[0] - disc[0])
        long, short = (2.3, 0.42) if form == "flame-shaped" else (1.1, 0.9)
        angles = np.arange(48) / 48 * 2 * np.pi
        waves = np.zeros_like(angles)
        for wave in (2, 3, 5):
            waves += random.normal(0, 0.25 / wave) * np.cos(wave * angles + random.uniform(0, 6.3))
        if form == "flame-shaped":  # its ends are frayed
            waves += 0.22 * np.cos(angles) ** 6 * random.normal(0, 1, len(angles))
        edge = radius * (1 + waves)
        u, v = edge * long * np.cos(angles), edge * short * np.sin(angles)
        px = spot[0] + u * np.cos(along) - v * np.sin(along)
        py = spot[1] + u * np.sin(along) + v * np.cos(along)
        corners = (np.stack([px, py], axis=1) + 1) / 2 * scale
        strength = round(255 * random.uniform(0.7, 1.0))
        pen.polygon([tuple(corner) for corner in corners.tolist()], fill=strength)
    stain = np.asarray(canvas.resize((size, size), Image.BOX), np.float32) / 255
    stain = gaussian_filter(stain, 0.5 * size / 128)
    blend(image, colour * np.array([0.48, 0.15, 0.18]), 0.92 * stain)
    return {
        "count": count,
        "largest": largest,
        "form": form,
        "amount": "a few" if count < 14 else "many",
    }


# ---- pictures, folders


def is_true(wording, attributes):
    """Whether every field that a wording names is true of the picture."""
    for _, field, _, _ in string.Formatter().parse(wording):
        if field and not attributes.get(field):
            return False
    return True


def draw(kind, seed, size=128):
    """Draw one phantom.

    kind: a key of KINDS. seed: any integer; 2k and 2k+1 are one patient. size: pixels a side.
    Returns a uint8 array (size, size, 3), a caption in lower case of at most 75 bytes, and a dict
    of the factors drawn.
    """
    body, random = keyed("patient", kind, seed // 2), keyed("picture", kind, seed)
    painter = {
        "inflammatory ulcer": inflammatory,
        "remodelling ulcer": remodelling,
        "mpox lesion": mpox,
        "normal chest": functools.partial(chest, finding=""),
        "pleural effusion": functools.partial(chest, finding="effusion"),
        "lung nodule": functools.partial(chest, finding="nodule"),
        "normal fundus": functools.partial(fundus, bleeding=False),
        "retinal haemorrhages": functools.partial(fundus, bleeding=True),
    }[kind]
    image, attributes = painter(body, random, size)
    wordings = [wording for wording in CAPTIONS[kind] if is_true(wording, attributes)]
    caption = wordings[random.integers(len(wordings))].format(**attributes)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), caption, attributes


def write_one(job):
    """Draw and save one picture of write(); returns its row of metadata.csv."""
    folder, kind, seed, size = job
    image, caption, _ = draw(kind, seed, size)
    slug = kind.replace(" ", "-")
    name = f"{slug}-{seed:07d}.png"
    Image.fromarray(image).save(pathlib.Path(folder) / name, optimize=True)
    return {
        "file_name": name,
        "text": caption,
        "label": kind,
        "modality": KINDS[kind],
        "patient_id": f"{slug}-{seed // 2}",
    }


def write(folder, count, seed=0, kinds=None, size=128, processes=1):
    """Draw `count` pictures, the kinds (default: all) in turn, into `folder` with metadata.csv.

    The pictures of a kind have the seeds from `seed` on. A kind named twice comes twice as often.
    """
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    seeds = collections.Counter()
    jobs = []
    for kind in itertools.islice(itertools.cycle(kinds or KINDS), count):
        jobs.append((folder, kind, seed + seeds[kind], size))
        seeds[kind] += 1
    if processes > 1:
        with multiprocessing.Pool(processes) as pool:
            rows = pool.map(write_one, jobs, chunksize=64)
    else:
        rows = [write_one(job) for job in jobs]
    with open(pathlib.Path(folder) / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["file_name", "text", "label", "modality", "patient_id"])
        table.writeheader()
        table.writerows(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first picture of each kind"
    )
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument(
        "--kinds",
        help="comma list, twice for twice as many, of: " + ", ".join(KINDS) + " (default: all)",
    )
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    kinds = list(KINDS)
    if args.kinds:
        kinds = [kind.strip() for kind in args.kinds.split(",")]
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        parser.error(f"--kinds: no such kind: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    write(args.out, args.count, args.seed, kinds, args.size, args.processes)


if __name__ == "__main__":
    main()
