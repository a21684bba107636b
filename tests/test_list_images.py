"""Data sets of every form become rows, splits and pixels; errors in them are one line."""

import sys
import unicodedata

import numpy as np
import PIL.features
import pytest
import torch
from PIL import Image
from test_read_image import RAMP, deep_ramp, dicom, nifti, write_deep_png, write_dicom

import metrics
import sample
from metrics import (
    Row,
    content_hash,
    count_people,
    decade_of,
    find_disc,
    fit_square,
    generator,
    is_marked,
    list_images,
    load_pixels,
    near_duplicates,
    pick_resolution,
    read_image,
    read_split,
    share_range,
    split_labels,
    split_rows,
    text_key,
)


def pictures(folder, *names):
    """Pictures of one colour each, all different."""
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + n, 8), (n, 0, 0)).save(folder / name)
    return folder


def refused(capsys, *args, **more):
    """The one line with which list_images refuses."""
    with pytest.raises(SystemExit) as stop:
        list_images(*args, **more)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def listed(capsys, *args, **more):
    """The rows, and the one line that was printed."""
    rows = list_images(*args, **more)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return rows, lines[0]


def captions(*args, **more):
    return [row.caption for row in list_images(*args, **more)]


# ---------------------------------------------------------------- folders


def test_a_folder_lists_its_images_and_skips_litter(tmp_path):
    pictures(tmp_path, "b.png", "A.JPG", "sub/c.png", ".hidden.png", "._a.jpg", ".cache/d.png")
    for name in ("Thumbs.db", "report.pdf", "notes"):
        (tmp_path / name).write_bytes(b"x" * 200)
    rows = list_images(tmp_path)
    assert [row.file_name for row in rows] == ["A.JPG", "b.png", "sub/c.png"]
    assert [row.label for row in rows] == ["", "", "sub"]
    assert rows[1] == Row(path=str(tmp_path / "b.png"), file_name="b.png")


def test_links_to_folders_are_followed(tmp_path):
    pictures(tmp_path / "elsewhere", "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mpox").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    rows = list_images(tmp_path / "data")
    assert [row.file_name for row in rows] == ["mpox/a.png"]
    assert rows[0].label == "mpox"


def test_class_folders_give_the_label_field(tmp_path):
    pictures(tmp_path, "mpox/a.png", "normal/b.png")
    found = captions(tmp_path, prompt="photo of {label} skin")
    assert found == ["photo of mpox skin", "photo of normal skin"]


def test_files_of_other_kinds_are_counted_once_by_suffix(tmp_path, capsys, monkeypatch):
    suffixes = [suffix for suffix in metrics.IMAGE_SUFFIXES if suffix != ".heic"]
    monkeypatch.setattr(metrics, "IMAGE_SUFFIXES", tuple(suffixes))
    pictures(tmp_path, "a.png", "Thumbs.db.png")
    for name in ("b.HEIC", "c.heic", "d.dng", "sub/e.MOV", "notes", ".hidden.pdf", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 200)
    rows, message = listed(capsys, tmp_path)
    assert len(rows) == 2
    assert "files skipped: .dng (1), .heic (2), .mov (1), without a suffix (1): " in message
    assert "pip install pillow-heif" in message
    assert ".heic (2)" in refused(capsys, tmp_path, strict=True)


def test_a_folder_of_nothing_else_says_what_is_in_it(tmp_path, capsys):
    (tmp_path / "a.cr2").write_bytes(b"x")
    assert ".cr2 (1): save images as PNG" in refused(capsys, tmp_path)


