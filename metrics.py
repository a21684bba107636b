"""From image files to numbers: reading, descriptors, distances, and the page that shows them.

All other scripts import from this file; it imports none of them. Its sections, in order:
    foundation    fail, Flags, number, replacing, generator, run_script, pick_device
    reading       read_image: rasters, DICOM files, volumes
    listing       list_images, read_table, fill_captions, split_rows
    people        count_people: images and patients by label, sex and age
    pixels        fit_square, share_range, load_pixels, near_duplicates
    descriptors   texture, colour, grain: without weights
    networks      get_weights, load_features, extract
    distances     lpips_matrix, ssim_matrix; frechet, kid, precision_recall; CopyFinder
    learning      fit_logistic, auroc, LabelCheck
    the page      page, table, dot_lines, thumbnail, zoom, pair, curve
    the card      write_card, counts_table: README.md of a model or of images

Pixels are RGB, torch uint8 from 0 to 255, on the CPU. Where no type is said, other arrays are NumPy
float64, torch float32 inside CopyFinder. rows: a list of Row. fail() raises SystemExit.
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import difflib
import functools
import glob
import hashlib
import html
import importlib
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import signal
import socket
import string
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import huggingface_hub.constants
import numpy as np
import scipy
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import special
from scipy.sparse import csgraph
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

# ---------------------------------------------------------------- foundation: errors, flags, files


def fail(message):
    """Print "error: " and a message of at most 1,000 characters on stderr; end with status 2."""
    line_start = ""
    for bar in list(tqdm._instances):  # an open progress bar would share the line
        bar.close()
        line_start = "\r"
    line = " ".join(str(message).split())[:1000]  # a damaged file may hold a name of megabytes
    print(f"{line_start}error: {line}", file=sys.stderr)
    sys.exit(2)


def note(message):
    """Print a line on stderr; under torchrun, only in the process of rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def progress(items, title, count=None):
    """The items, with a bar on a terminal after a second; count: if they have no length."""
    return tqdm(items, title, count, leave=False, disable=None, delay=1)


def did_you_mean(word, known, likeness=0.6):
    """A question that names the known word which is most like this one; "" if none is, or it is."""
    for near in difflib.get_close_matches(word, known, 1, likeness):
        if near != word:
            return f" (did you mean {near}?)"
    return ""


