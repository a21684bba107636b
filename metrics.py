"""From image files to numbers: reading, listing, features, distances, calibration, and the page that shows them.

Everything above imports from here; this file imports none of ours. Files, pixels or features go in; pixels, features,
numbers or HTML come out: no prompts, schedulers or optimizers. In this order:
    errors, files, seeds   fail, replacing, need, generator, guarded, pick_device
    reading and listing    read_image, list_images, split_rows, fit_square, load_pixels
"""
import contextlib
import csv
import gzip
import hashlib
import importlib
import importlib.util
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
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


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
        flags = [f"--{flag.replace('_', '-')}" for flag in ("gradient_checkpointing", "precision") if flag in vars(args)]
        fail(f"the GPU's memory is full: try a smaller --batch-size{''.join(' or ' + flag for flag in flags)}")
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

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb
FORMATS = ("PNG", "JPEG", "JPEG2000", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # never EPS: it runs ghostscript
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm",
                  ".dcm", ".dicom", *VOLUME_SUFFIXES)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # read_image has its own limit


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
        raise BadImage(path, "is empty" if os.path.getsize(path) == 0 else "is not an image") from None
    except Image.DecompressionBombError:
        raise BadImage(path, f"has more than {MAX_PIXELS // 10**6} megapixels") from None
    except MemoryError:
        raise BadImage(path, "does not fit into memory") from None
    except OSError as error:
        raise BadImage(path, error.strerror or "is damaged: " + str(error)) from None
    except Exception as error:  # decoders raise nearly anything on damaged files, with header text in the message
        raise BadImage(path, f"is damaged ({type(error).__name__})") from None


def read_raster(path, value_range):
    """PNG, JPEG, TIFF and the like; the first frame of several; transparency on black."""
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(path, f"has more than {MAX_PIXELS // 10**6} megapixels")
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
    return head[128:] == b"DICM" or head[:4] in (b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00",
                                                 b"\x02\x00\x00\x00")


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
    from pydicom.pixels import apply_color_lut, apply_rescale, apply_voi, get_decoder, pixel_array
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote the header
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pydicom.dcmread(path, force=True)
        if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise BadImage(path, "is a DICOM file without pixels")
        if data.Rows * data.Columns > MAX_PIXELS:
            raise BadImage(path, f"has more than {MAX_PIXELS // 10**6} megapixels")
        if "TransferSyntaxUID" not in data.file_meta:
            implicit = data.original_encoding[0]
            data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1"
        syntax = data.file_meta.TransferSyntaxUID
        if syntax.is_compressed and not get_decoder(syntax).is_available:
            raise BadImage(path, f"DICOM compressed as {syntax.name} needs a codec: "
                                 "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg")
        frame = pick_slice(path, slice, int(data.get("NumberOfFrames") or 1))
        for groups, index in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence"):
                if len(data.get(groups) or ()) > index and data[groups][index].get(name):
                    data.update(data[groups][index][name][0])  # enhanced objects keep these tags per frame
        if syntax == "1.2.840.10008.1.2.4.51":  # some 12-bit encoders end the scan at coefficient 0; it has all 64
            data.PixelData = re.sub(rb"(?s)(\xff\xda\0\x08\x01..\0)\0\0", b"\\1?\0", data.PixelData)
        try:
            values = pixel_array(data, index=frame)
        except RuntimeError:  # every decoder there is gave up
            raise BadImage(path, f"no decoder here reads its {syntax.name}: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg") from None
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
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                fail(f"{path}: line {number} is not JSON")
        if not all(isinstance(row, dict) for row in rows):
            fail(f"{path}: every line must be one JSON object")
    else:
        header = text.split("\n", 1)[0]
        reader = csv.DictReader(text.splitlines(keepends=True), delimiter=max(",;\t", key=header.count))
        rows = []
        try:
            for row in reader:
                if None in row:
                    fail(f"{path}: line {reader.line_num} has more cells than the header: put texts with commas in quotes")
                rows.append(row)
        except csv.Error as error:
            fail(f"{path}: line {reader.line_num}: {error}")
    return [{str(key).strip(): "" if value is None else str(value).strip() for key, value in row.items()} for row in rows]


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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def load_pixels(rows, resolution, crop="center", strict=False):
    """Read the images of `rows`: (the readable rows, uint8 pixels (N, 3, resolution, resolution)).

    Unreadable images are named on stderr and left out; more than 5 % of them, or any where `strict`, ends in fail().
    """
    def load(row):
        try:
            return np.asarray(fit_square(read_image(row["path"]), resolution, crop))
        except BadImage as error:
            return error
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        shown = tqdm(pool.map(load, rows), total=len(rows), desc="reading", unit="image", leave=False,
                     disable=None if len(rows) > 200 else True)
        loaded = list(shown)
    bad = [item for item in loaded if isinstance(item, BadImage)]
    for error in bad:
        print(f"skipped: {error}", file=sys.stderr)
    if bad and (strict or len(bad) > 0.05 * len(rows)):
        fail(f"{len(bad)} of {len(rows)} images cannot be read, the first: {bad[0]}")
    good = [(row, item) for row, item in zip(rows, loaded) if not isinstance(item, BadImage)]
    if not good:
        return [], torch.empty(0, 3, resolution, resolution, dtype=torch.uint8)
    pixels = torch.from_numpy(np.stack([item for _, item in good])).permute(0, 3, 1, 2).contiguous()
    return [row for row, _ in good], pixels
