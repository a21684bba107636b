"""Images of every kind become upright 8-bit RGB, or a BadImage that says why."""

import importlib.util
import io
import struct
import sys
import zlib

import numpy as np
import PIL.features
import pytest
from PIL import Image

import metrics
from metrics import WINDOWS, BadImage, read_image

RAMP = np.tile(np.arange(0, 4096, 32, dtype=np.uint16), (64, 1))  # (64, 128), 12 bits
dicom = pytest.mark.skipif(
    importlib.util.find_spec("pydicom") is None, reason="pydicom is not installed"
)
nifti = pytest.mark.skipif(
    importlib.util.find_spec("nibabel") is None, reason="nibabel is not installed"
)


def values(path, **how):
    image = read_image(path, **how)
    assert image.mode == "RGB"
    return np.asarray(image)[:, :, 0].astype(int)


# ---------------------------------------------------------------- rasters


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp", "a.gif", "png in a.jpg"]
)
def test_common_formats_are_read_by_content(tmp_path, name):
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / name, "PNG" if " " in name else None)
    found = np.asarray(read_image(tmp_path / name))
    assert found.shape == (30, 40, 3) and np.abs(found.astype(int) - (200, 100, 50)).max() < 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBA", "LA"])
def test_every_colour_mode_keeps_its_picture(tmp_path, mode):
    picture = Image.new("RGB", (20, 20), "black")
    picture.paste("white", (0, 0, 10, 20))
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    picture.convert(mode).save(path)
    found = values(path)
    assert found[:, :8].min() > 240 and found[:, 12:].max() < 15


