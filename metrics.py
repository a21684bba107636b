"""From image files to numbers: reading, listing, features, distances, calibration, and the page that shows them.

Everything above imports from here; this file imports none of ours. Files, pixels or features go in; pixels, features,
numbers or HTML come out: no prompts, schedulers or optimizers. In this order:
    errors, files, seeds   fail, replacing, write_file, copy_file, need, generator, guarded, pick_device
    reading and listing    read_image, list_images, split_rows, fit_square, load_pixels, near_duplicates
    features               texture, fid_inception, load_features, extract
    image against image    lpips_matrix, ssim, ms_ssim, ssim_matrix
    set against set        frechet, kid, precision_recall, joint_matrices, large_values and the table METRICS
    yardstick              permutation_draws, half_draws, yardstick
    calibration            nearest, copy_distances, copy_chances, calibrate, judge, measure_reference, score, refusals
    the quality head       quality_features, apply_selector, load_selector
    the page               page, table, thumbnail, curve
"""

import argparse
import base64
import collections
import contextlib
import csv
import functools
import hashlib
import html
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import string
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from tqdm import tqdm

# ---------------------------------------------------------------- errors, flags, files, seeds, devices


def fail(message):
    """Print what is wrong in one line on stderr and end with exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and every default that says something."""

    def _get_help_string(self, action):
        if action.default in (None, False, "", []) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Flags(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which reads flags from @file.

    In an @file each line is a flag with its value; blank lines and lines that start with # are skipped.
    """

    def __init__(self, description, **settings):
        super().__init__(
            description=description,
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            **settings,
        )

    def convert_arg_line_to_args(self, line):
        line = line.strip("\ufeff \t")
        if not line or line.startswith("#"):
            return []
        return [re.sub(r"^(--[\w-]+)\s+", r"\1=", line)]

    def parse_args(self, args=None, namespace=None):
        try:
            return super().parse_args(args, namespace)
        except (UnicodeDecodeError, RecursionError):
            fail("an @file of flags is not a text file, or names itself")

    def error(self, message):
        fail(message)


def number(low, high):
    """An argument type: a number from `low` to `high`, a whole one where both bounds are whole numbers."""
    whole = isinstance(low, int) and isinstance(high, int)

    def convert(text):
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # NaN fails this as well
            kind = "whole number" if whole else "number"
            raise argparse.ArgumentTypeError(f"{text}: give a {kind} from {low:g} to {high:g}")
        return value

    return convert


def data_set(text):
    """An argument type: the path of a folder of images or of a table."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return text


def existing_file(text):
    """An argument type: the path of a file."""
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return text


def add_common_flags(group):
    """--device, --precision and --seed, which mean the same in every script."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    precisions = ["auto", "fp32", "bf16", "fp16"]
    group.add_argument("--precision", choices=precisions, default="auto", help="of the networks")
    group.add_argument("--seed", type=number(0, 2**63 - 1), default=0, help="of every random draw")


@contextlib.contextmanager
def replacing(path):
    """Open a binary file that takes the place of `path` only once it is whole and on the disk."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name[:200]}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        wrapped = isinstance(error, RuntimeError) and isinstance(
            error.__context__, OSError
        )  # torch.save: a full disk
        cause = error.__context__ if wrapped else error
        if isinstance(cause, OSError) and cause.filename is None:
            cause.filename = str(path)
        raise cause


def write_file(path, content):
    """Write bytes or text, atomically."""
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def copy_file(source, target):
    """Copy a file, atomically."""
    with replacing(target) as file, open(source, "rb") as original:
        shutil.copyfileobj(original, file)


def need(package, purpose):
    """Import and return an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f"{purpose}: needs the package {package}: pip install {package}")


def generator(seed, *key):
    """A torch.Generator on the CPU for one purpose: the same (seed, key) gives the same numbers everywhere."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def command(script, *words):
    """A command to type next: `script` of ours, called from the folder that this one was called from."""
    return shlex.join(
        ["python", os.path.join(os.path.dirname(sys.argv[0]), script), *map(str, words)]
    )


def run_script(main, parse_args):
    """Run main(parse_args()); what a user, a disk or a signal did ends in one line, what a bug did in a traceback."""
    getattr(sys.stdout, "reconfigure", lambda **_: None)(
        errors="replace"
    )  # never fail on an unprintable character
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BadImage as error:
        fail(error)
    except torch.cuda.OutOfMemoryError:
        others = [name for name in ("gradient_checkpointing", "precision") if name in vars(args)]
        flags = " or --".join(["a smaller --batch-size", *others]).replace("_", "-")
        fail(f"the GPU's memory is full: try {flags}")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        fail("the memory is full: try a smaller --resolution or --batch-size")
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}" if error.strerror and error.filename else error)


def pick_device(name):
    """The torch.device for auto|cpu|cuda|cuda:N; auto is the GPU with the most free memory, else the CPU."""
    count = torch.cuda.device_count() if name != "cpu" else 0
    known = ["cpu"] + ["cuda"] * (count > 0) + [f"cuda:{n}" for n in range(count)]
    if name == "auto":
        free = {f"cuda:{n}": torch.cuda.mem_get_info(n)[0] for n in range(count)}
        return torch.device(max(free, key=free.get, default="cpu"))
    if name not in known:
        fail(f"--device {name}: this machine has {', '.join(known)}")
    return torch.device(name)


# ---------------------------------------------------------------- reading one image

MAX_PIXELS = 178_956_970  # where Pillow itself refuses to open an image
TOO_LARGE = "has more than 178 megapixels"
FORMATS = (
    "PNG",
    "JPEG",
    "JPEG2000",
    "GIF",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
)  # never EPS: it runs ghostscript
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".jp2",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".dcm",
    ".dicom",
    *VOLUME_SUFFIXES,
)
NEEDS = {
    "pydicom": "DICOM files need pydicom: pip install pydicom",
    "nibabel": "NIfTI and .mgz files need nibabel: pip install nibabel",
}
CODECS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
WINDOWS = {
    "lung": (-600, 1500),
    "soft": (40, 400),
    "mediastinum": (50, 350),
    "brain": (40, 80),
    "stroke": (35, 30),
    "subdural": (75, 215),
    "bone": (400, 1800),
    "liver": (60, 160),
    "angio": (300, 600),
}  # Hounsfield units
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
for quiet in (
    "PIL",
    "pydicom",
    "nibabel",
):  # they tell of every oddity; pydicom quotes the header, names included
    warnings.filterwarnings("ignore", module=quiet)


class BadImage(Exception):
    """An image that cannot be read: `.path` says which, `.why` says why."""

    def __init__(self, path, why):
        super().__init__(path, why)
        self.path, self.why = str(path), str(why)

    def __str__(self):
        return f"{self.path}: {self.why}"


def read_image(path, slice=None, window=None, value_range=None, allow_burned_in=False):
    """Read one image of any kind as an upright 8-bit PIL image of mode "RGB".

    The content decides the kind, not the suffix. slice: frame of a multi-frame DICOM or slice of a volume, a number or
    "coronal", "sagittal:12" (default: the middle one, axial); of a 4-D volume the first is taken. window: what becomes
    black to white, (centre, width) in the file's units, "40,400", or a name of WINDOWS, which only CTs and volumes obey
    (default: the DICOM's own, else percentiles). value_range: (low, high) that become black and white where no window
    is asked for, in all but 8-bit rasters and colours (default of 16-bit and float rasters: their own range). A DICOM
    with BurnedInAnnotation YES may show a name: refused unless allow_burned_in. Raises BadImage.
    """
    return read_upright(path, slice, window, value_range, allow_burned_in).convert("RGB")


@np.errstate(all="ignore")  # damaged numbers overflow
def read_upright(path, slice=None, window=None, value_range=None, allow_burned_in=False):
    """What read_image does, but grey images stay of mode "L": a third of the work for what comes after."""
    raster = False
    try:
        if os.path.isdir(path):
            raise BadImage(path, "is a folder, not an image")
        if not os.path.getsize(path):
            raise BadImage(path, "is empty")
        if str(path).lower().endswith(VOLUME_SUFFIXES):
            return read_volume(path, slice, window, value_range)
        if looks_like_dicom(path):
            return read_dicom(path, slice, window, value_range, allow_burned_in)
        raster = True
        return read_raster(path, value_range)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(path, "is not an image") from None
    except Image.DecompressionBombError:
        raise BadImage(path, TOO_LARGE) from None
    except (
        Exception
    ) as error:  # decoders raise nearly anything on damaged files, pydicom's quoting the header
        why = (
            getattr(error, "strerror", None)
            or f"is damaged ({raster and str(error) or type(error).__name__})"
        )
        raise BadImage(path, " ".join(why.split())) from None


def read_raster(path, value_range):
    """PNG, JPEG, TIFF and the like; the first frame of several; transparency on black."""
    with (
        open(path, "rb") as file,
        Image.open(file, formats=FORMATS) as image,
    ):  # by name Pillow maps some TIFFs askew
        if (
            image.format == "PNG"
        ):  # Pillow decodes pixels whose checksum is wrong; verify() is where it looks
            with Image.open(path, formats=("PNG",)) as twin:
                twin.verify()
        ImageOps.exif_transpose(image, in_place=True)
        if is_deep(image):  # convert would clip these at 255
            values, inverted = (
                np.asarray(image).astype(np.float64),
                image.format == "TIFF" and image.tag_v2.get(262) == 0,
            )
            grey = grey_image(values, *(value_range or percentile_range(values, 0, 100)))
            return (
                ImageOps.invert(grey) if inverted else grey
            )  # Pillow inverts those of 8 bits itself
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert(
                "RGB"
            )
        return image.convert("L" if image.mode in ("1", "L") else "RGB")


