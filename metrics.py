"""From image files to numbers: reading, listing, features, distances, calibration, and the page that shows them.

Everything above imports from here; this file imports none of ours. Files, pixels or features go in; pixels, features,
numbers or HTML come out: no prompts, schedulers or optimizers. In this order:
    errors, files, seeds   fail, replacing, need, generator, guarded, pick_device
    reading and listing    read_image, list_images, split_rows, fit_square, load_pixels
    features               texture, fid_inception, load_features, extract
    image against image    lpips_matrix, ssim, ssim_matrix
    set against set        frechet, kid, precision_recall, joint_matrices and the table METRICS
    yardstick              permutation_draws, half_draws, yardstick
    calibration            nearest, image_scores, calibrate, judge
    the page               page, table, thumbnail, curve
"""
import base64
import collections
import contextlib
import csv
import hashlib
import html
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import signal
import string
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# ---------------------------------------------------------------- errors, files, seeds, devices


def fail(message):
    """Say what is wrong in one line and stop: exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


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
        wrapped = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)   # torch.save: a full disk
        cause = error.__context__ if wrapped else error
        if isinstance(cause, OSError) and cause.filename is None:
            cause.filename = str(path)
        raise cause


def need(package, purpose):
    """Import and return an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f"{purpose} need {package}: pip install {package}")