@pytest.mark.skipif(not PIL.features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_and_rarer_suffixes_are_images(tmp_path, capsys):
    pictures(tmp_path, "a.avif", "b.JPE", "c.apng")
    rows, _ = load_pixels(list_images(tmp_path), 8)
    assert [row.file_name for row in rows] == ["a.avif", "b.JPE", "c.apng"]
    assert capsys.readouterr().err == ""


def test_heic_is_listed_where_the_package_is_installed(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"x")
    monkeypatch.setattr(metrics, "IMAGE_SUFFIXES", (".png", ".heic"))
    assert [row.file_name for row in list_images(tmp_path)] == ["a.heic"]


def test_texts_beside_images_are_their_captions(tmp_path, capsys):
    pictures(tmp_path, "a.png", "sub/b.png", "c.v2.JPG", "d.png")
    (tmp_path / "a.txt").write_text("\ufeffa wound,\n  granulating \n", encoding="utf-8")
    (tmp_path / "sub" / "b.caption").write_text("a wound of the toe")
    (tmp_path / "c.v2.TXT").write_text("Füße")
    (tmp_path / "sub" / "a.txt").write_text("no image has this name here")
    rows = list_images(tmp_path)
    assert [row.caption for row in rows] == [
        "a wound, granulating",
        "Füße",
        "",
        "a wound of the toe",
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{tmp_path}: files skipped: captions without an image (1): {metrics.ADVICE}",
        f"{tmp_path}: 1 of 4 rows have no caption, such as d.png",
    ]
    rows = list_images(tmp_path, prompt="{label}: {caption}")
    assert rows[3].caption == "sub: a wound of the toe"


@nifti
def test_a_caption_beside_a_volume_is_found(tmp_path):
    import nibabel

    volume = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
    nibabel.save(volume, tmp_path / "a.nii.gz")
    (tmp_path / "a.txt").write_text("a brain")
    assert captions(tmp_path) == ["a brain"]


def test_a_caption_that_is_no_utf_8_is_refused_by_name(tmp_path, capsys):
    pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("Füße".encode("latin-1"))
    assert "a.txt: not a UTF-8 text file" in refused(capsys, tmp_path)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("on_disk, in_table", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_compared_in_one_unicode_form(tmp_path, on_disk, in_table, capsys):
    names = ["Füße links.png", "größer/Zehe.png", "plain.png"]
    pictures(tmp_path, *[unicodedata.normalize(on_disk, name) for name in names])
    spelt = [unicodedata.normalize(in_table, name) for name in names]
    table = "file_name,text\n" + "".join(f"{name},x\n" for name in spelt)
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8")

    rows = list_images(tmp_path)

    assert [row.file_name for row in rows] == spelt
    assert len(load_pixels(rows, 8)[0]) == 3
    assert capsys.readouterr().err == ""
    for row in rows:
        row.file_name = unicodedata.normalize(on_disk, row.file_name)
    split = "file_name,group,split\n" + "".join(f"{name},,val\n" for name in spelt)
    (tmp_path / "split.csv").write_text(split, encoding="utf-8")
    read_split(rows, tmp_path / "split.csv")
    assert {row.split for row in rows} == {"val"}


def test_a_mac_folder_in_a_folder_of_another_form_is_found(tmp_path):
    mixed = unicodedata.normalize("NFC", "Müller") + "/" + unicodedata.normalize("NFD", "Füße.png")
    pictures(tmp_path, mixed)
    text = "file_name\n" + unicodedata.normalize("NFC", mixed) + "\n"
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    assert list_images(tmp_path)[0].path == str(tmp_path / mixed)


def test_labels_are_compared_in_one_unicode_form():
    assert text_key(unicodedata.normalize("NFD", "Größer")) == "größer"


def test_images_next_to_those_of_a_table_are_counted(tmp_path, capsys):
    pictures(tmp_path, "a.png", "sub/b.png", "sub/c.png", "grid.png", ".hidden.png")
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\na.png,x\nsub/b.png,y\n")
    for data in (tmp_path, table):
        rows, message = listed(capsys, data)
        assert len(rows) == 2
        assert message.endswith("images next to those that it names are not used: 1, such as c.png")


def test_a_group_of_few_values_is_said(tmp_path, capsys):
    names = [f"{n:02}.png" for n in range(20)]
    pictures(tmp_path, *names)
    for column, count, is_said in (("Group", 3, True), ("group", 15, False), ("patient", 3, False)):
        lines = [f"{name},p{n % count}" for n, name in enumerate(names)]
        (tmp_path / "metadata.csv").write_text(f"file_name,{column}\n" + "\n".join(lines))
        list_images(tmp_path)
        said = capsys.readouterr().err
        assert (f"column {column} has {count} values in 20 rows (p0, p1, p2)" in said) == is_said
        assert said.count("\n") == is_said


def test_a_table_gives_captions_labels_and_groups(tmp_path):
    pictures(tmp_path, "a.png", "d/b.png")
    text = "\ufefffile_name;Text;labels;patient_id\na.png;one;X|Y|Z;p1\nd/b.png;two;X;\n"
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    rows = list_images(tmp_path)
    assert [(r.caption, r.label, r.group) for r in rows] == [
        ("one", "X|Y|Z", "p1"),
        ("two", "X", ""),
    ]
    assert rows[0].fields == {
        "file_name": "a.png",
        "Text": "one",
        "labels": "X|Y|Z",
        "patient_id": "p1",
    }
    rows = list_images(tmp_path / "metadata.csv", prompt="a scan with {labels}, {Text} {{x}}")
    assert [row.caption for row in rows] == [
        "a scan with X, Y and Z, one {x}",
        "a scan with X, two {x}",
    ]
    rows = list_images(tmp_path, {"caption": "patient_id"}, "{caption}")
    assert rows[0].caption == "p1"


def test_a_line_that_is_no_json_is_named(tmp_path, capsys):
    for line in ("{", "7"):
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n' + line)
        assert f"not a JSON object: {line}" in refused(capsys, tmp_path)


def test_cells_that_say_that_nothing_is_known_are_empty(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    cells = "a.png,n/a,NA,NaN,none,null"
    (tmp_path / "metadata.csv").write_text(f"file_name,text,label,patient_id,site,age\n{cells}\n")
    (row,) = list_images(tmp_path)
    assert (row.caption, row.label, row.group, row.age) == ("", "", "", "")
    assert row.fields["label"] == ""  # as a prompt reads it
    assert row.fields["site"] == "none"  # may be a finding


def test_jsonl_and_manifests_are_tables_too(tmp_path):
    one, two = pictures(tmp_path / "one", "a.png"), pictures(tmp_path / "two", "a.png")
    (one / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "hello", "age": 7}\n\n')
    (two / "manifest.csv").write_text('file,prompt,seed\na.png,"a wound, red",3\n')
    assert list_images(one)[0].caption == "hello" and list_images(one)[0].fields["age"] == "7"
    assert list_images(two)[0].caption == "a wound, red"


def test_what_is_wrong_with_a_data_set_is_one_line(tmp_path, capsys):
    data = pictures(tmp_path / "data", "a.png")
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(capsys, tmp_path / "nowhere")
    assert "no images" in refused(capsys, tmp_path / "empty")
    assert "no table" in refused(capsys, data, {"label": "x"})
    assert "1 of 1 rows have no label" in refused(capsys, data, prompt="a {label}")
    for slices in ("middel", "every:0", "coronal:all"):
        assert "--slices " + slices in refused(capsys, data, slices=slices)


@pytest.mark.parametrize(
    "text, how, message",
    [
        ("file_name,text\na.png,x\n", dict(prompt="a {finding}"), "no column {finding}"),
        ("file_name,text\na.png,x\n", dict(prompt="a {text"), "--prompt 'a {text'"),
        ("file_name,text\na.png,x\n", dict(prompt="{text:d}"), "--prompt '{text:d}'"),
        ("file_name,text\na.png,x\n", dict(prompt="{text.__class__}"), "no column"),
        ("file_name,text\na.png,x\n", dict(columns={"caption": "age"}), "has file_name, text"),
        ("file_name,text\n", {}, "has no rows"),
        ("file_name,text\n,x\n", {}, "1 of 1 files are missing: (no name)"),
        ("name,text\na.png,x\n", {}, "--image-column"),
        ("file_name,finding\na.png,one, two\n", {}, "row a.png has more cells"),
        ("file_name,text,patient\na.png,one,two,p1\n", {}, "row a.png has more cells"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(tmp_path, capsys, text, how, message):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    assert message in refused(capsys, tmp_path, **how)


def test_a_table_that_is_no_text_is_refused(tmp_path, capsys):
    pictures(tmp_path, "a.png")
    assert "not a UTF-8 text file" in refused(capsys, tmp_path / "a.png")


def test_unquoted_commas_are_the_captions_and_that_is_reported(tmp_path, capsys):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    table = tmp_path / "metadata.csv"
    table.write_text(
        'path,Text,modal\na.png,"a mass, round",CT\n'
        "b.png,a mass, oval, deep,MR\nc.png,no mass,CT,,\n"
    )
    rows, message = listed(capsys, tmp_path, prompt="{modal}: {Text}")
    assert [row.caption for row in rows] == [
        "CT: a mass, round",
        "MR: a mass, oval, deep",
        "CT: no mass",
    ]
    assert '1 rows: Text read as "a mass, oval, deep"' in message


def test_the_last_column_needs_no_space_after_the_delimiter(tmp_path, capsys):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file;text\na.png;red;round\n")
    rows, _ = listed(capsys, tmp_path)
    assert rows[0].caption == "red;round"


def test_quotes_keep_delimiters_and_lines_together(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text('file,text\na.png,"two\nlines, ""quoted"""\n')
    assert captions(tmp_path) == ['two\nlines, "quoted"']


def test_lines_before_a_header_and_empty_rows_are_skipped(tmp_path, capsys):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("sep=;\n\nfile_name;text\na.png;x\n;\n;\n")
    assert captions(tmp_path) == ["x"]
    assert capsys.readouterr().err == ""


def test_json_has_lists_of_labels_and_nothing(tmp_path, capsys):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "t.jsonl").write_text(
        '{"file_name": "a.png", "labels": ["A", "B"], "patient": 12}\n'
        '{"file_name": "b.png", "labels": [], "patient": 12}\n'
        '{"file_name": "c.png", "labels": null}\n'
    )
    rows, message = listed(capsys, tmp_path / "t.jsonl", prompt="an X-ray with {labels}")
    assert [row.label for row in rows] == ["A|B", "", ""]
    assert [row.group for row in rows] == ["12", "12", ""]
    assert rows[0].caption == "an X-ray with A and B"
    assert "2 of 3 rows have no labels" in message


def test_paths_of_windows_are_found(tmp_path):
    pictures(tmp_path, "sub/a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nsub\\a.png,x\n")
    row = list_images(tmp_path)[0]
    assert row.path == str(tmp_path / "sub" / "a.png")
    assert row.file_name == "sub\\a.png"


def test_paths_may_lead_out_of_the_tables_folder(tmp_path):
    data = pictures(tmp_path / "data", "a.png")
    other = pictures(tmp_path / "other", "b.png") / "b.png"
    for name in (other, "../other/b.png"):
        (data / "metadata.csv").write_text(f"file_name,text\n{name},x\n")
        assert list_images(data)[0].path == str(other)


def test_a_few_missing_files_are_skipped_and_reported(tmp_path, capsys):
    names = [f"{n:02}.png" for n in range(40)]
    pictures(tmp_path, *names[2:])
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\n" + "".join(f"{name},x\n" for name in names))
    rows, message = listed(capsys, tmp_path)
    assert len(rows) == 38
    assert message == f"{table}: 2 of 40 files are missing: 00.png, 01.png (in {tmp_path})"
    assert "2 of 40" in refused(capsys, tmp_path, strict=True)
    (tmp_path / "39.png").unlink()
    assert "3 of 40" in refused(capsys, tmp_path)


def test_rows_of_json_may_lack_a_field(tmp_path, capsys):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "x", "view": "PA"}\n{"file_name": "b.png", "text": "y"}\n'
    )
    rows, message = listed(capsys, tmp_path, prompt="{view} {text}")
    assert [row.caption for row in rows] == ["PA x", "y"]
    assert "1 of 2 rows have no" in message


def test_fields_are_found_in_any_case(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("path,Text,modality\na.png,a macular hole,OCT\n")
    assert captions(tmp_path, prompt="{Modality}: {text}") == ["OCT: a macular hole"]


def test_a_text_that_begins_with_its_modality_names_it_once(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    lines = ["path,Text,modality", "a.png,OCT: a hole: large,OCT", "b.png,CT: CT of a lung,OCT"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    expected = ["OCT: a hole: large", "OCT: CT: CT of a lung"]
    assert captions(tmp_path, prompt="{modality}: {Text}") == expected


def test_generated_images_of_a_mix_are_never_held_out(tmp_path):
    pictures(tmp_path, *[f"{n:02}.png" for n in range(40)])
    (tmp_path / "metadata.csv").write_text(
        "file_name,synthetic\n" + "".join(f"{n:02}.png,{n % 2}\n" for n in range(40))
    )
    rows = list_images(tmp_path)
    split_rows(rows, 0.4, 0.3)
    assert {row.split for row in rows[1::2]} == {"train"} and {row.split for row in rows[::2]} == {
        "train",
        "val",
        "test",
    }
    split_rows(rows[1::2], 0.4)  # alone they are a set like any other
    assert {row.split for row in rows[1::2]} == {"train", "val"}


def test_rows_without_what_the_caption_needs_are_counted(tmp_path, capsys):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text,labels\na.png,one,\nb.png,,X\nc.png,,Y\n")
    _, message = listed(capsys, tmp_path)
    assert "2 of 3 rows have no caption, such as b.png" in message
    _, message = listed(capsys, tmp_path, prompt="film, {labels}")
    assert "1 of 3 rows have no labels, such as a.png" in message


def test_labels_are_split_and_compared_by_one_key():
    row = Row("a.png", "a.png", label="A | B|")
    assert split_labels(row) == {"A", "B"}
    assert split_labels(Row("a.png", "a.png")) == {""}
    assert text_key("  No  Finding\n") == "no finding"


# ---------------------------------------------------------------- who is in a set


@pytest.mark.parametrize(
    "age, decade",
    [
        ("67", "60–69"),
        ("067Y", "60–69"),
        ("early 40s", "40–49"),
        ("60-65", "60–69"),
        ("9.5", "0–9"),
        ("0", "0–9"),
        ("018M", "0–9"),
        ("130 months", "10–19"),
        ("090D", "0–9"),
        ("90", "90 or more"),
        ("104", "90 or more"),
        ("1957-03-12", ""),
        ("adult", ""),
        ("", ""),
    ],
)
def test_an_age_becomes_its_decade_and_a_birthday_nothing(age, decade):
    assert decade_of(age) == decade


def test_images_and_patients_are_counted_in_groups():
    people = [("F", "31", "a"), ("Female", "35Y", "a"), ("m", "", "b"), ("Jane", "x", "")]
    members = []
    for sex, age, group in people:
        members.append(("train", Row("", "", sex=sex, age=age, group=group, label="A | B")))
    members.append(("drawn", Row("", "", fields={"synthetic": "1"})))
    counts = {}
    for by, group, *numbers in map(dict.values, count_people(members)):
        counts[by, group] = numbers  # train: images, patients; drawn: likewise
    assert counts == {
        ("", "all"): [4, 2, 1, None],
        ("", "synthetic"): [0, None, 1, None],
        ("age", "30–39"): [2, 1, 0, None],
        ("age", "unknown"): [2, 1, 1, None],
        ("label", "a"): [4, 2, 0, None],
        ("label", "b"): [4, 2, 0, None],
        ("label", "unknown"): [0, None, 1, None],
        ("patient", "unknown"): [1, None, 1, None],
        ("sex", "female"): [2, 1, 0, None],
        ("sex", "male"): [1, 1, 0, None],
        ("sex", "unknown"): [1, None, 1, None],
    }


def test_sex_and_age_come_from_the_columns_that_usually_hold_them(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,Gender,Patient Age,stage\na.png,F,67,IV\n")
    (row,) = list_images(tmp_path)
    assert (row.sex, row.age) == ("F", "67")
    (row,) = list_images(tmp_path, {"sex": "stage"})
    assert (row.sex, row.age) == ("IV", "67")


@dicom
def test_sex_and_age_come_from_a_dicom_header_where_no_table_has_them(tmp_path):
    for n in range(2):
        write_dicom(tmp_path / f"{n}.dcm", RAMP, PatientSex="F", PatientAge="067Y", PatientID="1")
    write_dicom(tmp_path / "2.dcm", RAMP)
    rows = list_images(tmp_path)
    counts = {(by, group): images for by, group, images, _ in counted(rows)}
    assert counts["sex", "female"] == counts["age", "60–69"] == 2
    assert counts["sex", "unknown"] == counts["age", "unknown"] == 1
    (tmp_path / "metadata.csv").write_text("file_name,sex,age\n0.dcm,M,12\n")
    (row,) = list_images(tmp_path)
    assert (row.sex, row.age) == ("M", "12")


def counted(rows):
    return [record.values() for record in count_people([("x", row) for row in rows])]


@dicom
def test_files_that_say_they_are_synthetic_are_known(tmp_path):
    image = Image.new("L", (64, 64))
    sample.save_png(image, tmp_path / "drawn.png", "a prompt")
    (tmp_path / "drawn.dcm").write_bytes(
        sample.encode_dicom(image, "a prompt", dict.fromkeys(sample.MARKS, "1"))
    )
    assert is_marked(tmp_path / "drawn.png")
    assert is_marked(str(tmp_path / "drawn.dcm"))
    image.save(tmp_path / "plain.png")
    write_dicom(tmp_path / "plain.dcm", RAMP)
    (tmp_path / "scan.nii").write_bytes(b"no picture")
    for name in ("plain.png", "plain.dcm", "scan.nii"):
        assert not is_marked(str(tmp_path / name))


# ---------------------------------------------------------------- DICOM files and slices


@dicom
def test_dicoms_of_a_patient_share_a_group_that_does_not_name_it(tmp_path, capsys):
    for n, patient in enumerate(("Doe-17", "Doe-17", "Roe-4", "")):
        write_dicom(tmp_path / f"{n}", RAMP, PatientID=patient)
    rows = list_images(tmp_path)
    groups = [row.group for row in rows]
    assert groups[0] == groups[1] != groups[2]
    assert groups[3] == ""
    assert all(len(group) <= 12 for group in groups)
    assert "oe" not in str(rows) + "".join(capsys.readouterr())


@dicom
def test_one_id_for_all_files_is_none(tmp_path, capsys):
    for n in range(3):
        write_dicom(tmp_path / f"{n}", RAMP, PatientID="Doe-17")
    rows, message = listed(capsys, tmp_path)
    assert {row.group for row in rows} == {""}
    assert "all DICOM files have the same PatientID: ignored" in message
    assert "oe" not in message


@dicom
def test_localizers_and_reports_are_skipped_and_counted(tmp_path, capsys):
    for n in range(3):
        kind = "LOCALIZER" if n == 1 else "AXIAL"
        write_dicom(tmp_path / f"{n}", RAMP, ImageType=["ORIGINAL", "PRIMARY", kind], PatientID="")
    rows, message = listed(capsys, tmp_path)
    assert [row.file_name for row in rows] == ["0", "2"]
    assert "1 of 3 files skipped: DICOM reports, plans and localizers" in message
    for n in (0, 2):
        (tmp_path / f"{n}").write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(SystemExit):
        list_images(tmp_path)
    lines = capsys.readouterr().err
    assert "3 of 3 files skipped" in lines
    assert "no images left" in lines


@dicom
def test_files_without_their_codec_are_reported_with_the_command_that_gets_it(
    tmp_path, capsys, monkeypatch
):
    import pydicom.pixels

    def no_decoder(*args, **more):
        raise RuntimeError("Unable to decode: plugins are missing")

    write_dicom(tmp_path / "a", RAMP)
    monkeypatch.setattr(pydicom.pixels, "pixel_array", no_decoder)
    with pytest.raises(SystemExit):
        load_pixels(list_images(tmp_path), 16)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 1 images cannot be read" in message
    assert "no installed decoder reads its compression: pip install pylibjpeg" in message


@pytest.mark.parametrize(
    "name, package, start", [("a.dcm", "pydicom", b"\2"), ("a.nii", "nibabel", b"\\\1")]
)
def test_a_missing_package_is_reported(tmp_path, capsys, monkeypatch, name, package, start):
    (tmp_path / name).write_bytes(start + b"\0" * 400)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        load_pixels(list_images(tmp_path), 16)
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"1 of 1 images cannot be read, the first: {tmp_path / name}: needs" in message
    assert f"pip install {package}" in message


@dicom
def test_sets_are_compared_at_the_median_side_of_images_of_any_kind(tmp_path):
    sides = (70, 100, 120, 300, 900)
    for side in sides:
        Image.new("RGB", (side + 20, side)).save(tmp_path / f"{side}.png")
        pixels = np.zeros((side, side + 20), np.uint16)
        write_dicom(tmp_path / f"{side}.dcm", pixels)
    rows = list_images(tmp_path)
    by_suffix = {}
    for suffix in (".png", ".dcm"):
        by_suffix[suffix] = [row for row in rows if row.path.endswith(suffix)]
        assert pick_resolution(by_suffix[suffix]) == 120
    assert pick_resolution(by_suffix[".png"][-1:]) == 256
    assert pick_resolution([Row("nowhere.png", "")]) == 256
    Image.new("RGB", (20, 10)).save(tmp_path / "20.png")
    assert pick_resolution([Row(str(tmp_path / "20.png"), "")]) == 64


@dicom
@nifti
def test_slices_become_rows_of_one_group(tmp_path):
    import nibabel

    write_dicom(tmp_path / "a.dcm", np.stack([RAMP] * 10))
    volume = nibabel.Nifti1Image(np.zeros((4, 5, 7), np.int16), np.diag([1, 1, -1, 1]))
    nibabel.save(volume, tmp_path / "b.nii")
    pictures(tmp_path, "c.png")

    def slices_of(slices):
        return [(row.file_name, row.slice) for row in list_images(tmp_path, slices=slices)]

    frames = [("a.dcm", n) for n in range(10)]
    axial = [("b.nii", n) for n in range(7)]
    assert slices_of("middle") == [("a.dcm", None), ("b.nii", None), ("c.png", None)]
    assert slices_of("all") == [*frames, *axial, ("c.png", None)]
    assert slices_of("every:5") == [("a.dcm", 2), ("a.dcm", 7), ("b.nii", 2), ("c.png", None)]
    rows = list_images(tmp_path, slices="every:5")
    assert rows[0].group == rows[1].group != rows[2].group
    assert rows[3].group == ""
    assert load_pixels(rows, 16)[1].shape == (4, 3, 16, 16)


@dicom
def test_slices_are_in_the_split_of_their_file(tmp_path):
    splits = set()
    write_dicom(tmp_path / "a.dcm", np.stack([RAMP] * 10))
    for slices in ("middle", "all"):
        rows = list_images(tmp_path, slices=slices)
        split_rows(rows, 0.4, 0.3)
        splits |= {row.split for row in rows}
    assert len(splits) == 1


# ---------------------------------------------------------------- splits and pixels


def test_the_split_keeps_patients_together_and_survives_added_files(tmp_path):
    names = [f"{n}.png" for n in range(60)]
    pictures(tmp_path, *names)
    rows = list_images(tmp_path)
    for n, row in enumerate(rows):
        row.group = f"patient {n % 20}" if n < 40 else ""
    split_rows(rows, 0.3, 0.2)
    before = {row.file_name: row.split for row in rows}
    assert len({(row.group, row.split) for row in rows if row.group}) == 20
    assert set(before.values()) == {"train", "val", "test"}
    split_rows(rows[::-1][:30], 0.3, 0.2)
    assert {row.file_name: row.split for row in rows} == before
    split_rows(rows, 0.0)
    assert {row.split for row in rows} == {"train"}


def test_the_share_held_out_is_the_share_asked_for():
    rows = [Row(path="", file_name="", group=str(n)) for n in range(4000)]
    split_rows(rows, 0.15, 0.1)
    splits = [row.split for row in rows]
    assert splits.count("val") / 4000 == pytest.approx(0.15, abs=0.025)
    assert splits.count("test") / 4000 == pytest.approx(0.1, abs=0.025)


def test_a_split_is_read_back_and_another_sets_is_refused(tmp_path, capsys):
    rows = list_images(pictures(tmp_path / "data", "a.png", "b.png"))
    (tmp_path / "split.csv").write_text("file_name,group,split\na.png,,train\n")
    read_split(rows, tmp_path / "split.csv")
    assert [row.split for row in rows] == ["train", ""]
    with pytest.raises(SystemExit):
        read_split(rows[1:], tmp_path / "split.csv")
    assert "names none of these images, such as b.png" in capsys.readouterr().err


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


def test_unreadable_images_are_reported_and_too_many_are_an_error(tmp_path, capsys):
    pictures(tmp_path, *[f"{n:02}.png" for n in range(30)])
    (tmp_path / "07.png").write_bytes(b"")
    rows, pixels = load_pixels(list_images(tmp_path), 16)
    assert len(rows) == 29
    assert pixels.shape == (29, 3, 16, 16)
    assert pixels[7, 0, 8, 8] == 8
    assert f"skipped: {tmp_path / '07.png'}: is empty, or not an image" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load_pixels(list_images(tmp_path), 16, strict=True)
    (tmp_path / "09.png").write_bytes(b"x")
    with pytest.raises(SystemExit):
        load_pixels(list_images(tmp_path), 16)
    assert "2 of 30 images cannot be read" in capsys.readouterr().err


def test_a_random_crop_is_drawn_by_seed_and_file(tmp_path):
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (50, 1)))
    lefts = {np.asarray(fit_square(wide, 50, "random", generator(n)))[0, 0] for n in range(20)}
    assert len(lefts) > 10
    assert max(lefts) > 120
    assert min(lefts) < 30
    wide.save(tmp_path / "a.png")
    wide.save(tmp_path / "b.png")
    rows = list_images(tmp_path)
    one = load_pixels(rows, 50, "random", seed=0)[1]
    again = load_pixels(rows[::-1], 50, "random", seed=0)[1]
    other = load_pixels(rows, 50, "random", seed=1)[1]
    assert torch.equal(one, again.flip(0))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, other)


def test_a_fundus_is_cropped_to_its_disc():
    y, x = np.mgrid[:300, :500]
    is_lit = (y - 150) ** 2 + (x - 300) ** 2 < 180**2  # top and bottom are cut off
    pixels = np.where(is_lit, 120, 3).astype(np.uint8)
    pixels[:20, 20:60] = 255  # a label
    image = Image.fromarray(pixels)
    assert np.abs(np.array(find_disc(image)) - (120, -30, 480, 330)).max() <= 4
    square = np.asarray(fit_square(image, 90, "fundus"))
    assert square[:4].max() < 10
    assert (square[45, 3:87] > 110).all()
    assert not (square > 200).any()


def test_a_picture_without_a_disc_is_padded():
    y, _ = np.mgrid[:300, :500]
    black = np.zeros((300, 500), np.uint8)
    band = np.where(np.abs(y - 150) < 40, 120, 0).astype(np.uint8)
    for pixels in (black, band):
        image = Image.fromarray(pixels)
        assert find_disc(image) is None
        assert fit_square(image, 60, "fundus") == fit_square(image, 60, "pad")


def test_pixels_are_what_read_image_and_fit_square_give(tmp_path):
    draw = np.random.RandomState(0)
    contents = {
        "grey.png": draw.randint(0, 256, (40, 60)).astype(np.uint8),
        "colour.png": draw.randint(0, 256, (40, 60, 3)).astype(np.uint8),
        "deep.png": draw.randint(0, 900, (40, 60)).astype(np.uint16),
    }
    for name, content in contents.items():
        Image.fromarray(content).save(tmp_path / name)
    rows, pixels = load_pixels(list_images(tmp_path), 32, "pad", value_range=(100, 500))
    for row, found in zip(rows, pixels, strict=True):
        expected = fit_square(read_image(row.path, value_range=(100, 500)), 32, "pad")
        assert (found.permute(1, 2, 0).numpy() == np.asarray(expected)).all()
    share_range(rows, (100, 500))  # what a row says goes first
    assert torch.equal(load_pixels(rows, 32, "pad", value_range=(0, 1))[1], pixels)


def test_images_of_more_than_8_bits_share_one_range(tmp_path, capsys):
    for name, level in (("dim.png", 1000), ("bright.png", 4000)):
        picture = np.full((8, 8), level, np.uint16)
        picture[4:] = 0
        Image.fromarray(picture).save(tmp_path / name)
    rows, pixels = load_pixels(list_images(tmp_path), 8)
    assert [row.file_name for row in rows] == ["bright.png", "dim.png"]
    assert pixels[:, 0, 0, 0].tolist() == [255, 64]
    said = capsys.readouterr().err
    assert said.startswith("2 images have more than 8 bits (16-bit files with 12-bit values): ")
    assert "in all of them 0 is black and 4000 white" in said


def test_deep_colours_share_the_range_of_grey_images_and_are_named(tmp_path, capsys):
    write_deep_png(tmp_path / "colour.png", deep_ramp(3, 2000))
    write_deep_png(tmp_path / "grey.png", deep_ramp(1, 4000))
    write_deep_png(tmp_path / "opaque.png", deep_ramp(4, 1000))
    for given, white in ((None, 4000), ((0, 8000), 8000)):
        rows, pixels = load_pixels(list_images(tmp_path), 64, "pad", value_range=given)
        brightest = pixels[:, 0].flatten(1).max(1).values.tolist()
        assert brightest == [round(top / white * 255) for top in (2000, 4000, 1000)]
        said = capsys.readouterr().err
        assert "3 images have more than 8 bits (16-bit files with 12-bit values)" in said
        assert f"in all of them 0 is black and {white} white (--range)" in said


def test_a_measure_is_taken_of_the_image_as_stored(tmp_path):
    rows = list_images(pictures(tmp_path, "a.png", "b.png"))
    load_pixels(rows, 4, measure=lambda image: image.size)
    assert [row.measured for row in rows] == [(8, 8), (9, 8)]


@dicom
def test_flags_reach_the_reader(tmp_path, capsys):
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


def test_duplicates_are_found_when_exact_saved_again_or_flipped(tmp_path):
    draw = np.random.RandomState(0)
    images = []
    for _ in range(30):
        pixels = draw.randint(0, 256, (9, 9, 3)).astype(np.uint8)
        images.append(Image.fromarray(pixels).resize((128, 128)))
    images[3].save(tmp_path / "a.jpg", quality=40)
    images.append(images[0])
    images.append(Image.open(tmp_path / "a.jpg"))
    images.append(images[5].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    darker = images[7].resize((70, 70)).resize((128, 128)).point(lambda level: level * 0.8 + 9)
    images.append(darker)
    arrays = [torch.from_numpy(np.array(image.convert("RGB"))) for image in images]
    pixels = torch.stack(arrays).permute(0, 3, 1, 2)
    assert near_duplicates(pixels) == [(0, 30), (3, 31), (5, 32), (7, 33)]


def test_blank_pictures_have_no_duplicates():
    assert near_duplicates(torch.zeros(50, 3, 32, 32, dtype=torch.uint8)) == []