def is_deep(image):
    """True for grey images of 16 or 32 bits or of floats."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def grey_image(values, low, high):
    """(H, W) numbers -> image of mode "L": `low` and below is black, `high` and above white."""
    unit = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return Image.fromarray((unit.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def percentile_range(values, low, high):
    """(low, high) percentiles of the finite values, or their whole range where those two coincide."""
    finite = values[np.isfinite(values)]
    ends = np.percentile(finite, (low, high)) if finite.size else (0, 1)
    return ends if ends[1] > ends[0] else (finite.min(initial=0), finite.max(initial=1))


def pick_window(window):
    """(centre, width) of a window: a name of WINDOWS, "centre,width" or such a pair; None stays None."""
    if window is None or not isinstance(window, str):
        return window
    try:
        centre, width = WINDOWS.get(window) or map(float, window.split(","))
    except ValueError:
        width = 0
    if not width > 0:
        fail(
            f"--window {window}: give centre,width in the files' units, such as 40,400, or {', '.join(WINDOWS)}"
        )
    return centre, width


def square_pixels(image, row_spacing, column_spacing):
    """Stretch the coarser axis of an image whose pixels are `row_spacing` high and `column_spacing` wide."""
    ratio = float(row_spacing) / float(column_spacing) if row_spacing and column_spacing else 1.0
    if abs(ratio - 1) < 0.01 or not 0.02 < ratio < 50:
        return image
    width, height = round(image.width * max(1, 1 / ratio)), round(image.height * max(1, ratio))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def looks_like_dicom(path):
    """True for a DICOM file by its content, with or without the 128-byte preamble."""
    with open(path, "rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or head[:4] in (
        b"\2\0\0\0",
        *(bytes((8, 0, tag, 0)) for tag in (0, 5, 8, 0x16, 0x18)),
    )


def pick_slice(path, wanted, count):
    """The index of the slice named, or of the middle one; BadImage when there is none of that number."""
    if wanted is not None and not 0 <= wanted < count:
        raise BadImage(path, f"has slices 0 to {count - 1}, not {wanted}")
    return count // 2 if wanted is None else wanted


def open_dicom(path, **how):
    """A DICOM file as a pydicom Dataset, read leniently and without a word of its header said."""
    if importlib.util.find_spec("pydicom") is None:
        raise BadImage(path, NEEDS["pydicom"])
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    data = pydicom.dcmread(path, force=True, **how)
    if (
        "TransferSyntaxUID" not in data.file_meta
    ):  # no preamble: implicit or explicit, little endian
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" + (
            ".1" if not data.original_encoding[0] else ""
        )
    return data


def read_dicom(path, slice, window, value_range, allow_burned_in):
    """One frame of a DICOM file: rescale, then window, then MONOCHROME1, then square pixels (DICOM PS3.3 C.11)."""
    data = open_dicom(path)
    if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise BadImage(path, "is a DICOM file without pixels")
    if data.Rows * data.Columns > MAX_PIXELS:
        raise BadImage(path, TOO_LARGE)
    if str(data.get("BurnedInAnnotation")).strip().upper() == "YES" and not allow_burned_in:
        raise BadImage(
            path, "says that text is burnt in, maybe a name: refused without --allow-burned-in"
        )
    count = int(data.get("NumberOfFrames") or 1)
    values, padding = dicom_frame(path, data, pick_slice(path, split_slice(slice)[1], count))
    if values.ndim == 3:
        bits = (
            8 * values.itemsize if "PALETTE" in data.PhotometricInterpretation else data.BitsStored
        )
        image = Image.fromarray((values >> max(bits - 8, 0)).astype(np.uint8))
    else:
        if window in WINDOWS and data.get("Modality", "CT") != "CT":
            window = None
        elif (
            window
            and data.get("Modality") == "CT"
            and not (
                "ModalityLUTSequence" in data
                or "RescaleSlope" in data
                and "RescaleIntercept" in data
            )
        ):
            raise BadImage(
                path,
                "is a CT without RescaleSlope: its values are no Hounsfield units for a --window",
            )
        own = window or value_range or own_window(data) or data.get("VOILUTSequence")
        if count > 1 and not own:
            value_range = frames_range(path, os.path.getmtime(path))
        image = dicom_grey(data, values, padding, pick_window(window), value_range)
    spacing = (
        data.get("PixelSpacing") or data.get("ImagerPixelSpacing") or data.get("PixelAspectRatio")
    )
    return square_pixels(image, *spacing) if np.size(spacing) == 2 else image


def own_window(data):
    """(centre, width) of a DICOM file's first window, None where it has none, or one that is too narrow for its function."""
    found = [data.get(name) for name in ("WindowCenter", "WindowWidth")]
    centre, width = (
        np.ravel([] if value is None else value)[:1].astype(float).tolist() for value in found
    )
    steps = "PixelData" in data and data.get("VOILUTFunction") not in ("LINEAR_EXACT", "SIGMOID")
    return (*centre, *width) if centre and width and width[0] >= (1 if steps else 1e-9) else None


def dicom_frame(path, data, frame):
    """One frame: (rescaled (H, W) values, True where the scanner wrote nothing), or (colours (H, W, 3), None)."""
    from pydicom.pixels import apply_color_lut, apply_rescale, pixel_array

    for groups, index in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", frame),
    ):
        for name in (
            "PixelValueTransformationSequence",
            "FrameVOILUTSequence",
            "PixelMeasuresSequence",
        ):
            if len(data.get(groups) or ()) > index and data[groups][index].get(name):
                data.update(
                    data[groups][index][name][0]
                )  # enhanced objects keep these tags per frame
    for name in ("RescaleSlope", "RescaleIntercept"):
        if name in data and data[name].is_empty:
            del data[name]  # blanked by who took the names out
    syntax = data.file_meta.TransferSyntaxUID
    if syntax == JPEG_EXTENDED:  # some 12-bit encoders end the scan at coefficient 0; it has all 64
        data.PixelData = re.sub(rb"(?s)(\xff\xda\0\x08\x01..\0)\0\0", b"\\1?\0", data.PixelData)
    try:
        values = pixel_array(data, index=frame)
    except RuntimeError:  # every decoder there is gave up, or there is none
        known = syntax.name if syntax.is_transfer_syntax else "transfer syntax"
        raise BadImage(path, f"no decoder here reads its {known}: {CODECS}") from None
    if data.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, data)
    if values.ndim == 3:
        return values, None
    first, ends = data.get("PixelPaddingValue"), (1, 0)
    if first is not None:  # as unsigned numbers, often, of signed pixels
        ends = sorted(
            np.array([first, data.get("PixelPaddingRangeLimit", first)]).astype(values.dtype)
        )
    return apply_rescale(values, data), (values >= ends[0]) & (values <= ends[1])


@functools.lru_cache(maxsize=64)
def frames_range(path, modified):
    """Percentiles over at most 16 frames of a DICOM file without a window; `modified` is its time, for the cache."""
    data = open_dicom(path)
    count, step = int(data.NumberOfFrames), 1 + 16 * data.Rows * data.Columns // 2**23
    frames = [
        dicom_frame(path, data, n)
        for n in np.linspace(0, count - 1, min(count, 16)).astype(int).tolist()
    ]
    return percentile_range(
        np.concatenate([values[~padding][::step] for values, padding in frames]), 0.5, 99.5
    )


def dicom_grey(data, values, padding, window, value_range):
    """Rescaled (H, W) values -> image of mode "L": as asked for, else by the file's own window, else by percentiles."""
    function, own = data.get("VOILUTFunction") or "LINEAR", own_window(data)
    if window is None and value_range is not None:
        low, high = value_range
    elif window is None and data.get("VOILUTSequence"):
        count, first, bits = data.VOILUTSequence[0].LUTDescriptor
        table = data.VOILUTSequence[0].LUTData  # pydicom's apply_voi wraps those of 8 bits
        if isinstance(table, bytes):
            table = np.frombuffer(table, "u1" if len(table) == (count or 2**16) else "<u2")
        values = np.ravel(table)[np.clip(values - float(first), 0, np.size(table) - 1).astype(int)]
        low, high = 0, 2**bits - 1
    elif window is not None or own:
        centre, width = map(float, window or own)
        low, high = centre - width / 2, centre - 1 + width / 2
        if function == "LINEAR_EXACT" or "PixelData" not in data:  # float pixels: no step to count
            high = centre + width / 2
        if window is None and function == "SIGMOID":
            values, low, high = 1 / (1 + np.exp(-4 * (values - centre) / width)), 0, 1
    else:
        low, high = percentile_range(values[~padding].astype(np.float64), 0.5, 99.5)
    image = grey_image(values.astype(np.float64), low, high)
    image = ImageOps.invert(image) if data.PhotometricInterpretation == "MONOCHROME1" else image
    image.paste(0, mask=Image.fromarray(padding))
    return image


def read_volume(path, slice, window, value_range):
    """One slice of a NIfTI or FreeSurfer volume: anterior or superior up, the patient's left on the image's left."""
    axis, number = split_slice(slice)
    values, zooms, ends = load_volume(path, os.path.getmtime(path))
    chosen = values.take(pick_slice(path, number, values.shape[axis]), axis).astype(np.float64)
    if window:
        centre, width = pick_window(window)
        value_range = centre - width / 2, centre + width / 2
    column_spacing, row_spacing = (zooms[n] for n in range(3) if n != axis)
    return square_pixels(
        grey_image(np.rot90(chosen), *(value_range or ends)), row_spacing, column_spacing
    )


def split_slice(wanted):
    """(axis, number) of a slice: 12, "coronal:12" or "coronal"; the number may be None, for the middle one."""
    words = "" if wanted is None else str(wanted)
    name = next((name for name in AXES if words.startswith(name)), "")
    number = words[len(name) :].lstrip(":")
    return AXES[name or "axial"], int(number) if number else None


def open_volume(path):
    """The header of a NIfTI or FreeSurfer file; its values are read when asked for."""
    if importlib.util.find_spec("nibabel") is None:
        raise BadImage(path, NEEDS["nibabel"])
    import nibabel

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    volume = nibabel.load(path)
    size = np.prod(volume.shape[:3], dtype=float)
    if volume.ndim < 2 or not size:
        raise BadImage(path, f"has shape {volume.shape}")
    if size > 2 * MAX_PIXELS:
        raise BadImage(
            path,
            f"has {size / 1e6:.0f} million voxels, more than {2 * MAX_PIXELS / 1e6:.0f} million: cut it, or "
            "save its slices as images",
        )
    return volume.slicer[(*np.s_[:, :, :], *[0] * (volume.ndim - 3))] if volume.ndim > 3 else volume