def test_transparent_pixels_are_black(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    clear.putpixel((0, 0), (255, 255, 255, 255))
    clear.save(tmp_path / "a.png")
    indexed = Image.new("P", (8, 8), 1)
    indexed.putpalette([255] * 6)
    indexed.putpixel((0, 0), 0)
    indexed.save(tmp_path / "p.png", transparency=1)
    for name in ("a.png", "p.png"):
        found = values(tmp_path / name)
        assert found[0, 0] == 255 and found.sum() == 255


def test_tiffs_that_store_white_as_zero_are_inverted(tmp_path):
    ramp = np.tile(np.arange(0, 60000, 1000, dtype=np.uint16), (8, 1))
    Image.fromarray(ramp).save(tmp_path / "white.tif", tiffinfo={262: 0})

    row = values(tmp_path / "white.tif")[0]

    assert (row == 255 - np.round(ramp[0] / 59000 * 255)).all()


def test_tiffs_that_lie_on_their_side_are_turned_upright(tmp_path):
    lying = Image.fromarray(np.array([[0, 40, 80], [120, 160, 200]], np.uint16) * 256)
    lying.save(tmp_path / "lying.tif", tiffinfo={274: 6})
    assert values(tmp_path / "lying.tif", value_range=(0, 65280)).tolist() == [
        [120, 0],
        [160, 40],
        [200, 80],
    ]


def test_a_photo_is_turned_upright(tmp_path):
    photo, exif = Image.new("RGB", (40, 20)), Image.Exif()
    photo.paste("white", (0, 0, 10, 20))  # the left edge, which orientation 6 puts on top
    exif[0x0112] = 6
    photo.save(tmp_path / "a.png", exif=exif)
    found = values(tmp_path / "a.png")
    assert found.shape == (40, 20) and found[:8].min() == 255 and found[12:].max() == 0


def test_sixteen_bits_are_scaled_by_the_images_range_or_the_one_given(tmp_path):
    for name in ("a.png", "a.tif"):
        Image.fromarray(RAMP).save(tmp_path / name)
        found = values(tmp_path / name)
        assert found[0, 0] == 0 and found[0, -1] == 255 and (np.diff(found[0]) > 0).all()
        found = values(tmp_path / name, value_range=(0, 8190))
        assert found[0, -1] == round(4064 / 8190 * 255)
    Image.fromarray((RAMP / 4064 - 0.5).astype(np.float32)).save(tmp_path / "f.tif")
    assert values(tmp_path / "f.tif")[0, [0, -1]].tolist() == [0, 255]
    Image.fromarray(np.full((4, 4), 120, np.uint8)).save(tmp_path / "flat.png")
    assert (
        values(tmp_path / "flat.png", value_range=(0, 4095)) == 120
    ).all()  # 8 bits are never rescaled


def test_the_first_frame_of_an_animation_or_of_pages_is_read(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black", "red")]
    for name in ("a.gif", "a.tif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert values(tmp_path / name).min() > 250


def png_claiming(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in (chunk, b"IDAT" + zlib.compress(b"\0" * 99))
    )


def test_damaged_and_foreign_files_say_why_in_one_line(tmp_path):
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)).save(
        tmp_path / "whole.png"
    )
    whole = (tmp_path / "whole.png").read_bytes()
    Image.open(tmp_path / "whole.png").save(tmp_path / "whole.jpg")
    place = len(whole) - 3000
    cases = {
        "empty.png": (b"", "is empty, or not an image"),
        "text.png": (b"hello " * 99, "or not an image"),
        "half.png": (whole[: len(whole) // 2], "is damaged"),
        "note.pdf": (b"%PDF-1.4\n%stub\n", "or not an image"),
        "bad_crc.png": (
            whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
            "is damaged",
        ),
        "bad_sum.png": (
            whole[:-13] + bytes([whole[-13] ^ 1]) + whole[-12:],
            "is damaged",
        ),  # of the last pixels
        "half.jpg": ((tmp_path / "whole.jpg").read_bytes()[:900], "is damaged"),
        "bomb.png": (png_claiming(60000, 60000), "DecompressionBombError"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }
    for name, (content, why) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage) as error:
            read_image(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert why in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "folder.jpg").mkdir()
    for name, why in (("folder.jpg", "Is a directory"), ("missing.png", "No such file")):
        with pytest.raises(BadImage, match=why):
            read_image(tmp_path / name)


def write_deep_png(path, channels):
    """A PNG of 16-bit values (H, W, 1 to 4)."""
    height, width, count = channels.shape
    rows = [b"\0" + row.astype(">u2").tobytes() for row in channels]
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + checksum
    path.write_bytes(content)


def write_deep_tiff(path, channels, order="<", compress=False, **tags):
    """A TIFF of 16-bit values (H, W, 1 to 4), of one strip; tags: {"t274": 6}."""
    height, width, count = channels.shape
    data = channels.astype(order + "u2").tobytes()
    if compress:
        data = zlib.compress(data)
    values = {
        256: [width],
        257: [height],
        258: [16] * count,
        259: [8 if compress else 1],
        262: [2 if count > 2 else 1],
        273: [8],
        277: [count],
        278: [height],
        279: [len(data)],
        284: [1],
    }
    if count in (2, 4):
        values[338] = [2]
    values |= {int(name[1:]): [value] for name, value in tags.items()}
    start = 8 + len(data)
    extra = b""
    entries = b""
    place = start + 2 + 12 * len(values) + 4
    for tag, numbers in sorted(values.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            extra += packed
            packed = struct.pack(order + "I", place + len(extra) - len(packed))
        entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    directory = struct.pack(order + "H", len(values)) + entries + bytes(4)
    path.write_bytes(head + data + directory + extra)


def deep_ramp(count, top):
    """16-bit values (8, 64, count) from 0 to top; colours get darker, the opacity is full."""
    ramp = np.tile(np.linspace(0, top, 64).astype(np.uint16), (8, 1))
    channels = [ramp]
    if count > 2:
        channels += [ramp // 2, ramp // 4]
    if count in (2, 4):
        channels.append(np.full_like(ramp, 65535))
    return np.stack(channels, -1)


@pytest.mark.parametrize("top", [4095, 65535])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pngs_of_16_bits_are_scaled_like_grey_ones_in_any_number_of_channels(tmp_path, count, top):
    write_deep_png(tmp_path / "a.png", deep_ramp(count, top))

    own = np.asarray(read_image(tmp_path / "a.png"))
    ranged = np.asarray(read_image(tmp_path / "a.png", value_range=(0, 2 * top)))

    brightest = [255, 127, 64] if count > 2 else [255, 255, 255]
    assert np.abs(own[0, -1].astype(int) - brightest).max() <= 1
    assert own[0, 0].max() == 0
    assert np.abs(ranged.astype(int) - own / 2).max() <= 1


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_tiffs_of_16_bits_are_read_as_pngs_are(tmp_path, count, order, compress):
    ramp = deep_ramp(count, 3000)
    write_deep_png(tmp_path / "a.png", ramp)
    write_deep_tiff(tmp_path / "a.tif", ramp, order, compress)

    found = np.asarray(read_image(tmp_path / "a.tif"))

    assert (found == np.asarray(read_image(tmp_path / "a.png"))).all()


def test_deep_colours_in_planes_are_refused_with_what_to_do(tmp_path):
    write_deep_tiff(tmp_path / "a.tif", deep_ramp(3, 3000), compress=True, t284=2)
    with pytest.raises(
        BadImage, match="in planes or multiplied by opacity: save it as a 16-bit PNG"
    ):
        read_image(tmp_path / "a.tif")


def test_deep_colours_are_turned_upright(tmp_path):
    ramp = deep_ramp(3, 65535)
    write_deep_tiff(tmp_path / "a.tif", ramp, t274=6)
    found = np.asarray(read_image(tmp_path / "a.tif"))
    assert found.shape == (64, 8, 3)
    assert found[0].max() == 0
    assert found[-1, :, 0].min() == 255


def test_deep_transparent_pixels_are_black_and_the_largest_opacity_is_full(tmp_path):
    for count in (2, 4):
        clear = deep_ramp(count, 4095)
        clear[..., -1] = 4095  # of 12 bits as well
        clear[:4, :, -1] = 0
        write_deep_png(tmp_path / "a.png", clear)
        found = np.asarray(read_image(tmp_path / "a.png"))
        assert found[:4].max() == 0
        assert found[4:, -1, 0].min() == 255


@pytest.mark.skipif(not PIL.features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path):
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "a.avif")
    found = np.asarray(read_image(tmp_path / "a.avif")).astype(int)
    assert np.abs(found - (200, 100, 50)).max() < 8


@pytest.mark.skipif("HEIF" in metrics.FORMATS, reason="the package is installed")
def test_heic_needs_a_package_that_is_named(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.raises(BadImage, match="pip install pillow-heif"):
        read_image(tmp_path / "a.HEIC")


# ---------------------------------------------------------------- DICOM and volumes


def write_dicom(path, pixels, photometric="MONOCHROME2", **tags):
    from pydicom.dataset import Dataset, FileMetaDataset

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    data.PatientName, data.PatientID = "Doe^Jane", "secret"
    frames = pixels.shape[0] if pixels.ndim == 3 else 1
    if frames > 1:
        data.NumberOfFrames = frames
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, photometric
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)


@dicom
def test_a_dicom_is_rescaled_before_it_is_windowed(tmp_path):
    stored = np.tile(np.arange(0, 3000, 100, dtype=np.int16), (20, 1))
    write_dicom(
        tmp_path / "ct.png",
        stored,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=40,
        WindowWidth=400,
    )
    expected = np.clip((stored[0] - 1024 - 39.5) / 399 + 0.5, 0, 1) * 255  # DICOM PS3.3 C.11.2.1.2
    assert np.abs(values(tmp_path / "ct.png")[0] - expected).max() <= 1
    expected = np.clip((stored[0] - 1024 + 600.5) / 1499 + 0.5, 0, 1) * 255
    assert np.abs(values(tmp_path / "ct.png", window=(-600, 1500))[0] - expected).max() <= 1


@dicom
def test_the_files_own_function_of_its_window_is_used(tmp_path):
    stored = np.tile(np.arange(40, 60, dtype=np.uint16), (20, 1))
    x = stored[0].astype(float)
    for function, expected in (
        ("LINEAR", (x - 49.5) / 9 + 0.5),
        ("LINEAR_EXACT", (x - 50) / 10 + 0.5),
        ("SIGMOID", 1 / (1 + np.exp(-4 * (x - 50) / 10))),
    ):  # DICOM PS3.3 C.11.2.1
        write_dicom(
            tmp_path / function, stored, WindowCenter=50, WindowWidth=10, VOILUTFunction=function
        )
        assert np.abs(values(tmp_path / function)[0] - 255 * expected.clip(0, 1)).max() <= 1


@dicom
def test_monochrome1_is_inverted_once_and_without_a_window_the_percentiles_decide(tmp_path):
    write_dicom(tmp_path / "two", RAMP)
    write_dicom(tmp_path / "one", RAMP, photometric="MONOCHROME1")
    two, one = values(tmp_path / "two"), values(tmp_path / "one")
    assert two[0, 0] == 0 and two[0, -1] == 255 and (one == 255 - two).all()


@dicom
def test_oblong_pixels_become_square_and_frames_are_picked_by_number(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP, PixelSpacing=[2.0, 1.0])
    assert read_image(tmp_path / "a.dcm").size == (128, 128)
    frames = np.stack([np.full((8, 8), level, np.uint8) for level in (10, 20, 30)])
    write_dicom(tmp_path / "b.dcm", frames, WindowCenter=128, WindowWidth=256)
    assert [values(tmp_path / "b.dcm", slice=n)[0, 0] for n in (0, None, 2)] == [10, 20, 30]
    with pytest.raises(BadImage, match="b.dcm"):
        read_image(tmp_path / "b.dcm", slice=3)


@dicom
def test_no_name_of_a_patient_is_in_a_message(tmp_path, capsys, recwarn, monkeypatch):
    write_dicom(tmp_path / "a.dcm", RAMP)
    whole = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(whole[:-500])
    with pytest.raises(BadImage) as error:
        read_image(tmp_path / "a.dcm")
    said = (
        str(error.value) + "".join(capsys.readouterr()) + "".join(str(w.message) for w in recwarn)
    )
    assert "Doe" not in said and "secret" not in said
    monkeypatch.setattr(metrics, "dicom_frame", lambda *_: int("Doe^Jane"))
    with pytest.raises(BadImage, match=r"is damaged \(ValueError\)$"):
        read_image(tmp_path / "a.dcm")


@dicom
def test_files_with_blank_or_odd_tags_are_read(tmp_path):
    from pydicom.dataset import Dataset

    plain = dict(WindowCenter=2048, WindowWidth=4096)
    write_dicom(tmp_path / "plain", RAMP, **plain)
    usual = values(tmp_path / "plain")
    for n, odd in enumerate(
        (
            dict(RescaleSlope=None, RescaleIntercept=None, **plain),
            dict(PixelSpacing=[1.0], **plain),
            dict(WindowCenter=2048, WindowWidth=4096, PixelAspectRatio=None),
        )
    ):
        write_dicom(tmp_path / str(n), RAMP, **odd)
        assert (values(tmp_path / str(n)) == usual).all()
    write_dicom(tmp_path / "none", RAMP)
    for name, odd in (
        ("zero", dict(WindowCenter=100, WindowWidth=0)),
        ("half", dict(WindowCenter=100)),
    ):
        write_dicom(tmp_path / name, RAMP, **odd)
        assert (values(tmp_path / name) == values(tmp_path / "none")).all()
    write_dicom(tmp_path / "centred", RAMP.astype(np.int16) - 2048, WindowCenter=0, WindowWidth=400)
    assert (
        abs(values(tmp_path / "centred")[0, 64] - 128) <= 1
        and not values(tmp_path / "centred")[:, :50].any()
    )
    write_dicom(tmp_path / "ct", RAMP, Modality="CT", RescaleSlope=1, RescaleIntercept=None)
    with pytest.raises(BadImage, match="Hounsfield"):
        read_image(tmp_path / "ct", window="lung")
    table = Dataset()
    table.LUTDescriptor, table.LUTData = (
        [4096, 0, 8],
        (np.arange(4096) // 16).astype("<u2").tobytes(),
    )
    write_dicom(tmp_path / "lut", RAMP, VOILUTSequence=[table])
    assert (
        np.abs(values(tmp_path / "lut")[0] - RAMP[0] // 16).max() <= 1
    )  # 8 bits: pydicom's own way wraps
    signed = RAMP.astype(np.int16) - 2000
    signed[:, :9] = -2000
    write_dicom(tmp_path / "signed", signed, PixelPaddingValue=-2000)
    padded = metrics.open_dicom(tmp_path / "signed")
    padded.add_new("PixelPaddingValue", "US", 63536)  # the same as an unsigned number
    padded.save_as(tmp_path / "padded")
    assert (values(tmp_path / "padded") == values(tmp_path / "signed")).all() and not values(
        tmp_path / "padded"
    )[:, :9].any()


@dicom
def test_files_that_scanners_name_by_numbers_are_found(tmp_path):
    for name in ("1.2.840.113619.2", "MR.1.3.12.2", "x.IMA", "IM0001"):
        write_dicom(tmp_path / name, RAMP)
    (tmp_path / "notes.2024").write_text("no image")
    assert len(metrics.list_images(str(tmp_path))) == 4


@dicom
def test_windows_have_names_that_only_cts_obey(tmp_path, capsys):
    stored = np.tile(np.arange(0, 3000, 100, dtype=np.int16), (20, 1))
    for name, modality in (("ct", "CT"), ("mr", "MR")):
        write_dicom(
            tmp_path / name, stored, Modality=modality, RescaleSlope=1, RescaleIntercept=-1024
        )
    lung = values(tmp_path / "ct", window=(-600, 1500))
    assert (values(tmp_path / "ct", window="lung") == lung).all() and WINDOWS["lung"] == (
        -600,
        1500,
    )
    assert (values(tmp_path / "ct", window="-600,1500") == lung).all()
    assert (values(tmp_path / "mr", window="lung") == values(tmp_path / "mr")).all()
    assert (values(tmp_path / "mr", window="-600,1500") == lung).all()
    for wrong in ("lungs", "40", "40,0", "a,b"):
        with pytest.raises(SystemExit):
            read_image(tmp_path / "ct", window=wrong)
        assert f"--window {wrong}: give centre,width" in capsys.readouterr().err


@dicom
def test_a_ct_without_rescale_takes_no_window(tmp_path):
    write_dicom(tmp_path / "a", RAMP, Modality="CT")
    assert values(tmp_path / "a").max() == 255
    with pytest.raises(BadImage, match="not in Hounsfield units"):
        read_image(tmp_path / "a", window="soft")


@dicom
def test_burnt_in_text_is_refused_unless_allowed(tmp_path):
    write_dicom(tmp_path / "a", RAMP, BurnedInAnnotation="YES")
    with pytest.raises(BadImage, match="--allow-burned-in"):
        read_image(tmp_path / "a")
    assert read_image(tmp_path / "a", allow_burned_in=True).size == (128, 64)


@dicom
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_counts_for_nothing(tmp_path, photometric):
    padded = RAMP.copy()
    padded[:8] = 60000
    write_dicom(
        tmp_path / "a",
        padded,
        photometric,
        PixelPaddingValue=60000,
        RescaleSlope=2,
        RescaleIntercept=-5,
    )
    write_dicom(tmp_path / "b", RAMP, photometric)
    assert values(tmp_path / "a")[:8].max() == 0
    assert np.abs(values(tmp_path / "a")[8:] - values(tmp_path / "b")[8:]).max() <= 1


@dicom
def test_frames_without_a_window_share_one_range(tmp_path):
    frames = np.stack([np.full((16, 16), level, np.uint16) for level in (100, 200, 300)])
    frames[:, 0] = 9999
    write_dicom(tmp_path / "a", frames, PixelPaddingValue=9999)
    assert [values(tmp_path / "a", slice=n)[9, 0] for n in range(3)] == [0, 128, 255]
    assert [values(tmp_path / "a", slice=n, value_range=(0, 510))[9, 0] for n in range(3)] == [
        50,
        100,
        150,
    ]


@dicom
@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "examples_overlay.dcm",
    ],
)
def test_dicoms_read_as_pydicom_itself_reads_them(name):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("not among the files that come with pydicom")
    data = pydicom.dcmread(path)
    shown = apply_modality_lut(data.pixel_array, data).astype(float)
    low, high = np.percentile(shown, (0.5, 99.5))
    if "VOILUTSequence" in data or "WindowCenter" in data:
        shown = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data).astype(float)
        low, high = (
            0,
            2 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1 if "VOILUTSequence" in data else 0,
        )
        if not high:  # pydicom spreads a window over what the stored bits can hold
            slope, intercept = (
                float(data.get("RescaleSlope", 1)),
                float(data.get("RescaleIntercept", 0)),
            )
            least = -(2 ** (data.BitsStored - 1)) if data.PixelRepresentation else 0
            low, high = (slope * end + intercept for end in (least, least + 2**data.BitsStored - 1))
    expected = np.clip((shown - low) / (high - low), 0, 1) * 255
    assert np.abs(values(path) - expected).max() <= 1


@pytest.mark.parametrize("name, package", [("a", "pydicom"), ("a.nii", "nibabel")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 300)
    with pytest.raises(BadImage, match=f"needs the package {package}: pip install {package}"):
        read_image(tmp_path / name)


@nifti
def test_a_volume_gives_its_middle_slice_with_anterior_up(tmp_path):
    import nibabel

    volume = np.zeros((10, 12, 5, 2), np.int16)  # right, anterior, superior, time
    volume[:, :, 2, 0] = 100
    volume[8:, 10:, :, 0] = 1000  # right and anterior
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 3, 1.0])), tmp_path / "a.nii.gz")
    flipped = nibabel.Nifti1Image(volume[::-1], np.diag([-1, 1, 3, 1.0]))
    nibabel.save(flipped, tmp_path / "b.nii")
    for name in ("a.nii.gz", "b.nii"):
        found = values(tmp_path / name)
        assert found.shape == (12, 10) and (found[:2, 8:] == 255).all() and 20 < found[-1, 0] < 30
        assert values(tmp_path / name, slice=0)[-1, 0] == 0


