"""Data sets of every form become rows, splits and pixels; what is wrong with them is said in one line."""

import importlib.util
import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_read_image import RAMP, dicom, nifti, write_dicom

import metrics
from metrics import (
    content_hash,
    find_disc,
    fit_square,
    generator,
    list_images,
    load_pixels,
    near_duplicates,
    read_image,
    split_rows,
)


def pictures(folder, *names):
    """Pictures of one colour each, all different."""
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
    rows = list_images(tmp_path)
    assert [row["file_name"] for row in rows] == ["A.JPG", "b.png", "sub/c.png"]
    assert [row["label"] for row in rows] == ["", "", "sub"]
    assert rows[1] == dict(
        path=str(tmp_path / "b.png"),
        file_name="b.png",
        caption="",
        label="",
        group="",
        fields={},
        slice=None,
    )


def test_a_table_gives_captions_labels_and_groups(tmp_path):
    pictures(tmp_path, "a.png", "d/b.png")
    text = "\ufefffile_name;Text;labels;patient_id\na.png;one;X|Y|Z;p1\nd/b.png;two;X;\n"
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    rows = list_images(tmp_path)
    assert [(r["caption"], r["label"], r["group"]) for r in rows] == [
        ("one", "X|Y|Z", "p1"),
        ("two", "X", ""),
    ]
    assert rows[0]["fields"] == {
        "file_name": "a.png",
        "Text": "one",
        "labels": "X|Y|Z",
        "patient_id": "p1",
    }
    rows = list_images(tmp_path / "metadata.csv", prompt="a scan with {labels}, {Text} {{x}}")
    assert [row["caption"] for row in rows] == [
        "a scan with X, Y and Z, one {x}",
        "a scan with X, two {x}",
    ]
    rows = list_images(tmp_path, caption_column="patient_id", prompt="{caption}")
    assert rows[0]["caption"] == "p1"


def test_a_line_that_is_no_json_is_named(tmp_path, capsys):
    for line in ("{", "[" * 10_000):
        (tmp_path / "metadata.jsonl").write_text(line)
        assert "line 1 is not JSON" in refused(capsys, tmp_path)


def test_jsonl_and_manifests_are_tables_too(tmp_path):
    one, two = pictures(tmp_path / "one", "a.png"), pictures(tmp_path / "two", "a.png")
    (one / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "hello", "age": 7}\n\n')
    (two / "manifest.csv").write_text('file,prompt,seed\na.png,"a wound, red",3\n')
    assert list_images(one)[0]["caption"] == "hello" and list_images(one)[0]["fields"]["age"] == "7"
    assert list_images(two)[0]["caption"] == "a wound, red"


def test_class_folders_give_the_label_field(tmp_path):
    rows = list_images(
        pictures(tmp_path, "mpox/a.png", "normal/b.png"), prompt="photo of {label} skin"
    )
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
    (data / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"gone{n}.png,x\n" for n in range(7)) + "a.png,x\n"
    )
    said = refused(capsys, data)
    assert "7 of 8 files" in said and "gone4.png" in said and "gone5.png" not in said
    (data / "metadata.csv").write_text("file_name,text\n../outside.png,x\n")
    assert "../outside.png is not inside" in refused(capsys, data)
    (data / "metadata.csv").write_text("file_name,text\n,x\n")
    assert "1 of 1 files are not there: (no name)" in refused(capsys, data)
    (data / "metadata.csv").write_text("name,text\na.png,x\n")
    assert "--image-column" in refused(capsys, data)
    (data / "metadata.csv").write_text("file_name,finding\na.png,one, two\n")
    assert "line 2 has more cells" in refused(capsys, data)
    (data / "metadata.csv").write_text(
        "file_name,text,patient\na.png,one,two,p1\n"
    )  # whose comma is it?
    assert "line 2 has more cells" in refused(capsys, data)
    for slices in ("middel", "every:0", "oblique:all"):
        assert "--slices " + slices in refused(
            capsys, pictures(data / "sub", "a.png"), slices=slices
        )
    (data / "bad.jsonl").write_text('{"file_name": "a.png"}\nnot json\n')
    assert "line 2" in refused(capsys, data / "bad.jsonl")
    assert "not a UTF-8 text file" in refused(capsys, data / "a.png")