def generator(seed, *key):
    """A torch.Generator on the CPU for one purpose: the same (seed, key) gives the same numbers everywhere."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def guarded(main, args):
    """Run main(args); what a user, a disk or a signal did ends in one line, what a bug did in a traceback."""
    def interrupt(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, interrupt)
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
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
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
FORMATS = ("PNG", "JPEG", "JPEG2000", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # never EPS: it runs ghostscript
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm",
                  ".dcm", ".dicom", *VOLUME_SUFFIXES)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # read_image has its own limit
warnings.filterwarnings("ignore", module="pydicom")  # these quote the header, names included


class BadImage(Exception):
    """An image that cannot be read: `.path` says which, `.why` says why."""

    def __init__(self, path, why):
        super().__init__(path, why)
        self.path, self.why = str(path), str(why)

    def __str__(self):
        return f"{self.path}: {self.why}"


def read_image(path, slice=None, window=None, value_range=None):
    """Read one image of any kind as an upright 8-bit PIL image of mode "RGB".

    The content decides the kind, not the suffix. slice: frame of a multi-frame DICOM or slice of a volume (default:
    the middle one); window: (centre, width) in the file's units, e.g. Hounsfield; value_range: (low, high) that become
    black and white in 16-bit and float images (default: the image's own range; 8-bit images are never rescaled).
    Raises BadImage.
    """
    try:
        if os.path.isdir(path):
            raise BadImage(path, "is a folder, not an image")
        if str(path).lower().endswith(VOLUME_SUFFIXES):
            return read_volume(path, slice, window, value_range)
        if looks_like_dicom(path):
            return read_dicom(path, slice, window, value_range)
        return read_raster(path, value_range)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(path, "is not an image" if os.path.getsize(path) else "is empty") from None
    except Image.DecompressionBombError:
        raise BadImage(path, TOO_LARGE) from None
    except OSError as error:
        raise BadImage(path, error.strerror or f"is damaged ({error})") from None
    except Exception as error:  # decoders raise nearly anything on damaged files, with header text in the message
        raise BadImage(path, f"is damaged ({type(error).__name__})") from None


def read_raster(path, value_range):
    """PNG, JPEG, TIFF and the like; the first frame of several; transparency on black."""
    with Image.open(path, formats=FORMATS) as image:
        if image.format == "PNG":  # Pillow decodes pixels whose checksum is wrong; verify() is where it looks
            with Image.open(path, formats=("PNG",)) as twin:
                twin.verify()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # convert("RGB") would clip these at 255
            values = np.asarray(image).astype(np.float64)
            return grey_image(values, *(value_range or (np.nanmin(values), np.nanmax(values))))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
        return image.convert("RGB")


def grey_image(values, low, high):
    """(H, W) numbers -> RGB image: `low` and below is black, `high` and above white."""
    unit = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return Image.fromarray((unit.clip(0, 1) * 255 + 0.5).astype(np.uint8)).convert("RGB")


def percentile_range(values, low, high):
    """(low, high) percentiles of the finite values, or their whole range where those two coincide."""
    finite = values[np.isfinite(values)]
    ends = np.percentile(finite, (low, high)) if finite.size else (0, 1)
    return ends if ends[1] > ends[0] else (finite.min(initial=0), finite.max(initial=1))


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
    return head[128:] == b"DICM" or head[:4] in (b"\2\0\0\0", b"\x08\0\0\0", b"\x08\0\5\0", b"\x08\0\x08\0")


def pick_slice(path, wanted, count):
    """The index of the slice named, or of the middle one; BadImage when there is none of that number."""
    if wanted is not None and not 0 <= wanted < count:
        raise BadImage(path, f"has slices 0 to {count - 1}, not {wanted}")
    return count // 2 if wanted is None else wanted


def read_dicom(path, slice, window, value_range):
    """One frame of a DICOM file: rescale, then window, then MONOCHROME1, then square pixels (DICOM PS3.3 C.11)."""
    if importlib.util.find_spec("pydicom") is None:
        raise BadImage(path, "DICOM files need pydicom: pip install pydicom")
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_rescale, apply_voi, pixel_array
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    data = pydicom.dcmread(path, force=True)
    if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise BadImage(path, "is a DICOM file without pixels")
    if data.Rows * data.Columns > MAX_PIXELS:
        raise BadImage(path, TOO_LARGE)
    if "TransferSyntaxUID" not in data.file_meta:  # no preamble: implicit or explicit, little endian
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" + (".1" if not data.original_encoding[0] else "")
    syntax = data.file_meta.TransferSyntaxUID
    frame = pick_slice(path, slice, int(data.get("NumberOfFrames") or 1))
    for groups, index in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence"):
            if len(data.get(groups) or ()) > index and data[groups][index].get(name):
                data.update(data[groups][index][name][0])  # enhanced objects keep these tags per frame
    if syntax == "1.2.840.10008.1.2.4.51":  # some 12-bit encoders end the scan at coefficient 0; it has all 64
        data.PixelData = re.sub(rb"(?s)(\xff\xda\0\x08\x01..\0)\0\0", b"\\1?\0", data.PixelData)
    try:
        values = pixel_array(data, index=frame)
    except RuntimeError:  # every decoder there is gave up, or there is none
        raise BadImage(path, f"no decoder here reads its {syntax.name}: "
                             "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg") from None
    if data.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, data)
    if values.ndim == 3:
        bits = 8 * values.itemsize if "PALETTE" in data.PhotometricInterpretation else data.BitsStored
        image = Image.fromarray((values >> max(bits - 8, 0)).astype(np.uint8))
    else:
        image = dicom_grey(data, apply_rescale(values, data), apply_voi, window, value_range)
    spacing = data.get("PixelSpacing") or data.get("ImagerPixelSpacing") or data.get("PixelAspectRatio") or (1, 1)
    return square_pixels(image, *spacing)


def dicom_grey(data, values, apply_voi, window, value_range):
    """Rescaled (H, W) values -> RGB image by the window asked for, else the file's own, else percentiles."""
    function, voi = data.get("VOILUTFunction") or "LINEAR", data.get("WindowCenter") is not None
    if window is None and data.get("VOILUTSequence"):
        values = apply_voi(values, data, index=0)
        low, high = 0, 2 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif window is not None or voi:
        centre, width = window or (np.ravel(data.WindowCenter)[0], np.ravel(data.WindowWidth)[0])
        centre, width = float(centre), float(width)
        low, high = centre - width / 2, centre - 1 + width / 2
        if function == "LINEAR_EXACT" or "PixelData" not in data:  # float pixels: no step to count
            high = centre + width / 2
        if window is None and function == "SIGMOID":
            values, low, high = 1 / (1 + np.exp(-4 * (values - centre) / width)), 0, 1
    else:
        known = values[values != data.PixelPaddingValue] if "PixelPaddingValue" in data else values
        low, high = value_range or percentile_range(known.astype(np.float64), 0.5, 99.5)
    image = grey_image(values.astype(np.float64), low, high)
    return ImageOps.invert(image) if data.PhotometricInterpretation == "MONOCHROME1" else image


def read_volume(path, slice, window, value_range):
    """One axial slice of a NIfTI or FreeSurfer volume: anterior up, the patient's left on the image's left."""
    if importlib.util.find_spec("nibabel") is None:
        raise BadImage(path, "NIfTI and .mgz files need nibabel: pip install nibabel")
    import nibabel
    volume = nibabel.as_closest_canonical(nibabel.load(path))
    if volume.ndim < 2 or np.prod(volume.shape[:3]) > 8 * MAX_PIXELS:
        raise BadImage(path, f"has shape {volume.shape}")
    values = np.asanyarray(volume.dataobj[(Ellipsis, *[0] * (volume.ndim - 3))] if volume.ndim > 3 else volume.dataobj)
    values = np.atleast_3d(values)  # (X, Y, Z)
    chosen = values[:, :, pick_slice(path, slice, values.shape[2])].astype(np.float64)
    if window:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    else:  # one range for the volume: a range for each slice flickers
        low, high = value_range or percentile_range(values.astype(np.float32), 1, 99)
    zooms = volume.header.get_zooms()
    return square_pixels(grey_image(np.rot90(chosen), low, high), zooms[1], zooms[0])


# ---------------------------------------------------------------- listing a data set

IMAGE_COLUMNS = ("file_name", "path", "image", "image_path", "file")
CAPTION_COLUMNS = ("text", "caption", "prompt")
LABEL_COLUMNS = ("label", "labels", "class")
GROUP_COLUMNS = ("patient_id", "patient", "subject", "group")


def list_images(data, image_column=None, caption_column=None, label_column=None, group_column=None, prompt=None):
    """List a data set: a folder, class subfolders, a folder with metadata.csv/.jsonl/manifest.csv, or such a table.

    Returns a list of rows, sorted by file name for folders and in the table's order for tables: {"path": absolute,
    "file_name": as in the table or relative to the folder, "caption", "label", "group": str, "" when unknown,
    "fields": the row's columns, {} in folders}. The caption is `prompt` with its {fields} filled in, else the caption
    column, else "". A wrong path, column, field or table ends in fail().
    """
    if not os.path.exists(data):
        fail(f"{data}: no such file or folder")
    flags = {"image": image_column, "caption": caption_column, "label": label_column, "group": group_column}
    tables = [os.path.join(data, name) for name in ("metadata.csv", "metadata.jsonl", "manifest.csv")]
    table = next((name for name in tables if os.path.isfile(name)), None) if os.path.isdir(data) else data
    if table:
        rows, columns = list_table(table, flags)
    else:
        rows, columns = list_folder(data), {}
        for role, name in flags.items():
            if name is not None:
                fail(f"--{role}-column {name}: {data} has no metadata.csv that could have this column")
    if not rows:
        fail(f"{data}: no images in it (looked for {' '.join(IMAGE_SUFFIXES)})")
    fill_captions(data, rows, columns, prompt)
    return rows


def list_folder(folder):
    """Rows of the images below a folder; the label is the name of the first subfolder."""
    rows = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(os.path.abspath(place), name)
            if name.startswith(".") or not os.path.isfile(path):  # hidden files and AppleDouble's ._x
                continue
            if not name.lower().endswith(IMAGE_SUFFIXES) and (os.path.splitext(name)[1] or not looks_like_dicom(path)):
                continue
            file_name = Path(os.path.relpath(path, os.path.abspath(folder))).as_posix()
            label = file_name.split("/")[0] if "/" in file_name else ""
            rows.append(dict(path=path, file_name=file_name, caption="", label=label, group="", fields={}))
    return sorted(rows, key=lambda row: row["file_name"])


def read_table(path):
    """The rows of a CSV or JSONL file as dicts of strings."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        fail(f"{path}: is not a UTF-8 text file: give a folder of images, a .csv or a .jsonl")
    if str(path).lower().endswith((".jsonl", ".json", ".ndjson")):
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                fail(f"{path}: line {number} is not JSON")
        if not all(isinstance(row, dict) for row in rows):
            fail(f"{path}: every line must be one JSON object")
    else:
        header = text.split("\n", 1)[0]
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
        rows = []
        try:
            for row in reader:
                if None in row:
                    fail(f"{path}: line {reader.line_num} has more cells than the header: quote texts with commas")
                rows.append(row)
        except csv.Error as error:
            fail(f"{path}: line {reader.line_num}: {error}")
    return [{str(key).strip(): str("" if cell is None else cell).strip() for key, cell in row.items()} for row in rows]


def list_table(table, flags):
    """Rows of the images that a table names, and the dict of its columns: role -> name."""
    cells = read_table(table)
    if not cells:
        fail(f"{table}: has no rows")
    names = list(dict.fromkeys(name for row in cells for name in row))
    usual = {"image": IMAGE_COLUMNS, "caption": CAPTION_COLUMNS, "label": LABEL_COLUMNS, "group": GROUP_COLUMNS}
    columns = {}
    for role, wanted in flags.items():
        if wanted is not None and wanted not in names:
            fail(f"--{role}-column {wanted}: {table} has the columns {', '.join(names)}")
        found = [name for usual_name in usual[role] for name in names if name.lower() == usual_name]
        columns[role] = wanted or (found[0] if found else None)
    if columns["image"] is None:
        fail(f"{table}: no column of file names among {', '.join(names)}: name it with --image-column")
    folder, rows, missing = os.path.dirname(os.path.abspath(table)), [], []
    for number, fields in enumerate(cells, 2):
        file_name = fields.get(columns["image"], "")
        path = os.path.normpath(os.path.join(folder, file_name))
        if not os.path.isabs(file_name) and not path.startswith(folder.rstrip(os.sep) + os.sep):
            fail(f"{table}: row {number}: {file_name or 'an empty file name'} is not inside {folder}")
        missing += [] if os.path.isfile(path) else [file_name]
        roles = {role: fields.get(columns[role], "") for role in ("caption", "label", "group")}
        rows.append(dict(path=path, file_name=file_name, fields=fields, **roles))
    if missing:
        fail(f"{table}: {len(missing)} of {len(rows)} files are not there: {', '.join(missing[:5])}"
             + ("…" if len(missing) > 5 else ""))
    return rows, columns


def in_english(labels):
    """Several labels of one cell as English: "A|B|C" -> "A, B and C"."""
    parts = [part.strip() for part in labels.split("|") if part.strip()]
    return " and ".join([", ".join(parts[:-1])] * (len(parts) > 1) + parts[-1:])


def fill_captions(data, rows, columns, prompt):
    """Set each row's caption from the format string `prompt`; without one the captions stay as they are."""
    if prompt is None:
        return
    try:
        pieces = list(string.Formatter().parse(prompt))
    except ValueError as error:
        fail(f"--prompt {prompt!r}: {error} (fields look like {{label}}, braces themselves like {{{{ }}}})")
    roles = {"label": ("label", "labels"), "caption": ("caption", "text", "Text")}
    known = {role for role in roles if columns.get(role) or (role == "label" and any(row["label"] for row in rows))}
    for row in rows:
        values = {alias: row[role] for role in sorted(known) for alias in roles[role]} | row["fields"]
        for _, name, _, _ in pieces:
            if name is not None and name not in values:
                fail(f"--prompt: no field {{{name}}} in {data}; there are: {', '.join(values) or 'none'}")
        row["caption"] = "".join(
            literal + ("" if name is None else in_english(values[name])) for literal, name, _, _ in pieces).strip()


def content_hash(path):
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(2**20), b""):
            digest.update(part)
    return digest.hexdigest()