class BadImage(Exception):
    """An image that cannot be read; its text is "PATH: WHY"."""

    def __init__(self, path, why):
        super().__init__(f"{path}: {why}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as written, and defaults that are not empty, False or in the help."""

    def _get_help_string(self, action):
        if action.default in (None, "", []) or action.default is False or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Flags(argparse.ArgumentParser):
    """A parser whose errors are one line by fail(); @FILE holds a flag a line, # comments."""

    def __init__(self, description, **more):
        how = {"formatter_class": HelpFormatter, "fromfile_prefix_chars": "@"}
        super().__init__(description=description, allow_abbrev=False, **how, **more)
        self._negative_number_matcher = re.compile(r"-\d")  # --range -1000,400 has no other flag

    def convert_arg_line_to_args(self, line):
        line = line.strip("\ufeff \t")
        if "\0" in line:
            self.error(f"{line!r} in a file of flags: is not text; write the file again")
        if not line or line.startswith("#"):
            return []
        return [re.sub(r"^(--[\w-]+)\s+", r"\1=", line)]

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        problem = sys.exc_info()[1]
        if unknown:
            message += did_you_mean(unknown[1], self._option_string_actions)
        elif isinstance(problem, OSError):
            message = f"@{problem.filename}: {problem.strerror}: give a recipe of tests/recipes"
        elif "are required" in message:
            message += " (see --help)"
        fail(message)

    def parse_args(self, argv=None):
        """The flags; with --run, those of READING that are not given are taken from that run."""
        args = super().parse_args(argv)
        if getattr(args, "run", None):
            return self.parse_again(read_run(args.run), f"--run {args.run}", argv)
        return args

    def parse_again(self, settings, source, argv):
        """The flags; those of READING not given are from settings, a dict of the run `source`."""
        taken = {name: settings[name] for name in READING if settings.get(name)}
        self.set_defaults(**taken)
        args = super().parse_args(argv)
        words = [f"{name} {value}" for name, value in taken.items() if vars(args)[name] == value]
        if words:  # not of another program's adapter
            note(f"{source}: real images are prepared as in its training: {', '.join(words)}")
        return args


def number(low, high):
    """An argument type: a number from low to high inclusive, an int where both bounds are ints."""
    is_whole = isinstance(low, int) and isinstance(high, int)
    convert, kind = (int, "a whole number") if is_whole else (float, "a number")

    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # false for NaN, too
            raise argparse.ArgumentTypeError(f"{text}: give {kind} from {low:.10g} to {high:.10g}")
        return value

    parse.metavar = "N" if is_whole else "X"
    return parse


def data_set(text):
    """An argument type: the path of a folder of images or of a table, which must exist."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return text


def existing_file(text):
    """An argument type: the path of a file, which must exist."""
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return text


def read_run(folder):
    """The flags of a run of train.py, {name: value}; fail() if args.json is missing or damaged."""
    path = os.path.join(folder, "args.json")
    try:
        return dict(json.loads(read_text(path))["args"])
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{path}: missing or damaged: give the --out of a train.py run")


def read_audit(folder):
    """The dict of a run's audit.json, with a "sentence"; None where it is missing or damaged."""
    try:
        audit = json.loads(read_text(os.path.join(folder, "audit.json")))
        return audit if audit["sentence"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def interval(text):
    """An argument type: LO,HI as [LO, HI], floats with LO < HI."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not low < high:
        raise argparse.ArgumentTypeError(f"{text}: give LO,HI with LO < HI, such as 0,4095")
    return [low, high]


def ct_window(text):
    """An argument type: the text of a window that pick_window knows."""
    pick_window(text)
    return text


def flag_adder(group):
    """add(name, help, default, type, **options) for a group; default=False makes a switch."""

    def add(name, help, *default_and_type, **options):
        options |= zip(("default", "type"), default_and_type, strict=False)
        if options.get("default") is False:
            options["action"] = "store_true"
        if hasattr(options.get("type"), "metavar"):
            options.setdefault("metavar", options["type"].metavar)
        group.add_argument(name, help=help, **options)

    return add


def need_flags(args, needs):
    """fail() where a flag lacks one that it needs; {"mix": ("share",)}: --share needs --mix."""
    for needed, names in needs.items():
        for name in names:
            if getattr(args, name) not in (None, False, []) and not getattr(args, needed):
                fail(f"--{name}: needs --{needed}".replace("_", "-"))


# the flags of add_reading_flags
READING = (
    "image_column caption_column label_column group_column sex_column age_column "
    "crop slices window range allow_burned_in"
).split()


def add_reading_flags(group, with_run=True):
    """Flags of how real images are found and prepared, the same in all scripts; with_run: --run."""
    add = flag_adder(group)
    if with_run:
        run = "the run that made the images: use its split, and its settings for these flags"
        add("--run", run, metavar="DIR")
    for role in COLUMNS:
        add(f"--{role}-column", f"{role} column of the table (default: by name)", metavar="NAME")
    add(
        "--crop",
        "to a square: cut, add a black border (pad), or cut to the fundus disc",
        "center",
        choices=["center", "random", "pad", "fundus"],
    )
    add("--slices", "which slices of volumes are read: middle, every:N or all", "middle")
    add("--window", "centre,width in Hounsfield units, or lung, soft, bone, brain", type=ct_window)
    add("--range", "black and white in images of more than 8 bits", type=interval, metavar="LO,HI")
    add("--allow-burned-in", "read DICOM files with burned-in text", False)


def add_comparison_flags(group):
    """Flags of how real and generated images are compared, for evaluate.py and filter.py."""
    add = flag_adder(group)
    add(
        "--lpips",
        "network of LPIPS; auto: alex if its weights are there, else none",
        "auto",
        choices=["auto", "none", "alex", "vgg", "squeeze"],
    )
    add(
        "--resolution",
        "side of the compared images in pixels (default: the generated images' median, 64 to 256)",
        type=number(64, 4096),
    )
    add("--batch-size", "images that a network gets at once", 32, number(1, 10**6))
    add_common_flags(group)
    add_reading_flags(group)


def add_common_flags(group):
    """The flags --device, --precision and --seed, which mean the same in every script."""
    add = flag_adder(group)
    add("--device", "auto, cpu, cuda, cuda:N or mps", "auto")
    add("--precision", "networks' number format", "auto", choices=["auto", "fp32", "bf16", "fp16"])
    add("--seed", "of all random draws", 0, number(0, 2**63 - 1))


def add_card_flags(group):
    """Flags of what a card says about the training images, for train.py and filter.py."""
    add = flag_adder(group)
    add("--data-licence", "licence of the training images, for README.md", "not stated")
    add("--ethics", "ethics approval of their use, for README.md", "not stated")


@contextlib.contextmanager
def replacing(path, wait=True):
    """Open a binary file that replaces `path` once complete and (wait) on the disk; make dirs."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name[:200]}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if wait:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch.save hides the OSError of a full disk
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path
        raise error


def write_file(path, content):
    """Write bytes, or text as UTF-8, atomically; see replacing."""
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def write_csv(path, header, rows):
    """Write a CSV file in UTF-8 with CRLF line ends, atomically; rows: lists of cells."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_file(path, text.getvalue())


def copy_file(source, target):
    """Copy a file's content, atomically."""
    write_file(target, Path(source).read_bytes())


def need(package, purpose):
    """Import and return an optional package; else fail() with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f"{purpose}: needs the package {package}: pip install {package}")


def sha256(content):
    """SHA-256 of bytes: 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def hash_number(text):
    """64 bits of a hash of a text, as a whole number."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def generator(seed, *key):
    """A CPU torch.Generator for one purpose: the same seed and key, the same numbers everywhere."""
    return torch.Generator().manual_seed(hash_number(repr((seed, *key))) >> 1)


def command(script, *words):
    """The text of a command to type next: a script next to the running one, and its words."""
    path = os.path.join(os.path.dirname(sys.argv[0]), script)
    return shlex.join(["python", path, *map(str, words)])


def reading_words(args):
    """Of add_reading_flags, what a next command() needs: --run, which sets the others, or these."""
    if args.run:
        return ["--run", args.run]
    parser = Flags("")
    add_reading_flags(parser)
    usual = vars(parser.parse_args([]))
    words = []
    for name in READING:
        value = getattr(args, name)
        if value == usual[name]:
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, str):
            words += [flag, value]
        else:
            words += [flag, ",".join(f"{end:.10g}" for end in value)]
    return words


def run_script(main, parse_args):
    """Run main(parse_args()): input, disk and memory errors end in fail(), bugs in a traceback."""
    # never fail on an unprintable character; in a log, too, a line stands as soon as it is printed
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = None
    try:
        args = parse_args()
        main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except BadImage as error:
        fail(error)
    except UnicodeError as error:
        fail(f"a text file (such as an @file of flags) or a file name is not UTF-8 text: {error}")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search(MEMORY_IS_FULL, str(error)):
            raise
        fail(f"the memory is full: try {', '.join(less_memory(args)) or 'a larger machine'}")


# of torch's two allocators, cuBLAS, cuDNN and NCCL
MEMORY_IS_FULL = (
    "out of memory|not enough memory|can't allocate memory|ALLOC(ATION)?_FAILED|Failed to CUDA"
)


def less_memory(args):
    """Changes of flags, as texts, by which a command with these args needs less memory."""
    flags = vars(args) if args else {}
    is_full = flags.get("method") == "full"
    advice = {
        "a smaller --batch-size": flags.get("batch_size", 1) > 1,
        "a smaller --resolution": "resolution" in flags,
        "a smaller --height and --width": "height" in flags,
        "a smaller --max-images": "max_images" in flags,
        "--low-memory": flags.get("low_memory") is False,
        "--gradient-checkpointing": flags.get("gradient_checkpointing") is False,
        "--precision bf16": flags.get("precision") == "fp32",
        "--optimizer adamw8bit": is_full and flags["optimizer"] == "adamw",
        "--ema 0": is_full and flags["ema"] > 0,
    }
    return [flag for flag, helps in advice.items() if helps]


def pick_device(name):
    """The torch.device of auto|cpu|cuda|cuda:N|mps, or fail(). auto: cuda, else cpu."""
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    devices = ["cpu", *gpus]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if name in ("auto", "cuda") and gpus:
        name = pick_gpu(gpus)
    if name == "auto":
        name = "cpu"
    if name not in devices:
        fail(
            f"--device {name}: no such device: this machine has {', '.join(devices)}; if nvidia-smi"
            " shows more, update the driver or install torch for its CUDA (torch.version.cuda: "
            f"{torch.version.cuda})"
        )
    return torch.device(name)


def pick_gpu(gpus):
    """The GPU of this process under torchrun, else the one with the most free memory."""
    if "LOCAL_RANK" in os.environ:  # Slurm may show each process a single one
        return gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)]
    if len(gpus) == 1:
        return gpus[0]
    free = dict.fromkeys(gpus, -1)
    for gpu in gpus:
        with contextlib.suppress(RuntimeError):  # somebody else filled it
            free[gpu] = torch.cuda.mem_get_info(gpu)[0]
    return max(free, key=free.get)


# ---------------------------------------------------------------- reading one image

# never EPS: Pillow starts ghostscript to read it
FORMATS = "PNG JPEG JPEG2000 GIF BMP DIB TIFF WEBP PPM AVIF QOI PSD".split()
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
with contextlib.suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
    FORMATS += ["HEIF"]
ADVICE = "save images as PNG (for HEIC: pip install pillow-heif)"
# name: (centre, width) in Hounsfield units
WINDOWS = {"lung": (-600, 1500), "soft": (40, 400), "brain": (40, 80), "bone": (400, 1800)}
for package in ("PIL", "pydicom", "nibabel"):  # pydicom quotes the header, patients' names included
    warnings.filterwarnings("ignore", module=package)
    logging.getLogger(package).setLevel(logging.CRITICAL)


@np.errstate(all="ignore")  # damaged files hold numbers that overflow
def read_image(
    path, slice=None, window=None, value_range=None, allow_burned_in=False, keep_grey=False
):
    """Read an image of any kind as an upright 8-bit PIL image of mode "RGB", or raise BadImage.

    slice: from 0, a frame of a DICOM file or axial slice of a volume, by default the middle one.
    window, not of rasters: "centre,width", such a tuple, or for CTs and volumes a name of WINDOWS.
    value_range: (black, white) where no window is given, beyond 8 bits; by default all of a raster,
    a DICOM file's own window, else percentiles. keep_grey: mode "L" for grey images.
    """
    try:
        if str(path).lower().endswith(VOLUME_SUFFIXES):
            image = read_volume(path, slice, window, value_range)
        elif looks_like_dicom(path):
            image = read_dicom(path, slice, window, value_range, allow_burned_in)
        else:
            image = read_raster(path, value_range)
    except BadImage:
        raise
    except ImportError as error:
        raise BadImage(path, f"needs the package {error.name}: pip install {error.name}") from None
    except UnidentifiedImageError:
        raise BadImage(path, f"is empty, or not an image that can be read: {ADVICE}") from None
    except Exception as error:  # not its text: pydicom quotes the header
        why = getattr(error, "strerror", None) or f"is damaged ({type(error).__name__})"
        raise BadImage(path, why) from None
    return image if keep_grey else image.convert("RGB")


def read_raster(path, value_range):
    """PNG, JPEG, TIFF and the like: the first frame, upright, transparency on black."""
    # opened as a file: given a name, Pillow maps some TIFFs wrongly
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        if image.format == "PNG":
            Image.open(path).verify()  # decoding alone ignores wrong checksums
        values = deep_values(path, image)
        if values is not None:  # convert() would clip these at 255
            scaled = scale(values, *(value_range or percentile_range(values, 0, 100)))
            if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # white is zero
                scaled = ImageOps.invert(scaled)  # Pillow does this for 8 bits itself
            scaled.info = image.info
            return ImageOps.exif_transpose(scaled)
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, "black")
            return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
        return image.convert("L" if image.mode in ("1", "L") else "RGB")


def deep_values(path, image):
    """The numbers (H, W) or (H, W, 3) of an open image of more than 8 bits, on black; else None."""
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    if image.format not in ("PNG", "TIFF") or image.mode not in ("RGB", "RGBA"):
        return None
    layout = image.tile[0].args  # such as RGB;16L, the last letter the byte order
    if image.format == "TIFF":
        layout = layout[0]
        is_in_planes = image.tag_v2.get(284) == 2 and 16 in image.tag_v2.get(258, ())
        if is_in_planes or "a;16" in layout:
            why = "has 16-bit colours in planes or multiplied by opacity: save it as a 16-bit PNG"
            raise BadImage(path, why)
    if ";16" not in layout:
        return None
    values = np.asarray(image).astype(np.uint16) * 256 + lower_bytes(path, layout)
    if values.shape[2] == 4:
        opacity = values[..., 3:] / max(1, values[..., 3].max())
        values = (values[..., :3] * opacity).round().astype(np.uint16)
    return values


def lower_bytes(path, layout):
    """The bytes of 16-bit colours that Pillow leaves out: its upper ones in the other order."""
    other = layout[:-1] + ("L" if layout.endswith("B") else "B")
    if layout == "LA;16B":  # there is no LA;16L; read as RGBA, each byte is a channel
        other = "RGBA"
    with open(path, "rb") as file, Image.open(file, formats=("PNG", "TIFF")) as image:
        tiles = []
        for tile in image.tile:
            settings = tile.args[1:] if image.format == "TIFF" else ()
            tiles.append(tile._replace(args=(other, *settings)))
        image.tile = tiles
        values = np.asarray(image)
    return values[..., (1, 1, 1, 3)] if layout == "LA;16B" else values


def scale(values, low, high):
    """(H, W) or (H, W, 3) numbers to mode "L" or "RGB": black up to low, 255 from high."""
    finite = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    unit = (finite - low) / max(high - low, 1e-12)
    return Image.fromarray((unit.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def percentile_range(values, low, high):
    """(low, high) percentiles of the finite values."""
    finite = values[np.isfinite(values)]
    return tuple(np.percentile(finite, (low, high))) if finite.size else (0, 1)


def pick_window(window):
    """(centre, width) of a window: a name, "centre,width" or such a pair; None stays None."""
    if window in WINDOWS:
        return WINDOWS[window]
    if not isinstance(window, str):
        return window
    try:
        centre, width = map(float, window.split(","))
    except ValueError:
        width = 0
    if not width > 0:
        fail(f"--window {window}: give centre,width, such as 40,400, or {', '.join(WINDOWS)}")
    return centre, width


def square_pixels(image, spacing):
    """Stretch the coarser axis of an image; spacing: its pixels' height and width, if known."""
    if np.size(spacing) != 2 or not all(spacing):
        return image
    ratio = float(spacing[0]) / float(spacing[1])
    if abs(ratio - 1) < 0.01 or not 0.02 < ratio < 50:
        return image
    width = round(image.width * max(1, 1 / ratio))
    height = round(image.height * max(1, ratio))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def looks_like_dicom(path):
    """True for a DICOM file by its content, with or without the 128-byte preamble."""
    with open(path, "rb") as file:
        head = file.read(132)
    is_bare = head.startswith((b"\2\0", b"\b\0")) and head[3:4] == b"\0"  # a tag of group 2 or 8
    return head[128:] == b"DICM" or is_bare


def open_dicom(path, **how):
    """A file as a pydicom Dataset, of which no value is validated; how: flags of dcmread."""
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    data = pydicom.dcmread(path, force=True, **how)
    if "TransferSyntaxUID" not in data.file_meta:  # no preamble
        implicit, explicit = pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = implicit if data.original_encoding[0] else explicit
    return data


def read_dicom(path, slice, window, value_range, allow_burned_in):
    """One frame, grey or in colour, with square pixels (DICOM PS3.3 C.7.6.3 and C.11)."""
    data = open_dicom(path)
    if str(data.get("BurnedInAnnotation")).strip().upper() == "YES" and not allow_burned_in:
        raise BadImage(path, "has burned-in text, maybe a name: check, then give --allow-burned-in")
    if slice is None:
        slice = count_frames(data) // 2
    copy_frame_tags(data, slice)
    image = jpeg_colours(data, slice)
    if image is None:
        values = dicom_frame(path, data, slice)
        if values.ndim == 3:
            image = Image.fromarray(values)
        else:
            image = dicom_grey(path, data, values, window, value_range)
    spacing = data.get("PixelSpacing") or data.get("ImagerPixelSpacing")
    return square_pixels(image, spacing or data.get("PixelAspectRatio"))


def count_frames(data):
    """The number of frames of a DICOM file."""
    return int(data.get("NumberOfFrames") or 1)


def dicom_frame(path, data, frame):
    """A frame's rescaled values (H, W), NaN in padding, or uint8 colours (H, W, 3); or BadImage."""
    from pydicom.pixels import apply_color_lut, apply_rescale, pixel_array

    try:
        values = pixel_array(data, index=frame)
    except RuntimeError:  # there is no decoder, or each of them gave up
        codecs = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        raise BadImage(path, f"no installed decoder reads its compression: {codecs}") from None
    is_palette = data.PhotometricInterpretation == "PALETTE COLOR"
    if is_palette:
        values = apply_color_lut(values, data)
    if values.ndim == 3:
        bits = 8 * values.itemsize if is_palette else data.BitsStored
        return (values >> max(bits - 8, 0)).astype(np.uint8)
    if values.dtype.kind in "iu":
        unused = max(0, 8 * values.itemsize - data.BitsStored)  # may hold an overlay
        values = values << unused >> unused
    rescaled = apply_rescale(values, data).astype(np.float64)
    if data.get("PixelPaddingValue") is not None:
        ends = [data.PixelPaddingValue, data.get("PixelPaddingRangeLimit", data.PixelPaddingValue)]
        low, high = sorted(np.array(ends).astype(values.dtype))  # may be written as unsigned
        rescaled[(values >= low) & (values <= high)] = np.nan
    return rescaled


def jpeg_colours(data, frame):
    """A frame of a JPEG's colours, as the stream has them; None where the header decides."""
    from pydicom.encaps import get_frame
    from pydicom.uid import JPEGBaseline8Bit

    if data.file_meta.TransferSyntaxUID != JPEGBaseline8Bit or data.SamplesPerPixel != 3:
        return None
    stream = get_frame(data.PixelData, frame, number_of_frames=count_frames(data))
    image = Image.open(io.BytesIO(stream), formats=["JPEG"])
    names = bytes(layer[0] for layer in image.layer)
    is_rgb = names == b"RGB" or image.info.get("adobe_transform") == 0
    is_even = len({layer[1:] for layer in image.layer}) == 1  # colours as sharp as brightness
    if is_even and not is_rgb and not image.info.keys() & {"jfif", "adobe"}:
        return None
    colours = image.convert("RGB")
    if is_rgb == ("YBR" in data.PhotometricInterpretation):
        colours.info["remark"] = "the JPEG data has other colours than the header: the data is used"
    return colours


def copy_frame_tags(data, frame):
    """Copy an enhanced file's tags of one frame to where a simple file has them."""
    shared = data.get("SharedFunctionalGroupsSequence") or []
    of_frames = data.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*shared, *of_frames[frame : frame + 1]]:
        for kind in ("PixelValueTransformation", "FrameVOILUT", "PixelMeasures"):
            for tags in group.get(f"{kind}Sequence") or []:
                data.update(tags)
    if data.get("RescaleSlope") is None or data.get("RescaleIntercept") is None:
        data.pop("RescaleSlope", None)  # blanked by anonymisation


def own_window(data):
    """(centre, width) of a file's first window, or None."""
    with contextlib.suppress(Exception):  # absent, empty or no number
        centre = float(np.ravel(data.WindowCenter)[0])
        width = float(np.ravel(data.WindowWidth)[0])
        if width > 0:
            return centre, width
    return None


@functools.cache
def range_of_frames(path):
    """Percentiles 0.5 and 99.5 over up to 16 frames of a file without a window."""
    count = count_frames(open_dicom(path))
    frames = []
    for frame in range(0, count, 1 + count // 16):
        data = open_dicom(path)  # again, for no frame has the tags of another
        copy_frame_tags(data, frame)
        frames.append(dicom_frame(path, data, frame))
    return percentile_range(np.concatenate(frames), 0.5, 99.5)


def dicom_grey(path, data, values, window, value_range):
    """Rescaled (H, W) values to mode "L": as asked for, else as the file says, else percentiles."""
    if window in WINDOWS and data.get("Modality", "CT") != "CT":
        window = None
    if window and data.get("Modality") == "CT" and "RescaleSlope" not in data:
        raise BadImage(path, "is a CT without RescaleSlope: not in Hounsfield units: omit --window")
    window = pick_window(window)
    padding = np.isnan(values)
    if not window and value_range is None:
        if data.get("VOILUTSequence"):
            values, value_range = look_up(values, data.VOILUTSequence[0])
        else:
            window = own_window(data)
    function = data.get("VOILUTFunction")
    if window and function == "SIGMOID":
        values = 1 / (1 + np.exp(-4 * (values - window[0]) / window[1]))
        value_range = 0, 1
    elif window:
        centre, width = window
        # LINEAR counts whole grey levels (PS3.3 C.11.2.1.2.1)
        is_exact = function == "LINEAR_EXACT" or width < 1 or "PixelData" not in data
        value_range = centre - width / 2, centre + width / 2 - (0 if is_exact else 1)
    elif value_range is None and count_frames(data) > 1:
        value_range = range_of_frames(path)
    low, high = value_range or percentile_range(values, 0.5, 99.5)
    image = scale(values, low, high)
    if data.PhotometricInterpretation == "MONOCHROME1":
        image = ImageOps.invert(image)
    image.paste(0, mask=Image.fromarray(padding))
    return image


def look_up(values, lut):
    """Values through a VOI LUT, and its range; pydicom's own function wraps tables of 8 bits."""
    count, first, bits = lut.LUTDescriptor
    table = lut.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, "u1" if len(table) == (count or 2**16) else "<u2")
    indices = (np.nan_to_num(values) - first).astype(int)
    return np.ravel(table).take(indices, mode="clip"), (0, 2**bits - 1)


def read_volume(path, slice, window, value_range):
    """One axial slice of a volume, anterior up, the patient's left on the image's left."""
    values, spacing, ends, count = load_volume(path)
    if slice is None:
        slice = values.shape[2] // 2
    if window:
        centre, width = pick_window(window)
        value_range = centre - width / 2, centre + width / 2
    low, high = value_range or ends
    image = scale(np.rot90(values[:, :, slice].astype(np.float64)), low, high)
    if count > 1:
        image.info["remark"] = f"the file has {count} volumes (channels, times): the first is read"
    return square_pixels(image, (spacing[1], spacing[0]))


@functools.lru_cache(maxsize=2)
def load_volume(path):
    """(values (right, anterior, superior), spacings, (black, white), volumes in the file).

    Colours add an axis of 3 to the values. Black is the 1st percentile of all slices, white the
    99th of what is brighter than the mean: without the air. Colours of 8 bits stay as they are.
    """
    import nibabel

    volume = nibabel.load(path)
    is_vector = volume.ndim == 5 and volume.shape[4] == 3
    count = 1
    while volume.ndim > (4 if is_vector else 3):
        count *= volume.shape[3]
        volume = volume.slicer[:, :, :, 0]
    volume = nibabel.as_closest_canonical(volume)
    values = np.atleast_3d(np.asanyarray(volume.dataobj))
    if values.dtype.names:  # RGB24, RGBA32
        values = np.stack([values[name] for name in "RGB"], -1)
    if values.ndim == 4 and values.dtype == np.uint8:
        return values, volume.header.get_zooms(), (0, 255), count
    step = 1 + int((values.size / 2**23) ** (1 / 3))
    sample = values[::step, ::step, ::step].astype(np.float32)
    low, high = percentile_range(sample, 1, 99)
    bright = sample[sample > sample[np.isfinite(sample)].mean()]
    high = max(high, percentile_range(bright, 1, 99)[1])
    return values, volume.header.get_zooms(), (low, high), count


# ---------------------------------------------------------------- listing a data set

IMAGE_SUFFIXES = (".dcm", ".dicom", *VOLUME_SUFFIXES)
for suffix, name in Image.registered_extensions().items():
    if name in FORMATS:
        IMAGE_SUFFIXES += (suffix,)
CAPTION_SUFFIXES = (".txt", ".caption")
LITTER = (".db", ".ini")  # Thumbs.db and desktop.ini of Windows
COLUMNS = {
    "image": ("file_name", "path", "image", "image_path", "file"),
    "caption": ("text", "caption", "prompt"),
    "label": ("label", "labels", "class"),
    "group": ("patient_id", "patient", "subject", "group"),
    "sex": ("sex", "gender", "patient_sex", "patient_gender"),
    "age": ("age", "patient_age", "age_approx", "anchor_age"),
}
TABLES = ("metadata.csv", "metadata.jsonl", "manifest.csv")
MISSING = ("na", "n/a", "#n/a", "nan", "null")  # how R, Excel and pandas write that a cell is empty
BAD_SHARE = 0.05  # of a data set may be missing or unreadable; more is a mistake to correct first


@dataclass
class Row:
    """One image of a data set. Texts are "" where unknown.

    path: absolute; file_name: as in the table, or relative to the folder; fields: the table's
    columns; slice: see read_image; value_range: what is black and white beyond 8 bits; remark: what
    is odd in the file; size: (width, height), once it is read; weight: of its loss in training.
    """

    path: str
    file_name: str
    caption: str = ""
    label: str = ""
    group: str = ""
    sex: str = ""  # this and age are counted and never written: see count_people
    age: str = ""
    fields: dict = field(default_factory=dict)
    slice: int = None
    split: str = ""
    value_range: tuple = None
    remark: str = ""
    size: tuple = None
    weight: float = 1.0


def list_images(data, columns=None, prompt=None, slices="middle", strict=False):
    """The rows of a data set: a folder, class folders, a folder with a table, or a table.

    columns: {role of COLUMNS: a column of the table, None to find it}. prompt: a format string over
    the columns, instead of the caption column. slices: middle, all or every:N. strict: fail(), as
    without any image or for a wrong column, also for files that are missing or not read.
    """
    wanted = columns or {}
    tables = [data, *(os.path.join(data, name) for name in TABLES)]
    table = next(filter(os.path.isfile, tables), None)
    records = read_table(table, wanted.get("caption")) if table else []
    names = records[0] if records else {}
    columns = {}
    for role in COLUMNS:
        name = wanted.get(role)
        if name is not None and name not in names:
            fail(f"--{role}-column {name}: not in {data}; it has {', '.join(names) or 'no table'}")
        columns[role] = name or find_column(names, role)
    if table:
        rows = list_table(table, records, columns, strict)
        report_table(table, rows, columns["group"])
    else:
        rows = list_folder(data, strict)
        columns["caption"] = any(row.caption for row in rows)
    fill_captions(data, rows, columns, prompt)
    return spread_slices(check_dicoms(data, rows), slices)


def list_folder(folder, strict):
    """Rows of the images below a folder: label by subfolder, caption by a .txt of the same name."""
    rows = []
    texts = {}
    skipped = Counter()
    for name in sorted(glob.glob("**", root_dir=folder, recursive=True)):  # skips hidden files
        path = os.path.abspath(os.path.join(folder, name))
        suffix = os.path.splitext(name)[1].lower()
        if not os.path.isfile(path) or suffix in LITTER:
            continue
        if looks_like_image(path):
            label = os.path.dirname(name).split(os.sep)[0]
            rows.append(Row(path, name, label=label))
        elif suffix in CAPTION_SUFFIXES:
            texts[stem_of(path)] = path
        else:
            skipped[suffix or "without a suffix"] += 1
    for row in rows:
        if stem_of(row.path) in texts:
            row.caption = " ".join(read_text(texts[stem_of(row.path)]).split())
    skipped["captions without an image"] = len(texts.keys() - {stem_of(row.path) for row in rows})
    skipped = +skipped  # without zeros
    if skipped:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(skipped.items()))
        message = f"{folder}: files skipped: {kinds}: {ADVICE}"
        if strict or not rows:
            fail(message)
        note(message)
    if not rows:
        fail(f"{folder}: has no images; suffixes that are read: {' '.join(IMAGE_SUFFIXES)}")
    return rows