def listed(capsys, *args, **more):
    """The rows, and the one line that was said."""
    rows = list_images(*args, **more)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return rows, lines[0]


def test_commas_that_should_be_quoted_are_the_captions_and_the_reading_is_said(tmp_path, capsys):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    table = tmp_path / "metadata.csv"
    table.write_text(
        'path,Text,modal\na.png,"a mass, round",CT\nb.png,a mass, oval, deep,MR\nc.png,no mass,CT,,\n'
    )
    rows, said = listed(capsys, tmp_path, prompt="{modal}: {Text}")
    assert [row["caption"] for row in rows] == [
        "CT: a mass, round",
        "MR: a mass, oval, deep",
        "CT: no mass",
    ]
    assert "line 3:" in said and """',' in Text: "a mass, oval, deep\"""" in said
    table.write_text(
        "file;text\na.png;red;round\n"
    )  # the last column needs no space after the mark
    assert listed(capsys, tmp_path)[0][0]["caption"] == "red;round"
    table.write_text('file,text\na.png,"two\nlines, ""quoted"""\n')
    assert list_images(tmp_path)[0]["caption"] == 'two\nlines, "quoted"'


def test_tables_say_things_in_many_ways(tmp_path, capsys):
    for name in "abc":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.jsonl").write_text(
        '{"file_name": "a.png", "labels": ["A", "B"], "patient": 12.0}\n'
        '{"file_name": "b.png", "labels": [], "patient": 12}\n{"file_name": "c.png", "labels": null}\n'
    )
    rows = list_images(str(tmp_path / "t.jsonl"), prompt="an X-ray with {labels}")
    assert [row["label"] for row in rows] == ["A|B", "", ""] and [row["group"] for row in rows] == [
        "12",
        "12",
        "",
    ]
    assert (
        rows[0]["caption"] == "an X-ray with A and B"
        and "2 of 3 rows have no labels" in capsys.readouterr().err
    )
    (tmp_path / "t.csv").write_text('file_name, text\na.png, "one, two"\nb.png, three\n')
    assert [row["caption"] for row in list_images(str(tmp_path / "t.csv"))] == ["one, two", "three"]
    (tmp_path / "t.csv").write_text(
        'file_name,text\na.png,a lesion, "target" sign, left\nb.png,red, raised\n'
    )
    assert [row["caption"] for row in list_images(str(tmp_path / "t.csv"))] == [
        'a lesion, "target" sign, left',
        "red, raised",
    ]
    capsys.readouterr()
    (tmp_path / "t.csv").write_text("file_name,label,label\na.png,A,\n")
    assert "two columns are called label" in refused(capsys, tmp_path / "t.csv")