def write_csv(path, header, rows):
    """Write a CSV file, atomically."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def split_rows(rows, val_share, test_share=0.0):
    """Set row["split"] to "train", "val" or "test" by a hash of the group, else of the file's content.

    The split is the same on every machine, does not depend on order, and adding files moves none.
    """
    for row in rows:
        key = row["group"] or content_hash(row["path"])
        u = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
        row["split"] = "test" if u < test_share else "val" if u < test_share + val_share else "train"


# ---------------------------------------------------------------- from files to pixels


def fit_square(image, resolution, crop="center"):
    """An RGB image resized to resolution x resolution: its centre ("center") or all of it on black ("pad")."""
    size, method = (resolution, resolution), Image.Resampling.LANCZOS
    return ImageOps.fit(image, size, method) if crop == "center" else ImageOps.pad(image, size, method, "black")


def pick_resolution(rows):
    """The pixels at which sets are compared: the smallest stored side of their images, from 64 to 256."""
    sides = []
    for row in rows:
        with contextlib.suppress(Exception), Image.open(row["path"], formats=FORMATS) as image:  # load_pixels names it
            sides.append(min(image.size))
    return min(256, max(64, min(sides, default=256)))


def find_range(rows):
    """{path: (low, high)} for the 16-bit and float rasters of a set: one range for all, so that a dim film stays dim."""
    ends = {}
    for row in rows:
        with contextlib.suppress(Exception), Image.open(row["path"], formats=FORMATS) as image:  # load_pixels will name it
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                values = np.asarray(image)
                ends[row["path"]] = float(np.nanmin(values)), float(np.nanmax(values))
    low, high = (pick(end[n] for end in ends.values()) for n, pick in enumerate((min, max))) if ends else (0, 0)
    if ends:
        print(f"{len(ends)} images of 16 bits or of floats: {low:g} is black and {high:g} white in all of them")
    return dict.fromkeys(ends, (low, high))


def load_pixels(rows, resolution, crop="center", strict=False):
    """Read the images of `rows`: (the readable rows, uint8 pixels (N, 3, resolution, resolution)).

    16-bit and float ones are scaled by the range of them all. Unreadable images are named on stderr and left out;
    more than 5 % of them, or any where `strict`, ends in fail().
    """
    ranges, pixels = find_range(rows), torch.empty(len(rows), 3, resolution, resolution, dtype=torch.uint8)

    def load(n):
        try:
            square = fit_square(read_image(rows[n]["path"], value_range=ranges.get(rows[n]["path"])), resolution, crop)
            pixels[n] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        except BadImage as error:
            return error
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, \
            contextlib.closing(pool.map(load, range(len(rows)))) as loading:  # closing cancels the rest on Ctrl-C
        errors = list(tqdm(loading, total=len(rows), desc="reading", unit="image", leave=False,
                           disable=None if len(rows) > 200 else True))
    good, bad = [n for n, error in enumerate(errors) if error is None], [error for error in errors if error is not None]
    for error in bad:
        print(f"skipped: {error}", file=sys.stderr)
    if bad and (strict or len(bad) > 0.05 * len(rows)):
        fail(f"{len(bad)} of {len(rows)} images cannot be read, the first: {bad[0]}")
    return [rows[n] for n in good], pixels[good] if bad else pixels


# ---------------------------------------------------------------- features, one vector an image

CACHE = Path(os.environ.get("MEDLORA_CACHE") or Path.home() / ".cache" / "medlora")
FID_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LUMA = (0.299, 0.587, 0.114)


def to_grey(pixels):
    """uint8 (B, 3, H, W) -> luma in [0, 1], (B, 1, H, W)."""
    return torch.einsum("bchw,c->bhw", pixels.float(), torch.tensor(LUMA, device=pixels.device))[:, None] / 255


def texture(pixels):
    """The offline descriptor: uint8 (B, 3, H, W), H, W >= 40 -> (B, 368) log energies of oriented textures.

    A two-layer scattering transform (Bruna & Mallat 2013) with 8 orientations, 4 and 3 scales, and a 4x4 thumbnail.
    No weights, no randomness; blind to small changes in the size of blobs.
    """
    span = torch.arange(-4.0, 5.0, device=pixels.device)
    y, x = torch.meshgrid(span, span, indexing="ij")
    turn = torch.arange(8, device=pixels.device)[:, None, None] * torch.pi / 8
    phase = 1.6 * (x * turn.cos() + y * turn.sin())  # (8, 9, 9)
    waves = torch.cat([phase.cos(), phase.sin()]) * torch.exp(-(x**2 + y**2) / 8)
    waves = waves - waves.mean((1, 2), keepdim=True)
    waves = (waves / waves.flatten(1).norm(dim=1)[:, None, None])[:, None]  # (16, 1, 9, 9)
    blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], device=pixels.device)[None, None] / 16

    def modulus(maps):  # (B, 1, H, W) -> (B, 8, H, W)
        even, odd = F.conv2d(F.pad(maps, (4, 4, 4, 4), "reflect"), waves).chunk(2, 1)
        return (even**2 + odd**2 + 1e-8).sqrt()

    grey = to_grey(pixels)
    found = [F.adaptive_avg_pool2d(grey, 4).flatten(1)]
    for scale in range(4):
        energy = modulus(grey)
        found += [(F.adaptive_avg_pool2d(energy, 2) + 1e-3).log().flatten(1), (energy.std((2, 3)) + 1e-3).log()]
        if scale < 3:
            second = modulus(F.avg_pool2d(energy, 2).flatten(0, 1)[:, None]).mean((2, 3))
            found.append((second.reshape(len(pixels), 64) + 1e-3).log())
            grey = F.avg_pool2d(F.conv2d(F.pad(grey, (1, 1, 1, 1), "reflect"), blur), 2)
    return torch.cat(found, 1)


def find_weights(name):
    """The path of a downloaded weight file in our cache or torch's own, or None."""
    places = [CACHE / name, Path(torch.hub.get_dir()) / "checkpoints" / name]
    return next((str(path) for path in places if path.is_file()), None)