def stem_of(path):
    """A file's path without its suffix, as names are compared."""
    return name_key(re.sub(r"(\.nii)?\.\w+$", "", path))


def name_key(name):
    """A name as it is compared: "ü" is one letter on most systems, two in what a Mac packs."""
    return unicodedata.normalize("NFC", name)


def find_file(path):
    """The path of a file, if there, as it is spelt on the disk: see name_key."""
    folder, name = os.path.split(path)
    if os.path.exists(path) or not name:
        return path
    folder = find_file(folder)
    for form in ("NFC", "NFD"):
        path = os.path.join(folder, unicodedata.normalize(form, name))
        if os.path.exists(path):
            break
    return path


def report_table(table, rows, group_column):
    """Report images next to those that a table names, and a group that may be no patient."""
    named = {name_key(row.path) for row in rows}
    unnamed = []
    for folder in {os.path.dirname(row.path) for row in rows}:
        for name in os.listdir(folder):
            is_image = name.lower().endswith(IMAGE_SUFFIXES)
            is_ours = name.startswith((".", "grid.png"))
            if is_image and not is_ours and name_key(os.path.join(folder, name)) not in named:
                unnamed.append(name)
    if unnamed:
        count = f"{len(unnamed)}, such as {min(unnamed)}"
        note(f"{table}: images next to those that it names are not used: {count}")
    groups = sorted({row.group for row in rows} - {""})
    if str(group_column).lower() == "group" and 0 < len(groups) < min(10, len(rows) / 4):
        count = f"{len(groups)} values in {len(rows)} rows ({', '.join(groups[:3])})"
        note(f"{table}: column {group_column} has {count}: if not patients, give --group-column")


def looks_like_image(path):
    """True by a file's suffix, or by the content where it is named by numbers, as scanners do."""
    if path.lower().endswith(IMAGE_SUFFIXES):
        return True
    suffix = os.path.splitext(path)[1].strip(".0123456789").lower()
    return suffix in ("", "ima") and looks_like_dicom(path)


def read_table(path, caption_column=None):
    """The rows of a CSV or JSONL file, dicts of texts with the same keys; else fail()."""
    text = read_text(path)
    if str(path).lower().endswith((".jsonl", ".json", ".ndjson")):
        records = read_jsonl(path, text)
    else:
        records = read_csv(path, text, caption_column)
    names = {}  # JSON's rows may lack some
    for record in records:
        names |= dict.fromkeys(record, "")
    return [names | record for record in records]


def read_text(path):
    """The text of a file in UTF-8, or UTF-16, which is Excel's "Unicode text"; else fail()."""
    for encoding in ("utf-8-sig", "utf-16"):
        with contextlib.suppress(UnicodeError):
            return Path(path).read_text(encoding)
    fail(f"{path}: not a UTF-8 text file: save it as UTF-8 (in Excel: CSV UTF-8)")


def read_jsonl(path, text):
    """The JSON object of each line that is not blank, its values as texts, lists as A|B."""
    records = []
    for line in filter(str.strip, text.split("\n")):
        try:
            cells = json.loads(line).items()
        except (ValueError, AttributeError, RecursionError):
            fail(f"{path}: a line is not a JSON object: {line[:80]}")
        record = {}
        for name, cell in cells:
            parts = cell if isinstance(cell, list) else [cell]
            record[name] = "|".join(str(part).strip() for part in parts if part is not None)
        records.append(record)
    return records


def read_csv(path, text, caption_column):
    """The rows of a CSV text; the delimiter is a comma, semicolon or tab."""
    text = re.sub(r"\A(sep=.|\s)*\n", "", text)  # blank lines, and the one that Excel writes first
    mark = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    try:
        header, *rows = [cells for cells in reader if any(cells)] or [[]]
    except csv.Error as error:
        fail(f"{path}: not a readable CSV file: {error}")
    header = [name.strip() for name in header]
    caption = caption_column or find_column(header, "caption")
    start = header.index(caption) if caption in header else len(header)
    records = []
    joined = []
    for cells in rows:
        if any(cells[len(header) :]):  # others are a spreadsheet's empty columns
            end = start + 1 + len(cells) - len(header)
            # they belong to the caption, if a space follows each comma or it is the last column
            is_prose = all(cell.startswith(" ") for cell in cells[start + 1 : end])
            if caption not in header or not (is_prose or caption == header[-1]):
                fail(f"{path}: row {cells[0]} has more cells than the header: put texts in quotes")
            cells[start:end] = [mark.join(cells[start:end])]
            joined.append(cells[start])
        pairs = itertools.zip_longest(header, cells[: len(header)], fillvalue="")
        records.append({name: cell.strip() for name, cell in pairs})
    if joined:
        note(f'{path}: unquoted {mark!r} in {len(joined)} rows: {caption} read as "{joined[0]}"')
    return records


def find_column(names, role, columns=COLUMNS):
    """The first of names with a usual name of a role (File Name is file_name), or None."""
    for usual in columns[role]:
        for name in names:
            if re.sub(r"[\W_]", "", name.lower()) == usual.replace("_", ""):
                return name
    return None


def list_table(table, records, columns, strict):
    """Rows of the files that a table names, relative to its own folder; columns: {role: name}."""
    if not records:
        fail(f"{table}: the table has no rows")
    if columns["image"] is None:
        fail(f"{table}: has no column of file names: name it with --image-column")
    folder = os.path.dirname(os.path.abspath(table))
    rows = []
    missing = []
    for fields in records:
        for name in filter(None, columns.values()):
            if text_key(fields[name]) in MISSING:
                fields[name] = ""
        file_name = fields[columns["image"]]
        path = os.path.join(folder, file_name.replace("\\", "/"))  # of Windows
        path = find_file(os.path.normpath(path))
        if os.path.isfile(path):
            texts = [fields.get(columns[role], "") for role in COLUMNS]
            rows.append(Row(path, file_name, *texts[1:], fields))
        else:
            missing.append(file_name or "(no name)")
    if missing:
        count = f"{len(missing)} of {len(records)} files"
        message = f"{table}: {count} are missing: {', '.join(missing[:5])} (in {folder})"
        if strict or len(missing) > BAD_SHARE * len(records):
            fail(message)
        note(message)
    return rows


def text_key(text):
    """A label or caption as it is compared: in lower case, with single spaces, letters composed."""
    return " ".join(name_key(text).lower().split())


def label_list(text):
    """The labels of a cell: ["A", "B"] of A|B."""
    return [part.strip() for part in text.split("|") if part.strip()]


def split_labels(row):
    """The set of a row's labels, {""} where it has none."""
    return set(label_list(row.label) or [""])


def modality_of(row):
    """A row's value in the column "modality", in any case; "" where it has none."""
    for name, value in row.fields.items():
        if name.lower() == "modality":
            return value
    return ""


def in_english(text):
    """Several labels of one cell as English: "A|B|C" becomes "A, B and C"."""
    *first, last = label_list(text) or [""]
    return ", ".join(first) + " and " + last if first else last


def fill_captions(data, rows, columns, prompt):
    """Set captions by the format string `prompt`; report rows that lack its columns, or fail()."""
    if prompt is None and not columns.get("caption"):
        return
    form = "{caption}" if prompt is None else prompt
    lacking = []
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(form) if name is not None]
        for row in rows:
            known = dict(caption=row.caption, text=row.caption, label=row.label, labels=row.label)
            known |= {name.lower(): value for name, value in row.fields.items()}
            texts = {}
            for name in names:
                if name.lower() not in known:
                    there = ", ".join(row.fields) or "only label and caption"
                    fail(f"--prompt: {data} has no column {{{name}}}; it has {there}")
                texts[name] = in_english(known[name.lower()])
            if not all(texts.values()):
                lacking.append(row.file_name)
            if prompt is not None:
                caption = prompt.format_map(texts).strip()
                row.caption = re.sub(r"^(.+?: )\1", r"\1", caption)  # "CT: {Text}" of "CT: a lung"
    except ValueError as error:  # of a format such as {label or {label:d}
        fail(f"--prompt {prompt!r}: {error} (write {{label}} for a column, {{{{ }}}} for braces)")
    if lacking:
        count = f"{len(lacking)} of {len(rows)} rows"
        message = f"{data}: {count} have no {' or '.join(sorted(texts))}, such as {lacking[0]}"
        if prompt is not None and len(lacking) == len(rows):
            fail(message)
        note(message)


def check_dicoms(data, rows):
    """The rows without DICOM files that are no images of patients; groups are from PatientID."""
    kept = []
    named = []
    for row in progress(rows, "looking for DICOM"):
        header = dicom_header(row.path)
        if header is None:
            kept.append(row)
        elif "Rows" in header and "LOCALIZER" not in (header.get("ImageType") or ()):
            kept.append(row)
            row.sex = row.sex or str(header.get("PatientSex"))
            row.age = row.age or str(header.get("PatientAge"))
            if header.get("PatientID") and not row.group:
                # 16 bits of a hash are too few to tell who it is
                digest = hashlib.blake2b(str(header.PatientID).strip().encode(), digest_size=2)
                row.group = f"patient-{digest.hexdigest()}"
                named.append(row)
    skipped = len(rows) - len(kept)
    if skipped:
        note(f"{data}: {skipped} of {len(rows)} files skipped: DICOM reports, plans and localizers")
    if not kept:
        fail(f"{data}: no images left: all are DICOM reports, plans or localizers")
    if len(named) > 1 and len({row.group for row in named}) == 1:
        note(f"{data}: all DICOM files have the same PatientID: ignored; give --group-column")
        for row in named:
            row.group = ""
    return kept


def dicom_header(path):
    """The header of a DICOM file; None for other and damaged files, which load_pixels reports."""
    with contextlib.suppress(Exception):
        if looks_like_dicom(path):
            return open_dicom(path, stop_before_pixels=True)
    return None