def test_a_link_to_a_folder_above_is_not_followed_and_slices_stay_on_the_side_of_their_volume(
    tmp_path,
):
    (tmp_path / "A").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "A" / "a.png")
    (tmp_path / "A" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert [row["file_name"] for row in list_images(str(tmp_path))] == ["A/a.png"]
    (tmp_path / "A" / "root").symlink_to("/", target_is_directory=True)
    assert [row["file_name"] for row in list_images(str(tmp_path))] == ["A/a.png"]
    splits = []
    for count in (1, 3):  # middle or all: the volume is in its content's part
        rows = metrics.spread_slices(
            [{"path": str(tmp_path / "A" / "a.png"), "file_name": "A/a.png", "group": ""}],
            {str(tmp_path / "A" / "a.png"): (1, 1, count)},
            "all",
        )
        split_rows(rows, 0.4, 0.3)
        splits.append({row["split"] for row in rows})
    assert splits[0] == splits[1] and len(splits[0]) == 1
    pair = [
        {"path": str(tmp_path / "A" / "a.png"), "file_name": name, "group": "a.png"}
        for name in ("a.png", "a-aug.png")
    ]
    (tmp_path / "b.png").write_bytes(b"other")
    pair[1]["path"] = str(tmp_path / "b.png")
    for share in np.linspace(0, 0.9, 30):  # a table may call its groups by files' names
        split_rows(pair, share)
        assert pair[0]["split"] == pair[1]["split"]
    blank = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
    assert len(near_duplicates(blank)) == 49


def test_names_that_are_not_utf8_are_refused_by_name_and_empty_rows_of_a_spreadsheet_are_none(
    tmp_path, capsys
):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("file_name;text\na.png;x\n;\n;\n")
    assert [row["caption"] for row in list_images(str(tmp_path / "t.csv"))] == [
        "x"
    ] and not capsys.readouterr().err
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/w\xe9.png")
    assert "not UTF-8" in refused(capsys, tmp_path)


def test_paths_of_windows_are_found(tmp_path):
    pictures(tmp_path, "sub/a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nsub\\a.png,x\n")
    row = list_images(tmp_path)[0]
    assert row["path"] == str(tmp_path / "sub" / "a.png") and row["file_name"] == "sub\\a.png"


def test_only_a_table_that_says_so_absolutely_leaves_its_folder(tmp_path):
    data, other = pictures(tmp_path / "data", "a.png"), pictures(tmp_path / "other", "b.png")
    (data / "metadata.csv").write_text(f"file_name,text\n{other / 'b.png'},x\n")
    assert list_images(data)[0]["path"] == str(other / "b.png")


def test_a_few_missing_files_and_repeated_rows_are_left_out_and_said(tmp_path, capsys):
    names = [f"{n:02}.png" for n in range(40)]
    pictures(tmp_path, *names[2:])
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\n" + "".join(f"{name},x\n" for name in names))
    rows, said = listed(capsys, tmp_path)
    assert len(rows) == 38 and said == f"{table}: 2 of 40 files are not there: 00.png, 01.png"
    assert "2 of 40" in refused(capsys, tmp_path, strict=True)
    table.write_text("file_name,text\n05.png,x\n06.png,x\n05.png,x\n05.png,y\n")
    rows, said = listed(capsys, tmp_path)
    assert [(row["file_name"], row["caption"]) for row in rows] == [
        ("05.png", "x"),
        ("06.png", "x"),
        ("05.png", "y"),
    ]
    assert "1 of 4 rows repeat another" in said


def test_missing_and_unreadable_files_count_together_and_the_doctor_hears_of_all(
    tmp_path, capsys, monkeypatch
):
    pictures(tmp_path, *[f"{n:02}.png" for n in range(2, 40)])
    (tmp_path / "05.png").write_bytes(b"x")
    table = tmp_path / "metadata.csv"
    table.write_text("file_name\n" + "".join(f"{n:02}.png\n" for n in range(40)))  # 2 are missing
    with pytest.raises(SystemExit):
        load_pixels(list_images(table), 16)
    assert "1 of 38 images cannot be read, besides 2 left out before" in capsys.readouterr().err
    monkeypatch.setattr(metrics, "BAD_SHARE", 3 / 40)
    assert (
        len(load_pixels(list_images(table)[:20], 16)[0]) == 19
    )  # a part of the set: 1 of 20 is less, and so are 3 of 40
    capsys.readouterr()
    table.write_text("file_name\n" + "".join(f"{n:02}.png\n" for n in range(80)))
    assert "42 of 80 files are not there" in refused(capsys, table)
    assert len(list_images(table, strict=None)) == 38


def test_lines_before_a_header_are_skipped_and_counted(tmp_path, capsys):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("sep=;\n\nfile_name;text;more\na.png;x;y\na.png;x;y;z\n")
    assert "line 5 has more cells" in refused(capsys, tmp_path)


def test_rows_of_json_may_lack_a_field_and_fields_take_no_format(tmp_path, capsys):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "x", "view": "PA"}\n{"file_name": "b.png", "text": "y"}\n'
    )
    rows, said = listed(capsys, tmp_path, prompt="{view} {text}")
    assert [row["caption"] for row in rows] == ["PA x", "y"] and "1 of 2 rows have no" in said
    assert "write {view}" in refused(capsys, tmp_path, prompt="{view:>4}")