@functools.lru_cache(maxsize=2)
def load_volume(path, modified):
    """(values (right, anterior, superior), their three spacings, (black, white)): one range for all of its slices.

    Black is the 1st percentile, white the 99th of what is brighter than the mean, which leaves the air out.
    """
    import nibabel

    volume = nibabel.as_closest_canonical(open_volume(path))
    values, zooms = (
        np.atleast_3d(np.asanyarray(volume.dataobj)),
        (*volume.header.get_zooms(), 1.0)[:3],
    )
    if values.dtype.kind not in "biuf":
        raise BadImage(path, "holds colours or complex numbers, not grey values")
    sample = values[tuple([np.s_[:: 1 + int((values.size / 2**23) ** (1 / 3))]] * 3)].astype(
        np.float32
    )
    bright = sample[sample > sample[np.isfinite(sample)].mean()]
    low, high = percentile_range(sample, 1, 99)
    return (
        values,
        zooms,
        (low, max(high, percentile_range(bright, 1, 99)[1]) if bright.size else high),
    )


# ---------------------------------------------------------------- listing a data set

COLUMNS = {
    "image": ("file_name", "path", "image", "image_path", "file"),
    "caption": ("text", "caption", "prompt"),
    "label": ("label", "labels", "class"),
    "group": ("patient_id", "patient", "subject", "group"),
}


@dataclass
class Row:
    """One image of a data set, as a folder or a line of a table names it.

    path is absolute; file_name is as the table has it, or relative to the folder. Texts are "" where unknown. fields
    holds the table's columns; slice is that of a volume or multi-frame DICOM, for read_image. split is "train", "val"
    or "test" once split_rows was here.
    """

    path: str
    file_name: str
    caption: str = ""
    label: str = ""
    group: str = ""
    fields: dict = field(default_factory=dict)
    slice: int = None
    split: str = ""

    # until no reader takes rows for dicts
    def __getitem__(self, name):
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name, value):
        setattr(self, name, value)

    def __contains__(self, name):
        return hasattr(self, name)

    def get(self, name, default=None):
        return getattr(self, name, default)

    def keys(self):
        return vars(self).keys()

    def __ior__(self, values):
        vars(self).update(values)
        return self

    def __or__(self, values):
        return Row.of({**vars(self), **values})

    @classmethod
    def of(cls, values):
        row = cls(values["path"], values["file_name"])
        vars(row).update(values)
        return row


BAD_SHARE = (
    0.05  # of a data set's images may be missing or unreadable; more is a mistake to mend first
)


def list_images(
    data,
    image_column=None,
    caption_column=None,
    label_column=None,
    group_column=None,
    prompt=None,
    slices="middle",
    strict=False,
):
    """List a data set: a folder, class subfolders, a folder with metadata.csv/.jsonl/manifest.csv, or such a table.

    Returns a list of rows, sorted by file name for folders and in the table's order for tables: {"path": absolute,
    "file_name": as in the table or relative to the folder, "caption", "label", "group": str, "" when unknown,
    "fields": the row's columns, {} in folders, "slice": for read_image}. The caption is `prompt` with its {fields}
    filled in, else the caption column, else "". slices: middle, every:N or all of a volume or multi-frame DICOM, each a
    row; behind "coronal:" or "sagittal:" those of that plane. Where no group is known, slices get their file as one and
    DICOM files one that keeps a patient's together. Files that are not there, and those for which a package is missing,
    are told of and left out up to 5 %; more (but where `strict` is None), or any where it is True, end in fail(), as do a
    wrong path, column, field. Where files were left out, a row's "lost" says (how many, of how many).
    """
    if not os.path.exists(data):
        fail(f"{data}: no such file or folder")
    flags = {
        "image": image_column,
        "caption": caption_column,
        "label": label_column,
        "group": group_column,
    }
    tables = [
        os.path.join(data, name) for name in ("metadata.csv", "metadata.jsonl", "manifest.csv")
    ]
    table = (
        next((name for name in tables if os.path.isfile(name)), None)
        if os.path.isdir(data)
        else data
    )
    if table:
        rows, columns, lost = list_table(table, flags, strict)
    else:
        rows, columns, lost = list_folder(data), {}, 0
        for role, name in flags.items():
            if name is not None:
                fail(
                    f"--{role}-column {name}: {data} has no metadata.csv that could have this column"
                )
    if not rows:
        fail(f"{data}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
    fill_captions(data, rows, columns, prompt)
    return spread_slices(*check_medical(data, rows, lost, strict), slices)


def note(message):
    """Say something on stderr, once under torchrun."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def leave_out(bad, count, strict, message):
    """Say that `bad` of `count` images are left out; fail() where that is more than 5 %, or any and `strict`; never where
    that is None."""
    if bad:
        (fail if strict or strict is not None and bad > BAD_SHARE * count else note)(message)


def list_folder(folder):
    """Rows of the images below a folder; the label is the name of the first subfolder."""
    rows, odd = [], []
    for place, folders, names in os.walk(folder, followlinks=True):
        links = {
            name for name in folders if os.path.islink(os.path.join(place, name))
        }  # one that leads up goes round for ever
        above = (
            set(map(os.path.realpath, (place, *Path(os.path.abspath(place)).parents)))
            if links
            else ()
        )
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and not (name in links and os.path.realpath(os.path.join(place, name)) in above)
        )
        for name in names:
            path = os.path.join(os.path.abspath(place), name)
            if name.startswith(".") or not os.path.isfile(
                path
            ):  # hidden files and AppleDouble's ._x
                continue
            bare = os.path.splitext(name)[1].strip(".0123456789").lower() in (
                "",
                "ima",
            )  # scanners name by numbers
            if not name.lower().endswith(IMAGE_SUFFIXES) and not (bare and looks_like_dicom(path)):
                continue
            file_name = Path(os.path.relpath(path, os.path.abspath(folder))).as_posix()
            label = file_name.split("/")[0] if "/" in file_name else ""
            rows.append(Row(path=path, file_name=file_name, label=label))
            odd += [ascii(file_name)] * (file_name.encode(errors="replace").decode() != file_name)
    if odd:  # no table could name them
        fail(
            f"{folder}: {len(odd)} files have names that are not UTF-8, such as {odd[0]}: rename them"
        )
    return sorted(rows, key=lambda row: row["file_name"])


def read_table(path, caption_column=None):
    """The rows of a CSV or JSONL file as dicts of strings, all with the same keys. Commas that should have been quoted are
    the caption's."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        fail(
            f"{path}: is not a UTF-8 text file: save the table as CSV UTF-8, or give a folder of images"
        )
    if str(path).lower().endswith((".jsonl", ".json", ".ndjson")):
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError):
                fail(f"{path}: line {number} is not JSON")
        if not all(isinstance(row, dict) for row in rows):
            fail(f"{path}: every line must be one JSON object")
    else:
        rows = read_csv(path, text, caption_column)
    rows = [{str(key).strip(): cell_text(cell) for key, cell in row.items()} for row in rows]
    names = dict.fromkeys((name for row in rows for name in row), "")  # JSON's rows may lack some
    return [names | row for row in rows]


def cell_text(cell):
    """A cell of a table as text; of JSON's several values A|B, 12.0 as 12, null as nothing."""
    if isinstance(cell, list):
        return "|".join(map(cell_text, cell))
    cell = int(cell) if isinstance(cell, float) and cell.is_integer() else cell
    return "" if cell is None else str(cell).strip()


def read_csv(path, text, caption_column):
    """The rows of a CSV text as dicts; surplus cells are joined to the caption's where that reading is safe.

    It is safe where the caption is the last column, or where a space follows each of these commas, as in prose.
    """
    whole, text = (
        text,
        re.sub(r"\A(?:sep=.\r?\n|\s*\n)+", "", text),
    )  # without Excel's first line, and blank ones
    above = whole.count("\n") - text.count("\n")
    first = text.split("\n", 1)[0]
    mark = max(",;\t", key=first.count)

    def cells_of(spaced):
        return csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=spaced)

    rows, joined = [], {}
    try:  # a, "b, c" is read so only where all rows then are of one length
        reader = cells_of(
            f'{mark} "' in text and len({len(cells) for cells in cells_of(True) if any(cells)}) == 1
        )
        header = [name.strip() for name in next(reader, [])]
        twice = [
            name for name, count in collections.Counter(filter(None, header)).items() if count > 1
        ]
        if twice:
            fail(f"{path}: two columns are called {twice[0]}: rename one")
        name = caption_column or find_column(header, "caption")
        place = header.index(name) if name in header else None
        for cells in filter(any, reader):
            surplus = len(cells) - len(header)
            if surplus > 0 and not any(cells[len(header) :]):  # a spreadsheet's empty columns
                cells = cells[: len(header)]
            elif surplus > 0:
                parts = [] if place is None else cells[place : place + surplus + 1]
                if (
                    not parts
                    or place < len(header) - 1
                    and not all(part.startswith(" ") for part in parts[1:])
                ):
                    fail(
                        f"{path}: line {above + reader.line_num} has more cells than the header: quote texts with {mark!r}"
                    )
                joined[above + reader.line_num] = mark.join(parts)
                cells[place : place + surplus + 1] = [mark.join(parts)]
            rows.append(dict(itertools.zip_longest(header, cells, fillvalue="")))
    except csv.Error as error:
        fail(f"{path}: {error}")
    if joined:
        lines, example = ", ".join(map(str, joined)), next(iter(joined.values()))
        note(
            f'{path}: more cells than the header in line {lines[:99]}: read as {mark!r} in {name}: "{example[:99]}"'
        )
    return rows


def find_column(names, role):
    """The first of a table's columns that usually plays a role, or None."""
    return next((name for usual in COLUMNS[role] for name in names if name.lower() == usual), None)


def modality_of(row):
    """What a row's column of modalities says, however its name is written; "" where there is none."""
    return next((value for name, value in row["fields"].items() if name.lower() == "modality"), "")