def spread_slices(rows, slices):
    """A row for each wanted slice; the slices of one file share a group, by default its content."""
    match = re.fullmatch(r"middle|all|every:([1-9]\d*)", slices)
    if not match:
        fail(f"--slices {slices}: give middle, all or every:N, such as every:4")
    if slices == "middle":
        return rows
    step = int(match[1] or 1)
    spread = []
    for row in rows:
        count = count_slices(row.path)
        if count == 1:
            spread.append(row)
            continue
        group = row.group or content_hash(row.path)
        for number in range(min(step, count) // 2, count, step):
            spread.append(dataclasses.replace(row, slice=number, group=group))
    return spread


def count_slices(path):
    """Frames of a DICOM file, axial slices of a volume; 1 for other files and damaged ones."""
    with contextlib.suppress(Exception):
        if path.lower().endswith(VOLUME_SUFFIXES):
            return load_volume(path)[0].shape[2]
        return count_frames(dicom_header(path))
    return 1


def content_hash(path):
    """SHA-256 of a file's bytes: 64 hexadecimal digits."""
    return sha256(Path(path).read_bytes())


def set_hash(rows):
    """One SHA-256 of the contents of a set's files, whatever their names and order."""
    hashes = sorted(content_hash(row.path) for row in rows)
    return sha256("".join(hashes).encode())


def list_rows(data, args, prompt, strict=False):
    """list_images by the flags of add_reading_flags."""
    columns = {role: getattr(args, f"{role}_column") for role in COLUMNS}
    return list_images(data, columns, prompt, args.slices, strict)


def list_real(data, args, prompt=None):
    """The rows of real images, with value_range, by the reading flags; --run sets row.split."""
    rows = share_range(list_rows(data, args, prompt), args.range)
    if args.run:
        read_split(rows, os.path.join(args.run, "split.csv"))
    return rows


def split_rows(rows, val_share, test_share=0.0):
    """Set row.split to train, val or test by a hash of the group, else of the file's content.

    Shares of the groups: 0 to 1. In a mix, images with 1 in the column synthetic are for training.
    """
    synthetic = [row.fields.get("synthetic") == "1" for row in rows]
    for row, is_synthetic in zip(rows, synthetic, strict=True):
        key = row.group or content_hash(row.path)
        place = hash_number(key) / 2**64
        if place >= test_share + val_share or (is_synthetic and not all(synthetic)):
            row.split = "train"
        elif place >= test_share:
            row.split = "val"
        else:
            row.split = "test"


def read_split(rows, path):
    """Set row.split as in a run's split.csv, "" where not named; fail() if it names no row."""
    splits = {name_key(record["file_name"]): record["split"] for record in read_table(path)}
    for row in rows:
        by_path = splits.get(name_key(row.path))
        row.split = by_path or splits.get(name_key(row.file_name), "")
    if not any(row.split for row in rows):
        example = rows[0].file_name
        fail(f"{path}: names none of these images, such as {example}: give the data of that run")


# ---------------------------------------------------------------- who is in a set

SEXES = {"f": "female", "female": "female", "m": "male", "male": "male", "o": "other"}


def decade_of(age):
    """The decade, such as "60–69", of an age such as "067Y", "8 months" or "60-65"; else ""."""
    match = re.search(r"(\d+)[.\d]* *([mwd]?)", age.lower())
    if not match:
        return ""
    years = int(match[1]) // {"m": 12, "w": 52, "d": 365}.get(match[2], 1)
    if years > 120:  # a year of birth
        return ""
    if years >= 90:  # so few that a decade could name one
        return "90 or more"
    return f"{years // 10 * 10}–{years // 10 * 10 + 9}"


def groups_of(row):
    """What an image counts for: [(by, group), …]; of sex and age no word of a table is shown."""
    groups = [("", "all"), ("sex", SEXES.get(text_key(row.sex))), ("age", decade_of(row.age))]
    if row.fields.get("synthetic") == "1":
        groups.append(("", "synthetic"))
    if not row.group:
        groups.append(("patient", ""))
    for label in label_list(text_key(row.label)) or [""]:
        groups.append(("label", label))
    return [(by, group or "unknown") for by, group in groups]


def count_people(members):
    """Images and patients of each set, in all and by age, label and sex, as in the JSON: dicts.

    members: [(name of a set, row), …]. Keys: by, group, "NAME images", "NAME patients" or None.
    """
    patients = {}  # of each image
    for name, row in members:
        for by, group in groups_of(row):
            patients.setdefault((by, group), {}).setdefault(name, []).append(row.group)
    records = []
    for (by, group), by_set in sorted(patients.items()):
        record = {"by": by, "group": group}
        for name in dict(members):  # of each set
            found = by_set.get(name, [])
            record[f"{name} images"] = len(found)
            record[f"{name} patients"] = len(set(found) - {""}) or None
        records.append(record)
    return records


def is_marked(path):
    """Whether a file itself says that it is synthetic: DICOM's (0008,001C) or PNG's text."""
    header = dicom_header(path)
    if header is not None:
        return header.get("SyntheticData") == "YES"
    with contextlib.suppress(UnidentifiedImageError), Image.open(path) as image:
        return image.info.get("synthetic") == "true"
    return False


# ---------------------------------------------------------------- from files to pixels


def fit_square(image, resolution, crop="center", gen=None):
    """A PIL image as a square of `resolution` pixels a side; crop: see --crop; random: by gen."""
    size = (resolution, resolution)
    disc = find_disc(image) if crop == "fundus" else None
    if disc:
        image = image.crop(disc)
    elif crop in ("pad", "fundus"):
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, 0)
    place = torch.rand((), generator=gen).item() if crop == "random" else 0.5
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=(place, place))


def find_disc(image):
    """(left, top, right, bottom) of the square around a fundus photograph's lit disc, or None."""
    small = image.convert("L")
    small.thumbnail((256, 256))
    parts, _ = scipy.ndimage.label(np.asarray(small) > 10)
    areas = np.bincount(parts.ravel())[1:]
    if areas.max(initial=0) < 0.2 * parts.size:
        return None
    rows, columns = scipy.ndimage.find_objects(parts)[areas.argmax()]
    height = rows.stop - rows.start
    width = columns.stop - columns.start
    side = max(height, width)
    if side > 1.6 * min(height, width):
        return None
    scale = image.width / small.width
    half = side / 2
    x = columns.start + width / 2
    y = rows.start + height / 2
    return tuple(round(edge * scale) for edge in (x - half, y - half, x + half, y + half))


def pick_resolution(rows):
    """Pixels a side at which sets are compared: the median shorter side of the rows, 64 to 256."""
    sides = []
    for row in rows:
        with contextlib.suppress(Exception):  # load_pixels reports those that cannot be read
            sides.append(min(stored_size(row.path)))
    return int(min(max(64, np.median(sides or 256)), 256))


def stored_size(path):
    """Width and height of an image of any kind; of most kinds without reading its pixels."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except UnidentifiedImageError:
        return read_image(path).size


def square_side(row, crop):
    """Pixels a side of the square that fit_square resizes; for fundus, about."""
    return max(row.size) if crop == "pad" else min(row.size)


def report_enlarged(rows, resolution, crop):
    """Report how many real images have fewer pixels a side than `resolution`."""
    small = sum(square_side(row, crop) < resolution for row in rows)
    if small:
        note(f"{small} of {len(rows)} real images are smaller than {resolution} px: enlarged")


def share_range(rows, given):
    """Return rows with value_range: given, or the range of all rasters of more than 8 bits."""
    deep = []
    ends = []
    kind = ""
    for row in progress(rows, "looking at grey values"):
        row.value_range = given
        with contextlib.suppress(Exception), Image.open(row.path, formats=FORMATS) as image:
            values = deep_values(row.path, image)
            if values is not None:
                ends += percentile_range(values, 0, 100)
                deep.append(row)
                kind = f"{8 * values.itemsize}-bit files"
                if values.dtype.kind != "f":
                    kind += f" with {int(max(ends)).bit_length()}-bit values"
    if deep:
        low, high = given or (float(min(ends)), float(max(ends)))
        for row in deep:
            row.value_range = low, high
        note(
            f"{len(deep)} images have more than 8 bits ({kind}): in all of them {low:g} is black "
            f"and {high:g} white (--range)"
        )
    return rows


def load_pixels(
    rows,
    resolution,
    crop="center",
    strict=False,
    seed=0,
    measure=None,
    value_range=None,
    bad_share=BAD_SHARE,
    **options,
):
    """Read the images of rows: (the readable rows, uint8 pixels (N, 3, resolution, resolution)).

    Sets remark and size of rows. seed: of crop "random". measure: a function of the uncropped PIL
    image, for row.measured. value_range: see share_range, whose earlier answer goes first. options:
    window and allow_burned_in of read_image. Unreadable files are reported and skipped; a share of
    more than bad_share (0 to 1), or any with strict, ends in fail().
    """
    if not any(row.value_range for row in rows):
        share_range(rows, value_range)
    pixels = torch.empty(len(rows), 3, resolution, resolution, dtype=torch.uint8)

    def load(i):
        row = rows[i]
        ends = row.value_range
        try:
            image = read_image(row.path, row.slice, value_range=ends, keep_grey=True, **options)
        except BadImage as error:
            return error
        row.remark = image.info.get("remark", "")
        row.size = image.size
        if measure:
            row.measured = measure(image)
        gen = generator(seed, "crop", row.file_name, row.slice)
        square = np.array(fit_square(image, resolution, crop, gen))
        pixels[i] = torch.from_numpy(np.atleast_3d(square)).permute(2, 0, 1)
        return None

    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        results = pool.imap(load, range(len(rows)))
        errors = list(progress(results, "reading", len(rows)))
    bad = [error for error in errors if error]
    report_bad(rows, bad, 0 if strict else bad_share)
    if bad_share < 1:  # else these are a part of a set
        report_remarks(rows)
    readable = [i for i, error in enumerate(errors) if not error]
    return [rows[i] for i in readable], pixels[readable] if bad else pixels


def load_real(rows, resolution, args, **how):
    """load_pixels of real images, by the flags of add_reading_flags."""
    how |= {"window": args.window, "allow_burned_in": args.allow_burned_in}
    return load_pixels(rows, resolution, args.crop, value_range=args.range, **how)


def report_bad(rows, bad, share):
    """Report images that cannot be read; fail() where they are more than this share."""
    for error in bad:
        print(f"skipped: {error}", file=sys.stderr)
    if len(bad) > share * len(rows):
        fail(f"{len(bad)} of {len(rows)} images cannot be read, the first: {bad[0]}")


def report_remarks(rows):
    """Report each row.remark once, with the number of images that have it."""
    names = {}
    for row in rows:
        if row.remark:
            names.setdefault(row.remark, []).append(row.file_name)
    for remark, odd in names.items():
        note(f"{len(odd)} of {len(rows)} images, such as {odd[0]}: {remark}")


def picture(pixels):
    """Pixels (3, H, W) as a PIL image of mode "RGB"."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def near_duplicates(pixels, alike=0.95):
    """Pairs (i, j), i < j, of pixels (N, 3, S, S) that show one picture, perhaps mirrored.

    The cosine of their difference_hash is above `alike`, as after re-saving, resizing or gamma: of
    230 chest films, above .98 for re-saved copies, below .91 for films of other patients.
    """
    thumbnails = shrink(pixels, 16).mean(1)
    hashes = difference_hash(thumbnails)
    mirrored = difference_hash(thumbnails.flip(2))
    pairs = []
    for start in range(0, len(pixels), 1024):
        block = hashes[start : start + 1024]
        likeness = torch.maximum(block @ hashes.T, block @ mirrored.T)
        for row, j in (likeness > alike).triu(start + 1).nonzero().tolist():
            pairs.append((start + row, j))
    return pairs


def difference_hash(grey):
    """Differences of neighbours (dHash with their sizes), norm 1: (N, 16, 16) -> torch (N, 480)."""
    differences = [grey.diff(dim=1).flatten(1), grey.diff(dim=2).flatten(1)]
    return F.normalize(torch.cat(differences, 1))


# ---------------------------------------------------------------- descriptors without weights

LUMA = (0.299, 0.587, 0.114)


def to_grey(pixels):
    """Luma (ITU-R BT.601) in [0, 1]: uint8 (B, 3, H, W) -> torch float32 (B, 1, H, W)."""
    weights = torch.tensor(LUMA, device=pixels.device)
    return torch.einsum("bchw,c->bhw", pixels.float(), weights)[:, None] / 255


def gabor_pairs(device):
    """Waves of 8 orientations, first even, then odd ones: torch (16, 1, 9, 9), mean 0, norm 1."""
    span = torch.arange(-4.0, 5.0, device=device)
    y, x = torch.meshgrid(span, span, indexing="ij")
    angle = torch.arange(8, device=device)[:, None, None] * torch.pi / 8
    phase = 1.6 * (x * angle.cos() + y * angle.sin())
    waves = torch.cat([phase.cos(), phase.sin()]) * torch.exp(-(x**2 + y**2) / 8)
    waves = waves - waves.mean((1, 2), keepdim=True)
    return F.normalize(waves.flatten(1)).reshape(16, 1, 9, 9)