def test_generated_images_of_a_mix_are_never_held_out(tmp_path):
    pictures(tmp_path, *[f"{n:02}.png" for n in range(40)])
    (tmp_path / "metadata.csv").write_text(
        "file_name,synthetic\n" + "".join(f"{n:02}.png,{n % 2}\n" for n in range(40))
    )
    rows = list_images(tmp_path)
    split_rows(rows, 0.4, 0.3)
    assert {row["split"] for row in rows[1::2]} == {"train"} and {
        row["split"] for row in rows[::2]
    } == {"train", "val", "test"}
    split_rows(rows[1::2], 0.4)  # alone they are a set like any other
    assert {row["split"] for row in rows[1::2]} == {"train", "val"}


def test_rows_without_what_the_caption_wants_are_counted(tmp_path, capsys):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,labels\na.png,one,\nb.png,,X\nc.png,,Y\n"
    )
    assert "2 of 3 rows have no caption, such as b.png" in listed(capsys, tmp_path)[1]
    assert (
        "1 of 3 rows have no labels, such as a.png"
        in listed(capsys, tmp_path, prompt="film, {labels}")[1]
    )


@dicom
def test_dicoms_of_a_patient_share_a_group_that_does_not_name_it(tmp_path, capsys):
    for n, patient in enumerate(("Doe-17", "Doe-17", "Roe-4", "")):
        write_dicom(tmp_path / f"{n}", RAMP, PatientID=patient)
    rows = list_images(tmp_path)
    groups = [row["group"] for row in rows]
    assert (
        groups[0] == groups[1] != groups[2]
        and groups[3] == ""
        and all(len(group) <= 12 for group in groups)
    )
    assert "oe" not in str(rows) + "".join(capsys.readouterr())
    for n in (0, 1, 3):
        Image.new("L", (8, 8)).save(tmp_path / f"{n}.png")
    list_images(tmp_path)
    assert not capsys.readouterr().err
    (tmp_path / "2").unlink()  # one id for all says nothing: the files are anonymised
    rows, said = listed(capsys, tmp_path)
    assert (
        {row["group"] for row in rows} == {""}
        and "one patient's id, as anonymised ones do" in said
        and "oe" not in said
    )


@dicom
def test_localizers_and_reports_are_left_out_and_counted(tmp_path, capsys):
    for n in range(3):
        write_dicom(
            tmp_path / f"{n}",
            RAMP,
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER" if n == 1 else "AXIAL"],
        )
    assert [row["file_name"] for row in list_images(tmp_path)] == ["0", "2"]
    assert "1 of 3 files left out: localizers" in capsys.readouterr().err
    for n in (0, 2):
        (tmp_path / f"{n}").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(SystemExit):
        list_images(tmp_path)
    said = capsys.readouterr().err
    assert (
        "2 of 3 files left out: DICOM files without a picture" in said and "no images left" in said
    )