def list_table(table, flags, strict):
    """Rows of the images that a table names, the dict of its columns, role -> name, and how many files are not there."""
    cells = read_table(table, flags["caption"])
    if not cells:
        fail(f"{table}: has no rows")
    names = list(cells[0])
    for role, wanted in flags.items():
        if wanted is not None and wanted not in names:
            fail(f"--{role}-column {wanted}: {table} has the columns {', '.join(names)}")
    columns = {role: wanted or find_column(names, role) for role, wanted in flags.items()}
    if columns["image"] is None:
        fail(
            f"{table}: no column of file names among {', '.join(names)}: name it with --image-column"
        )
    folder, rows, missing, seen = os.path.dirname(os.path.abspath(table)), [], [], set()
    for fields in cells:
        file_name = fields.get(columns["image"], "")
        path = os.path.normpath(os.path.join(folder, file_name))
        if "\\" in file_name and not os.path.exists(path):  # written on Windows
            path = os.path.normpath(os.path.join(folder, file_name.replace("\\", "/")))
        if (
            file_name
            and not os.path.isabs(file_name)
            and not path.startswith(folder.rstrip(os.sep) + os.sep)
        ):
            fail(
                f"{table}: {file_name} is not inside {folder}: write absolute paths, or put the table above its images"
            )
        roles = {role: fields.get(columns[role], "") for role in ("caption", "label", "group")}
        if not os.path.isfile(path):
            missing.append(file_name or "(no name)")
        elif (path, *fields.values()) not in seen:
            rows.append(Row(path=path, file_name=file_name, fields=fields, **roles))
        seen.add((path, *fields.values()))
    some = ", ".join(missing[:5]) + "…" * (len(missing) > 5)
    leave_out(
        len(missing),
        len(cells),
        strict,
        f"{table}: {len(missing)} of {len(cells)} files are not there: {some}",
    )
    if len(rows) + len(missing) < len(cells):
        note(
            f"{table}: {len(cells) - len(rows) - len(missing)} of {len(cells)} rows repeat another: left out"
        )
    return rows, columns, len(missing)


def in_english(labels):
    """Several labels of one cell as English: "A|B|C" -> "A, B and C"."""
    parts = [part.strip() for part in labels.split("|") if part.strip()]
    return " and ".join([", ".join(parts[:-1])] * (len(parts) > 1) + parts[-1:])


def fill_captions(data, rows, columns, prompt):
    """Set each row's caption from the format string `prompt`, if any; say how many lack what it or the column wants."""
    try:
        pieces = list(string.Formatter().parse("{caption}" if prompt is None else prompt))
    except ValueError as error:
        fail(
            f"--prompt {prompt!r}: {error} (fields look like {{label}}, braces themselves like {{{{ }}}})"
        )
    roles = {"label": ("label", "labels"), "caption": ("caption", "text", "Text")}
    known = {
        role
        for role in roles
        if columns.get(role) or (role == "label" and any(row["label"] for row in rows))
    }
    lacking = []
    for row in rows if prompt is not None or "caption" in known else ():
        values = {alias: row[role] for role in sorted(known) for alias in roles[role]} | row[
            "fields"
        ]
        for _, name, *how in pieces:
            if any(how):
                fail(
                    f"--prompt {prompt!r}: a field has no format of its own here: write {{{name}}}"
                )
            if name is not None and name not in values:
                fail(
                    f"--prompt: no field {{{name}}} in {data}; there are: {', '.join(values) or 'none'}"
                )
        lacking += [row] * any(
            name is not None and not in_english(values[name]) for _, name, _, _ in pieces
        )
        if prompt is not None:
            row["caption"] = "".join(
                literal + ("" if name is None else in_english(values[name]))
                for literal, name, _, _ in pieces
            ).strip()
    if lacking:
        names = " or ".join(sorted({name for _, name, _, _ in pieces if name is not None}))
        note(
            f"{data}: {len(lacking)} of {len(rows)} rows have no {names}, such as {lacking[0]['file_name']}"
        )


def medical_header(path):
    """(why not to read it or "", slices along each axis, patient's id) of a DICOM or volume; of other files nothing."""
    is_volume = path.lower().endswith(VOLUME_SUFFIXES)
    package = "nibabel" if is_volume else "pydicom" if looks_like_dicom(path) else None
    if package is None or importlib.util.find_spec(package) is None:
        return NEEDS.get(package, ""), (1, 1, 1), ""
    if is_volume:
        volume = open_volume(path)
        from nibabel import io_orientation

        order = np.argsort(io_orientation(volume.affine)[:, 0])
        return "", [(*volume.shape, 1)[n] for n in order], ""
    data = open_dicom(
        path,
        stop_before_pixels=True,
        specific_tags=["Rows", "NumberOfFrames", "ImageType", "PatientID", "BitsAllocated"],
    )
    from pydicom.pixels import get_decoder

    syntax, why = data.file_meta.TransferSyntaxUID, ""
    decoders = set(get_decoder(syntax).available_plugins) if syntax.is_encapsulated else {"pydicom"}
    if syntax == JPEG_EXTENDED and data.get("BitsAllocated") == 16:
        decoders -= {"pillow"}  # it reads 8 bits of them
    if "Rows" not in data:
        why = "DICOM files without a picture: reports, plans and the like"
    elif "LOCALIZER" in (data.get("ImageType") or ()):
        why = "localizers, which only show where the slices of a study lie"
    elif not decoders:
        why = f"no decoder here reads {syntax.name}: {CODECS}"
    return (
        why,
        (1, 1, int(data.get("NumberOfFrames") or 1)),
        str(data.get("PatientID") or "").strip(),
    )


def check_medical(data, rows, lost, strict):
    """Look at the headers of DICOM files and volumes: (the rows that can be read, {path: slices along each axis}).
    lost: how many files of the set were left out before.

    Left out, counted in a line for each reason: files for which a package or codec is missing, and those without a
    picture of the patient. DICOMs get a group: 16 bits of a hash of the patient's id, enough to keep one's images
    together, too few to tell who it is.
    """
    headers, reasons, count_of_all = {}, collections.Counter(), len(rows) + lost
    for row in rows:
        headers[row["path"]] = "", (1, 1, 1), ""
        with contextlib.suppress(Exception):  # damaged: load_pixels will name it
            headers[row["path"]] = medical_header(row["path"])
        reasons[headers[row["path"]][0]] += 1
    for why, count in reasons.items():
        message = f"{data}: {count} of {len(rows)} files left out: {why}"
        if "pip install" in why:
            lost += count
            leave_out(lost, count_of_all, strict, message)
        elif why:
            note(message)
    patients = {patient for _, _, patient in headers.values()} - {""}
    if (
        len(patients) == 1
        and sum(bool(patient) for _, _, patient in headers.values()) > 1
        and not any(row["group"] for row in rows)
    ):
        note(
            f"{data}: all DICOM files have one patient's id, as anonymised ones do: taken for none; a table with a column "
            "patient_id says whose they are"
        )
    for row in rows:
        row |= {"lost": (lost, count_of_all)} if lost else {}
        patient = headers[row["path"]][2]
        if patient and len(patients) > 1 and not row["group"]:
            row["group"] = "patient-" + hashlib.blake2b(patient.encode(), digest_size=2).hexdigest()
    kept = [row for row in rows if not headers[row["path"]][0]]
    if not kept:
        fail(f"{data}: no images left")
    return kept, {path: shape for path, (_, shape, _) in headers.items()}


