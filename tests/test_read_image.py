"""Images of every kind become upright 8-bit RGB, or a BadImage that says why; data sets become rows."""
import importlib.util
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from metrics import BadImage, content_hash, fit_square, list_images, load_pixels, read_image, split_rows

RAMP = np.tile(np.arange(0, 4096, 32, dtype=np.uint16), (64, 1))  # (64, 128), 12 bits
dicom = pytest.mark.skipif(importlib.util.find_spec("pydicom") is None, reason="pydicom is not installed")
nifti = pytest.mark.skipif(importlib.util.find_spec("nibabel") is None, reason="nibabel is not installed")


def values(path, **how):
    image = read_image(path, **how)
    assert image.mode == "RGB"
    return np.asarray(image)[:, :, 0].astype(int)


# ---------------------------------------------------------------- rasters


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp", "a.gif", "png in a.jpg"])
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
    assert (values(tmp_path / "flat.png", value_range=(0, 4095)) == 120).all()  # 8 bits are never rescaled


def test_the_first_frame_of_an_animation_or_of_pages_is_read(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black", "red")]
    for name in ("a.gif", "a.tif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert values(tmp_path / name).min() > 250


def png_claiming(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
                                        for part in (chunk, b"IDAT" + zlib.compress(b"\0" * 99)))


def test_damaged_and_foreign_files_say_why_in_one_line(tmp_path):
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    Image.open(tmp_path / "whole.png").save(tmp_path / "whole.jpg")
    place = len(whole) - 3000
    cases = {"empty.png": (b"", "is empty"), "text.png": (b"hello " * 99, "is not an image"),
             "half.png": (whole[:len(whole) // 2], "is damaged"), "note.pdf": (b"%PDF-1.4\n%stub\n", "is not an image"),
             "bad_crc.png": (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:], "is damaged"),
             "half.jpg": ((tmp_path / "whole.jpg").read_bytes()[:900], "is damaged"),
             "bomb.png": (png_claiming(60000, 60000), "178 megapixels"),
             "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image")}
    for name, (content, why) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage) as error:
            read_image(tmp_path / name)
        assert why in error.value.why and str(error.value) == f"{tmp_path / name}: {error.value.why}"
        assert "\n" not in str(error.value)
    (tmp_path / "folder.jpg").mkdir()
    for name, why in (("folder.jpg", "is a folder"), ("missing.png", "No such file")):
        with pytest.raises(BadImage, match=why):
            read_image(tmp_path / name)


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
    write_dicom(tmp_path / "ct.png", stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    expected = np.clip((stored[0] - 1024 - 39.5) / 399 + 0.5, 0, 1) * 255  # DICOM PS3.3 C.11.2.1.2
    assert np.abs(values(tmp_path / "ct.png")[0] - expected).max() <= 1
    expected = np.clip((stored[0] - 1024 + 600.5) / 1499 + 0.5, 0, 1) * 255
    assert np.abs(values(tmp_path / "ct.png", window=(-600, 1500))[0] - expected).max() <= 1


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
    with pytest.raises(BadImage, match="slices 0 to 2"):
        read_image(tmp_path / "b.dcm", slice=3)


@dicom
def test_no_name_of_a_patient_is_in_a_message(tmp_path, capsys, recwarn):
    write_dicom(tmp_path / "a.dcm", RAMP)
    whole = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(whole[:-500])
    with pytest.raises(BadImage) as error:
        read_image(tmp_path / "a.dcm")
    said = str(error.value) + "".join(capsys.readouterr()) + "".join(str(w.message) for w in recwarn)
    assert "Doe" not in said and "secret" not in said


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 99)
    (tmp_path / "a.nii").write_bytes(b"\0" * 400)
    for name, package in (("a", "pip install pydicom"), ("a.nii", "pip install nibabel")):
        with pytest.raises(BadImage, match=package):
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


# ---------------------------------------------------------------- listing


def pictures(folder, *names):
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + n, 8), (n, 0, 0)).save(folder / name)
    return folder


def refused(capsys, *args, **more):
    with pytest.raises(SystemExit) as stop:
        list_images(*args, **more)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_folder_lists_its_images_and_skips_litter(tmp_path):
    pictures(tmp_path, "b.png", "A.JPG", "sub/c.png", ".hidden.png", "._a.jpg", ".cache/d.png")
    for name in ("Thumbs.db", "report.pdf", "notes"):
        (tmp_path / name).write_bytes(b"x" * 200)
    (tmp_path / "dicom_without_suffix").write_bytes(b"\0" * 128 + b"DICM")
    rows = list_images(tmp_path)
    assert [row["file_name"] for row in rows] == ["A.JPG", "b.png", "dicom_without_suffix", "sub/c.png"]
    assert [row["label"] for row in rows] == ["", "", "", "sub"]
    assert rows[1] == dict(path=str(tmp_path / "b.png"), file_name="b.png", caption="", label="", group="", fields={})


def test_a_table_gives_captions_labels_and_groups(tmp_path):
    pictures(tmp_path, "a.png", "d/b.png")
    text = "\ufefffile_name;Text;labels;patient_id\na.png;one;X|Y|Z;p1\nd/b.png;two;X;\n"
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    rows = list_images(tmp_path)
    assert [(r["caption"], r["label"], r["group"]) for r in rows] == [("one", "X|Y|Z", "p1"), ("two", "X", "")]
    assert rows[0]["fields"] == {"file_name": "a.png", "Text": "one", "labels": "X|Y|Z", "patient_id": "p1"}
    rows = list_images(tmp_path / "metadata.csv", prompt="a scan with {labels}, {Text} {{x}}")
    assert [row["caption"] for row in rows] == ["a scan with X, Y and Z, one {x}", "a scan with X, two {x}"]
    rows = list_images(tmp_path, caption_column="patient_id", prompt="{caption}")
    assert rows[0]["caption"] == "p1"