@nifti
def test_volumes_of_both_kinds_are_scaled_as_a_whole(tmp_path):
    import nibabel

    volume = np.random.RandomState(0).rand(6, 8, 10).astype(np.float32)
    volume[4:, 6:, 7:] = 3  # right, anterior, superior: the upper right corner of a high slice
    for name, save in (("a.nii", nibabel.Nifti1Image), ("a.mgz", nibabel.MGHImage)):
        nibabel.save(save(volume, np.eye(4)), tmp_path / name)
        high = values(tmp_path / name, slice=8)
        assert high.shape == (8, 6)
        assert (high[:2, -2:] == 255).all()
        assert high[4:].max() < 100
        assert values(tmp_path / name, slice=2).max() < 100
        with pytest.raises(BadImage, match=name):
            read_image(tmp_path / name, slice=10)


@nifti
def test_volumes_read_as_nibabel_itself_turns_them():
    import nibabel.testing

    for name in (
        "anatomical.nii",
        "functional.nii",
        "reoriented_anat_moved.nii",
        "example4d.nii.gz",
        "example_nifti2.nii.gz",
        "test.mgz",
    ):
        path = f"{nibabel.testing.data_path}/{name}"
        volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
        volume = volume[..., 0] if volume.ndim > 3 else volume
        low, high = np.percentile(volume, 1), np.percentile(volume[volume > volume.mean()], 99)
        expected = (
            np.clip((np.rot90(volume[:, :, volume.shape[2] // 2]) - low) / (high - low), 0, 1) * 255
        )
        found = values(path)
        assert found.shape == expected.shape and np.abs(found - expected).max() <= 1, name


@nifti
@pytest.mark.parametrize("kind", ["vector", "rgb24", "vectors of several times"])
def test_colours_of_a_volume_are_colours(tmp_path, kind):
    import nibabel

    colours = np.zeros((6, 8, 4, 1, 3), np.uint8)  # right, anterior, superior, time, colour
    colours[..., 0] = 200
    colours[3:, ..., 1] = 100
    if kind == "rgb24":
        fields = [("R", "u1"), ("G", "u1"), ("B", "u1")]
        colours = np.ascontiguousarray(colours[:, :, :, 0]).view(fields)[..., 0]
    if kind == "vectors of several times":
        colours = np.concatenate([colours, colours // 2], 3)
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), tmp_path / "a.nii.gz")

    found = np.asarray(read_image(tmp_path / "a.nii.gz"))

    assert found.shape == (8, 6, 3)
    assert found[0, 0].tolist() == [200, 0, 0]
    assert found[0, -1].tolist() == [200, 100, 0]


@nifti
def test_a_vector_of_floats_is_scaled_by_the_range(tmp_path):
    import nibabel

    vectors = np.zeros((6, 8, 4, 1, 3), np.float32)
    vectors[..., 1] = 0.5
    nibabel.save(nibabel.Nifti1Image(vectors, np.eye(4)), tmp_path / "a.nii")
    found = np.asarray(read_image(tmp_path / "a.nii", value_range=(0, 1)))
    assert found[0, 0].tolist() == [0, 128, 0]


@nifti
def test_the_first_of_several_channels_is_read_and_that_is_said_once(tmp_path, capsys):
    import nibabel

    for name in ("a.nii", "b.nii"):
        channels = np.random.RandomState(0).rand(6, 8, 4, 4).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(channels, np.eye(4)), tmp_path / name)
    nibabel.save(nibabel.Nifti1Image(channels[..., 0], np.eye(4)), tmp_path / "first.nii")

    metrics.load_pixels(metrics.list_images(str(tmp_path)), 16)

    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("2 of 3 images, such as a.nii: the file has 4 volumes")
    assert (values(tmp_path / "a.nii") == values(tmp_path / "first.nii")).all()


def frame_tags(**tags):
    """The item of a functional group that gives a frame its rescale or window."""
    from pydicom.dataset import Dataset

    inner = Dataset()
    for name, value in tags.items():
        setattr(inner, name, value)
    group = Dataset()
    kind = "FrameVOILUT" if "WindowCenter" in tags else "PixelValueTransformation"
    setattr(group, f"{kind}Sequence", [inner] if tags else [])
    return group


@dicom
def test_a_frame_of_an_enhanced_file_has_its_own_tags_alone(tmp_path):
    frames = np.stack([RAMP, RAMP, RAMP])
    rescale = frame_tags(RescaleSlope=0.1, RescaleIntercept=0)
    write_dicom(
        tmp_path / "first",
        frames,
        PerFrameFunctionalGroupsSequence=[rescale, frame_tags(), frame_tags()],
    )
    window = frame_tags(WindowCenter=100, WindowWidth=50)
    write_dicom(
        tmp_path / "window",
        frames,
        PerFrameFunctionalGroupsSequence=[frame_tags(), window, frame_tags()],
    )

    middle = values(tmp_path / "first")[0]

    low, high = np.percentile([RAMP * 0.1, RAMP, RAMP], (0.5, 99.5))
    assert np.abs(middle - 255 * ((RAMP[0] - low) / (high - low)).clip(0, 1)).max() <= 1
    assert (values(tmp_path / "window", slice=0) == values(tmp_path / "window", slice=2)).all()
    assert values(tmp_path / "window", slice=1)[0, 10] == 255
    assert values(tmp_path / "window", slice=2)[0, 10] < 40


def write_compressed(path, pixels, stream, syntax, **tags):
    """A DICOM file of pixels (H, W) or (H, W, 3) that a codec has encoded as `stream`."""
    import pydicom
    from pydicom.encaps import encapsulate

    write_dicom(path, np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 else pixels))
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = syntax
    if pixels.ndim == 3:
        data.SamplesPerPixel = 3
        data.PlanarConfiguration = 0
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = encapsulate([stream])
    data["PixelData"].is_undefined_length = True
    data.save_as(path)


@dicom
@pytest.mark.parametrize("codec", ["none", "JPEG 2000"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_bits_above_those_stored_are_no_values(tmp_path, codec, dtype):
    ramp = RAMP // 2  # of 11 bits, so positive with a sign, too
    covered = ramp | 0x8000  # an overlay
    plain = dict(WindowCenter=1024, WindowWidth=2048)
    stored = dict(BitsStored=12, HighBit=11, PixelRepresentation=int(dtype == np.int16), **plain)
    write_dicom(tmp_path / "plain", ramp, **plain)
    if codec == "none":
        write_dicom(tmp_path / "covered", covered, **stored)
    else:
        stream = io.BytesIO()
        Image.fromarray(covered).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
        syntax = "1.2.840.10008.1.2.4.90"
        write_compressed(tmp_path / "covered", covered, stream.getvalue(), syntax, **stored)

    assert (values(tmp_path / "covered") == values(tmp_path / "plain")).all()


PATCHES = np.zeros((32, 48, 3), np.uint8)
PATCHES[:, :16] = (200, 60, 40)
PATCHES[:, 16:32] = (20, 200, 60)
PATCHES[:, 32:] = (30, 40, 220)


def jpeg_stream(markers, **how):
    """PATCHES as a JPEG stream with JFIF's, Adobe's or no marker."""
    file = io.BytesIO()
    Image.fromarray(PATCHES).save(file, "JPEG", quality=95, **how)
    whole = file.getvalue()
    place = 2
    while 0xE0 <= whole[place + 1] <= 0xEF:
        place += 2 + int.from_bytes(whole[place + 2 : place + 4], "big")
    start = whole[:2]
    if markers == "JFIF":
        start = whole[:place]
    if markers == "Adobe":
        start += b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([0 if how.get("keep_rgb") else 1])
    return start + whole[place:]


@dicom
@pytest.mark.parametrize("label", ["RGB", "YBR_FULL_422"])
@pytest.mark.parametrize("markers", ["none", "JFIF", "Adobe"])
@pytest.mark.parametrize(
    "how", [dict(subsampling=0), dict(subsampling=2), dict(keep_rgb=True)], ids=str
)
def test_colours_of_a_jpeg_are_those_of_its_stream(tmp_path, capsys, how, markers, label):
    if "keep_rgb" in how and markers == "JFIF":
        pytest.skip("JFIF has no RGB")
    stream = jpeg_stream(markers, **how)
    path = tmp_path / "a.dcm"
    syntax = "1.2.840.10008.1.2.4.50"
    write_compressed(path, PATCHES, stream, syntax, PhotometricInterpretation=label)

    found = np.asarray(read_image(path)).astype(int)

    assert np.abs(found - PATCHES).mean() < 4
    metrics.load_pixels(metrics.list_images(str(tmp_path)), 16)
    disagrees = ("keep_rgb" in how) == (label != "RGB")
    assert ("other colours than the header" in capsys.readouterr().err) == disagrees


@dicom
def test_a_stream_that_does_not_say_its_colours_has_those_of_the_header(tmp_path):
    stream = bytearray(jpeg_stream("none", keep_rgb=True))
    for name, number in zip(b"RGB", (1, 2, 3), strict=True):  # in the frame's and the scan's header
        for place in (stream.index(b"\xff\xc0"), stream.index(b"\xff\xda")):
            stream[stream.index(name, place)] = number
    path = tmp_path / "a.dcm"
    syntax = "1.2.840.10008.1.2.4.50"
    write_compressed(path, PATCHES, bytes(stream), syntax, PhotometricInterpretation="RGB")
    assert np.abs(np.asarray(read_image(path)).astype(int) - PATCHES).mean() < 4


# ---------------------------------------------------------------- files that are broken in any way


@pytest.mark.filterwarnings("ignore")
def test_whatever_is_in_a_file_it_is_an_image_or_a_bad_image(tmp_path, capfd):
    for name in ("a.png", "a.jpg", "a.gif", "a.tif", "a.bmp", "a.webp"):
        Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / name)
    if importlib.util.find_spec("pydicom"):
        write_dicom(tmp_path / "a.dcm", np.stack([RAMP, RAMP]), WindowCenter=40, WindowWidth=400)
    if importlib.util.find_spec("nibabel"):
        import nibabel

        nibabel.save(
            nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "a.nii.gz"
        )
    draw, read = np.random.RandomState(0), 0
    for path in sorted(tmp_path.iterdir()):
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for n in range(16):
            broken = whole.copy()
            broken[draw.randint(0, min(len(whole), 400 if n % 2 else len(whole)), 1 + n // 4)] = (
                draw.randint(256)
            )
            path.write_bytes(broken[: draw.randint(len(whole)) if n % 5 == 0 else None].tobytes())
            try:
                read += read_image(path).mode == "RGB"
            except BadImage as error:
                assert "\n" not in str(error)
    assert read > 10 and capfd.readouterr() == ("", "")