def spread_slices(rows, shapes, slices):
    """A row for each slice wanted, with its "slice" for read_image; slices of one file share a group: where there is none,
    the file is one ("of_file")."""
    match = re.fullmatch(r"(?:(axial|coronal|sagittal):)?(?:middle|all|every:([1-9]\d*))", slices)
    if not match:
        fail(
            f"--slices {slices}: give middle, every:N or all; of another plane coronal:middle, sagittal:every:5, …"
        )
    plane, step = match[1], int(match[2] or 1)
    spread = []
    for row in rows:
        count = shapes[row["path"]][AXES[plane or "axial"]]
        numbers = (
            [None]
            if count == 1 or slices.endswith("middle")
            else range(step // 2, count, step) or [count // 2]
        )
        own = (
            {"group": row["file_name"], "of_file": True}
            if len(numbers) > 1 and not row["group"]
            else {}
        )
        for n in numbers:
            named = n if plane is None else plane if n is None else f"{plane}:{n}"
            spread.append(Row.of({**row, **own, "slice": named}))
    return spread


def content_hash(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(2**20), b""):
            digest.update(part)
    return digest.hexdigest()


def set_hash(rows):
    """One SHA-256 for the files of a set, whatever their names and order."""
    return hashlib.sha256(
        "".join(sorted(content_hash(row["path"]) for row in rows)).encode()
    ).hexdigest()


def write_csv(path, header, rows):
    """Write a CSV file, atomically."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, text.getvalue())


def split_rows(rows, val_share, test_share=0.0):
    """Set row["split"] to "train", "val" or "test" by a hash of the group, else of the file's content.

    The split is the same on every machine, does not depend on order, and adding files moves none; of a mix the generated
    images (column synthetic) are all for training. Says so where no groups are known but file names look as if one patient
    had several.
    """
    series, content = collections.defaultdict(list), functools.lru_cache(None)(content_hash)
    made = [
        row.get("fields", {}).get("synthetic") == "1" for row in rows
    ]  # column of filter.py's metadata.csv
    mix = not all(made)
    for row, generated in zip(rows, made):
        key = content(row["path"]) if row.get("of_file") or not row["group"] else row["group"]
        u = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
        row["split"] = (
            "test" if u < test_share else "val" if u < test_share + val_share else "train"
        )
        if generated and mix:
            row["split"] = "train"
        stem = re.fullmatch(
            r"(.*\d.*?)[-_. ]+(?:\d{1,3}|[A-Za-z]{1,5})", Path(row.get("file_name", "")).stem
        )
        if stem and not row["group"]:
            series[stem[1]].append(row["file_name"])
    several = [names for names in series.values() if len(names) > 1]
    if len(several) > 1 and val_share + test_share > 0:
        note(
            f"{sum(map(len, several))} files are named as if {len(several)} patients had several each, such as "
            f"{' and '.join(several[0][:2])}: a column patient_id in a table keeps a patient on one side of the split"
        )


def read_split(rows, path):
    """Set row["split"] as a run's split.csv (file_name, group, split) has it; fail() where it names none of the images."""
    known = {cells.get("file_name"): cells.get("split") for cells in read_table(path)}
    for row in rows:
        row["split"] = known.get(row["path"]) or known.get(row["file_name"]) or ""
    if not any(row["split"] for row in rows):
        fail(
            f"--split {path}: names none of these {len(rows)} images, such as {rows[0]['file_name']}; "
            "give the same data folder as train.py had"
        )


# ---------------------------------------------------------------- from files to pixels


def fit_square(image, resolution, crop="center", gen=None):
    """An image resized to resolution x resolution, by one of four crops.

    center: its largest central square; random: such a square anywhere, drawn by the torch.Generator gen; pad: all of it
    on black; fundus: the square round the lit disc, black where that reaches beyond the image, or "pad" without a disc.
    """
    size, method = (resolution, resolution), Image.Resampling.LANCZOS
    disc = find_disc(image) if crop == "fundus" else None
    if crop == "pad" or crop == "fundus" and disc is None:
        return ImageOps.pad(image, size, method, 0)
    image = image.crop(disc) if disc else image
    place = torch.rand((), generator=gen).item() if crop == "random" else 0.5
    return ImageOps.fit(image, size, method, centering=(place, place))


def find_disc(image):
    """The square (left, top, right, bottom) round the largest lit part of a fundus photograph, its top and bottom often
    cut off; None where that is under 20 % of the image, or longer than 1.6 times its width."""
    small = image.convert("L")
    small.thumbnail((256, 256))
    parts, count = ndimage.label(np.asarray(small) > 10)
    part = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else parts > 0
    if part.mean() < 0.2:
        return None
    rows, columns = (np.flatnonzero(part.any(axis)) for axis in (1, 0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    if max(height, width) > 1.6 * min(height, width):
        return None
    scale, half = image.width / small.width, max(height, width) / 2
    middle = (columns[0] + width / 2, rows[0] + height / 2)
    return tuple(round((at + by) * scale) for by in (-half, half) for at in middle)


def pick_resolution(*sets):
    """The pixels at which sets of rows are compared: the smallest stored side of their images, from 64 to 256, but for
    one image in twenty of each set: a stray thumbnail does not decide."""
    picked = [256]
    for rows in sets:
        sides = [256]
        for row in rows:
            with (
                contextlib.suppress(Exception),
                Image.open(row["path"], formats=FORMATS) as image,
            ):  # load_pixels names it
                sides.append(min(image.size))
        picked.append(sorted(sides)[(len(sides) - 1) // 20])
    return max(64, min(picked))


def find_range(rows):
    """{path: (low, high)} for the 16-bit and float rasters of a set: one range for all, so that a dim film stays dim.

    Floats have a range of their own: they are rarely in the same units.
    """
    kinds, ranges = collections.defaultdict(dict), {}
    for row in rows:
        with (
            contextlib.suppress(Exception),
            Image.open(row["path"], formats=FORMATS) as image,
        ):  # load_pixels names it
            if is_deep(image):
                kind = "floats" if image.mode == "F" else "16 bits"
                kinds[kind][row["path"]] = percentile_range(np.asarray(image), 0, 100)
    for kind, ends in kinds.items():
        low, high = (
            float(pick(end[n] for end in ends.values())) for n, pick in enumerate((min, max))
        )
        note(f"{len(ends)} images of {kind}: {low:g} is black and {high:g} white in all of them")
        ranges |= dict.fromkeys(ends, (low, high))
    return ranges


def share_range(rows, given=None):
    """Set row["range"], what becomes black and white in images of more than 8 bits: `given`, or one range for all rows."""
    ranges = find_range(rows) if given is None else {}
    for row in rows:
        row["range"] = ranges.get(row["path"], given)
    return rows


def load_pixels(
    rows,
    resolution,
    crop="center",
    strict=False,
    window=None,
    value_range=None,
    allow_burned_in=False,
    seed=0,
    measure=None,
):
    """Read the images of `rows`: (the readable rows, uint8 pixels (N, 3, resolution, resolution)).

    window, value_range, allow_burned_in: as read_image; a row's own "range" comes before value_range, and without
    either 16-bit and float images are scaled by the range of them all. seed: of crop "random", with the file's name.
    measure: a function of the PIL image before it is cut and resized; the row's "measured" is what it gives.
    Unreadable images are named on stderr and left out; more than 5 % of the set, with those that `list_images` left out, or
    any where `strict`, end in fail().
    """
    pick_window(window)  # a wrong one ends here
    ranges, discless = (
        {} if value_range else find_range([row for row in rows if "range" not in row]),
        [],
    )
    pixels = torch.empty(len(rows), 3, resolution, resolution, dtype=torch.uint8)

    def load(n):
        row = rows[n]
        path, slice = row["path"], row.get("slice")
        try:
            own = row.get("range") or ranges.get(path, value_range)
            image = read_upright(path, slice, window, own, allow_burned_in)
            discless.extend([path] * (crop == "fundus" and find_disc(image) is None))
            row |= {"measured": measure(image)} if measure else {}
            gen = generator(seed, "crop", row["file_name"], slice) if crop == "random" else None
            square = np.array(fit_square(image, resolution, crop, gen))
            pixels[n] = torch.from_numpy(square if square.ndim == 2 else square.transpose(2, 0, 1))
        except BadImage as error:
            return error

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        contextlib.closing(pool.map(load, range(len(rows)))) as loading,
    ):  # closing cancels the rest on Ctrl-C
        errors = list(
            tqdm(
                loading,
                total=len(rows),
                desc="reading",
                unit="image",
                leave=False,
                disable=None if len(rows) > 200 else True,
            )
        )
    good, bad = (
        [n for n, error in enumerate(errors) if error is None],
        [error for error in errors if error is not None],
    )
    for error in bad:
        note(f"skipped: {error}")
    lost, whole = max(
        (row.get("lost", (0, 0)) for row in rows), default=(0, 0)
    )  # rows may be a part of the set
    if bad and (
        strict
        or max(len(bad) / len(rows), (lost + len(bad)) / max(whole, lost + len(rows))) > BAD_SHARE
    ):
        fail(
            f"{len(bad)} of {len(rows)} images cannot be read"
            + f", besides {lost} left out before" * (lost > 0)
            + f", the first: {bad[0]}"
        )
    if len(bad) > 1:
        note(f"{len(bad)} of {len(rows)} images cannot be read: left out")
    if discless:
        note(
            f"{len(discless)} of {len(rows)} images show no disc of a fundus: padded whole, such as {min(discless)}"
        )
    return [rows[n] for n in good], pixels[good] if bad else pixels


def picture(pixels):
    """uint8 (3, H, W) -> PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def near_duplicates(pixels, alike=0.95):
    """Pairs of pictures that are the same: [(i, j, kind)], i < j, for uint8 pixels (N, 3, S, S).

    "exact" has equal pixels; "near" survives re-saving, resizing, gamma; "flipped" is near its left-right mirror image.
    Two are near where the differences between neighbours in their 16 x 16 thumbnails (dHash, but not cut down to signs)
    correlate above `alike`. Of 230 chest films, copies saved anew did above .98, films of other patients below .91.
    """
    small = torch.cat(
        [F.adaptive_avg_pool2d(part.float().mean(1), 16) for part in pixels.split(256)]
    )
    hashes = [
        F.normalize(torch.cat([grey.diff(dim=1).flatten(1), grey.diff(dim=2).flatten(1)], 1))
        for grey in (small, small.flip(2))
    ]
    same = collections.defaultdict(list)
    for n, image in enumerate(pixels):
        same[hashlib.sha256(image.numpy().tobytes()).digest()].append(n)
    found = {}
    for group in same.values():  # blank slices are many: each with the next one only
        blank = pixels[group[0]].min() == pixels[group[0]].max()
        found |= dict.fromkeys(
            itertools.pairwise(group) if blank else itertools.combinations(group, 2), "exact"
        )
    for kind, other in zip(("near", "flipped"), hashes):
        for start in range(0, len(pixels), 1024):
            for i, j in (hashes[0][start : start + 1024] @ other.T > alike).nonzero().tolist():
                if start + i < j:
                    found.setdefault((start + i, j), kind)
    return [(*pair, kind) for pair, kind in sorted(found.items())]


# ---------------------------------------------------------------- descriptors without weights

LUMA = (0.299, 0.587, 0.114)


def to_grey(pixels):
    """Luma in [0, 1] of uint8 pixels (B, 3, H, W): (B, 1, H, W)."""
    weights = torch.tensor(LUMA, device=pixels.device)
    return torch.einsum("bchw,c->bhw", pixels.float(), weights)[:, None] / 255


def gabor_pairs(device):
    """Waves of 8 orientations, first the even, then the odd: (16, 1, 9, 9), of mean 0, norm 1."""
    span = torch.arange(-4.0, 5.0, device=device)
    y, x = torch.meshgrid(span, span, indexing="ij")
    angle = torch.arange(8, device=device)[:, None, None] * torch.pi / 8
    phase = 1.6 * (x * angle.cos() + y * angle.sin())
    waves = torch.cat([phase.cos(), phase.sin()]) * torch.exp(-(x**2 + y**2) / 8)
    waves = waves - waves.mean((1, 2), keepdim=True)
    return F.normalize(waves.flatten(1)).reshape(16, 1, 9, 9)


def texture(pixels):
    """Log energies of oriented textures: uint8 (B, 3, H, W), H, W >= 40 -> (B, 368).

    A two-layer scattering transform (Bruna & Mallat 2013) with 8 orientations, 4 and 3 scales, and
    a 4 x 4 thumbnail. No weights, no randomness; blind to small changes in the size of blobs.
    """
    waves = gabor_pairs(pixels.device)
    blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], device=pixels.device)[None, None] / 16

    def modulus(maps):  # (B, 1, H, W) -> (B, 8, H, W)
        even, odd = F.conv2d(F.pad(maps, (4, 4, 4, 4), "reflect"), waves).chunk(2, 1)
        return (even**2 + odd**2 + 1e-8).sqrt()

    def log(energy):
        return (energy + 1e-3).log().flatten(1)

    grey = to_grey(pixels)
    parts = [F.adaptive_avg_pool2d(grey, 4).flatten(1)]
    for scale in range(4):
        energy = modulus(grey)
        parts.append(log(F.adaptive_avg_pool2d(energy, 2)))
        parts.append(log(energy.std((2, 3))))
        if scale < 3:
            channels = F.avg_pool2d(energy, 2).flatten(0, 1)[:, None]
            parts.append(log(modulus(channels).mean((2, 3)).reshape(len(pixels), 64)))
            grey = F.avg_pool2d(F.conv2d(F.pad(grey, (1, 1, 1, 1), "reflect"), blur), 2)
    return torch.cat(parts, 1)


def colour(pixels):
    """What `texture`, which is grey, cannot see: uint8 (N, 3, H, W) -> float64 (N, 8).

    Mean, spread, covariance, size and fine detail (JPEG's is coarse) of the two chroma channels.
    """
    parts = []
    for part in pixels.split(16):
        red, green, blue = part.float().div(255).unbind(1)
        chroma = torch.stack([red - green, (red + green) / 2 - blue], 1)
        mean = chroma.mean((2, 3), keepdim=True)
        spread = (chroma - mean).square().mean((2, 3)).sqrt()
        covariance = (chroma - mean).prod(1).mean((1, 2))
        size = torch.hypot(*chroma.unbind(1)).mean((1, 2))  # norm(dim=1) takes sixty times as long
        detail = (chroma.diff(dim=2).diff(dim=3).abs().mean((2, 3)) + 1e-3).log()
        columns = [mean[..., 0, 0], spread, covariance[:, None], size[:, None], detail]
        parts.append(torch.cat(columns, 1))
    return torch.cat(parts).double().cpu().numpy()


def grain(pixels):
    """How pictures were made: uint8 (N, 3, H, W), H, W >= 16 -> float64 (N, 11).

    Logs of: sharpness (spread of the Laplacian), contrast, noise (Immerkaer 1996), signal to noise,
    noise over steps between neighbours, steps at the borders of 8 x 8 blocks over all steps (down,
    across: JPEG), checkerboards, and the steps at three scales over those at the next coarser one.
    """
    parts = [grey_grain(255 * to_grey(part)) for part in pixels.split(16)]
    return torch.cat(parts).double().cpu().numpy()


def grey_grain(grey):
    """The measures of `grain` of float pictures (B, 1, H, W) in grey levels: (B, 11)."""

    def log_mean(maps):  # + a tenth of a grey level: flat pictures have finite measures too
        return (maps.abs().mean((1, 2, 3)) + 0.1).log()

    def log_spread(maps):
        deviations = maps - maps.mean((1, 2, 3), keepdim=True)
        return (deviations.square().mean((1, 2, 3)).sqrt() + 0.1).log()

    def log_steps(maps):
        return (log_mean(maps.diff(dim=2)) + log_mean(maps.diff(dim=3))) / 2

    down = grey.diff(dim=2)
    across = grey.diff(dim=3)
    laplacian = down.diff(dim=2)[..., 1:-1] + across.diff(dim=3)[:, :, 1:-1]
    mask = down.diff(dim=2).diff(n=2, dim=3)
    noise = log_mean(mask * ((torch.pi / 2) ** 0.5 / 6))
    steps = log_steps(grey)
    measures = [log_spread(laplacian), log_spread(grey), noise]
    measures.append(log_mean(grey) - noise)
    measures.append(noise - steps)
    measures.append(log_mean(down[:, :, 7::8]) - log_mean(down))
    measures.append(log_mean(across[..., 7::8]) - log_mean(across))
    measures.append(log_mean(down.diff(dim=3)) - steps)
    for _ in range(3):
        grey = F.avg_pool2d(grey, 2)
        coarser_steps = log_steps(grey)
        measures.append(steps - coarser_steps)
        steps = coarser_steps
    return torch.stack(measures, 1)


def stored_grain(image):
    """`grain` of a PIL image's middle 512 pixels, (11,): a resize would hide JPEG and noise."""
    left, top = (max(0, side - 512) // 16 * 8 for side in image.size)  # on JPEG's grid of 8 pixels
    box = left, top, min(left + 512, image.width), min(top + 512, image.height)
    values = np.asarray(image.crop(box).convert("RGB"))
    missing = [(0, max(0, 16 - side)) for side in values.shape[:2]]
    values = np.pad(values, [*missing, (0, 0)], "edge")
    return grain(torch.from_numpy(values).permute(2, 0, 1)[None])[0]


# ---------------------------------------------------------------- networks

CACHE = Path(os.environ.get("MEDLORA_CACHE") or Path.home() / ".cache" / "medlora")
FID_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
IMAGENET_SCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, sd


@dataclass
class Network:
    """What turns uint8 pixels (B, 3, H, W) on its device into vectors (B, D)."""

    name: str  # with a hash of the weights: the cache's key
    function: Callable
    standardise: bool = False  # its numbers have no common unit: divide each by its spread
    published: bool = False  # its figures compare with published ones
    head: np.ndarray | None = None  # Inception's last layer (1008, 2048)

    def __getitem__(self, key):
        return getattr(self, key)

    def get(self, key):
        return getattr(self, key)


def find_weights(name):
    """The path of a weight file in our cache or torch's own, or None."""
    for folder in (CACHE, Path(torch.hub.get_dir()) / "checkpoints"):
        if (folder / name).is_file():
            return str(folder / name)
    return None


def load_weights(path, sha256=""):
    """The state dict of a .pth file; fail() if it is damaged or its SHA-256 begins otherwise."""
    if sha256 and not content_hash(path).startswith(sha256):
        fail(f"{path}: is damaged or another file (its SHA-256 is not {sha256[:8]}…): get it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises a dozen kinds for a damaged file
        fail(f"{path}: is not a readable weight file")


def load_features(name, device, resize="legacy"):
    """The Network of a name: texture, inception or the path of its weights, or the Hub id or folder
    of a vision model. resize: Inception's input, as pytorch-fid (legacy) or clean-fid makes it."""
    if name == "texture":
        return Network("texture-1", texture_in_parts, standardise=True)
    if name == "inception":
        path = find_weights(FID_WEIGHTS)
        if path is None:
            source = "github.com/mseitzer/pytorch-fid, release fid_weights"
            fail(f"--features inception: no such file: put {FID_WEIGHTS} ({source}) into {CACHE}")
        return load_inception(path, load_weights(path, FID_SHA256), device, resize)
    if os.path.isfile(name):
        return load_inception(name, load_weights(name), device, resize)
    return load_vision_model(name, device)


def texture_in_parts(pixels):
    """`texture` of few images at a time: the maps stay in the processor's cache, twice as fast."""
    count = len(pixels)
    if pixels.device.type == "cpu":
        count = max(1, 2**15 // pixels[0, 0].numel())
    return torch.cat([texture(part) for part in pixels.split(count)])


def load_inception(path, state, device, resize):
    """The Network of FID's Inception with the state dict that a file holds."""
    try:
        net = fid_inception(state).to(device)
    except RuntimeError:
        fail(f"{path}: is not the weights of FID's Inception")

    def pool3(pixels):
        if resize == "clean":
            return net((clean_resize(pixels, 299) - 128) / 128)
        images = F.interpolate(pixels.float(), (299, 299), mode="bilinear")
        return net(images / 127.5 - 1)

    digest = content_hash(path)
    name = f"inception-{digest[:16]}"
    if resize == "clean":
        name += "-clean"
    head = net.head.cpu().double().numpy()
    return Network(name, pool3, published=digest == FID_SHA256, head=head)


def clean_resize(pixels, side):
    """uint8 (B, 3, H, W) -> float (B, 3, side, side) in [0, 255], as clean-fid (Parmar et al. 2022)
    does; plain bilinear, as in pytorch-fid, leaves out pixels when it shrinks."""
    images = F.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
    return images.clamp(0, 255)


def fid_inception(state):
    """FID's Inception (Heusel et al. 2017, pytorch-fid's port) on torchvision's blocks.

    Its averages leave out the border and its last block takes the maximum. The module maps
    (B, 3, 299, 299) in [-1, 1] to pool3 features (B, 2048); `head` is its last layer (1008, 2048).
    """
    import torchvision

    net = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.load_state_dict(state)
    last_input = {}

    def average_inside(_, pooled):  # from an average over 9 cells with zeros around the picture
        ones = torch.ones_like(pooled[0][:1, :1])
        return pooled[0] / F.avg_pool2d(ones, 3, 1, 1)

    def keep_input(_, inputs):
        last_input["maps"] = inputs[0]

    def maximum(_, pooled):
        return F.max_pool2d(last_input.pop("maps"), 3, 1, 1)

    for block in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        getattr(net, f"Mixed_{block}").branch_pool.register_forward_pre_hook(average_inside)
    net.Mixed_7c.register_forward_pre_hook(keep_input)
    net.Mixed_7c.branch_pool.register_forward_pre_hook(maximum)
    net.head = net.fc.weight
    net.fc = torch.nn.Identity()
    return net.eval().requires_grad_(False)


def load_vision_model(name, device):
    """The Network of a vision model of transformers: CLIP's image embedding, else the CLS token.

    Safetensors only; its own image processor prepares the images."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        kind = transformers.AutoModel
        if config.model_type.startswith("clip"):
            kind = transformers.CLIPVisionModelWithProjection
        model = kind.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:120]
        fail(f"--features {name}: no such weight file or vision model ({reason})")
    model = model.to(device).eval().requires_grad_(False)
    digest = hashlib.sha256(processor.to_json_string().encode())
    for weight in model.state_dict().values():
        digest.update(weight.cpu().float().numpy().tobytes())

    def function(pixels):
        images = processor(images=list(pixels.cpu()), return_tensors="pt")["pixel_values"]
        output = model(images.to(device))
        if "image_embeds" in output:
            return output.image_embeds
        states = output.last_hidden_state
        if states.ndim == 4:  # of a convolutional network
            return states.mean((2, 3))
        return states[:, 0]

    return Network(f"{config.model_type}-{digest.hexdigest()[:16]}", function)


def extract(pixels, network, device, batch_size=32, precision="auto"):
    """Features of uint8 pixels (N, 3, H, W): float64 (N, D). precision: auto is fp32, as published.

    They are cached by network and pixels: neither an edited file nor another resize is stale.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    name = network.name
    if dtype != torch.float32:
        name += f"-{precision}"
    paths = [cache_path(name, image) for image in pixels]
    vectors = [read_vector(path) for path in paths]
    missing = [n for n, vector in enumerate(vectors) if vector is None]
    starts = range(0, len(missing), batch_size)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), autocast, without_tf32():
        for start in tqdm(starts, desc=name, leave=False, disable=None, delay=2):
            numbers = missing[start : start + batch_size]
            batch = network.function(pixels[numbers].to(device)).float().cpu().numpy()
            for n, vector in zip(numbers, batch, strict=True):
                vectors[n] = vector
                write_vector(paths[n], vector)
    features = np.stack(vectors).astype(np.float64)
    if not np.isfinite(features).all():
        fail(f"the features of {network.name} are not finite: are its weights sound?")
    return features


def without_tf32():
    """Convolutions in full fp32 on a GPU: TF32 moves FID's third digit."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def cache_path(name, image):
    """Where the cache holds the vector that a network of that name makes of a uint8 image."""
    key = hashlib.sha256(f"{name} {tuple(image.shape)}".encode() + image.numpy().tobytes())
    return CACHE / "features" / name / key.hexdigest()[:2] / f"{key.hexdigest()}.npy"


def read_vector(path):
    """The vector in a cache file, or None where there is no readable one."""
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):
        return None


def write_vector(path, vector):
    """Write a cache file, atomically but without waiting for the disk; a full disk does no harm."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.save(file, vector)
        os.replace(temporary, path)


# ---------------------------------------------------------------- image against image: LPIPS, SSIM

LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # mean, sd of images in [-1, 1]
LPIPS = {  # trunk of torchvision, its layers, its file, SHA-256 of the linear layers v0.1
    "alex": ("alexnet", (1, 4, 7, 9, 11), "alexnet-owt-7be5be79.pth", "df73285e"),
    "vgg": ("vgg16", (3, 8, 15, 22, 29), "vgg16-397923af.pth", "a78928a0"),
    "squeeze": (
        "squeezenet1_1",
        (1, 4, 7, 9, 10, 11, 12),
        "squeezenet1_1-b8a52dc0.pth",
        "4a5350f2",
    ),
}


def trunk_of(kind, state):
    """The convolutions of torchvision's alexnet, vgg16 or squeezenet1_1; state: of all or of these."""
    import torchvision

    with torch.device("meta"):
        trunk = getattr(torchvision.models, kind)().features
    weights = {}
    for key, value in state.items():
        if not key.startswith("classifier."):
            weights[key.removeprefix("features.")] = value
    trunk.load_state_dict(weights, assign=True)
    for module in trunk:
        if hasattr(module, "inplace"):
            module.inplace = False  # the maps are kept
    return trunk.eval().requires_grad_(False)


def taps(trunk, images, indices):
    """The maps (B, C, h, w) after each layer named in `indices`."""
    maps = []
    for index, layer in enumerate(trunk[: max(indices) + 1]):
        images = layer(images)
        if index in indices:
            maps.append(images)
    return maps


def lpips_files(net):
    """The paths of LPIPS's trunk and of its linear layers (in the package lpips), each or None."""
    linear = find_weights(f"lpips-{net}.pth")
    package = importlib.util.find_spec("lpips")
    if linear is None and package:
        packed = Path(package.submodule_search_locations[0], "weights", "v0.1", f"{net}.pth")
        if packed.is_file():
            linear = str(packed)
    return find_weights(LPIPS[net][2]), linear


def has_lpips(net):
    """Whether the weight files of that LPIPS are there."""
    return None not in lpips_files(net)


def load_lpips(net, device):
    """The Network of LPIPS v0.1; net: alex, vgg or squeeze. See lpips_vectors."""
    kind, layers, file, digest = LPIPS[net]
    trunk_path, linear_path = lpips_files(net)
    if trunk_path is None or linear_path is None:
        source = "the linear layers of the package lpips (pip install lpips)"
        fail(f"--lpips {net}: needs {file} of torchvision in {CACHE} and {source}, or --lpips none")
    trunk = trunk_of(kind, load_weights(trunk_path, file.split("-")[-1][:8])).to(device)
    linear = load_weights(linear_path, digest)
    weights = [linear[f"lin{n}.model.1.weight"][0].to(device) for n in range(len(layers))]

    def function(pixels):
        return lpips_vectors(pixels / 127.5 - 1, trunk, layers, weights)

    return Network(net, function, published=True)


def lpips_vectors(images, trunk, layers, weights):
    """Images in [-1, 1] (B, 3, H, W) -> (B, F): LPIPS of two images is their squared distance.

    Zhang et al. 2018; the epsilon stands outside the root, as in the package lpips.
    """
    mean, sd = (torch.tensor(values).to(images)[:, None, None] for values in LPIPS_SCALE)
    parts = []
    maps_of_layers = taps(trunk, (images - mean) / sd, layers)
    for maps, weight in zip(maps_of_layers, weights, strict=True):
        maps /= torch.linalg.vector_norm(maps, dim=1, keepdim=True) + 1e-10
        maps *= (weight / maps[0, 0].numel()).sqrt()
        parts.append(maps.flatten(1))
    return torch.cat(parts, 1)


def lpips_matrix(pixels, network, device, batch_size=32, memory=2**29, others=None):
    """LPIPS of all pairs of uint8 pixels (N, 3, H, W), H, W >= 64: float64 (N, N), symmetric.

    others: uint8 pixels (M, 3, H, W) to pair them with instead: (N, M). One forward pass an image
    and one product; a block of `memory` bytes of vectors is held, the others are made again for it.
    """
    symmetric = others is None
    if symmetric:
        others = pixels
    result = np.zeros((len(pixels), len(others)))

    def vectors(part):
        return network.function(part.to(device))

    def square(part):
        return torch.linalg.vector_norm(part, dim=1).square()

    with torch.inference_mode(), without_tf32():
        size = vectors(pixels[:1]).shape[1]
        width = max(1, memory // (4 * size) // batch_size) * batch_size
        block = torch.empty(min(width, len(pixels)), size, device=device)
        starts = range(0, len(pixels), width)
        for i in tqdm(starts, desc=f"LPIPS {network.name}", leave=False, disable=None):
            first = block[: len(pixels) - i]
            for j in range(0, len(first), batch_size):
                rows = first[j : j + batch_size]
                rows.copy_(vectors(pixels[i + j : i + j + len(rows)]))
            square_first = square(first)[:, None]
            start = i if symmetric else 0
            for j in range(start, len(others), batch_size):
                if symmetric and j < i + len(first):
                    second = first[j - i : j - i + batch_size]
                else:
                    second = vectors(others[j : j + batch_size])
                distances = square_first + square(second) - 2 * (first @ second.T)
                result[i : i + len(first), j : j + len(second)] = distances.cpu()
    if symmetric:  # by construction: a product a @ a.T is not so to the last bit on every machine
        result = np.triu(result, 1)
        result += result.T
    result[result < 3e-5] = 0  # float32 leaves up to 2e-5 between equal flat images
    return result


def gauss_window():
    """The 11-point Gaussian of sigma 1.5 (Wang et al. 2004), float64."""
    window = torch.exp(-torch.arange(-5.0, 6.0, dtype=torch.float64).square() / 4.5)
    return window / window.sum()


def ssim(a, b):
    """SSIM (Wang et al. 2004) of images in [0, 1], (B, C, H, W), H, W >= 11: (B,)."""
    window = gauss_window().tolist()

    def smooth(maps):  # sums of shifted pictures: several times faster than conv2d of one channel
        for axis in (2, 3):
            size = maps.shape[axis] - 10
            total = window[0] * maps.narrow(axis, 0, size)
            for k in range(1, 11):
                total.add_(maps.narrow(axis, k, size), alpha=window[k])
            maps = total
        return maps

    mean_a = smooth(a)
    mean_b = smooth(b)
    variances = smooth(a * a) + smooth(b * b) - mean_a**2 - mean_b**2
    structure = (2 * (smooth(a * b) - mean_a * mean_b) + 9e-4) / (variances + 9e-4)
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return (luminance * structure).mean((1, 2, 3))


def ssim_matrix(first, second, device="cpu", size=64):
    """SSIM of all pairs at `size` pixels, grey: uint8 (N, 3, H, W), (M, 3, H, W) -> float64 (N, M).

    Means and variances are taken once an image; what a pair shares, the smoothed product, is one
    matrix product of all images for each place of the window.
    """
    window = gauss_window().float().to(device)
    weights = torch.outer(window, window).flatten()  # (121,)

    def shrink(pixels):  # -> (N, size, size)
        parts = []
        for part in pixels.split(64):
            parts.append(F.interpolate(to_grey(part.to(device)), (size, size), mode="area")[:, 0])
        return torch.cat(parts)

    def windows(grey, y):  # a row of places: centred patches (N, 121), means, both divisors' terms
        patches = grey[:, y : y + 11].unfold(2, 11, 1).permute(2, 0, 1, 3).flatten(2)
        mean = patches @ weights
        patches = patches - mean[:, :, None]
        spread = patches.square() @ weights
        return zip(patches, mean, mean**2 + 0.5e-4, spread + 4.5e-4, strict=True)

    with torch.inference_mode():
        first = shrink(first)
        second = shrink(second)
        total = torch.zeros(len(first), len(second), device=device)
        for y in tqdm(range(size - 10), desc="SSIM", leave=False, disable=None):
            for a, b in zip(windows(first, y), windows(second, y), strict=True):
                patches_a, mean_a, light_a, spread_a = a
                patches_b, mean_b, light_b, spread_b = b
                covariance = (patches_a * (2 * weights)) @ patches_b.T
                score = torch.outer(2 * mean_a, mean_b).add_(1e-4).mul_(covariance.add_(9e-4))
                total += score.div_(light_a[:, None] + light_b).div_(spread_a[:, None] + spread_b)
    return (total / (size - 10) ** 2).double().cpu().numpy()


# ---------------------------------------------------------------- set against set


def frechet(first, second):
    """Fréchet distance of features (N, D), (M, D), N, M >= 2: FID if they are Inception's pool3.

    The trace of the root of S1 S2 is the nuclear norm of R1 R2' where Ri' Ri = Si: no root of a
    matrix, exact where N < D.
    """
    gap = np.square(first.mean(0) - second.mean(0)).sum()
    root_1 = covariance_root(first)
    root_2 = covariance_root(second)
    nuclear = np.linalg.svd(root_1 @ root_2.T, compute_uv=False).sum()
    return max(0.0, gap + np.square(root_1).sum() + np.square(root_2).sum() - 2 * nuclear)


def covariance_root(features):
    """R (at most D, D) with R' R the covariance of features (N, D)."""
    root = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    if len(root) > root.shape[1]:
        return np.linalg.qr(root, mode="r")
    return root


def kid(first, second):
    """KID (Binkowski et al. 2018) of features (N, D), (M, D), and its standard error.

    Unbiased MMD^2 with the kernel (x·y/D + 1)^3 of all images at once, no subsets; the error is the
    delete-one jackknife, from row sums.
    """

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_to_others(x):  # of each row, without the diagonal
        within = kernel(x, x)
        return (within.sum(1) - within.diagonal()) / (len(x) - 1)

    cross = kernel(first, second)
    within_first = mean_to_others(first)
    within_second = mean_to_others(second)
    value = within_first.mean() + within_second.mean() - 2 * cross.mean()
    n, m = cross.shape
    if min(n, m) < 3:
        return value, float("nan")
    # what is the same whichever image is left out has no variance
    left_first = (cross.mean(1) - within_first * (n - 1) / (n - 2)).var() / (n - 1)
    left_second = (cross.mean(0) - within_second * (m - 1) / (m - 2)).var() / (m - 1)
    return value, 2 * np.sqrt(left_first + left_second)


def squared_distances(first, second):
    """|x - y|^2 of all pairs, (N, D), (M, D) -> (N, M); what rounding leaves of equal rows is 0."""
    norms = np.square(first).sum(1)[:, None] + np.square(second).sum(1)
    distances = norms - 2 * first @ second.T
    distances[distances < 1e-12 * norms] = 0
    return distances


def precision_recall(real, fake, cross, k):
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Squared distances: real (N, N), fake (M, M), cross (N, M). A ball reaches to the k-th neighbour
    in its own set and includes its surface, so that coinciding points count as covered.
    """

    def radii(distances):  # the 0-th neighbour is the point itself
        nth = min(k, len(distances) - 1)
        return np.partition(distances, nth, axis=1)[:, nth]

    in_real_ball = cross <= radii(real)[:, None]
    in_fake_ball = cross <= radii(fake)
    precision = in_real_ball.any(0).mean()
    recall = in_fake_ball.any(1).mean()
    density = in_real_ball.sum(0).mean() / k
    coverage = in_real_ball.any(1).mean()
    return precision, recall, density, coverage


# ---------------------------------------------------------------- nearest images, copies

COPY_CHANCE = 0.01  # an image is a copy if a fresh one would be as close in 1 of 100 cases


def same_unit(groups):
    """bool (N, N): True for an image with itself and with others of its group; "" is no group."""
    names = np.array([name or f"\0{n}" for n, name in enumerate(groups)])
    return names[:, None] == names


def nearest(distances, forbidden=False):
    """Index and distance of each row's smallest entry; entries True in `forbidden` do not count."""
    allowed = np.where(forbidden, np.inf, distances)
    return allowed.argmin(1), allowed.min(1)


def copy_distances(first, real):
    """Distances small for altered copies: uint8 (N, 3, S, S), (M, 3, S, S) -> (N, M), 0 to 2.

    sqrt(2 - 2 correlation) of 16 x 16 grey thumbnails, the smallest over the real picture, 25 crops
    of 90 % and all their mirror images.
    """

    def shrink(grey, side):
        return F.interpolate(grey, (side, side), mode="bilinear", antialias=True)

    def thumbnails(grey):  # (B, 16, 16) of mean 0 and norm 1
        small = shrink(grey, 16)[:, 0]
        small = small - small.mean((1, 2), keepdim=True)
        return F.normalize(small.flatten(1)).reshape(small.shape)

    offsets = range(0, 9, 2)  # of 80 pixels: steps of 2.5 %, coarser ones miss some
    places = [(0, 0, 80)] + [(y, x, 72) for y in offsets for x in offsets]
    parts = [thumbnails(shrink(to_grey(part), 80)).flatten(1) for part in first.split(256)]
    queries = torch.cat(parts)
    best = torch.full((len(first), len(real)), -1.0)
    for part, best_part in zip(real.split(256), best.split(256, 1), strict=True):  # views of best
        grey = shrink(to_grey(part), 80)
        for y, x, side in places:
            crops = thumbnails(grey[:, :, y : y + side, x : x + side])
            for view in (crops, crops.flip(2)):
                torch.maximum(best_part, queries @ view.flatten(1).T, out=best_part)
    return best.mul_(-2).add_(2).clamp_(min=0).sqrt_().numpy()


def copy_limit(count):
    """The chance up to which an image is a copy; few real ones cannot show a smaller one."""
    return max(COPY_CHANCE, 1 / (count + 1))


def copy_chances(real, fake, same):
    """How likely a fresh image is as near to a real one as each generated one: (m,).

    real (n, n), fake (m, n): distances to real images; same: bool (n, n), images of one patient.
    Conformal p-values of the distance and of its ratio to the second nearest of another patient
    (near copies show in the one, faint ones in the other), combined as Simes (1986) does. Real
    images three times nearer than usual are one picture cut twice, which would excuse every copy.
    """
    _, usual = nearest(real, same)
    same = same | (real < np.median(usual) / 3)
    same = same | same.T

    def nearness(distances, forbidden):
        index, distance = nearest(distances, forbidden)
        _, second = nearest(distances, same[index] | forbidden)
        return distance, distance / np.maximum(second, 1e-12)

    def p_values(real_values, values):
        return (1 + np.searchsorted(np.sort(real_values), values, "right")) / (len(real) + 1)

    real_distance, real_ratio = nearness(real, same)
    distance, ratio = nearness(fake, False)
    by_distance = p_values(real_distance, distance)
    by_ratio = p_values(real_ratio, ratio)
    return np.minimum(2 * np.minimum(by_distance, by_ratio), np.maximum(by_distance, by_ratio))


# ---------------------------------------------------------------- the page

STYLE = """:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--paper:#fff;
--mark:#0b62c4;--two:#c2410c;--three:#15803d;--four:#7e22ce}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--line:#343b43;--paper:#0e1116;
--mark:#6cb0ff;--two:#fb923c;--three:#4ade80;--four:#c084fc}}
*{box-sizing:border-box}body{margin:0 auto;max-width:64rem;padding:1.2rem;font:16px/1.5 system-ui,
sans-serif;overflow-wrap:anywhere;color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem;line-height:1.2}h2{font-size:1.15rem;margin-top:2rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .45rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
td:nth-child(2):last-child{white-space:normal;overflow-wrap:anywhere}.soft{color:var(--soft)}
.verdict{border-left:.3rem solid var(--mark);padding:.1rem 0 .1rem .9rem;font-size:1.05rem}
.grid{display:flex;flex-wrap:wrap;gap:.3rem}figure .grid{flex-wrap:nowrap}
.grid img{width:6rem;height:6rem;object-fit:cover;border-radius:.2rem}
figure{display:inline-block;margin:0 .6rem .8rem 0}svg{max-width:100%;height:auto}
figcaption{font-size:.8rem;color:var(--soft);max-width:12.3rem;overflow-wrap:anywhere}
@media print{body{max-width:none}.wide{overflow:visible}table{font-size:.6rem}
h2,figure,tr{break-inside:avoid}}"""


def page(title, body):
    """One self-contained HTML file as text; `body` is HTML whose texts went through html.escape."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def table(header, rows):
    """An HTML table; every cell is escaped."""

    def line(tag, cells):
        texts = [f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells]
        return f"<tr>{''.join(texts)}</tr>\n"

    lines = [line("th", header)] + [line("td", row) for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>\n'


def thumbnail(image, size=96, **options):
    """An <img> of a PIL image or uint8 pixels (3, H, W): a JPEG of at most `size` pixels a side."""
    if not isinstance(image, Image.Image):
        image = picture(image)
    image = image.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 85, **options})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def curve(series, x_label="", y_label="", width=640, height=260):
    """An inline SVG line chart; series: name -> list of (x, y). Only finite points are drawn."""
    finite = {}
    for name, points in series.items():
        finite[name] = [point for point in points if np.isfinite(point).all()]
    every = np.array(sum(finite.values(), []), float)
    if not len(every):
        return '<p class="soft">nothing to draw yet</p>\n'
    low = every.min(0)
    high = every.max(0)
    span = np.where(high > low, high - low, np.maximum(np.abs(low), 1e-12))
    left, bottom = 70, height - 40
    box = np.array([width - 100, height - 68])

    def position(point):
        x, y = (np.asarray(point, float) - low) / span * box
        return f"{left + x:.1f},{bottom - y:.1f}"

    def text(x, y, content, more=""):
        return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{html.escape(content)}</text>'

    parts = [f'<path d="M{left} 20V{bottom}H{width - 15}" fill="none" stroke="var(--line)"/>']
    for share in (0, 0.5, 1):
        x, y = low + share * span
        parts.append(text(left + share * box[0], bottom + 18, f"{x:.4g}", 'text-anchor="middle"'))
        parts.append(text(left - 6, bottom + 4 - share * box[1], f"{y:.4g}", 'text-anchor="end"'))
    for n, (name, points) in enumerate(finite.items()):
        colour = f"var(--{('mark', 'two', 'three', 'four')[n % 4]})"
        line = " ".join(map(position, points[:1] + points))  # the first twice: one alone is a dot
        stroke = 2 if len(points) > 1 else 7
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{stroke}" '
            'stroke-linecap="round"/>'
        )
        parts.append(text(80 + 140 * n, 12, name, f'fill="{colour}"'))
    parts.append(text(left + box[0] / 2, height - 4, x_label, 'text-anchor="middle"'))
    parts.append(text(0, 12, y_label))
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'font-size="12" fill="var(--soft)">{"".join(parts)}</svg>\n'
    )