def test_jsonl_and_manifests_are_tables_too(tmp_path):
    one, two = pictures(tmp_path / "one", "a.png"), pictures(tmp_path / "two", "a.png")
    (one / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "hello", "age": 7}\n\n')
    (two / "manifest.csv").write_text("file,prompt,seed\na.png,\"a wound, red\",3\n")
    assert list_images(one)[0]["caption"] == "hello" and list_images(one)[0]["fields"]["age"] == "7"
    assert list_images(two)[0]["caption"] == "a wound, red"


def test_class_folders_give_the_label_field(tmp_path):
    rows = list_images(pictures(tmp_path, "mpox/a.png", "normal/b.png"), prompt="photo of {label} skin")
    assert [row["caption"] for row in rows] == ["photo of mpox skin", "photo of normal skin"]


def test_what_is_wrong_with_a_data_set_is_said_in_one_line(tmp_path, capsys):
    data = pictures(tmp_path / "data", "a.png")
    (tmp_path / "empty").mkdir()
    assert "no such file or folder" in refused(capsys, tmp_path / "nowhere")
    assert "no images" in refused(capsys, tmp_path / "empty")
    assert "no metadata.csv" in refused(capsys, data, label_column="x")
    assert "no field {label}" in refused(capsys, data, prompt="a {label}")
    (data / "metadata.csv").write_text("file_name,text\na.png,x\n")
    said = refused(capsys, data, prompt="a {finding}")
    assert "{finding}" in said and "text, Text, file_name" in said
    assert "columns file_name, text" in refused(capsys, data, caption_column="findings")
    assert "--prompt" in refused(capsys, data, prompt="a {text")
    assert "--prompt" in refused(capsys, data, prompt="{text.__class__}")
    (data / "metadata.csv").write_text("file_name,text\n" + "".join(f"gone{n}.png,x\n" for n in range(7)) + "a.png,x\n")
    said = refused(capsys, data)
    assert "7 of 8 files" in said and "gone4.png" in said and "gone5.png" not in said
    for name in ("../outside.png", ""):
        (data / "metadata.csv").write_text(f"file_name,text\n{name},x\n")
        assert "not inside" in refused(capsys, data)
    (data / "metadata.csv").write_text("name,text\na.png,x\n")
    assert "--image-column" in refused(capsys, data)
    (data / "metadata.csv").write_text("file_name,text\na.png,one, two\n")
    assert "line 2" in refused(capsys, data)
    (data / "bad.jsonl").write_text('{"file_name": "a.png"}\nnot json\n')
    assert "line 2" in refused(capsys, data / "bad.jsonl")
    assert "not a UTF-8 text file" in refused(capsys, data / "a.png")


# ---------------------------------------------------------------- splits and pixels


def test_the_split_keeps_patients_together_and_survives_added_files(tmp_path):
    names = [f"{n}.png" for n in range(60)]
    pictures(tmp_path, *names)
    rows = list_images(tmp_path)
    for n, row in enumerate(rows):
        row["group"] = f"patient {n % 20}" if n < 40 else ""
    split_rows(rows, 0.3, 0.2)
    before = {row["file_name"]: row["split"] for row in rows}
    assert len({(row["group"], row["split"]) for row in rows if row["group"]}) == 20
    assert set(before.values()) == {"train", "val", "test"}
    split_rows(rows[::-1][:30], 0.3, 0.2)
    assert {row["file_name"]: row["split"] for row in rows} == before
    split_rows(rows, 0.0)
    assert {row["split"] for row in rows} == {"train"}


def test_the_share_held_out_is_the_share_asked_for():
    rows = [dict(group=str(n), path="") for n in range(4000)]
    split_rows(rows, 0.15, 0.1)
    shares = {name: sum(row["split"] == name for row in rows) / 4000 for name in ("val", "test")}
    assert shares == pytest.approx({"val": 0.15, "test": 0.1}, abs=0.025)


def test_the_content_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert content_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_picture_is_cropped_to_its_centre_or_padded_with_black():
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste("red", (0, 0, 100, 100))
    centre = np.asarray(fit_square(wide, 50))
    assert centre.shape == (50, 50, 3) and centre[:, 4:].min() == 255
    padded = np.asarray(fit_square(wide, 60, "pad"))
    assert padded.shape == (60, 60, 3) and padded[:18].max() == 0 and padded[30, 30].min() == 255
    for crop in ("center", "pad"):
        assert fit_square(Image.new("RGB", (2000, 3)), 64, crop).size == (64, 64)


def test_unreadable_images_are_named_and_too_many_of_them_stop_the_run(tmp_path, capsys):
    pictures(tmp_path, *[f"{n:02}.png" for n in range(30)])
    (tmp_path / "07.png").write_bytes(b"")
    rows, pixels = load_pixels(list_images(tmp_path), 16)
    assert len(rows) == 29 and pixels.shape == (29, 3, 16, 16) and pixels[7, 0, 8, 8] == 8
    assert capsys.readouterr().err == f"skipped: {tmp_path / '07.png'}: is empty\n"
    with pytest.raises(SystemExit):
        load_pixels(list_images(tmp_path), 16, strict=True)
    (tmp_path / "09.png").write_bytes(b"x")
    with pytest.raises(SystemExit):
        load_pixels(list_images(tmp_path), 16)
    assert "2 of 30 images cannot be read" in capsys.readouterr().err