@dicom
def test_files_without_their_codec_are_counted_once_with_the_command_that_gets_it(
    tmp_path, capsys, monkeypatch
):
    import pydicom

    for n in range(30):
        write_dicom(tmp_path / f"{n}", RAMP, PatientID=f"{n}")
    for n in range(2):
        data = pydicom.dcmread(tmp_path / f"{n}")
        data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
        data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
        data.save_as(tmp_path / f"{n}")
    monkeypatch.setattr(
        pydicom.pixels, "get_decoder", lambda syntax: type("Decoder", (), {"available_plugins": ()})
    )
    said = refused(capsys, tmp_path)
    assert "2 of 30 files" in said and "JPEG Lossless" in said and "pip install pylibjpeg" in said
    monkeypatch.setattr(metrics, "BAD_SHARE", 0.1)
    assert len(listed(capsys, tmp_path)[0]) == 28


@pytest.mark.parametrize("name, package", [("a", "pydicom"), ("a.nii", "nibabel")])
def test_a_missing_package_is_said_before_anything_is_read(
    tmp_path, capsys, monkeypatch, name, package
):
    (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM")
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    assert f"1 of 1 files left out: {'DICOM' if name == 'a' else 'NIfTI'}" in (
        said := refused(capsys, tmp_path)
    )
    assert f"pip install {package}" in said


@dicom
@nifti
def test_slices_become_rows_of_one_group(tmp_path):
    import nibabel

    write_dicom(tmp_path / "a.dcm", np.stack([RAMP] * 10))
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((4, 5, 7), np.int16), np.diag([1, 1, -1, 1])),
        tmp_path / "b.nii",
    )
    pictures(tmp_path, "c.png")
    found = {
        slices: [(row["file_name"], row["slice"]) for row in list_images(tmp_path, slices=slices)]
        for slices in ("middle", "all", "every:5", "coronal:every:2", "sagittal:middle")
    }
    assert found["middle"] == [("a.dcm", None), ("b.nii", None), ("c.png", None)]
    assert found["all"] == [
        *(("a.dcm", n) for n in range(10)),
        *(("b.nii", n) for n in range(7)),
        ("c.png", None),
    ]
    assert found["every:5"] == [("a.dcm", 2), ("a.dcm", 7), ("b.nii", 2), ("c.png", None)]
    assert found["coronal:every:2"][1:-1] == [("b.nii", "coronal:1"), ("b.nii", "coronal:3")]
    assert found["sagittal:middle"][1] == ("b.nii", "sagittal")
    rows = list_images(tmp_path, slices="every:5")
    assert [row["group"] for row in rows] == ["a.dcm", "a.dcm", "", ""]
    assert load_pixels(list_images(tmp_path, slices="coronal:all"), 16)[1].shape == (7, 3, 16, 16)


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
    assert (
        content_hash(tmp_path / "a")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


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


def test_file_names_that_look_like_patients_are_pointed_at(tmp_path, capsys):
    names = [
        "patient12_1.png",
        "patient12_2.png",
        "patient7-L.png",
        "patient7-R.png",
        "alone3_1.png",
    ]
    rows = list_images(pictures(tmp_path, *names))
    split_rows(rows, 0.2)
    said = capsys.readouterr().err
    assert (
        "4 files are named as if 2 patients had several each, such as patient12_1.png and patient12_2.png"
        in said
    )
    split_rows([{**row, "group": "x"} for row in rows], 0.2)
    split_rows(rows, 0.0)
    split_rows(
        list_images(pictures(tmp_path / "more", *[f"img_{n:03}.png" for n in range(9)])), 0.2
    )
    assert capsys.readouterr().err == ""


def test_the_crop_is_drawn_by_seed_and_file_or_by_the_disc(tmp_path, capsys):
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (50, 1)))
    lefts = {np.asarray(fit_square(wide, 50, "random", generator(n)))[0, 0] for n in range(20)}
    assert len(lefts) > 10 and max(lefts) > 120 and min(lefts) < 30
    wide.save(tmp_path / "a.png")
    wide.save(tmp_path / "b.png")
    rows = list_images(tmp_path)
    one, again, other = (
        load_pixels(part, 50, "random", seed=seed)[1]
        for part, seed in ((rows, 0), (rows[::-1], 0), (rows, 1))
    )
    assert (
        torch.equal(one, again.flip(0))
        and not torch.equal(one[0], one[1])
        and not torch.equal(one, other)
    )
    y, x = np.mgrid[:300, :500]
    disc = np.where((y - 150) ** 2 + (x - 300) ** 2 < 180**2, 120, 3).astype(
        np.uint8
    )  # top and bottom cut off
    disc[:20, 20:60] = 255  # a label
    left, top, right, bottom = find_disc(Image.fromarray(disc))
    assert np.abs(np.array([left, top, right, bottom]) - (120, -30, 480, 330)).max() <= 4
    square = np.asarray(fit_square(Image.fromarray(disc), 90, "fundus"))
    assert square[:4].max() < 10 and (square[45, 3:87] > 110).all() and (square > 200).sum() == 0
    for wrong in (disc * 0, np.where(np.abs(y - 150) < 40, 120, 0).astype(np.uint8)):
        assert find_disc(Image.fromarray(wrong)) is None
        assert fit_square(Image.fromarray(wrong), 60, "fundus") == fit_square(
            Image.fromarray(wrong), 60, "pad"
        )
    assert len(load_pixels(rows, 32, "fundus")[0]) == 2
    assert "2 of 2 images show no disc of a fundus" in capsys.readouterr().err