def load_weights(path, sha256=""):
    """The state dict in a .pth file; fail() where it is damaged or not the file of that hash."""
    if sha256 and not content_hash(path).startswith(sha256):
        fail(f"{path}: is damaged or another file: its SHA-256 does not begin with {sha256[:8]}; download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises a dozen kinds for a damaged file
        fail(f"{path}: is not a readable weight file")


def fid_inception(state):
    """The Inception of FID (Heusel et al. 2017; pytorch-fid's port) on torchvision's blocks: state dict -> module.

    It differs from torchvision's in its pools: averages leave out the border, and the last block takes the maximum.
    The module maps (B, 3, 299, 299) in [-1, 1] to pool3 features (B, 2048).
    """
    from torchvision.models import Inception3
    net, seen = Inception3(num_classes=1008, aux_logits=False, init_weights=False), {}
    net.load_state_dict(state)

    def without_border(_, pooled):  # an average over 9 cells, padding included -> over the cells inside
        return pooled[0] / F.avg_pool2d(torch.ones_like(pooled[0][:1, :1]), 3, 1, 1)

    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
        getattr(net, name).branch_pool.register_forward_pre_hook(without_border)
    net.Mixed_7c.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    net.Mixed_7c.branch_pool.register_forward_pre_hook(lambda *_: F.max_pool2d(seen.pop("x"), 3, 1, 1))
    net.fc = torch.nn.Identity()
    return net.eval().requires_grad_(False)


def orthogonal_vgg(seed=0):
    """A state dict for VGG16's convolutions: random orthogonal filters of gain sqrt(2), no bias."""
    from torchvision.models.vgg import cfgs, make_layers
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in make_layers(cfgs["D"], False).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        rows, columns = shape[0], shape[1:].numel()
        state[name] = torch.zeros(shape)
        if len(shape) == 4:
            q, r = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator(seed, name)))
            q = q * r.diagonal().sign() * 2**0.5  # the sign makes Q unique
            state[name] = (q if rows > columns else q.T).reshape(shape)
    return state


def trunk_of(kind, state):
    """The convolutions of torchvision's alexnet, vgg16 or squeezenet1_1 with the weights `state`."""
    import torchvision
    with torch.device("meta"):
        trunk = getattr(torchvision.models, kind)().features
    trunk.load_state_dict(state, assign=True)
    for module in trunk:
        if hasattr(module, "inplace"):
            module.inplace = False  # the maps are kept
    return trunk.eval().requires_grad_(False)


def taps(trunk, images, indices):
    """The maps (B, C, h, w) after each layer named in `indices`."""
    found = []
    for index, layer in enumerate(trunk):
        images = layer(images)
        found += [images] if index in indices else []
        if index == max(indices):
            return found