def texture(pixels):
    """Log energies of oriented textures: uint8 (B, 3, H, W), H, W >= 40 -> torch float32 (B, 368).

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
    """What `texture`, which is grey, cannot see: uint8 (N, 3, H, W) -> (N, 8).

    Mean, spread, covariance, size and log of fine detail (JPEG's is coarse) of two chroma channels.
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
        columns = [mean.flatten(1), spread, covariance[:, None], size[:, None], detail]
        parts.append(torch.cat(columns, 1))
    return torch.cat(parts).cpu().double().numpy()


def robust_scale(real, floor=1e-6):
    """A function: descriptors (n, D) less real's median, over 1.48 median deviations (>= floor)."""
    middle = np.median(real, axis=0)
    spread = 1.4826 * np.median(np.abs(real - middle), axis=0)
    spread = np.maximum(spread, np.maximum(floor, 0.2 * np.median(spread)))
    return lambda descriptors: (descriptors - middle) / spread


def shows_colour(pixels):
    """bool (N,): do pixels (N, 3, S, S), at 16 x 16, differ by over 8 of 255 between channels?"""
    small = shrink(pixels, 16)
    differences = (small.amax(1) - small.amin(1)).amax((1, 2))
    return (differences > 8).numpy()  # a VAE leaves 2 of a grey picture, yellowed films have 5


def shrink(pixels, side):
    """Means of cells, few images at a time: (N, 3, H, W) -> torch float32 (N, 3, side, side)."""
    return torch.cat([F.adaptive_avg_pool2d(part.float(), side) for part in pixels.split(64)])


def in_grey(pixels):
    """Pixels (N, 3, S, S) with the rounded mean of the channels in all three."""
    mean = pixels.sum(1, keepdim=True, dtype=torch.int16).add(1).div(3, rounding_mode="floor")
    return mean.to(torch.uint8).expand_as(pixels)


def grey_kind(pixels):
    """(grey pixels, shows_colour) where at most 5 % show a colour; else (pixels, None)."""
    in_colour = shows_colour(pixels)
    if in_colour.mean() > 0.05:  # a few with a tint or a mark decide nothing
        return pixels, None
    return in_grey(pixels), in_colour


def colour_and_layout(pixels):
    """Pixels (N, 3, S, S) -> (N, 104): `colour`; 8 x 8 pixels made symmetric, of mean 0, norm 1."""
    small = shrink(pixels, 8).double()
    small = (small + small.flip(3))[..., :4].flatten(1)
    layouts = F.normalize(small - small.mean(1, keepdim=True))
    return np.hstack([colour(pixels), layouts.numpy()])


def colour_scale(real):
    """A function that scales colour_and_layout by real's; a colour counts 3 deviations at most."""
    level = 2 / 255  # of a colour the eye hardly sees more
    detail = np.log1p((level / np.exp(np.median(real[:, 6:8], axis=0))) ** 2) / 2  # as noise adds
    tint_scale = robust_scale(real[:, :8], [*[level] * 6, *detail])
    layout_spread = 0.8 * np.linalg.norm(real[:, 8:].std(0)) + 1e-6

    def scale(vectors):
        tint = 3 * np.tanh(tint_scale(vectors[:, :8]) / 3) / 8**0.5
        return np.hstack([tint, vectors[:, 8:] / layout_spread])

    return scale


def grain(pixels):
    """How pictures were made: uint8 (N, 3, H, W), H, W >= 16 -> (N, 11).

    Logs of: sharpness (spread of the Laplacian), contrast, noise (Immerkaer 1996), signal to noise,
    noise over steps between neighbours, steps at the borders of 8 x 8 blocks over all steps (down,
    across: JPEG), checkerboards, and the steps at three scales over those at the next coarser one.
    """
    parts = [grey_grain(255 * to_grey(part)) for part in pixels.split(16)]
    return torch.cat(parts).cpu().double().numpy()


def log_mean(maps):
    """The log of the mean size of torch (B, 1, H, W), (B,); 0.1 of a grey level keeps it finite."""
    return (maps.abs().mean((1, 2, 3)) + 0.1).log()


def grey_grain(grey):
    """The measures of `grain`: torch float32 (B, 1, H, W), 0 to 255 -> torch (B, 11)."""

    def log_spread(maps):
        variance = (maps - maps.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
        return (variance + 0.1**2).log() / 2

    def log_steps(maps):
        return (log_mean(maps.diff(dim=2)) + log_mean(maps.diff(dim=3))) / 2

    down = grey.diff(dim=2)
    across = grey.diff(dim=3)
    laplacian = down.diff(dim=2)[..., 1:-1] + across.diff(dim=3)[:, :, 1:-1]
    mask = down.diff(dim=2).diff(n=2, dim=3)
    noise = log_mean(mask * (torch.pi / 72) ** 0.5)
    steps = log_steps(grey)
    measures = [
        log_spread(laplacian),
        log_spread(grey),
        noise,
        log_mean(grey) - noise,
        noise - steps,
        log_mean(down[:, :, 7::8]) - log_mean(down),
        log_mean(across[..., 7::8]) - log_mean(across),
        log_mean(down.diff(dim=3)) - steps,
    ]
    for _ in range(3):
        grey = F.avg_pool2d(grey, 2)
        coarser_steps = log_steps(grey)
        measures.append(steps - coarser_steps)
        steps = coarser_steps
    return torch.stack(measures, 1)


def stored_grain(image):
    """`grain` (11,) of a PIL image's middle 512 pixels: a resize would hide JPEG and noise."""
    left, top = (max(0, side - 512) // 16 * 8 for side in image.size)  # on JPEG's grid of 8 pixels
    right = max(16, min(left + 512, image.width))
    bottom = max(16, min(top + 512, image.height))
    values = np.array(image.crop((left, top, right, bottom)).convert("RGB"))
    return grain(torch.from_numpy(values).permute(2, 0, 1)[None])[0]


# ---------------------------------------------------------------- weights, downloaded once

CACHE = Path(os.environ.get("MEDLORA_CACHE") or Path.home() / ".cache" / "medlora")
FID_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
TORCHVISION = "https://download.pytorch.org/models/"
LPIPS_LAYERS = (
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/v0.1.4/lpips/weights/v0.1/"
)
WEIGHTS = {  # file: (folder on the web, SHA-256, MB, licence)
    FID_WEIGHTS: (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95.6,
        "Apache-2.0",
    ),
    "alexnet-owt-7be5be79.pth": (
        TORCHVISION,
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        244.4,
        "BSD-3-Clause",
    ),
    "vgg16-397923af.pth": (
        TORCHVISION,
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553.4,
        "BSD-3-Clause",
    ),
    "squeezenet1_1-b8a52dc0.pth": (
        TORCHVISION,
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        5,
        "BSD-3-Clause",
    ),
    "alex.pth": (
        LPIPS_LAYERS,
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        0.01,
        "BSD-2-Clause",
    ),
    "vgg.pth": (
        LPIPS_LAYERS,
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        0.01,
        "BSD-2-Clause",
    ),
    "squeeze.pth": (
        LPIPS_LAYERS,
        "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
        0.01,
        "BSD-2-Clause",
    ),
}
PATIENCE = 8  # seconds that a network may be silent
PROBLEMS = []  # why downloads failed in this command


def get_weights(name):
    """The path of a file of WEIGHTS, downloaded once, its SHA-256 checked; None: see PROBLEMS."""
    folder, sha256, size, licence = WEIGHTS[name]
    for place in (Path(torch.hub.get_dir()) / "checkpoints", CACHE):
        path = place / name
        if path.is_file() and content_hash(path) == sha256:
            return path
    try:
        wait_for(folder + name)
        note(f"downloading {folder}{name}: {size:g} MB, licence {licence}")
        os.makedirs(CACHE, exist_ok=True)
        torch.hub.download_url_to_file(folder + name, path, sha256)
    except (OSError, HTTPException, RuntimeError) as error:  # the last: another SHA-256
        PROBLEMS.append(error)
        return None
    return path


def wait_for(url):
    """Return when an address answers; else raise OSError or HTTPException in PATIENCE seconds."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    for problem in PROBLEMS:
        if isinstance(problem, TimeoutError):  # a network that hangs is waited for once
            raise problem
    socket.setdefaulttimeout(PATIENCE + 1)  # of each read
    with ThreadPool(1) as pool:  # that limit leaves out the name server
        answer = pool.apply_async(urlopen, (url,))
        answer.wait(PATIENCE)
        if not answer.ready():
            raise TimeoutError(f"no answer in {PATIENCE} seconds")
        with contextlib.suppress(HTTPError):  # an answer, too
            answer.get().close()


def need_weights(name, purpose):
    """The path of a file of WEIGHTS that a flag asks for; fail() where there is none."""
    path = get_weights(name)
    if path is None:
        fail(
            f"{purpose}: needs {name}, which cannot be downloaded ({PROBLEMS[-1]}): download "
            f"{WEIGHTS[name][0]}{name} on another machine and copy it into {CACHE}"
        )
    return path


def resolve_auto(features, lpips):
    """(features, lpips); auto: inception and alex, or texture and none if weights are missing."""
    if features == "auto":
        features = "inception" if get_weights(FID_WEIGHTS) else "texture"
    if lpips == "auto":
        lpips = "alex" if all(map(get_weights, LPIPS["alex"][2])) else "none"
    if PROBLEMS:
        note(
            f"features {features}, LPIPS {lpips}: published weights are missing ({PROBLEMS[0]}): "
            "run `evaluate.py --download` where there is internet"
        )
    return features, lpips


def from_hub(name, patterns):
    """The folder of a Hub id's files of these glob patterns, downloaded once."""
    try:
        wait_for(huggingface_hub.constants.ENDPOINT)
        offline = False
    except OSError:
        offline = True
    return huggingface_hub.snapshot_download(
        name, allow_patterns=patterns, local_files_only=offline
    )


# ---------------------------------------------------------------- networks


@dataclass
class Network:
    """What turns uint8 pixels (B, 3, H, W) on its device into vectors, a torch tensor (B, D)."""

    name: str  # with a hash of the weights: the cache's key
    function: Callable
    standardise: bool = False  # its numbers have no common unit: divide each by its spread
    published: bool = False  # its figures compare with published ones
    head: np.ndarray = None  # Inception's last layer (1008, 2048)


def load_weights(path):
    """The state dict of a .pth file, on the CPU; fail() where it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises a dozen kinds for a damaged file
        fail(f"{path}: is damaged or not a PyTorch weight file")


def load_features(name, device, resize="legacy"):
    """The Network of texture, inception, its weight file, or a vision model's Hub id or folder."""
    if name == "texture":
        return Network("texture-1", texture_in_parts, standardise=True)
    if name == "inception":
        name = need_weights(FID_WEIGHTS, "--features inception")
    if os.path.isfile(name):
        return load_inception(name, device, resize)
    return load_vision_model(name, device)


def texture_in_parts(pixels):
    """`texture` of few images at a time: twice as fast, as maps stay in the processor's cache."""
    count = len(pixels)
    if pixels.device.type == "cpu":
        count = max(1, 2**15 // pixels[0, 0].numel())
    return torch.cat([texture(part) for part in pixels.split(count)])


def load_inception(path, device, resize):
    """The Network of FID's Inception by a weight file; resize: "clean", else as pytorch-fid."""
    try:
        net = fid_inception(load_weights(path))
    except RuntimeError:
        fail(f"{path}: does not hold the weights of FID's Inception")

    for module in list(net.modules()):  # with channels last, 1.6 times as fast on a CPU
        if hasattr(module, "bn"):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = torch.nn.Identity()
    net = net.to(device, memory_format=torch.channels_last)

    def pool3(pixels):
        if resize == "clean":
            images = (clean_resize(pixels, 299) - 128) / 128
        else:
            images = F.interpolate(pixels.float(), (299, 299), mode="bilinear") / 127.5 - 1
        return net(images.contiguous(memory_format=torch.channels_last))

    digest = content_hash(path)
    name = f"inception-{digest[:16]}"
    if resize == "clean":
        name += "-clean"
    head = net.head.cpu().double().numpy()
    return Network(name, pool3, published=digest == WEIGHTS[FID_WEIGHTS][1], head=head)


def clean_resize(pixels, side):
    """As clean-fid (Parmar et al. 2022): (B, 3, H, W) -> float32 (B, 3, side, side), 0 to 255."""
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
    """The Network of a vision model of transformers, prepared and pooled as it was published.

    Its own image processor, by Pillow, makes its input. The output is the image embedding (CLIP,
    SigLIP), else what the model pools (DINOv2's class token), else the class token where the file
    leaves out the pooler (DINO), else the mean of the patches (MAE).
    """
    import transformers

    try:
        if not os.path.isdir(name):
            name = from_hub(name, ("*.json", "model*.safetensors"))
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
        model, loaded = transformers.AutoModel.from_pretrained(
            name, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # the Hub's client alone raises a dozen kinds
        fail(
            f"--features {name}: no such weight file or vision model ({str(error)[:150]}); get one "
            "of the Hub's by `hf download` where there is internet, and give its folder"
        )
    no_pooler = any(key.startswith("pooler.") for key in loaded["missing_keys"])
    if no_pooler:
        model.pooler = None  # its weights are random
    model.config.mask_ratio = 0.0  # MAE would hide three quarters of an image
    model = model.to(device).eval().requires_grad_(False)
    class_tokens = sum(key.endswith("cls_token") for key in model.state_dict())
    digest = hashlib.sha256(repr(processor).encode())
    for path in sorted(Path(name).glob("model*.safetensors")):
        digest.update(path.read_bytes())
    embed = getattr(model, "get_image_features", model)

    def function(pixels):
        images = processor(images=list(pixels.cpu()), return_tensors="pt")["pixel_values"]
        output = embed(pixel_values=images.to(device))
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        states = output.last_hidden_state
        if states.ndim == 4:  # of a convolutional network
            return states.mean((2, 3))
        if no_pooler:
            return states[:, 0]
        return states[:, class_tokens:].mean(1)

    return Network(f"{model.config.model_type}-{digest.hexdigest()[:16]}", function)


def extract(pixels, network, device, batch_size=32, precision="auto"):
    """Features (N, D) of pixels (N, 3, H, W), each image's kept in the cache; fail() if not finite.

    N > 0. precision: fp32, bf16, fp16, or auto, which is fp32, as published figures are.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    name = f"{network.name}-{precision}" if dtype else network.name
    paths = [cache_path(name, image) for image in pixels]
    vectors = [None] * len(pixels)
    for n, path in enumerate(paths):
        with contextlib.suppress(OSError, ValueError, EOFError):  # absent or torn
            vectors[n] = np.load(path)
    missing = [n for n, vector in enumerate(vectors) if vector is None]
    starts = range(0, len(missing), batch_size)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)
    with torch.inference_mode(), autocast, without_tf32():
        for start in progress(starts, name):
            numbers = missing[start : start + batch_size]
            batch = network.function(pixels[numbers].to(device)).float().cpu().numpy()
            for n, vector in zip(numbers, batch, strict=True):
                vectors[n] = vector
                with contextlib.suppress(OSError), replacing(paths[n], wait=False) as file:
                    np.save(file, vector)  # where the disk is full, it is computed again
    features = np.stack(vectors).astype(np.float64)
    if not np.isfinite(features).all():
        fail(f"the features of {network.name} are not finite: check its weights")
    return features


def without_tf32():
    """Convolutions in full fp32 on a GPU: TF32 moves FID's third digit."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def cache_path(name, image):
    """The path in the cache of the vector that a network of this name makes of a uint8 image."""
    content = f"{name} {tuple(image.shape)}".encode() + image.numpy().tobytes()
    key = sha256(content)
    return CACHE / "features" / name / key[:2] / f"{key}.npy"


# ---------------------------------------------------------------- image against image: LPIPS, SSIM

LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # mean, sd of images in [-1, 1]
LPIPS = {  # trunk of torchvision, its layers, files: trunk, linear layers v0.1
    "alex": ("alexnet", (1, 4, 7, 9, 11), ("alexnet-owt-7be5be79.pth", "alex.pth")),
    "vgg": ("vgg16", (3, 8, 15, 22, 29), ("vgg16-397923af.pth", "vgg.pth")),
    "squeeze": (
        "squeezenet1_1",
        (1, 4, 7, 9, 10, 11, 12),
        ("squeezenet1_1-b8a52dc0.pth", "squeeze.pth"),
    ),
}


def trunk_of(kind, state):
    """The layers `features` of torchvision's alexnet, vgg16 or squeezenet1_1 with a state dict."""
    import torchvision

    with torch.device("meta"):
        net = getattr(torchvision.models, kind)()
    net.classifier = None
    net.load_state_dict(state, strict=False, assign=True)  # without the classifier's weights
    return net.features.eval().requires_grad_(False)


def taps(trunk, images, indices):
    """The list of maps (B, C, h, w) after each layer of `indices`; images (B, 3, H, W)."""
    maps = []
    for index, layer in enumerate(trunk[: max(indices) + 1]):
        images = layer(images)
        if index in indices:
            maps.append(images)
    return maps


def load_lpips(net, device):
    """The Network of LPIPS v0.1, see lpips_vectors; net: alex, vgg or squeeze. Or fail()."""
    kind, layers, files = LPIPS[net]
    trunk, linear = [load_weights(need_weights(file, f"--lpips {net}")) for file in files]
    trunk = trunk_of(kind, trunk).to(device)
    weights = [weight[0].to(device) for weight in linear.values()]  # of each layer, in order

    def function(pixels):
        return lpips_vectors(pixels / 127.5 - 1, trunk, layers, weights)

    return Network(net, function)


def lpips_vectors(images, trunk, layers, weights):
    """Images in [-1, 1] (B, 3, H, W) -> torch (B, F): their squared distances are LPIPS.

    Zhang et al. 2018; the epsilon stands outside the root, as in the package lpips.
    """
    mean, sd = torch.tensor(LPIPS_SCALE).to(images)[:, :, None, None]
    parts = []
    maps_of_layers = taps(trunk, (images - mean) / sd, layers)
    for maps, weight in zip(maps_of_layers, weights, strict=True):
        maps /= torch.linalg.vector_norm(maps, dim=1, keepdim=True) + 1e-10
        maps *= (weight / maps[0, 0].numel()).sqrt()
        parts.append(maps.flatten(1))
    return torch.cat(parts, 1)


def lpips_matrix(pixels, network, device, batch_size=32, memory=2**29, others=None):
    """LPIPS of all pairs of pixels (N, 3, H, W), H, W >= 64: (N, N), symmetric.

    others: pixels (M, 3, H, W) to pair them with instead: (N, M). One forward pass an image and one
    product; blocks of vectors have at most `memory` bytes, and of several some are made again.
    """
    symmetric = others is None
    if symmetric:
        others = pixels
    result = np.zeros((len(pixels), len(others)))

    def vectors(part):
        return torch.cat([network.function(batch.to(device)) for batch in part.split(batch_size)])

    with torch.inference_mode(), without_tf32():
        width = max(1, memory // (4 * vectors(pixels[:1]).shape[1]))
        for i in progress(range(0, len(pixels), width), f"LPIPS {network.name}"):
            first = vectors(pixels[i : i + width])
            for j in range(i if symmetric else 0, len(others), width):
                second = first if symmetric and i == j else vectors(others[j : j + width])
                squares = first.norm(dim=1).square()[:, None] + second.norm(dim=1).square()
                distances = squares - 2 * (first @ second.T)
                result[i : i + width, j : j + width] = distances.cpu()
    if symmetric:  # by construction: a product a @ a.T is not so to the last bit on every machine
        result = np.triu(result, 1)
        result += result.T
    result[result < 3e-5] = 0  # float32 leaves up to 2e-5 between equal flat images
    return result


GAUSS = np.exp(-np.square(np.arange(-5.0, 6.0)) / 4.5)  # SSIM's window, sigma 1.5
GAUSS /= GAUSS.sum()


def ssim_matrix(first, second, device="cpu", height=128):
    """SSIM of all pairs in grey at 64 x 64: pixels (N, 3, H, W), (M, 3, H, W) -> (N, M).

    Wang et al. 2004, window 11 x 11; at each of its places, one matrix product serves all pairs of
    `height` pictures: few, for the processor's cache. Of a set with itself, half of the pairs do.
    """
    weights = torch.tensor(np.outer(GAUSS, GAUSS).flatten(), dtype=torch.float32, device=device)
    symmetric = first is second
    with torch.inference_mode():
        greys = [to_grey(shrink(pixels.to(device), 64))[:, 0] for pixels in (first, second)]
        total = torch.zeros(len(first), len(second), device=device)
        for place in progress(range(54 * 54), "SSIM"):
            left, right = [ssim_terms(grey, weights, *divmod(place, 54)) for grey in greys]
            for i in range(0, len(first), height):
                start = i if symmetric else 0
                patches_a, mean_a, light_a, spread_a = [term[i : i + height] for term in left]
                patches_b, mean_b, light_b, spread_b = [term[start:] for term in right]
                covariance = (patches_a * (2 * weights)) @ patches_b.T
                score = torch.outer(2 * mean_a, mean_b).add_(1e-4).mul_(covariance.add_(9e-4))
                score.div_(light_a[:, None] + light_b).div_(spread_a[:, None] + spread_b)
                total[i : i + height, start:] += score
    if symmetric:
        total = total.triu() + total.triu(1).T
    return (total / 54**2).cpu().double().numpy()


def ssim_terms(grey, weights, y, x):
    """At one place: centred patches (N, 121), their means, and terms of SSIM's two divisors."""
    patches = grey[:, y : y + 11, x : x + 11].flatten(1)
    mean = patches @ weights
    patches = patches - mean[:, None]
    spread = patches.square() @ weights
    return patches, mean, mean**2 + 0.5e-4, spread + 4.5e-4


# ---------------------------------------------------------------- set against set


def pooled(real, fake, standardise):
    """Features (N, D) and (M, D) as (N + M, D), to mean 0 and spread 1 if `standardise`."""
    features = np.concatenate([real, fake], dtype=np.float64)
    if standardise:
        features -= features.mean(0)
        spread = features.std(0)
        features /= np.where(spread > 1e-9, spread, 1)
    return features


def frechet(first, second):
    """Fréchet distance of features (N, D), (M, D), N, M >= 2: FID if they are Inception's pool3.

    Heusel et al. 2017, equation 6. The trace of the root of S1 S2 is the nuclear norm of R1 R2'
    where Ri' Ri = Si: no root of a matrix, exact where N < D.
    """
    gap = np.square(first.mean(0) - second.mean(0)).sum()
    root_1 = covariance_root(first)
    root_2 = covariance_root(second)
    nuclear = np.linalg.norm(root_1 @ root_2.T, "nuc")
    return max(0.0, gap + np.square(root_1).sum() + np.square(root_2).sum() - 2 * nuclear)


def covariance_root(features):
    """R (min(N, D), D) with R' R the covariance of features (N, D)."""
    root = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root


def kid(first, second):
    """KID (Binkowski et al. 2018) of features (N, D), (M, D), N, M >= 3, and its standard error.

    Unbiased MMD^2 with the kernel (x·y/D + 1)^3 of all images at once, no subsets, may be negative;
    the error is the delete-one jackknife, from row sums.
    """

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_within(x, between):  # and the variance over images that are left out
        n = len(x)
        within = kernel(x, x)
        within = (within.sum(1) - within.diagonal()) / (n - 1)
        return within.mean(), (between - within * (n - 1) / (n - 2)).var() / (n - 1)

    cross = kernel(first, second)
    mean_first, variance_first = mean_within(first, cross.mean(1))
    mean_second, variance_second = mean_within(second, cross.mean(0))
    value = mean_first + mean_second - 2 * cross.mean()
    return value, 2 * np.sqrt(variance_first + variance_second)


def squared_distances(first, second):
    """|x - y|^2 of all pairs, (N, D), (M, D) -> (N, M); what rounding leaves of equal rows is 0."""
    norms = np.square(first).sum(1)[:, None] + np.square(second).sum(1)
    distances = norms - 2 * first @ second.T
    distances[distances < 1e-12 * norms] = 0
    return distances


def precision_recall(distances, order, draw, k):
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    distances (N, N), or squared, of real (draw 1), generated (-1) and other images (0); order:
    argsort of its rows. A ball reaches to the k-th neighbour in its own set and includes its
    surface, so that coinciding points count as covered.
    """
    covered = np.zeros(len(draw), bool)  # by a ball of the other set
    inside = np.zeros(len(draw), int)  # how many of the other set are in its ball
    rows = np.flatnonzero(draw)
    depth = 32  # of the nearest images that are looked at, more where they do not decide
    while len(rows):
        near = order[rows, :depth]
        to_near = distances[rows[:, None], near]
        sides = draw[near] * draw[rows, None]  # 1 in its own set, -1 in the other
        ranks = (sides == 1).cumsum(1)  # the first is the point itself
        last = np.minimum(ranks, k + 1).argmax(1)  # of a tiny set the farthest
        radius = to_near[np.arange(len(rows)), last]
        decided = (ranks[:, -1] > k) & (radius < to_near[:, -1]) | (depth >= len(draw))
        hits = (to_near <= radius[:, None]) & (sides == -1) & decided[:, None]
        inside[rows] = hits.sum(1)
        covered[near[hits]] = True
        rows = rows[~decided]
        depth *= 8
    is_real, is_fake = draw == 1, draw == -1
    precision = covered[is_fake].mean()
    recall = covered[is_real].mean()
    density = inside[is_real].sum() / (k * is_fake.sum())
    coverage = (inside[is_real] > 0).mean()
    return precision, recall, density, coverage


# ---------------------------------------------------------------- nearest images, copies


def unit_names(groups):
    """The groups (N,), where an image without one ("") has a name of its own."""
    return np.array([str(name) or f"\0{n}" for n, name in enumerate(groups)])


def same_unit(groups):
    """bool (N, N): True for an image with itself and with others of its group."""
    names = unit_names(groups)
    return names[:, None] == names


def nearest(distances, forbidden):
    """Index and value (N,) of each row's smallest entry; those True in `forbidden` do not count."""
    allowed = np.where(forbidden, np.inf, distances)
    return allowed.argmin(1), allowed.min(1)


PICTURE = 64  # pixels a side at which pictures are compared
THUMBNAIL = 12
SAME_PICTURE = 0.62  # of different patients' wounds or films, hardly two agree so well


class CopyFinder:
    """Finds pictures again: mirrored, turned, cropped, padded, re-saved, of other grey values.

    Each is compared with thumbnails of all real pictures in many poses. The most alike are laid
    over it by an affine map, and the details of the best are compared. The real pictures, of more
    than `most` each n-th, are sought among one another as well:

    limits: (n,), the `agreement` with a picture from which another is the same.
    picture_of, unit_of: (n,), equal for the same picture, and for those of one group or picture.
    first: (units,), the number of an image of each unit that was sought.
    usual: (units,), its best agreement with a picture of another unit.
    """

    def __init__(self, rows, pixels, most=2000):
        """rows, pixels: of the real images, as load_pixels gives them."""
        self.pictures = grey_and_mask(pixels)
        self.maps = F.avg_pool2d(local_contrast(self.pictures, 4.0, 1.0), 2)
        self.turns, self.crops = poses()
        coarse = local_contrast(self.pictures, 6.0, 2.0)
        self.thumbnails = torch.cat([thumbnails(coarse, crop[None]) for crop in self.crops])
        self.measure_real(rows, most)

    def measure_real(self, rows, most):
        """Seek real pictures among the others."""
        same = same_unit([row.group for row in rows])
        sought = np.arange(0, len(rows), -(-len(rows) // most))
        index, scores, _ = self.find_each(self.pictures[sought], sought)
        others = np.where(same[sought[:, None], index], 0, scores)
        self.limits = copy_limits(np.sort(others)[:, -2], sought, rows)
        near = np.zeros_like(same)
        near[sought[:, None], index] = scores >= self.limits[index]
        _, self.picture_of = csgraph.connected_components(near)
        _, self.unit_of = csgraph.connected_components(near | same)
        _, first = np.unique(self.unit_of[sought], return_index=True)
        self.first = sought[first]
        self.usual = scores[first, 0]
        same = self.unit_of[self.first, None] == self.unit_of
        crowded = np.take_along_axis(same, index[first], 1).any(1)
        if crowded.any():
            _, scores, _ = self.find_each(self.pictures[self.first[crowded]], same[crowded])
            self.usual[crowded] = scores[:, 0]

    def find(self, pixels):
        """Of pixels (N, 3, S, S): number of the best real picture, `agreement`, kind, is a copy?"""
        index, scores, kinds = self.find_each(grey_and_mask(pixels), [()] * len(pixels))
        is_copy = scores[:, 0] >= self.limits[index[:, 0]]
        return index[:, 0], scores[:, 0], kinds, is_copy

    def find_each(self, pictures, forbidden):
        """What find_one gives for each picture; a thread works on one, as its steps are small."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                found = pool.map(self.find_one, pictures.split(1), forbidden)
                found = list(progress(found, "looking for copies", len(pictures)))
        finally:
            torch.set_num_threads(threads)
        index, scores, kinds = zip(*found, strict=True)
        return np.array(index), np.array(scores), kinds

    def find_one(self, picture, forbidden):
        """Numbers of the 3 real pictures most like one, scores (0: forbidden), first kind."""
        coarse = local_contrast(picture, 6.0, 2.0)
        likeness = thumbnails(coarse, self.turns) @ self.thumbnails.T
        likeness = likeness.reshape(-1, len(self.pictures))  # (turns x crops, n)
        likeness[:, forbidden] = 0
        views = likeness.abs().argmax(0)
        likeness = likeness.gather(0, views[None])[0]
        index = likeness.abs().topk(min(40, len(likeness))).indices
        signs = likeness[index].sign()  # -1: a negative
        turns, crops = (views[index] // len(self.crops), views[index] % len(self.crops))
        matches = self.crops[crops] @ torch.linalg.inv(self.turns)[turns]
        detail = F.avg_pool2d(local_contrast(picture, 4.0, 1.0), 2)
        for side, count in ((16, 10), (32, 3)):
            scores, matches = align(detail, self.maps[index], matches, signs, side)
            best = scores.topk(min(count, len(scores))).indices
            index, matches, signs = index[best], matches[best], signs[best]
        scores = agreement(picture, self.pictures[index], matches, signs)
        best = scores.argsort(descending=True)
        kind = kind_of_copy(matches[best[0]], signs[best[0]])
        return index[best].tolist(), scores[best].tolist(), kind


def copy_limits(second, sought, rows):
    """The agreement from which a picture is a copy of each real one, (n,): higher if all are alike.

    second: of those `sought`, the second best with another patient's; the best may be stored twice.
    """
    labels = np.array([text_key(row.label) for row in rows])
    usual = np.full(len(rows), np.median(second))
    for label in np.unique(labels[sought]):
        usual[labels == label] = np.median(second[labels[sought] == label])
    return np.clip(usual + 0.35, SAME_PICTURE, 0.9)


def pose(angle=0, scale=1.0, x=0.0, y=0.0, sign=1):
    """An affine map (3, 3) of a picture's places, from -1 to 1; sign -1 mirrors."""
    c = scale * math.cos(math.radians(angle))
    s = scale * math.sin(math.radians(angle))
    return torch.tensor([[sign * c, -s, x], [sign * s, c, y], [0, 0, 1]])


def poses():
    """(40, 3, 3), poses of a generated picture; (30, 3, 3), parts of a real one that it shows."""
    turns = []
    for sign, quarter in itertools.product((1, -1), (0, 90, 180, 270)):
        for angle, scale in ((-10, 1), (0, 1), (10, 1), (0, 0.85), (0, 0.7)):
            turns.append(pose(quarter + angle, scale, sign=sign))
    crops = [pose()]
    for scale, shifts in ((0.9, (-0.1, 0.1)), (0.8, (-0.2, 0, 0.2)), (0.7, (-0.3, -0.1, 0.1, 0.3))):
        for x, y in itertools.product(shifts, shifts):
            crops.append(pose(0, scale, x, y))
    return torch.stack(turns), torch.stack(crops)


def kind_of_copy(match, sign):
    """What was done to a copy, in words, from the map of its places to the real picture's."""
    (a, _, _), (b, _, _), _ = match.tolist()
    mirror = -1 if match.det() < 0 else 1
    angle = round(math.degrees(math.atan2(b * mirror, a * mirror)))
    kinds = {
        "mirrored": mirror < 0,
        f"turned by {abs(angle)}°": abs(angle) > 2,
        "cropped": abs(match.det()) < 0.94,
        "zoomed out": abs(match.det()) > 1.06,
        "negative": sign < 0,
    }
    return ", ".join(kind for kind, applies in kinds.items() if applies) or "as it is"


def warp(maps, matches, side):
    """What maps (B or 1, C, S, S) show at the places `matches` (B or 1, 3, 3)."""
    count = max(len(maps), len(matches))
    places = matches[:, :2].expand(count, -1, -1)
    grid = F.affine_grid(places, (count, 1, side, side), align_corners=False)
    return F.grid_sample(maps.expand(count, -1, -1, -1), grid, align_corners=False)


def smooth(maps, sigma):
    """Maps (N, 1, H, W) under a Gaussian window; outside of them is 0."""
    sigmas = (0, 0, sigma, sigma)
    return torch.from_numpy(
        scipy.ndimage.gaussian_filter(maps.numpy(), sigmas, mode="constant", truncate=2)
    )


def grey_and_mask(pixels):
    """uint8 (N, 3, S, S) -> (N, 2, 64, 64): grey, and 1 where it is not flat, as padding is."""
    size = (PICTURE, PICTURE)
    parts = []
    for part in pixels.split(128):
        parts.append(F.interpolate(to_grey(part), size, mode="bilinear", antialias=True))
    grey = torch.cat(parts)
    steps = F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1)
    flat = (steps < 1.5 / 255).float()
    return torch.cat([grey, 1 - F.max_pool2d(flat, 3, 1, 1)], 1)


def local_contrast(pictures, sigma, blur):
    """Grey less its local mean, over its local spread, blurred; and the mask, (N, 2, S, S)."""
    grey, mask = pictures.split(1, 1)
    weight = smooth(mask, sigma) + 1e-4
    detail = (grey - smooth(grey * mask, sigma) / weight) * mask
    spread = (smooth(detail.square(), sigma) / weight).sqrt()
    return torch.cat([smooth(detail / (spread + 0.02), blur), mask], 1)


def thumbnails(maps, matches):
    """Vectors (B, 144) of mean 0 and norm 1 of what maps show at `matches`."""
    small = warp(maps, matches, THUMBNAIL)[:, 0].flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True))


def unit_vectors(values, mask):
    """values (…, P) of mean 0 and norm 1 where mask is 1, else 0."""
    mean = (values * mask).sum(-1, keepdim=True) / (mask.sum(-1, keepdim=True) + 1e-3)
    return F.normalize((values - mean) * mask, dim=-1, eps=1e-3)


def align(picture, others, matches, signs, side):
    """Improve affine matches of a picture's maps (1, 2, S, S) to others' (k, 2, S, S).

    Returns correlations (k,) and matches. Gauss-Newton steps on what small moves change in the
    picture itself (inverse compositional; Baker & Matthews 2004).
    """
    still = pose()[None]
    nudges = F.pad(torch.eye(6).reshape(6, 2, 3), (0, 0, 0, 1)) * 2 / side  # by a pixel
    target, target_mask = warp(picture, still, side)[0].flatten(1)
    forward, backward = (warp(picture, still + n, side)[:, 0] for n in (nudges, -nudges))
    slopes = (forward - backward).flatten(1) * side / 4 * target_mask
    solver = target.norm() * torch.linalg.pinv(slopes, rtol=0.05)
    shown = wanted = target
    for step in range(6):
        if step:
            moves = still.repeat(len(others), 1, 1)
            moves[:, :2] += ((shown - wanted) @ solver).clamp(-0.2, 0.2).reshape(-1, 2, 3)
            matches = matches @ torch.linalg.inv(moves)
        shown, mask = warp(others, matches, side).flatten(2).unbind(1)
        mask = mask * target_mask
        shown = unit_vectors(shown, mask) * signs[:, None]
        wanted = unit_vectors(target, mask)
    return (shown * wanted).sum(1) * (mask.mean(1) > 0.2), matches


def agreement(picture, others, matches, signs):
    """The correlation of details that 70 % of squares of 8 x 8 pixels reach: (k,)."""
    others = warp(others, matches, PICTURE)
    mask = (picture[:, 1:] * others[:, 1:] > 0.99).float()
    squares = []
    for grey in (picture[:, :1].expand_as(mask), others[:, :1]):
        details = local_contrast(torch.cat([grey, mask], 1), 2.0, 0.7)
        squares.append(F.unfold(details, 8, stride=8).unflatten(1, (2, 64)).transpose(2, 3))
    weights = squares[0][:, 1]
    first, second = (unit_vectors(square[:, 0], weights) for square in squares)
    correlations = (first * second).sum(2) * signs[:, None]
    known = weights.mean(2) > 0.4
    reached = correlations.where(known, torch.nan).nanquantile(0.3, dim=1).nan_to_num(0)
    return reached * (known.float().mean(1) > 0.15)


# ---------------------------------------------------------------- logistic regression

PENALTIES = np.logspace(-1, 1.5, 6)  # the features of an image have a squared length near 3


def draw_order(count, seed, *key):
    """A permutation of range(count), int64, the same everywhere."""
    return torch.randperm(count, generator=generator(seed, *key)).numpy()


def predict(features, weights):
    """Logits (N, m) of features (N, D) by weights (D + 1, m) of `fit_logistic`."""
    return features @ weights[:-1] + weights[-1]


def auroc(scores, good, times=None, strata=0):
    """Share of (good, bad) pairs of one stratum that scores (n,) order right, ties half: (B,).

    good: bool (n,); strata: (n,). times: how often each image counts, (B, n). NaN without a pair.
    """
    if times is None:
        times = np.ones((1, len(good)))
    right, pairs = np.zeros((2, len(times)))
    for stratum in np.unique(strata):
        first, second = (strata == stratum) & good, (strata == stratum) & ~good
        a, b = times[:, first], times[:, second]
        ordered = np.heaviside(scores[first][:, None] - scores[second], 0.5)
        right += ((a @ ordered) * b).sum(1)
        pairs += a.sum(1) * b.sum(1)
    return right / np.where(pairs > 0, pairs, np.nan)


def resamples(groups, seed):
    """(1001, n): how often an image counts: once, then in 1,000 bootstraps of whole groups (n,)."""
    _, numbers = np.unique(unit_names(groups), return_inverse=True)
    size = numbers.max() + 1
    drawn = torch.randint(size, (1000, size), generator=generator(seed, "bootstrap"))
    times = np.apply_along_axis(np.bincount, 1, drawn.numpy(), minlength=size)[:, numbers]
    return np.vstack([np.ones(len(groups)), times])


def cross_validate(features, labels, weights, groups, seed):
    """Logits of labels (n, m) from five folds of whole groups (n,), and the best penalties (m,)."""
    names, numbers = np.unique(groups, return_inverse=True)
    folds = draw_order(len(names), seed, "folds")[numbers] % 5
    u, scale, _ = np.linalg.svd(features, full_matrices=False)
    x = u * scale  # the same fit in at most n dimensions
    logits = np.zeros((len(PENALTIES), *labels.shape))
    for k, penalty in enumerate(PENALTIES):
        for fold in np.unique(folds):
            train = folds != fold
            fitted = fit_logistic(x[train], labels[train], weights[train], penalty)
            logits[k, ~train] = predict(x[~train], fitted)
    losses = np.logaddexp(0, logits) - labels * logits
    best = (losses * weights[:, None]).sum(1).argmin(0)
    return np.take_along_axis(logits, best[None, None], 0)[0], PENALTIES[best]


def fit_logistic(features, labels, weights, penalty):
    """Logistic regressions of each column of labels (n, m) in [0, 1]: weights (D + 1, m).

    Minimises the sum of weighted log losses + penalty / 2 |w|^2; the last weight, the intercept, is
    free. Newton's method with the bound X'X / 4 on the Hessian (Boehning and Lindsay 1988), so that
    one inverse serves all columns and steps.
    """
    x = np.hstack([features, np.ones((len(features), 1))])
    ridge = np.full((x.shape[1], 1), penalty)
    ridge[-1] = 1e-6
    weights = (weights / weights.mean())[:, None]
    inverse = np.linalg.inv(x.T @ (weights * x) / 4 + np.diag(ridge[:, 0]))
    fitted = np.zeros((x.shape[1], labels.shape[1]))
    for _ in range(500):
        residuals = weights * (labels - special.expit(x @ fitted))
        step = inverse @ (x.T @ residuals - ridge * fitted)
        fitted += step
        if np.abs(step).max() < 1e-3:
            break
    return fitted


# ---------------------------------------------------------------- does an image show its label?

LEAST_APART = 0.8  # of the AUROC's interval, for two labels that can be told apart


def block_scale(real, sizes):
    """Mean and spread (D,) of descriptors (n, D) that consist of blocks of these widths."""
    # by the root of its size, a block of many descriptors weighs no more than one of few
    return real.mean(0), np.maximum(real.std(0), 1e-6) * np.sqrt(np.repeat(sizes, sizes))


def fit_labels(names, labels, features, groups, seed):
    """Logits (n, names) of labels (n,) as images left out, and weights (D + 1, names) of all."""
    is_own = np.equal.outer(labels, names).astype(float)
    ones = np.ones(len(labels))
    logits, penalties = cross_validate(features, is_own, ones, groups, seed)
    return logits, fit_logistic(features, is_own, ones, np.median(penalties))


class LabelCheck:
    """Does an image show its label? Learnt from the labelled real images alone.

    names: the labels of 8 real images or more; [] if fewer than two, or all of one patient: then
    nothing else is set. own: the real images' numbers of names; looks, scores: what they look like,
    and how much like their own label, predicted as images left out.
    """

    def __init__(self, rows, blocks, seed):
        """blocks: a list of descriptors (n, D) of rows, not `grain`: it tells who made them."""
        counts = Counter(text_key(row.label) for row in rows)
        self.names = sorted(name for name in counts if name and counts[name] >= 8)
        own = self.numbers(rows)
        groups = np.array([row.group or row.path for row in rows])[own >= 0]
        if len(self.names) < 2 or len(set(groups)) < 2:
            self.names = []
            return
        self.mean, self.spread = block_scale(np.hstack(blocks), [part.shape[1] for part in blocks])
        features = self.scale(blocks)[own >= 0]
        self.own = own[own >= 0]
        numbers = range(len(self.names))
        logits, self.weights = fit_labels(numbers, self.own, features, groups, seed)
        self.looks = logits.argmax(1)
        self.scores = label_scores(logits, self.own)
        self.apart = np.ones((len(numbers), len(numbers)), bool)
        self.sentences = []  # on pairs of labels that cannot be told apart
        for pair in itertools.combinations(numbers, 2):
            self.compare(pair, logits, groups, seed)
        more = len(self.sentences) - 4
        if more > 1:
            self.sentences[4:] = [f"{more} more pairs of labels cannot be told apart reliably."]

    def scale(self, blocks):
        """Descriptors of all kinds side by side, (N, D), in units of the real images."""
        return (np.hstack(blocks) - self.mean) / self.spread

    def numbers(self, rows):
        """The number of each row's label among the names, (N,); -1 for none of them."""
        numbers = {name: number for number, name in enumerate(self.names)}
        return np.array([numbers.get(text_key(row.label), -1) for row in rows])

    def compare(self, pair, logits, groups, seed):
        """Whether the real images of a pair of labels can be told apart."""
        a, b = pair
        inside = np.isin(self.own, pair)
        scores = (logits[:, a] - logits[:, b])[inside]
        values = auroc(scores, self.own[inside] == a, resamples(groups[inside], seed))
        low, high = np.nanpercentile(values[1:], (2.5, 97.5))
        if not low >= LEAST_APART:  # or NaN, of a single patient
            self.apart[a, b] = self.apart[b, a] = False
            names = f'"{self.names[a]}" and "{self.names[b]}"'
            self.sentences.append(
                f"Real images of {names} cannot be told apart reliably (AUROC {values[0]:.2f}, "
                f"95 % interval {low:.2f} to {high:.2f}; it must lie above {LEAST_APART})."
            )

    def judge(self, blocks, rows):
        """Of each image: its label, what it looks like, p of its label, whether it shows another.

        All are (n,). Labels are numbers of names, -1 for none of them, whose p is NaN. p is
        conformal: how many real images of the label look no more like it. Where none does, the real
        images of all labels count, for few of one label would allow no small p.
        """
        logits = predict(self.scale(blocks), self.weights)
        own = self.numbers(rows)
        looks = logits.argmax(1)
        p = np.full(len(rows), np.nan)
        for i, score in enumerate(label_scores(logits, own)):
            below = self.scores <= score
            same = self.own == own[i]
            if same.any():
                p[i] = (1 + below[same].sum()) / (1 + same.sum())
            if not below[same].any():
                p[i] = np.minimum(p[i], (1 + below.sum()) / (1 + len(below)))
        limit = max(0.02, 1 / (1 + len(self.own)))
        return own, looks, p, (looks != own) & (p <= limit) & self.apart[own, looks]


def label_scores(logits, own):
    """How much images look like their own labels: the logs of their softmax shares, (N,)."""
    return special.log_softmax(logits, axis=1)[np.arange(len(own)), own]


# ---------------------------------------------------------------- the page

STYLE = """:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--paper:#fff;
--mark:#0b62c4;
--two:#c2410c;--three:#15803d;--four:#7e22ce}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--line:#343b43;--paper:#0e1116;
--mark:#6cb0ff;--two:#fb923c;--three:#4ade80;--four:#c084fc}}
*{box-sizing:border-box}body{margin:0 auto;max-width:66rem;padding:1.2rem;font:16px/1.5 system-ui,
sans-serif;overflow-wrap:anywhere;color:var(--ink);background:var(--paper)}
h1{font-size:1.5rem;line-height:1.2}h2{font-size:1.25rem;margin-top:2rem}h3{font-size:1.1rem}
.wide{overflow-x:auto;background:linear-gradient(90deg,transparent,var(--paper) 75%) 100%/3rem 100%
no-repeat local,linear-gradient(270deg,var(--line),transparent) 100%/1rem 100% no-repeat}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .45rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:normal}th{color:var(--soft);font-weight:600;
white-space:normal;overflow-wrap:break-word}
td:last-child{white-space:normal;overflow-wrap:normal}
td:nth-child(2):last-child{overflow-wrap:anywhere}.soft{color:var(--soft)}
.verdict{border-left:.3rem solid var(--mark);padding:.1rem 0 .1rem .9rem;font-size:1.05rem}
.badge{display:inline-block;border:.15rem solid;border-radius:2rem;padding:0 .8rem;font-weight:700;
margin:.2rem .5rem .2rem 0;color:var(--two)}
.badge.not{color:var(--three)}.worse{color:var(--two)}:is(.too,.copies).badge,.too{
color:var(--four)}
svg{width:35rem;max-width:100%;font-size:12px;text-anchor:middle}path,polyline{fill:none;stroke-width:2;stroke-linecap:round}
pre{white-space:pre-wrap;border:1px solid var(--line);border-radius:.3rem;padding:.6rem}
summary{cursor:pointer;padding:.4rem 0;font-weight:600}
:focus-visible{outline:.15rem solid var(--mark)}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:.5rem 1rem}.sides h4{margin:.5rem 0;
font-size:.9rem}
.tiles,.pairs{display:grid;gap:.4rem;grid-auto-flow:dense;
grid-template-columns:repeat(auto-fill,minmax(min(10rem,100%),1fr))}
.pairs{gap:1rem;margin-bottom:1rem;grid-template-columns:repeat(auto-fill,minmax(min(20.4rem,100%),1fr))}
figure{display:grid;grid-template-columns:1fr 1fr;gap:.3rem;margin:0;align-content:start}
figcaption{grid-column:1/-1;font-size:.8rem;color:var(--soft);white-space:pre-line}
.zoom summary{padding:0;list-style:none;cursor:zoom-in}.zoom summary::-webkit-details-marker{
display:none}.zoom img{display:block;width:100%;border-radius:.2rem}.zoom[open]{grid-column:1/-1}
.zoom[open] img{max-width:32rem;cursor:zoom-out}
.lines{width:100%;max-width:50rem;table-layout:fixed}.lines :is(th,td){white-space:normal;
text-align:left}.lines :is(th,td):first-child{width:29%}.lines :is(th,td):last-child{width:25%}
.lines tbody th{color:var(--ink)}small{color:var(--soft);font-weight:400;display:block}
.ends{display:grid;grid-template-columns:1fr 1fr 1fr;line-height:1.2}.ends :nth-child(2){text-align:
center}.ends :last-child{text-align:right}
.axis{display:block;width:100%;height:1.6rem;overflow:visible}.axis line{stroke:var(--line)}
.axis rect{fill:var(--soft);opacity:.4}.axis circle{fill:currentColor}
@media(max-width:40rem){svg{font-size:14px}th,td{padding:.3rem .25rem}.ends{font-size:.75rem}
.sides{gap:.5rem}
.sides .zoom[open]{width:calc(200% + .5rem);z-index:1}
.sides>:last-child .zoom[open]{margin-left:calc(-100% - .5rem)}}
@media print{body{max-width:none}.wide{overflow:visible}table{font-size:.6rem}th,td{
white-space:normal}::details-content{content-visibility:visible}h2,h3{break-after:avoid}
figure,tr{break-inside:avoid}}"""


def page(title, body):
    """The text of a self-contained HTML file; body: HTML, its texts escaped by html.escape."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def table(header, rows):
    """An HTML table; header: a list of cells, rows: lists of cells; each cell is escaped."""

    def line(tag, cells):
        texts = [f"<{tag}>{html.escape(str(cell))}" for cell in cells]
        return f"<tr>{''.join(texts)}</tr>\n"

    head = line('th scope="col"', header)  # in a thead it is printed on each page
    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{head}</thead>{body}</table></div>\n'


def dot_lines(header, rows):
    """An HTML table with an axis in each row, on it a grey bar and a dot; all texts are HTML.

    A row: name, note, left and right of the bar and dot in percent, what they say, words.
    """
    names, *ends, words = header
    ends = f'<div class="ends"><span>{"</span><span>".join(ends)}</span></div>'
    heads = '<th scope="col">'.join(("", names, ends, words))
    lines = [f"<thead><tr>{heads}</thead><tbody>"]
    for name, note, *places, title, words in rows:
        left, right, dot = np.clip(places, 0, 100)
        lines.append(
            f'<tr><th scope="row">{name}<small>{note}</small>'
            f'<td><svg class="axis {words}" role="img"><title>{title}</title>'
            '<line x1="0" x2="100%" y1="50%" y2="50%"/>'
            f'<rect x="{left:.1f}%" width="{right - left:.1f}%" y="25%" height="50%"/>'
            f'<circle cx="{dot:.1f}%" cy="50%" r="6"/></svg><td>{words}'
        )
    return f'<table class="lines">{"".join(lines)}</table>\n'


def paragraph(text, kind=""):
    """HTML: a paragraph of plain text, which is escaped; kind: a class of STYLE."""
    return f'<p class="{kind}">{html.escape(text)}</p>\n'


def fold(title, body):
    """HTML: a title, escaped, that shows the body, which is HTML, when it is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>\n"


def thumbnail(image, size=96, alt="", quality=85, **options):
    """An <img> of a PIL image or pixels (3, H, W): a JPEG of at most `size` pixels a side."""
    if not isinstance(image, Image.Image):
        image = picture(image)
    image = image.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'


def zoom(image, alt, size=384):
    """HTML: an image of at most `size` pixels a side that a click, or Enter, shows larger."""
    return f'<details class="zoom"><summary>{thumbnail(image, size, alt)}</summary></details>'


def pair(generated, real, text, size=384):
    """HTML: a generated image next to a real one, each (pixels, row), over text and names."""
    pictures = ""
    for kind, (pixels, row) in (("generated", generated), ("real", real)):
        pictures += zoom(pixels, f"{kind}: {row.file_name}", size)
        text += f"\n{kind}: {row.file_name}"
        if row.label:
            text += f" ({row.label})"
    return f"<figure>{pictures}<figcaption>{html.escape(text)}</figcaption></figure>\n"


def curve(series, x_label):
    """An inline SVG line chart of finite points; series: {name: [(x, y), …]}, at most 4 names."""
    finite = {}
    for name, points in series.items():
        points = np.array(points, float).reshape(-1, 2)
        finite[name] = points[np.isfinite(points).all(1)]
    every = np.concatenate(list(finite.values()))
    if not len(every):
        return '<p class="soft">nothing to draw yet</p>\n'
    low = every.min(0)
    span = np.maximum(every.max(0) - low, 1e-9)

    def text(x, y, content, colour="soft"):
        return f'<text x="{x}" y="{y}" fill="var(--{colour})">{html.escape(content)}</text>'

    parts = ['<path d="M60 30V215H415" stroke="var(--line)"/>', text(235, 246, x_label)]
    for share in (0, 0.5, 1):
        x, y = low + share * span
        parts.append(text(60 + 350 * share, 230, f"{x:.0f}"))
        parts.append(text(28, 219 - 180 * share, f"{y:.3g}"))
    for n, (name, points) in enumerate(finite.items()):
        colour = ("mark", "two", "three", "four")[n]
        places = (points - low) / span * (350, -180) + (60, 215)  # the axes cross at (60, 215)
        words = [f"{x:.1f},{y:.1f}" for x, y in places]
        line = " ".join(words[:1] + words)  # the first twice: one alone is a dot
        parts.append(f'<polyline points="{line}" stroke="var(--{colour})"/>')
        parts.append(text(110 + 90 * n, 12, name, colour))
    label = html.escape(f"{', '.join(finite)} against {x_label}")
    return f'<svg viewBox="0 0 440 250" role="img" aria-label="{label}">{"".join(parts)}</svg>\n'


# ---------------------------------------------------------------- the card

# What fewer patients share can tell who they are, and a rare label may be the name of a folder.
FEW = 5
BASE_LICENCES = {  # what stands in the name of a base -> its licence
    r"\btiny( |$)": "MIT",
    "sd15|diffusion-v1": "CreativeML Open RAIL-M",
    "sd21|sdxl|diffusion-(2|xl)": "CreativeML Open RAIL++-M",
}
CARD = """---
license: other
license_name: that-of-the-base-and-of-the-data
{header}
---

# {title}

## What the images show

| | images |
|---|---|
{counts}
An image with several labels counts for each. A label, sex or age that fewer than five patients are
known to have is not named, and a count below five is "<5". An image without a patient counts as one
patient.

## What it was made from

- training images: {images}; patients: {patients}
- licence of these images: {data_licence}
- ethics approval: {ethics}
- base: {model}; its licence: {base_licence}
- adapter, or fully trained model, first letters of its hash: {adapter}

## How it was made and checked

{checks}

Flags that are numbers or switches:

{flags}
## Privacy

Privacy method: none; not differentially private. {audit}

## Intended use and limits

Research, such as enlarging training sets, after an evaluation against held-out real images; not
for diagnosis. A synthetic image shows no patient, but may repeat a training image. The biases of
the training set and the terms of the base's licence apply to it, too.

## How to cite

Name medlora, the base and the adapter's hash, and say which images are synthetic.
"""


def write_card(args, **parts):
    """Write args.out/README.md: parts of CARD, "not stated" where empty; none may name a person."""
    licences = [text for name, text in BASE_LICENCES.items() if re.search(name, parts["model"])]
    parts["base_licence"] = ", ".join(licences)
    parts["flags"] = ""
    for name, value in vars(args).items():
        if isinstance(value, int | float):  # paths, prompts and columns may name somebody
            parts["flags"] += f"- {name}: {value}\n"
    parts = {name: value or "not stated" for name, value in parts.items()}
    write_file(os.path.join(args.out, "README.md"), CARD.format_map(vars(args) | parts))


def counts_table(rows, real_rows):
    """Markdown: images by label, sex, age; "other" where fewer than FEW real patients have it."""
    if not any(row.label for row in real_rows):
        real_rows = rows  # labels that were typed, or are of other data
    patients = {}
    for row in real_rows:
        # the folders of a set without a table, read as labels, may each be of one patient
        patient = row.group or (row.path if row.fields else "")
        for group in groups_of(row):
            patients.setdefault(group, set()).add(patient)
    counts = Counter()
    for row in rows:
        for by, group in groups_of(row):
            is_common = len(patients.get((by, group), "")) >= FEW
            if by in ("label", "sex", "age"):
                counts[by, group if is_common else "other"] += 1
    lines = ""
    for (by, group), count in sorted(counts.items()):
        shown = count if count >= FEW else f"<{FEW}"
        lines += f"| {by}: {group} | {shown} |\n"
    return lines