def test_pixels_are_what_read_image_and_fit_square_give(tmp_path):
    draw = np.random.RandomState(0)
    Image.fromarray(draw.randint(0, 256, (40, 60)).astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(draw.randint(0, 256, (40, 60, 3)).astype(np.uint8)).save(
        tmp_path / "colour.png"
    )
    Image.fromarray(draw.randint(0, 900, (40, 60)).astype(np.uint16)).save(tmp_path / "deep.png")
    rows, pixels = load_pixels(list_images(tmp_path), 32, "pad", value_range=(100, 500))
    for row, found in zip(rows, pixels):
        expected = fit_square(read_image(row["path"], value_range=(100, 500)), 32, "pad")
        assert (found.permute(1, 2, 0).numpy() == np.asarray(expected)).all()
    same = load_pixels(
        [{**row, "range": (100, 500)} for row in rows], 32, "pad", value_range=(0, 1)
    )[1]
    assert torch.equal(same, pixels)


@dicom
def test_what_is_asked_for_reaches_the_reader(tmp_path, capsys):
    write_dicom(
        tmp_path / "a",
        RAMP,
        Modality="CT",
        BurnedInAnnotation="YES",
        RescaleSlope=1,
        RescaleIntercept=0,
    )
    rows = list_images(tmp_path)
    with pytest.raises(SystemExit):
        load_pixels(rows, 64)
    assert "--allow-burned-in" in capsys.readouterr().err
    found = [
        load_pixels(rows, 64, allow_burned_in=True, **how)[1]
        for how in ({}, dict(window="bone"), dict(value_range=(0, 99)))
    ]
    assert len({part.float().mean().item() for part in found}) == 3


def test_duplicates_are_found_when_exact_saved_anew_or_flipped(tmp_path):
    draw = np.random.RandomState(0)
    drawn = [
        Image.fromarray(draw.randint(0, 256, (9, 9, 3)).astype(np.uint8)).resize((128, 128))
        for _ in range(30)
    ]
    drawn[3].save(tmp_path / "a.jpg", quality=40)
    drawn += [
        drawn[0],
        Image.open(tmp_path / "a.jpg"),
        drawn[5].transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        drawn[7].resize((70, 70)).resize((128, 128)).point(lambda level: level * 0.8 + 9),
    ]
    pixels = torch.stack(
        [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in drawn]
    )
    assert near_duplicates(pixels) == [
        (0, 30, "exact"),
        (3, 31, "near"),
        (5, 32, "flipped"),
        (7, 33, "near"),
    ]
    assert near_duplicates(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)) == [(0, 1, "exact")]