def load_features(name, device):
    """A feature network by name: {"name", "function": uint8 (B, 3, H, W) -> (B, D), "standardise", "published"}.

    name: texture, vgg-random, inception (its weights in the cache), or the path of an Inception weight file.
    """
    if name == "texture":
        return dict(name="texture-1", function=texture, standardise=True, published=False)
    if name == "vgg-random":
        trunk = trunk_of("vgg16", orthogonal_vgg()).to(device)
        mean, sd = (torch.tensor(v, device=device)[:, None, None] for v in (LPIPS_MEAN, LPIPS_SD))

        def spread(pixels):  # mean and sd of each map of five layers: 2944 numbers
            maps = taps(trunk, (pixels / 127.5 - 1 - mean) / sd, LPIPS["vgg"][1])
            return torch.cat([part for m in maps for part in (m.mean((2, 3)), m.std((2, 3)))], 1)
        return dict(name="vgg-random-1", function=spread, standardise=True, published=False)
    path = find_weights(FID_WEIGHTS) if name == "inception" else name
    if path is None or not os.path.isfile(path):
        fail(f"--features {name}: no such weight file: put {FID_WEIGHTS} (github.com/mseitzer/pytorch-fid, release "
             f"fid_weights) into {CACHE}, name its path, or use texture or vgg-random, which need none")
    try:
        net = fid_inception(load_weights(path, FID_SHA256 if name == "inception" else "")).to(device)
    except RuntimeError:
        fail(f"{path}: is not the weights of FID's Inception")
    digest = content_hash(path)

    def pool3(pixels):
        images = F.interpolate(pixels.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        return net(2 * images - 1)
    return dict(name=f"inception-{digest[:16]}", function=pool3, standardise=False, published=digest == FID_SHA256)


def extract(pixels, network, device, batch_size=32, precision="auto"):
    """Features of uint8 pixels (N, 3, H, W) as float64 (N, D); known images come from the disk cache.

    The cache's key is the network and the pixels it sees, so that neither an edited file nor another resize can
    bring up a stale vector; a damaged entry is computed again. precision: auto is fp32, as published figures are.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    name = network["name"] + (f"-{precision}" if dtype != torch.float32 else "")
    keys = [hashlib.sha256(f"{name} {tuple(image.shape)}".encode() + image.numpy().tobytes()).hexdigest()
            for image in pixels]
    paths = [CACHE / "features" / name / key[:2] / key for key in keys]
    vectors = [cached_vector(path) for path in paths]
    todo = [n for n, vector in enumerate(vectors) if vector is None]
    lower = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), lower, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 moves FID's third digit
        for start in tqdm(range(0, len(todo), batch_size), desc=name, leave=False,
                          disable=None if len(todo) > 100 else True):
            numbers = todo[start:start + batch_size]
            found = network["function"](pixels[numbers].to(device)).float().cpu().numpy()
            for n, vector in zip(numbers, found):
                vectors[n] = vector
                with contextlib.suppress(OSError), replacing(paths[n]) as file:  # a full disk costs only time
                    file.write(hashlib.sha256(vector.tobytes()).digest() + vector.tobytes())
    return np.stack(vectors).astype(np.float64)


def cached_vector(path):
    """The float32 vector of a cache file, or None where there is none or its checksum is wrong."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return np.frombuffer(data[32:], np.float32) if hashlib.sha256(data[32:]).digest() == data[:32] else None


# ---------------------------------------------------------------- LPIPS and SSIM, image against image

LPIPS_MEAN, LPIPS_SD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LPIPS = {"alex": ("alexnet", (1, 4, 7, 9, 11), "alexnet-owt-7be5be79.pth", "df73285e"),
         "vgg": ("vgg16", (3, 8, 15, 22, 29), "vgg16-397923af.pth", "a78928a0"),
         "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12), "squeezenet1_1-b8a52dc0.pth", "4a5350f2")}


def lpips_files(net):
    """Where LPIPS's trunk and its linear weights lie: (path or None, path or None)."""
    package = importlib.util.find_spec("lpips")
    packed = Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / f"{net}.pth" if package else None
    own = find_weights(f"lpips-{net}.pth")
    return find_weights(LPIPS[net][2]), own or (str(packed) if packed and packed.is_file() else None)


def load_lpips(net, device):
    """The perceptual distance: {"name", "trunk", "indices", "weights"}; net: alex, vgg, squeeze or random.

    `random` is a VGG of random orthogonal filters with equal weights: no file needed, no published scale.
    """
    if net == "random":
        trunk, indices = trunk_of("vgg16", orthogonal_vgg()), LPIPS["vgg"][1]
        weights = [torch.full((channels, 1, 1), 1 / len(indices)) for channels in (64, 128, 256, 512, 512)]
    else:
        kind, indices, file, digest = LPIPS[net]
        trunk_path, linear_path = lpips_files(net)
        if not trunk_path or not linear_path:
            fail(f"--lpips {net}: needs torchvision's {file} in {CACHE} and the linear layers of the package lpips "
                 "(pip install lpips); --lpips random needs neither")
        state = load_weights(trunk_path, file.split("-")[-1][:8])
        state = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        trunk, linear = trunk_of(kind, state), load_weights(linear_path, digest)
        weights = [linear[f"lin{n}.model.1.weight"][0] for n in range(len(indices))]
    return dict(name=net, trunk=trunk.to(device), indices=indices, weights=[w.to(device) for w in weights])


def lpips_vectors(network, images):
    """Images in [-1, 1] (B, 3, H, W) -> (B, F): LPIPS v0.1 of two images is their squared distance here.

    Zhang et al. 2018; the eps stands outside the root as in the lpips package.
    """
    mean, sd = (torch.tensor(v).to(images)[:, None, None] for v in (LPIPS_MEAN, LPIPS_SD))
    parts = []
    for maps, weight in zip(taps(network["trunk"], (images - mean) / sd, network["indices"]), network["weights"]):
        maps = maps / (maps.square().sum(1, keepdim=True).sqrt() + 1e-10)
        parts.append((maps * (weight / maps[0, 0].numel()).sqrt()).flatten(1))
    return torch.cat(parts, 1)


def lpips_matrix(pixels, network, device, batch_size=32, memory=2**29):
    """LPIPS of all pairs of uint8 pixels (N, 3, H, W), H, W >= 64: float64 (N, N); under 1e-5 reads 0.

    One forward pass an image and one product, in blocks of at most `memory` bytes of features.
    """
    def vectors(numbers):
        return torch.cat([lpips_vectors(network, part.to(device) / 127.5 - 1)
                          for part in pixels[numbers].split(batch_size)])
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        width = max(1, memory // (4 * vectors([0]).shape[1]))
        blocks = [list(range(start, min(start + width, len(pixels)))) for start in range(0, len(pixels), width)]
        result = np.zeros((len(pixels), len(pixels)))
        shown = tqdm(blocks, desc=f"LPIPS {network['name']}", leave=False, disable=None)
        for n, rows in enumerate(shown):
            first = vectors(rows)
            for columns in blocks[n:]:
                second = first if columns is rows else vectors(columns)
                norms = first.square().sum(1)[:, None] + second.square().sum(1)
                block = (norms - 2 * first @ second.T).double().cpu().numpy()
                result[np.ix_(rows, columns)], result[np.ix_(columns, rows)] = block, block.T
    return np.where(result < 1e-5, 0, result)  # float32 leaves up to 3e-6 between equal images


def gauss_window(like):
    """The 11-point Gaussian of sigma 1.5 of Wang et al. 2004."""
    window = torch.exp(-torch.arange(-5.0, 6.0, dtype=torch.float64).square() / 4.5)
    return (window / window.sum()).to(like)


def ssim(a, b):
    """SSIM (Wang et al. 2004) of images in [0, 1], (B, C, H, W), H, W >= 11 -> (B,): valid region, channels' mean."""
    window = gauss_window(a)

    def smooth(x):
        x = F.conv2d(x.flatten(0, 1)[:, None], window[None, None, :, None])
        return F.conv2d(x, window[None, None, None, :]).reshape(*a.shape[:2], x.shape[2], -1)
    mean_a, mean_b = smooth(a), smooth(b)
    variances = smooth(a * a) + smooth(b * b) - mean_a**2 - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    score = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    return (score / ((mean_a**2 + mean_b**2 + 1e-4) * (variances + 9e-4))).mean((1, 2, 3))


def ssim_matrix(first, second, device="cpu", size=64):
    """SSIM of all pairs at `size` pixels, grey: uint8 (N, 3, H, W), (M, 3, H, W) -> float64 (N, M).

    Means and variances are taken once an image; what a pair shares, the smoothed product, is one matrix product of
    all images for each place of the window.
    """
    window = gauss_window(torch.empty(0, device=device))
    weights = (window[:, None] * window).flatten()  # (121,)

    def shrink(pixels):  # -> (N, size, size)
        return torch.cat([F.interpolate(to_grey(part.to(device)), (size, size), mode="area")[:, 0]
                          for part in pixels.split(64)])

    def places(grey, y):  # one row of windows: centred patches (size - 10, N, 121), means, both terms of the divisor
        patches = grey[:, y:y + 11].unfold(2, 11, 1).permute(2, 0, 1, 3).flatten(2)
        mean = patches @ weights
        patches = patches - mean[:, :, None]
        return zip(patches, mean, mean**2 + 0.5e-4, patches.square() @ weights + 4.5e-4)
    with torch.inference_mode():
        a, b, total = shrink(first), shrink(second), torch.zeros(len(first), len(second), device=device)
        for y in tqdm(range(size - 10), desc="SSIM", leave=False, disable=None):
            for (x, mean_x, light_x, spread_x), (z, mean_z, light_z, spread_z) in zip(places(a, y), places(b, y)):
                score = torch.outer(2 * mean_x, mean_z).add_(1e-4).mul_((x * (2 * weights) @ z.T).add_(9e-4))
                total += score.div_(light_x[:, None] + light_z).div_(spread_x[:, None] + spread_z)
    return (total / (size - 10) ** 2).double().cpu().numpy()


# ---------------------------------------------------------------- set against set, from one Gram matrix


def frechet(first, second):
    """Frechet distance of two feature sets (N, D), (M, D), N, M >= 2: FID when these are Inception's pool3.

    The trace of the root of S1 S2 is the nuclear norm of X1 X2' / sqrt((n-1)(m-1)) for centred X1, X2: no root of a
    matrix, exact where N < D. Where N > D the triangle of a QR decomposition stands for X.
    """
    mean_term = np.square(first.mean(0) - second.mean(0)).sum()
    roots, traces = [], 0.0
    for x in (first, second):
        centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
        traces += np.square(centred).sum()
        roots.append(np.linalg.qr(centred, mode="r") if len(x) > x.shape[1] else centred)
    return max(0.0, mean_term + traces - 2 * np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())


def kid(first, second):
    """KID (Binkowski et al. 2018): unbiased MMD^2 of two feature sets with the kernel (x·y/D + 1)^3, and its error.

    All images at once, no subsets; the standard error is the delete-one jackknife from row sums.
    """
    n, m, d = len(first), len(second), first.shape[1]
    kernels = [(x @ y.T / d + 1) ** 3 for x, y in ((first, first), (second, second), (first, second))]
    a, b = (k.sum(1) - k.diagonal() for k in kernels[:2])  # row sums without the diagonal
    cross, sums = kernels[2], (a.sum(), b.sum(), kernels[2].sum())
    value = sums[0] / (n * (n - 1)) + sums[1] / (m * (m - 1)) - 2 * sums[2] / (n * m)
    if min(n, m) < 3:
        return value, float("nan")
    left_a = ((sums[0] - 2 * a) / ((n - 1) * (n - 2)) + sums[1] / (m * (m - 1))
              - 2 * (sums[2] - cross.sum(1)) / ((n - 1) * m))
    left_b = ((sums[1] - 2 * b) / ((m - 1) * (m - 2)) + sums[0] / (n * (n - 1))
              - 2 * (sums[2] - cross.sum(0)) / (n * (m - 1)))
    return value, np.sqrt((n - 1) * left_a.var() + (m - 1) * left_b.var())


def squared_distances(first, second):
    """|x - y|^2 of all pairs, (N, D), (M, D) -> (N, M); what rounding leaves between equal rows reads 0."""
    norms = np.square(first).sum(1)[:, None] + np.square(second).sum(1)
    distances = norms - 2 * first @ second.T
    return np.where(distances < 1e-12 * norms, 0, distances)


def precision_recall(real, fake, cross, k):
    """Precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020) from squared distances.

    real (N, N), fake (M, M), cross (N, M). A ball reaches to the k-th neighbour within its own set and includes its
    surface, so that coinciding points count as covered.
    """
    def radii(own):  # the 0-th neighbour is the point itself
        return np.partition(own, min(k, len(own) - 1), axis=1)[:, min(k, len(own) - 1)]
    inside = cross <= radii(real)[:, None]
    return (inside.any(0).mean(), (cross <= radii(fake)).any(1).mean(), inside.sum(0).mean() / k, inside.any(1).mean())


def joint_matrices(real, fake, standardise):
    """What every number below is read from: both sets' features stacked, their KID kernel and distances.

    standardise: divide by the pooled standard deviation (the real set's own would favour the real set).
    """
    features = np.concatenate([real, fake])
    if standardise:
        spread = features.std(0)
        features = (features - features.mean(0)) / np.where(spread > 1e-9, spread, 1)
    centred = features - features.mean(0)  # a large common mean costs digits
    return {"features": features, "gram": centred @ centred.T, "distance": squared_distances(centred, centred),
            "kernel": (features @ features.T / features.shape[1] + 1) ** 3}


def frechet_draws(joint, draws):
    """The Frechet distance of each draw, by the nuclear norm of a block of the one Gram matrix."""
    def one(draw):
        i, j = np.flatnonzero(draw == 1), np.flatnonzero(draw == -1)
        if max(len(i), len(j)) > joint["features"].shape[1]:
            return frechet(joint["features"][i], joint["features"][j])
        a, b, c = (joint["gram"][np.ix_(*pair)] for pair in ((i, i), (j, j), (i, j)))
        traces = sum((x.trace() - len(x) * x.mean()) / (len(x) - 1) for x in (a, b))
        centred = c - c.mean(0) - c.mean(1, keepdims=True) + c.mean()
        nuclear = np.linalg.svd(centred, compute_uv=False).sum() / np.sqrt((len(i) - 1) * (len(j) - 1))
        return max(0.0, a.mean() + b.mean() - 2 * c.mean() + traces - 2 * nuclear)
    return np.array([one(draw) for draw in tqdm(draws, desc="Frechet", leave=False, disable=None)])


def pair_means(matrix, draws):
    """Means of a symmetric matrix over pairs, diagonals left out: within the first, the second set, between them.

    One product with the draws' indicators serves them all.
    """
    first, second = (draws == 1).T.astype(float), (draws == -1).T.astype(float)  # (n+m, draws)
    n, m, diagonal = first.sum(0), second.sum(0), matrix.diagonal()
    to_first, to_second = matrix @ first, matrix @ second
    return (((first * to_first).sum(0) - diagonal @ first) / (n * (n - 1)),
            ((second * to_second).sum(0) - diagonal @ second) / (m * (m - 1)), (first * to_second).sum(0) / (n * m))


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
        joint[key] = np.array([one(draw) for draw in tqdm(draws, desc="neighbours", leave=False, disable=None)])
    return joint[key][:, number]


def nearest_draws(matrix, draws):
    """Mean over the second set of the smallest entry towards the first, for each draw."""
    return np.array([matrix[np.ix_(draw == 1, draw == -1)].min(0).mean() for draw in draws])


# name: (function of the joint matrices and the draws, lower is better, the matrix it needs)
METRICS = {
    "frechet": (frechet_draws, True, "features"),
    "kid": (kid_draws, True, "features"),
    "precision": (lambda joint, draws: neighbour_draws(joint, draws, 0), False, "features"),
    "recall": (lambda joint, draws: neighbour_draws(joint, draws, 1), False, "features"),
    "density": (lambda joint, draws: neighbour_draws(joint, draws, 2), False, "features"),
    "coverage": (lambda joint, draws: neighbour_draws(joint, draws, 3), False, "features"),
    "ssim_nearest": (lambda joint, draws: -nearest_draws(-joint["ssim"], draws), False, "ssim"),
    "ssim_pairs": (lambda joint, draws: pair_means(joint["ssim"], draws)[1], True, "ssim"),
    "lpips_nearest": (lambda joint, draws: nearest_draws(joint["lpips"], draws), True, "lpips"),
    "lpips_pairs": (lambda joint, draws: pair_means(joint["lpips"], draws)[1], False, "lpips"),
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
        for unit in torch.randperm(len(units), generator=generator(seed, "permutation", row)).tolist():
            side = next((side for side in room if room[side] >= len(units[unit])), 0)
            draws[row, units[unit]] = side
            room[side] = room.get(side, 0) - len(units[unit])
    return draws


def half_draws(n, m, count, seed, groups=None):
    """Two kinds of int8 (count, n + m) draws at equal sizes: half of the real set against its other half, and the
    first of these halves against as many of the second set."""
    half = min(n // 2, m)
    splits = permutation_draws(half, n - half, count, (seed, "halves"), groups[:n] if groups else None)[1:]
    against_real, against_fake = (np.zeros((count, n + m), np.int8) for _ in range(2))
    for row, split in enumerate(splits):
        order = torch.randperm(m, generator=generator(seed, "half of the second set", row)).numpy() + n
        first, rest = np.flatnonzero(split == 1), np.flatnonzero(split == -1)
        size = min(len(first), len(rest), m)   # whole patients can leave a half short
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
    return {"value": float(value), "null": float(median), "null_low": float(low), "null_high": float(high),
            "excess": float(value - median), "p_high": float((1 + worse.sum()) / (1 + len(null))),
            "p_low": float((1 + better.sum()) / (1 + len(null)))}


# ---------------------------------------------------------------- calibration: what a real image scores


def same_unit(groups):
    """bool (N, N): True for an image with itself and with others of its group; "" is no group."""
    names = np.array([name or f"\0{n}" for n, name in enumerate(groups)])
    return names[:, None] == names


def nearest(distances, forbidden=None):
    """(index, distance) of each row's smallest entry; entries that are True in `forbidden` do not count."""
    distances = distances if forbidden is None else np.where(forbidden, np.inf, distances)
    found = distances.argmin(1)
    return found, distances[np.arange(len(found)), found]


def copy_chances(real, fake, same):
    """How likely a fresh image is as near to a real one as each generated image is: (m,), small for copies.

    real: (n, n) and fake: (m, n) distances to the real images; same: bool (n, n), images of one patient. Conformal
    p-values, against the real images' own, of the distance and of its ratio to the second nearest of another
    patient (near copies show in the one, faint copies in the other); the smaller one, doubled.
    """
    def nearness(distances, forbidden):
        first, d1 = nearest(distances, forbidden)
        d2 = nearest(distances, same[first] | forbidden)[1]
        return d1, d1 / np.maximum(d2, 1e-12)
    known, asked = nearness(real, same), nearness(fake, np.zeros_like(fake, bool))
    chances = [(1 + np.searchsorted(np.sort(a), b, "right")) / (len(real) + 1) for a, b in zip(known, asked)]
    return np.minimum(1, 2 * np.minimum(*chances))


def image_scores(pixels):
    """Scores of uint8 pixels (N, 3, H, W), each (N,): log variance of the Laplacian, contrast, mean chroma."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    scores = {"sharpness": [], "contrast": [], "colour": []}
    for part in pixels.split(64):
        grey = to_grey(part)
        scores["sharpness"].append((F.conv2d(grey, kernel).var((1, 2, 3)) + 1e-8).log())
        scores["contrast"].append(grey.std((1, 2, 3)))
        scores["colour"].append((part.amax(1).float() - part.amin(1).float()).mean((1, 2)) / 255)
    return {name: torch.cat(values).double().numpy() for name, values in scores.items()}


def two_sided(reference, values):
    """Distance from the reference's median in units of its median absolute deviation: both ends are bad."""
    median = np.median(reference)
    return np.abs(values - median) / (1.4826 * np.median(np.abs(reference - median)) + 1e-9)


def ranks(real_scores, scores):
    """{name: u}: u = (1 + how many real scores are smaller) / (n + 1), in (0, 1]; large is bad."""
    return {name: (1 + np.searchsorted(np.sort(real_scores[name]), values)) / (len(real_scores[name]) + 1)
            for name, values in scores.items()}


def calibrate(real_scores, alpha):
    """The threshold on the largest rank that 1 - alpha of unseen real images pass in all their scores together.

    real_scores: name -> (n,) leave-one-out scores of real images, large is bad. The conformal quantile of the
    maximum of the ranks: cutting each of several scores at alpha would refuse too many. Infinite,
    so that everything passes, where n < 1/alpha - 1.
    """
    joint = np.sort(np.max(list(ranks(real_scores, real_scores).values()), axis=0))
    k = int(np.ceil((1 - alpha) * (len(joint) + 1) - 1e-9))
    return float(joint[k - 1]) if k <= len(joint) else float("inf")


def judge(real_scores, scores, threshold):
    """(passes, worst): bool (N,) and, for each image, the name of the score that ranks worst among the real ones."""
    u = ranks(real_scores, scores)
    stacked = np.stack(list(u.values()))  # (scores, N)
    return stacked.max(0) <= threshold, [list(u)[n] for n in stacked.argmax(0)]


# ---------------------------------------------------------------- the page that train, evaluate and filter share

STYLE = """:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--paper:#fff;--mark:#0b62c4;
--two:#c2410c;--three:#15803d;--four:#7e22ce}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--line:#343b43;--paper:#0e1116;--mark:#6cb0ff;
--two:#fb923c;--three:#4ade80;--four:#c084fc}}
*{box-sizing:border-box}body{margin:0 auto;max-width:64rem;padding:1.2rem;font:16px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--paper)}h1{font-size:1.5rem;line-height:1.2}h2{font-size:1.15rem;margin-top:2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .45rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
.verdict{border-left:.3rem solid var(--mark);padding:.1rem 0 .1rem .9rem;font-size:1.05rem}.soft{color:var(--soft)}
.grid{display:flex;flex-wrap:wrap;gap:.3rem}.grid img{width:6rem;height:6rem;object-fit:cover;border-radius:.2rem}
figure{display:inline-block;margin:0 .6rem .8rem 0}figure .grid{flex-wrap:nowrap}figcaption{font-size:.8rem;
color:var(--soft);max-width:12.3rem;overflow-wrap:anywhere}svg{max-width:100%;height:auto}
@media print{body{max-width:none}.wide{overflow:visible}table{font-size:.6rem}h2,figure,tr{break-inside:avoid}}"""


def page(title, body):
    """One self-contained HTML file as text: `body` is HTML whose texts went through html.escape."""
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
            f"<style>{STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n")


def table(header, rows):
    """An HTML table; every cell is escaped."""
    lines = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
             for tag, cells in [("th", header)] + [("td", row) for row in rows]]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>\n"


def thumbnail(image, size=96):
    """A PIL image, or uint8 pixels (3, H, W), as a small JPEG in an <img> element."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
    image, buffer = image.convert("RGB"), io.BytesIO()
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def curve(series, x_label="", y_label="", width=640, height=260):
    """An inline SVG line chart; series: name -> list of (x, y). Points that are not finite are left out."""
    series = {name: [p for p in points if np.isfinite(p).all()] for name, points in series.items()}
    every = np.array([point for points in series.values() for point in points], float).reshape(-1, 2)
    if not len(every):
        return '<p class="soft">nothing to draw yet</p>\n'
    low, high = every.min(0), every.max(0)
    span = np.where(high > low, high - low, np.maximum(np.abs(low), 1e-12))
    box = np.array([width - 100, height - 68])

    def place(point):
        x, y = (np.asarray(point, float) - low) / span * box
        return f"{70 + x:.1f},{height - 40 - y:.1f}"
    parts = [f'<path d="M70 20V{height - 40}H{width - 15}" fill="none" stroke="var(--line)"/>']
    for share in (0, 0.5, 1):
        x, y = low + share * span
        parts.append(f'<text x="{70 + share * box[0]:.0f}" y="{height - 22}" text-anchor="middle">{x:.4g}</text>'
                     f'<text x="64" y="{height - 36 - share * box[1]:.0f}" text-anchor="end">{y:.4g}</text>')
    for n, (name, points) in enumerate(series.items()):
        colour = f"var(--{('mark', 'two', 'three', 'four')[n % 4]})"
        line = " ".join(map(place, points[:1] + points))  # twice the first: one point alone is a dot
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" '
                     'stroke-linecap="round"/>'
                     f'<text x="{80 + 140 * n}" y="12" fill="{colour}">{html.escape(name)}</text>')
    parts.append(f'<text x="{70 + box[0] / 2}" y="{height - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
                 f'<text x="0" y="12">{html.escape(y_label)}</text>')
    return (f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-size="12" '
            f'fill="var(--soft)">{"".join(parts)}</svg>\n')
