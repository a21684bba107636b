"""Drawing: the pictures are keyed, the files are safe, and diffusers' own pipeline agrees."""

import errno
import hashlib
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_selector
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import lora
import sample
import train
from metrics import read_image, read_table
from sample import Settings

CPU = torch.device("cpu")
JOBS = [("a wound", 0), ("a wound", 1), ("a film", 0), ("", 3), ("a film", 7)]
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def loaded(base):
    return sample.load_base(base, CPU)


@pytest.fixture
def draw(base, run):
    """draw(out, flag, …): sample.py with the tiny random base and a step per picture."""

    def call(out, *flags):
        run(sample, "--base", base, "--steps", 1, "--out", out, *flags)

    return call


@pytest.fixture
def refusal(base, refused):
    """refusal(out, flag, …): the line with which the same command is refused."""

    def call(out, *flags):
        return refused(sample, "--base", base, "--steps", 1, "--out", out, *flags)

    return call


def pixels(images):
    return np.stack([np.asarray(image, int) for image in images])


def contents(folder):
    """{name: bytes} of the pictures and tables in a folder."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".jsonl"]
    return {path.name: path.read_bytes() for path in paths}


def manifest(folder):
    return read_table(folder / "manifest.csv")


def names(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def largest_difference(one, other):
    """Of the pictures of two folders, which have the same names."""
    assert names(one) and names(one) == names(other)
    differences = []
    for name in names(one):
        first, second = pixels([Image.open(one / name), Image.open(other / name)])
        differences.append(np.abs(first - second).max())
    return max(differences)


# ---------------------------------------------------------------- the sampler


@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
def test_the_same_pictures_whatever_the_batch_size(loaded, scheduler):
    settings = Settings(steps=4, scheduler=scheduler)
    one = pixels(sample.generate(loaded, JOBS, settings, batch_size=1))
    three = pixels(sample.generate(loaded, JOBS, settings, batch_size=3))
    assert np.abs(one - three).max() <= 1
    assert np.abs(one[0] - one[1]).max() > 5  # and they are different pictures


@pytest.fixture(scope="module")
def peer(base):
    """peer(job, settings, changed={}): the picture of diffusers' pipeline from our noise, seed 3.

    changed: values of the schedule's configuration.
    """
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    config = {**pipe.scheduler.config, "skip_prk_steps": True}

    def call(job, settings, changed=None):
        kind = getattr(diffusers, sample.SCHEDULERS[settings.scheduler])
        pipe.scheduler = kind.from_config({**config, **(changed or {})})
        generator = sample.generator(3, "sample", *job)
        noise = torch.randn(4, 8, 8, generator=generator)[None]
        result = pipe(
            job[0],
            negative_prompt=settings.negative_prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            latents=noise,
            height=64,
            width=64,
            generator=[generator],
        )
        return result.images[0]

    return call


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
def test_few_steps_of_every_scheduler_are_diffusers_own(loaded, peer, scheduler, steps):
    settings = Settings(steps, 5, scheduler)
    ours = next(sample.generate(loaded, [("a wound", 4)], settings, seed=3))
    theirs = peer(("a wound", 4), settings)
    assert np.abs(pixels([ours]) - pixels([theirs])).max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_guidance_and_negative_prompt_are_diffusers_own(loaded, peer, guidance):
    settings = Settings(steps=6, guidance_scale=guidance, negative_prompt="blur")
    ours = next(sample.generate(loaded, [("a wound", 4)], settings, seed=3))
    theirs = peer(("a wound", 4), settings)
    assert np.abs(pixels([ours]) - pixels([theirs])).max() <= 1


V = {"prediction_type": "v_prediction"}
TERMINAL = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("config", [V, TERMINAL], ids=["v", "zero terminal SNR"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm"])
def test_v_prediction_with_rescaled_guidance_is_diffusers_own(base, peer, scheduler, config):
    ours = sample.load_base(base, CPU)
    ours.schedule.update(config)
    rescaled = Settings(4, 12, scheduler, guidance_rescale=0.7)
    plain = Settings(4, 12, scheduler)
    with_rescaling = pixels(sample.generate(ours, [("a film", 0)], rescaled, seed=3))
    without = pixels(sample.generate(ours, [("a film", 0)], plain, seed=3))
    theirs = pixels([peer(("a film", 0), rescaled, config)])
    assert np.abs(with_rescaling - theirs).max() <= 1
    assert np.abs(with_rescaling - without).max() > 1


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
def test_the_bases_spacing_of_timesteps_is_obeyed(base, scheduler, spacing):
    ours = sample.load_base(base, CPU)
    ours.schedule["timestep_spacing"] = spacing
    steps = sample.make_scheduler(ours, Settings(steps=5, scheduler=scheduler)).timesteps.tolist()
    if spacing == "leading":
        assert steps[0] < 900
    else:
        assert steps[0] == 999
    if spacing == "trailing":
        assert steps[-1] == 199


def test_a_scheduler_that_knows_no_zero_terminal_snr_is_refused(base, capsys):
    ours = sample.load_base(base, CPU)
    ours.schedule.update(TERMINAL)
    with pytest.raises(SystemExit):
        next(sample.generate(ours, JOBS, Settings(scheduler="pndm")))
    assert "pndm" in capsys.readouterr().err


def test_low_memory_draws_the_same_with_half_the_rows(draw, tmp_path, monkeypatch):
    rows = []
    tiles = []
    denoise = sample.denoise
    decode = sample.decode

    def counting_denoise(base, noisy, *rest):
        rows.append(len(noisy))
        return denoise(base, noisy, *rest)

    def watching_decode(base, latents):
        tiles.append((base.vae.use_slicing, base.vae.use_tiling))
        return decode(base, latents)

    monkeypatch.setattr(sample, "denoise", counting_denoise)
    monkeypatch.setattr(sample, "decode", watching_decode)
    flags = ["--prompt", "a wound", "--num-images", 3, "--steps", 3]
    draw(tmp_path / "a", *flags)
    draw(tmp_path / "b", *flags, "--low-memory")
    assert rows == [6] * 3 + [3] * 6
    assert tiles == [(False, False), (True, True)]
    assert largest_difference(tmp_path / "a", tmp_path / "b") <= 1


def test_compile_is_asked_of_the_unet(draw, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(type(self).__name__))
    draw(tmp_path, "--prompt", "a wound", "--num-images", 1, "--compile")
    assert asked == ["UNet2DConditionModel"]


def test_a_unet_that_returns_nan_is_one_line(loaded, monkeypatch, capsys):
    monkeypatch.setattr(sample, "denoise", lambda base, noisy, *rest: noisy * float("nan"))
    with pytest.raises(SystemExit):
        next(sample.generate(loaded, JOBS, Settings(steps=1)))
    assert "NaN" in capsys.readouterr().err


def test_every_flag_of_drawing_reaches_the_sampler(draw, tmp_path, monkeypatch):
    calls = []
    generate = sample.generate

    def watching_generate(base, jobs, *how):
        calls.append(how)
        return generate(base, jobs, *how)

    monkeypatch.setattr(sample, "generate", watching_generate)
    model = ["--prompt", "x", "--num-images", 2, "--batch-size", 2, "--seed", 9, "--steps", 3]
    how = ["--guidance-scale", 4, "--scheduler", "euler", "--guidance-rescale", 0.5]
    draw(tmp_path, *model, *how, "--height", 64, "--width", 72, "--negative-prompt", "blur")
    assert calls == [(Settings(3, 4.0, "euler", 64, 72, "blur", 0.5, False), 2, 9)]


# ---------------------------------------------------------------- what a base is


def test_v_prediction_and_epsilon_targets_describe_the_same_noising(loaded):
    """x0 and noise recovered from the target are those that went in (Salimans & Ho 2022)."""
    latents = torch.randn(3, 4, 8, 8)
    noise = torch.randn(3, 4, 8, 8)
    t = torch.tensor([10, 500, 990])
    a = loaded.alphas_cumprod[t].double()[:, None, None, None]
    noisy, epsilon, _ = sample.noised_and_target(loaded, latents, noise, t)
    loaded.schedule["prediction_type"] = "v_prediction"
    _, v, _ = sample.noised_and_target(loaded, latents, noise, t)
    loaded.schedule["prediction_type"] = "epsilon"
    assert torch.equal(epsilon, noise)
    expected = a.sqrt() * latents + (1 - a).sqrt() * noise
    torch.testing.assert_close(noisy.double(), expected, rtol=1e-5, atol=1e-5)
    recovered = (a.sqrt() * noisy - (1 - a).sqrt() * v).float()
    torch.testing.assert_close(recovered, latents, rtol=1e-4, atol=1e-4)


def test_the_latents_implied_by_v_are_those_that_went_in(sd21):
    base = sample.load_base(sd21, CPU)
    latents = torch.randn(3, 4, 8, 8)
    t = torch.tensor([10, 500, 990])
    noisy, v, _ = sample.noised_and_target(base, latents, torch.randn(3, 4, 8, 8), t)
    implied = sample.predicted_latents(base, noisy, v, t)
    torch.testing.assert_close(implied, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, mean", [("epsilon", 0.917), ("v_prediction", 0.294)])
def test_min_snr_weights_have_the_published_shape_and_mean_one(loaded, kind, mean):
    t = torch.arange(loaded.num_timesteps)
    x = torch.zeros(len(t), 1, 1, 1)
    a = loaded.alphas_cumprod.double()
    snr = a / (1 - a)
    expected = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    loaded.schedule["prediction_type"] = kind
    weight = sample.noised_and_target(loaded, x, x, t, snr_gamma=5.0)[2]
    unweighted = sample.noised_and_target(loaded, x, x, t)[2]
    loaded.schedule["prediction_type"] = "epsilon"
    assert torch.equal(unweighted, torch.ones(len(t)))
    assert abs(expected.mean().item() - mean) < 1e-3  # the value in the literature's table
    torch.testing.assert_close(weight.double(), expected / expected.mean(), rtol=1e-4, atol=1e-6)
    assert abs(weight.mean().item() - 1) < 1e-4


def test_noise_outweighs_the_signal_from_the_blur_timestep_on(loaded):
    step = sample.blur_timestep(loaded)
    assert loaded.alphas_cumprod[step - 1] >= 0.5 > loaded.alphas_cumprod[step]


def test_sdxl_is_told_height_before_width(sdxl, monkeypatch):
    base = sample.load_base(sdxl, CPU)
    cond = sample.encode_text(base, ["x"])
    seen = []

    def forward(noisy, timesteps, added_cond_kwargs, **_):
        seen.append(added_cond_kwargs["time_ids"].tolist())
        return (noisy,)

    monkeypatch.setattr(base.unet, "forward", forward)
    sample.denoise(base, torch.zeros(1, 4, 8, 16), torch.tensor([5]), cond)
    assert seen == [[[64, 128, 0, 0, 64, 128]]]  # diffusers' order


# ---------------------------------------------------------------- files


def test_a_contact_sheet_gives_a_caption_a_row_and_cuts_long_ones_in_the_middle():
    pictures = [Image.new("RGB", size, "red") for size in [(64, 64), (64, 32)] * 3]
    captions = ["a foot"] * 3 + ["a hand"] * 3
    names = [str(i) for i in range(6)]
    sheet = sample.contact_sheet(list(zip(pictures, captions, names, strict=True)))
    assert sheet.size == (3 * 164 + 4, 2 * 208 + 4)
    assert sheet.getpixel((5, 5)) == (255, 0, 0)
    assert sheet.getpixel((169, 100)) == (255, 255, 255)  # below a wide picture: none is cut
    others = [f"{caption} {i}" for i, caption in enumerate(captions)]
    cells = list(zip(pictures, others, names, strict=True))
    assert sample.contact_sheet(cells).size == (6 * 164 + 4, 208 + 4)
    pen = ImageDraw.Draw(sheet)
    words = sample.in_lines("a chest X-ray with pneumonia " * 9 + "on the left", 2, pen)
    first, second = words.split("\n")
    assert first.startswith("a chest X-ray with") and second.endswith("on the left")
    assert "…" in words
    for caption in (
        words,
        sample.in_lines("a chest X-ray with Pneumonia, Viral and Varicella", 2, pen),
    ):
        assert max(map(pen.textlength, caption.split("\n"))) < 160  # none runs into the next column
    assert sample.in_lines("x" * 200, 1, pen).count("x") > 20 and sample.in_lines("", 2, pen) == ""


def test_a_run_writes_pictures_with_their_settings_a_manifest_and_a_grid(draw, tmp_path):
    prompts = ["--prompt", "a wound", "--prompt", "a chest film"]
    draw(tmp_path, *prompts, "--num-images", 3, "--label", "ulcer", "--grid", "--grey")
    rows = manifest(tmp_path)
    expected = [f"{stem}-000{i}.png" for stem in ("a-chest-film", "a-wound") for i in range(3)]
    assert [row["file"] for row in rows] == expected
    assert list(rows[0]) == sample.MANIFEST
    assert rows[0]["prompt"] == "a chest film"
    assert rows[0]["label"] == "ulcer"
    for row in rows:
        image = Image.open(tmp_path / row["file"])
        assert (image.mode, image.size, image.info["synthetic"]) == ("L", (64, 64), "true")
        assert image.info["parameters"].startswith(row["prompt"] + "\nNegative prompt: ")
        assert "Seed: 0" in image.info["parameters"]
        content = (tmp_path / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
    assert Image.open(tmp_path / "grid.png").width > 64
    others = {"grid.png", "manifest.csv", "drawn.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {*expected, *others}


def test_a_grid_shows_64_pictures_and_says_of_how_many(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    records = [{"file": "x.png", "prompt": "a wound", "reason": "", "attempts": 1}] * 65
    args = SimpleNamespace(out=tmp_path, grid=True, selector=None, reference=None, run=None)
    sample.finish(records, 65, [tmp_path / "lora.safetensors"], args)
    assert "grid.png shows the first 64 of 65" in capsys.readouterr().out
    assert Image.open(tmp_path / "grid.png").size == (8 * 164 + 4, 8 * 208 + 4)


def test_the_same_command_again_draws_only_what_is_missing(draw, tmp_path, capsys):
    flags = ["--prompt", "a wound", "--num-images", 4]
    draw(tmp_path, *flags)
    before = contents(tmp_path)
    (tmp_path / "a-wound-0001.png").unlink()
    capsys.readouterr()
    draw(tmp_path, *flags)
    assert "1 drawn now, 3 already there" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_a_finished_picture_is_not_opened(draw, tmp_path, capsys):
    flags = ["--prompt", "a wound", "--num-images", 2]
    draw(tmp_path, *flags)
    for name in names(tmp_path):
        (tmp_path / name).write_bytes(b"x")
    draw(tmp_path, *flags)
    assert "0 drawn now, 2 already there" in capsys.readouterr().out


def test_a_run_killed_before_its_manifest_is_continued_from_its_log(
    draw, tmp_path, monkeypatch, capsys
):
    flags = ["--prompt", "a wound", "--num-images", 4]
    draw(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(sample.Manifest, "write", lambda self: None)
        draw(tmp_path / "killed", *flags)
    (tmp_path / "killed" / "a-wound-0002.png").unlink()  # killed between the log and this picture
    with open(tmp_path / "killed" / "drawn.jsonl", "a") as log:
        log.write('"a record"\n{"file": null}\n{"file": "a-wou')  # the machine crashed
    assert not (tmp_path / "killed" / "manifest.csv").exists()
    capsys.readouterr()
    draw(tmp_path / "killed", *flags)
    assert "1 drawn now, 3 already there" in capsys.readouterr().out
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_other_settings_in_the_same_folder_are_refused_unless_overwrite(draw, tmp_path, refusal):
    flags = ["--prompt", "a wound", "--num-images", 2]
    draw(tmp_path, *flags)
    before = contents(tmp_path)
    assert "other settings" in refusal(tmp_path, *flags, "--seed", 1)
    assert contents(tmp_path) == before
    draw(tmp_path, *flags, "--seed", 1, "--overwrite")
    assert names(tmp_path) == ["a-wound-0000.png", "a-wound-0001.png"]
    assert contents(tmp_path)["a-wound-0000.png"] != before["a-wound-0000.png"]
    assert {row["seed"] for row in manifest(tmp_path)} == {"1"}


def test_other_prompts_are_added_to_the_folder(draw, tmp_path, capsys):
    draw(tmp_path, "--prompt", "a wound", "--num-images", 1)
    draw(tmp_path, "--prompt", "a film", "--num-images", 1, "--seed", 4)
    assert capsys.readouterr().err.count("also holds 1 images of other commands") == 1
    assert [(row["prompt"], row["seed"]) for row in manifest(tmp_path)] == [
        ("a film", "4"),
        ("a wound", "0"),
    ]


def test_a_base_trained_on_is_another_setting(base, tmp_path, run, refused):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    flags = ["--base", copy, "--prompt", "a wound", "--num-images", 1, "--steps", 1]
    flags += ["--out", tmp_path / "out"]
    run(sample, *flags)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.1 for name, value in load_file(weights).items()}, weights)
    assert "other settings" in refused(sample, *flags)
    shutil.copytree(base, copy, dirs_exist_ok=True)
    run(sample, *flags)  # the same again
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    assert "other settings" in refused(sample, *flags)


def test_another_format_replaces_and_an_overwrite_can_be_interrupted(
    draw, refusal, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("pydicom")
    flags = ["--prompt", "a wound", "--num-images", 3, "--batch-size", 1]
    draw(tmp_path, *flags)
    assert "other settings" in refusal(tmp_path, *flags, "--format", "dcm")

    def interrupted(*_):
        raise KeyboardInterrupt

    flags += ["--format", "dcm"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "draw", interrupted)
        draw(tmp_path, *flags, "--overwrite")
    assert len(manifest(tmp_path)) == 3  # nothing is drawn: the old pictures are still there
    draw(tmp_path, *flags, "--overwrite")
    expected = [*(f"a-wound-000{n}.dcm" for n in range(3)), "manifest.csv"]
    assert sorted(contents(tmp_path)) == expected
    (tmp_path / "a-wound-0000.txt").write_text("a caption of somebody's")
    draw(tmp_path, *flags)
    assert "0 drawn now, 3 already there" in capsys.readouterr().out
    assert (tmp_path / "a-wound-0000.txt").exists()


def test_somebody_elses_picture_is_not_overwritten(draw, refusal, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a-wound-0000.png")
    flags = ["--prompt", "a wound", "--num-images", 1]

    message = refusal(tmp_path, *flags)

    assert "a-wound-0000.png" in message
    assert Image.open(tmp_path / "a-wound-0000.png").size == (9, 9)
    draw(tmp_path, *flags, "--overwrite")
    assert Image.open(tmp_path / "a-wound-0000.png").size == (64, 64)


@pytest.mark.parametrize("name", ["sore/1.png", "metadata.csv", "manifest.csv"])
def test_a_folder_of_somebody_elses_data_stays_as_it_is(name, refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_base", lambda *_: pytest.fail("a model was loaded"))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(path, "PNG")
    assert f"{path} is not of sample.py" in refusal(tmp_path, "--prompt", "a wound")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_somebody_elses_manifest_is_refused(refusal, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    (tmp_path / "manifest.csv").write_text("file,text\nx.png,a wound\n")
    assert "another --out" in refusal(tmp_path, "--prompt", "a wound")
    assert (tmp_path / "manifest.csv").read_text() == "file,text\nx.png,a wound\n"


def test_a_prompt_cannot_leave_the_folder(draw, tmp_path):
    prompts = ["--prompt", "../../etc/x", "--prompt", "", "--prompt", "🦶"]
    draw(tmp_path / "out", *prompts, "--num-images", 1)
    assert names(tmp_path / "out") == [
        "etc-x-0000.png",
        "prompt-0000.png",
        "unconditional-0000.png",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("grey", [[], ["--grey"]])
def test_dicom_holds_the_same_picture_and_its_settings(grey, draw, refusal, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    flags = ["--prompt", "größe 🦶, a wound", "--num-images", 2, *grey]
    draw(tmp_path / "png", *flags)
    draw(tmp_path / "dcm", *flags, "--format", "dcm", "--grid")
    for name in names(tmp_path / "png"):
        path = tmp_path / "png" / name
        dicom = (tmp_path / "dcm" / name).with_suffix(".dcm")
        assert np.array_equal(pixels([read_image(path)]), pixels([read_image(dicom)]))
        inside = pydicom.dcmread(dicom).private_block(0x0099, "medlora")[1].value
        assert inside == Image.open(path).info["parameters"]
    line = refusal(tmp_path / "dcm", *flags, "--format", "dcm", "--steps", 3)
    assert "other settings" in line


def test_a_dicom_file_says_that_it_is_synthetic_and_of_nobody(draw, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    draw(tmp_path, "--prompt", "a wound", "--num-images", 2, "--format", "dcm")
    first, second = [pydicom.dcmread(path) for path in sorted(tmp_path.glob("*.dcm"))]
    assert first.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    assert list(first.ImageType) == ["DERIVED", "SECONDARY", "OTHER"]
    for name in ("SeriesDescription", "ImageComments", "PatientName"):
        assert "SYNTHETIC" in str(first[name].value)
    for name in ("PatientBirthDate", "PatientSex", "StudyDate"):
        assert first[name].value == ""
    assert first.ConversionType == "SYN"
    for name in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID"):
        assert first[name].value != second[name].value
        assert len(first[name].value) <= 64
    uids = {first.SOPInstanceUID, first.StudyInstanceUID, first.SeriesInstanceUID}
    assert len(uids) == 3
    assert all(uid.is_valid for uid in uids)


def test_a_missing_package_is_said_before_anything_is_drawn(refusal, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    line = refusal(tmp_path / "out", "--prompt", "x", "--format", "dcm")
    assert "pip install pydicom" in line
    assert not (tmp_path / "out").exists()


FULL_DISK = OSError(errno.ENOSPC, "No space left")


@pytest.mark.parametrize("error, status", [(FULL_DISK, 2), (KeyboardInterrupt(), 130)])
def test_what_was_drawn_before_a_full_disk_or_an_interrupt_stays(
    error, status, draw, tmp_path, monkeypatch, capsys
):
    flags = ["--prompt", "a wound", "--num-images", 6, "--batch-size", 1]
    draw(tmp_path / "whole", *flags)
    calls = []
    main = sample.main

    def failing_encoder(image, parameters, marks):
        calls.append(parameters)
        if len(calls) == 4:
            raise error
        return sample.encode_png(image, parameters, marks)

    monkeypatch.setattr(sample, "main", lambda args: sample.run_script(main, lambda: args))
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setitem(sample.ENCODERS, "png", failing_encoder)
        draw(tmp_path / "out", *flags)
    assert stop.value.code == status
    assert "Traceback" not in capsys.readouterr().err
    assert 3 <= len(names(tmp_path / "out")) < 6
    assert [row["file"] for row in manifest(tmp_path / "out")] == names(tmp_path / "out")
    draw(tmp_path / "out", *flags)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_two_processes_share_the_images_and_leave_what_one_leaves(
    batch_size, draw, tmp_path, monkeypatch
):
    flags = ["--prompt", "a wound", "--prompt", "a film", "--num-images", 5, "--steps", 2]
    one = tmp_path / "one"
    two = tmp_path / "two"
    draw(one, *flags)
    monkeypatch.setattr(sample, "WORLD", 2)
    for rank, count in ((1, 5), (0, 10)):
        monkeypatch.setattr(sample, "RANK", rank)
        draw(two, *flags, "--batch-size", batch_size)
        assert len(names(two)) == count
        assert (two / "manifest.csv").exists() == (rank == 0)
    assert largest_difference(one, two) <= 1  # kernels differ with the batch size, by a grey level
    assert [row["file"] for row in manifest(two)] == names(one)
    assert sorted(contents(two)) == sorted(contents(one))


def test_what_two_killed_processes_left_is_continued_by_one(draw, tmp_path, monkeypatch, capsys):
    flags = ["--prompt", "a wound", "--num-images", 4]
    with monkeypatch.context() as patch:
        patch.setattr(sample, "WORLD", 2)
        patch.setattr(sample, "RANK", 1)
        draw(tmp_path, *flags)
    assert len(names(tmp_path)) == 2
    draw(tmp_path, *flags)
    assert "2 drawn now, 2 already there" in capsys.readouterr().out
    assert len(manifest(tmp_path)) == 4


def test_a_pictures_bits_do_not_depend_on_its_neighbours(draw, tmp_path):
    flags = ["--prompt", "a wound", "--prompt", "a film", "--num-images", 5, "--steps", 3]
    flags += ["--batch-size", 4]
    draw(tmp_path, *flags)
    before = contents(tmp_path)
    for lost in ("a-wound-0001", "a-film-0000", "a-film-0002", "a-film-0003", "a-film-0004"):
        (tmp_path / f"{lost}.png").unlink()
    draw(tmp_path, *flags)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- prompts


def read_prompts(*flags, adapters=()):
    """[(caption, label, modality)] as these flags ask for them."""
    args = sample.parse_args([str(flag) for flag in flags])
    prompts = sample.read_prompts(args, adapters)
    return [(row.caption, row.label, row.fields["modality"]) for row in prompts]


def test_a_label_is_told_only_where_all_rows_of_a_caption_agree(tmp_path):
    for n in range(3):
        Image.new("RGB", (64, 64), (n, 9, 9)).save(tmp_path / f"{n}.png")
    rows = ["0.png,one,calm,x", "1.png,two  words,calm,x", "2.png,one,sore,x"]
    (tmp_path / "t.csv").write_text("file_name,text,label,modality\n" + "\n".join(rows))
    prompts = read_prompts("--labels-from", tmp_path / "t.csv")
    assert prompts == [("one", "", "x"), ("two words", "calm", "x")]


def test_the_label_that_is_given_comes_before_that_of_the_row(images):
    data = ["--labels-from", images, "--prompt", "a {label} foot"]
    assert read_prompts(*data) == [("a calm foot", "calm", ""), ("a sore foot", "sore", "")]
    assert read_prompts(*data, "--label", "x") == [
        ("a calm foot", "x", ""),
        ("a sore foot", "x", ""),
    ]


def test_a_table_is_no_file_of_prompts(refusal, tmp_path):
    (tmp_path / "p.csv").write_text("prompt\na wound\n")
    line = refusal(tmp_path / "out", "--prompts", tmp_path / "p.csv")
    assert "for a table give --labels-from" in line


def test_prompts_come_from_a_text_file_or_a_data_set_and_labels_travel(draw, images, tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("a wound\n\nWound: größe ø\nA wound!\n", encoding="utf-8")
    draw(tmp_path / "a", "--prompts", text, "--num-images", 1)
    assert len(names(tmp_path / "a")) == 3  # two prompts with one slug: two files
    assert "a-wound-0000.png" in names(tmp_path / "a")
    flags = ["--labels-from", images, "--prompt", "a {label} foot", "--num-images", 1]
    draw(tmp_path / "b", *flags)
    prompts = [(row["prompt"], row["label"]) for row in manifest(tmp_path / "b")]
    assert prompts == [("a calm foot", "calm"), ("a sore foot", "sore")]


def test_a_prompt_with_fields_is_a_format_of_the_captions_of_a_table(tmp_path):
    for n in range(2):
        Image.new("RGB", (64, 64), (n, 9, 9)).save(tmp_path / f"{n}.png")
    table = tmp_path / "P.CSV"
    table.write_text("path,Text,Modality,label\n0.png,a disc,Fundus,x\n1.png,an organ,CT,y\n")
    flags = ["--labels-from", table, "--prompt", "{Modality}: {Text}"]
    assert read_prompts(*flags) == [
        ("Fundus: a disc", "x", "Fundus"),
        ("CT: an organ", "y", "CT"),
    ]


def test_formats_that_say_nothing_are_refused(refusal, images, tmp_path):
    text = tmp_path / "p.txt"
    text.write_text("a disc\n")
    out = tmp_path / "out"
    assert "--labels-from DATA" in refusal(out, "--prompt", "a {label} foot")
    two = ["--labels-from", images, "--prompt", "{label}", "--prompt", "{label} foot"]
    assert "give one" in refusal(out, *two)
    both = ["--prompts", text, "--labels-from", images]
    assert "not allowed with" in refusal(out, *both)
    assert "has labels but no captions" in refusal(out, "--labels-from", images)


def test_the_column_of_captions_may_be_named_and_a_set_without_any_is_refused(refusal, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    (tmp_path / "t.csv").write_text("path,befund,text\n0.png,ein Fuss,a foot\n")
    flags = ["--labels-from", tmp_path / "t.csv"]
    assert read_prompts(*flags, "--caption-column", "befund") == [("ein Fuss", "", "")]
    (tmp_path / "t.csv").write_text("path,befund\n0.png,ein Fuss\n")
    assert "give --prompt or --caption-column" in refusal(tmp_path / "out", *flags)


def test_captions_by_the_format_of_the_adapters_run(images):
    about = {"prompt": "a {label} foot"}
    adapter = sample.Adapter("a.safetensors", 1.0, {}, about, {})
    prompts = read_prompts("--labels-from", images, adapters=[adapter])
    assert prompts == [("a calm foot", "calm", ""), ("a sore foot", "sore", "")]


def test_the_format_of_a_run_comes_before_the_captions_of_the_table(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text("path,Text,modality,label\n0.png,a disc,Fundus,x\n")
    flags = ["--labels-from", tmp_path]
    for prompt, expected in (("{modality}: {Text}", "Fundus: a disc"), ("a retina", "a disc")):
        adapter = sample.Adapter("a.safetensors", 1.0, {}, {"prompt": prompt}, {})
        assert read_prompts(*flags, adapters=[adapter]) == [(expected, "x", "Fundus")]
    assert capsys.readouterr().err.count("captions as in training") == 1
    prompts = read_prompts(*flags, "--prompt", "{caption}", adapters=[adapter])
    assert prompts == [("a disc", "x", "Fundus")]


def test_without_prompts_those_of_the_adapters_run_are_drawn():
    flags = ["--lora", "a.safetensors"]
    of_training = sample.Adapter("a", 1.0, {}, {"prompt": "a foot"}, {})
    of_validation = sample.Adapter("b", 1.0, {}, {"val_prompts": ["x", "y"], "prompt": "z"}, {})
    prompts = read_prompts(*flags, adapters=[of_training, of_validation])
    assert [caption for caption, *_ in prompts] == ["a foot", "x", "y"]


def test_a_long_prompt_has_a_short_file_name(draw, tmp_path):
    words = [f"w{i}" for i in range(500)]
    draw(tmp_path, "--prompt", " ".join(words), "--num-images", 1)
    row = manifest(tmp_path)[0]
    assert row["prompt"].split() == words
    assert len(row["file"]) < 80


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "x", "--steps", "0"], "--steps: 0"),
        (["--prompt", "x", "--height", "65"], "--height: 65"),
        (["--prompt", "x", "--steps", "999"], "--steps: 999"),
        (["--prompt", "x", "--guidance-rescale", "1.5"], "--guidance-rescale: 1.5"),
        (["--prompt", "x", "--guidance-scale", "nan"], "--guidance-scale: nan"),
        (["--prompt", "x", "--scheduler", "magic"], "magic"),
        (["--num-images", "2"], "nothing to draw"),
        (["--prompts", "no-such-file.txt"], "no-such-file.txt"),
        (["--prompt", "x", "--lora", "no-such-file.safetensors"], "no-such-file.safetensors"),
        (["--prompt", "x", "--base", "no/such/folder"], "no/such/folder"),
        (["--prompt", "x", "--device", "cuda:99"], "cuda:99"),
        (["--prompt", "x", "--min-quality", "0.5"], "needs --selector"),
        (["--prompt", "x", "--max-lpips", "0.3"], "needs --reference"),
    ],
)
def test_bad_flags_are_one_line(flags, message, base, tmp_path, refused):
    assert message in refused(sample, "--base", base, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_flag_file_gives_flags_and_the_command_line_overrides_it(tmp_path, monkeypatch):
    text = "# a recipe\n\n--steps 7\n--prompt @ 9 o'clock, with = and spaces\n--grid\n--seed=3\n"
    (tmp_path / "try.txt").write_text(text + "--negative-prompt -blurry, grey\n")
    monkeypatch.setattr("sys.argv", ["sample.py", f"@{tmp_path / 'try.txt'}", "--seed", "5"])
    args = sample.parse_args()
    assert args.prompt == ["@ 9 o'clock, with = and spaces"]
    assert (args.steps, args.grid, args.seed) == (7, True, 5)
    assert args.negative_prompt == "-blurry, grey"


# ---------------------------------------------------------------- what a run of train.py left


WORD = ["--token", "<sore>", "--prompt", "a <sore> foot", "--lr", 0.5]


@pytest.mark.parametrize(
    "method, flags, result",
    [
        ("lora", ["--text-lora", "--rank", 2, "--alpha", 5, "--lr", 0.03], "lora.safetensors"),
        ("textual-inversion", WORD, "embeddings.safetensors"),
        ("full", ["--lr", 0.01], "model"),
    ],
)
def test_a_checkpoint_draws_what_the_runs_own_result_draws(
    method, flags, result, base, images, tmp_path, run
):
    prompt = "a <sore> foot" if method == "textual-inversion" else "a foot"
    training = ["--base", base, "--data", images, "--prompt", "a foot", "--steps", 4]
    training += ["--val-samples", 0, "--val-split", 0, "--method", method, *flags]
    run(train, *training, "--out", tmp_path / "run")
    how = ["--num-images", 2, "--steps", 3, "--precision", "fp32"]
    checkpoint = tmp_path / "run" / "checkpoints" / "latest.pt"
    kind = "--base" if method == "full" else "--lora"
    run(sample, "--checkpoint", checkpoint, *how, "--out", tmp_path / "a")
    own = [kind, tmp_path / "run" / result, "--prompt", prompt]
    run(sample, *own, *how, "--out", tmp_path / "b")
    run(sample, "--base", base, "--prompt", prompt, *how, "--out", tmp_path / "plain")
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    assert largest_difference(tmp_path / "a", tmp_path / "plain") > 0
    row = manifest(tmp_path / "a")[0]
    assert (row["prompt"], row["base"]) == (prompt, base)
    assert row["lora"].endswith("latest.pt:1")


def test_what_is_no_checkpoint_is_one_line(tmp_path, refused):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": 1, "args": Evil()}, tmp_path / "pickle.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "foreign.pt").read_bytes()[:300])
    for name in ("pickle.pt", "foreign.pt", "torn.pt", "absent.pt", "."):
        flags = ["--checkpoint", tmp_path / name, "--prompt", "x", "--out", tmp_path / "out"]
        assert "--checkpoint" in refused(sample, *flags)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def write_adapter(path, tensors, **metadata):
    lora.save(path, tensors, {"rank": 1, "alpha": 1, **metadata})
    return path


def write_pair(path, a, b):
    return write_adapter(path, {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b})


def write_word(path, word, value):
    return write_adapter(path, {word: torch.full((2, 32), value)}, tokens=word)


def test_an_adapter_draws_at_the_size_it_was_trained_at(draw, tmp_path):
    tensors = {"<sore>": torch.zeros(1, 32)}
    word = write_adapter(tmp_path / "w.safetensors", tensors, tokens="<sore>", resolution=96)
    draw(tmp_path, "--lora", word, "--prompt", "x", "--num-images", 1, "--width", 64)
    assert Image.open(tmp_path / "x-0000.png").size == (64, 96)


def test_an_adapter_of_grey_images_draws_grey_unless_colour_is_asked_for(draw, tmp_path, capsys):
    tensors = {"<grey>": torch.zeros(1, 32)}
    grey = write_adapter(tmp_path / "g.safetensors", tensors, tokens="<grey>", grey=True)
    other = write_word(tmp_path / "o.safetensors", "<other>", 0.0)
    modes = {}
    for name, flags in (("grey", []), ("forced", ["--color"]), ("mixed", ["--lora", other])):
        draw(tmp_path / name, "--lora", grey, "--prompt", "a film", "--num-images", 1, *flags)
        modes[name] = Image.open(tmp_path / name / "a-film-0000.png").mode

    assert modes == {"grey": "L", "forced": "RGB", "mixed": "RGB"}
    assert capsys.readouterr().err.count("for colour give --color") == 1


def test_adapters_add_up(draw, tmp_path):
    ramp = torch.arange(32.0) / 9
    ones = torch.ones(32)
    one = write_pair(tmp_path / "1.safetensors", ones[None], ones[:, None])
    two = write_pair(tmp_path / "2.safetensors", ramp[None], ones[:, None])
    weights = torch.tensor([[0.5, 2.0]]).repeat(32, 1)
    both = write_pair(tmp_path / "3.safetensors", torch.stack([ones, ramp]), weights)
    flags = ["--prompt", "a foot", "--num-images", 1, "--steps", 2]
    draw(tmp_path / "a", *flags, "--lora", f"{one}:0.5", "--lora", f"{two}:2")
    draw(tmp_path / "b", *flags, "--lora", both)
    # 0.5 A + 2 B is rounded in another order
    assert largest_difference(tmp_path / "a", tmp_path / "b") <= 1


def test_new_words_of_several_adapters_are_all_known(draw, tmp_path):
    sore = write_word(tmp_path / "sore.safetensors", "<sore>", 0.3)
    calm = write_word(tmp_path / "calm.safetensors", "<calm>", -0.3)
    flags = ["--prompt", "a <sore> and <calm> foot", "--num-images", 1, "--lora", sore]
    draw(tmp_path / "a", *flags, "--lora", calm)
    draw(tmp_path / "b", *flags)
    assert largest_difference(tmp_path / "a", tmp_path / "b") > 0


def test_adapters_that_exclude_each_other_are_refused(refusal, tmp_path):
    sore = write_word(tmp_path / "sore.safetensors", "<sore>", 0.3)
    out = tmp_path / "out"
    flags = ["--prompt", "x"]
    assert "<sore>" in refusal(out, *flags, "--lora", sore, "--lora", sore)
    assert "cannot have a weight" in refusal(out, *flags, "--lora", f"{sore}:0.5")


def test_a_weight_below_zero_takes_an_adapter_away(draw, tmp_path):
    ramp = torch.arange(32.0)[None]
    up = write_pair(tmp_path / "up.safetensors", ramp, torch.full((32, 1), 1.0))
    down = write_pair(tmp_path / "down.safetensors", ramp, torch.full((32, 1), -0.5))
    flags = ["--prompt", "x", "--num-images", 1, "--steps", 2]
    draw(tmp_path / "a", *flags, "--lora", f"{up}:-0.5")
    draw(tmp_path / "b", *flags, "--lora", down)
    draw(tmp_path / "c", *flags, "--lora", f"{up}:0.5")
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    assert largest_difference(tmp_path / "a", tmp_path / "c") > 0


# ---------------------------------------------------------------- quality control


FOOT = ["--prompt", "a foot", "--height", 64, "--width", 64]


@pytest.fixture
def quality_of(images, tmp_path, run):
    """quality_of(folder): what filter.py's own run gives the pictures, by file name."""
    import filter as filter_script

    def call(folder, selector):
        flags = ["--reference", images, "--selector", selector, "--min-quality", 0, "--dry-run"]
        run(filter_script, folder, *flags, "--out", tmp_path / "judged")
        rows = read_table(tmp_path / "judged" / "decisions.csv")
        return {row["file"]: float(row["quality"]) for row in rows}

    return call


def test_what_the_selector_refuses_is_drawn_again_and_filter_agrees(
    draw, quality_of, tmp_path, capsys
):
    selector = write_selector(tmp_path / "s.safetensors")
    plain = tmp_path / "plain"
    out = tmp_path / "out"
    flags = [*FOOT, "--num-images", 12, "--steps", 2]
    draw(plain, *flags)
    quality = list(quality_of(plain, selector).values())
    limit = np.round(np.median(quality), 4)  # so that half of the first drawings fail
    flags += ["--selector", selector, "--min-quality", limit]
    draw(out, *flags, "--max-attempts", 2, "--grid")
    rows = manifest(out)
    first = [row for row in rows if row["attempts"] == "1"]
    assert len(first) == sum(value >= limit for value in quality)
    assert {row["attempts"] for row in rows} == {"1", "2"}
    for row in first:  # the picture of a run without control
        stem = row["file"].split("_quality_")[0]
        assert row["file"] == f"{stem}_quality_{float(row['quality']):.2f}.png"
        ours, theirs = pixels([Image.open(out / row["file"]), Image.open(plain / f"{stem}.png")])
        assert np.array_equal(ours, theirs)
    refused = names(out / "refused")
    assert len(refused) + len(rows) == 12
    assert f"{len(rows)} of 12 passed" in capsys.readouterr().out
    assert all(value >= limit for value in quality_of(out, selector).values())

    # the same command draws only what is missing
    before = {path: path.stat().st_mtime_ns for path in out.rglob("a-foot*.png")}
    sorted(before)[0].unlink()
    draw(out, *flags, "--max-attempts", 2)
    assert "1 drawn now, 11 already there" in capsys.readouterr().out
    assert set(before) == set(out.rglob("a-foot*.png"))
    assert sum(path.stat().st_mtime_ns != then for path, then in before.items()) == 1

    # with more attempts, what was refused is drawn again
    draw(out, *flags, "--max-attempts", 40)
    assert len(manifest(out)) + len(names(out / "refused")) == 12
    assert len(manifest(out)) > len(rows)


def test_pictures_are_compared_with_real_ones_as_filter_does(draw, images, tmp_path, capsys):
    flags = [*FOOT, "--num-images", 6, "--reference", images, "--out", tmp_path]
    draw(tmp_path, *flags, "--min-ssim", 0.99, "--max-attempts", 1)
    out = capsys.readouterr().out
    assert "0 of 6 passed (6 attempts)" in out
    assert "--min-ssim 0.99 would refuse" in out
    assert not manifest(tmp_path)
    draw(tmp_path, *flags, "--min-ssim", -1, "--drop-copies", "--overwrite")
    assert len(manifest(tmp_path)) == 6
    assert not names(tmp_path / "refused")


def test_real_images_are_prepared_as_the_adapters_run_did(draw, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "draw", lambda *_: sys.exit())  # the control is there
    references = []
    measure = sample.measure_reference

    def keep(rows, pixels, *how, **limits):
        references.append(pixels)
        return measure(rows, pixels, *how, **limits)

    monkeypatch.setattr(sample, "measure_reference", keep)
    (tmp_path / "real").mkdir()
    for i in range(4):
        wide = np.random.RandomState(i).randint(50, 255, (64, 128, 3)).astype(np.uint8)
        Image.fromarray(wide).save(tmp_path / "real" / f"{i}.png")
    word = {"<sore>": torch.zeros(1, 32)}
    adapter = write_adapter(tmp_path / "w.safetensors", word, tokens="<sore>", crop="pad")
    flags = [*FOOT, "--lora", adapter, "--reference", tmp_path / "real", "--min-ssim", -1]
    for more in ([], ["--crop", "center"]):
        with pytest.raises(SystemExit):
            draw(tmp_path / "out", *flags, *more)
    padded, cut = references
    assert (padded[:, :, 0] == 0).all()
    assert (cut >= 40).all()
    notes = [line for line in capsys.readouterr().err.splitlines() if "as in its training" in line]
    assert notes == [f"{adapter}: real images are prepared as in its training: crop pad"]


@pytest.mark.parametrize("more, calibrate", [([], 0.05), (["--min-ssim", 0.5], None)])
def test_pictures_are_judged_by_what_the_run_was_trained_on(
    more, calibrate, draw, images, tmp_path, monkeypatch, make_run
):
    asked = []

    def measure(rows, pixels, device, **limits):
        asked.append((rows, limits))
        return SimpleNamespace(summary=[])

    monkeypatch.setattr(sample, "measure_reference", measure)
    monkeypatch.setattr(sample, "draw", lambda *_: sys.exit())
    folder = make_run({f"calm/{n}.png": "train" if n < 10 else "val" for n in range(0, 24, 2)})
    with pytest.raises(SystemExit):
        draw(tmp_path / "out", *FOOT, "--reference", images, "--run", folder, *more)
    ((rows, limits),) = asked
    assert sorted(row.file_name for row in rows) == [f"calm/{n}.png" for n in range(0, 10, 2)]
    assert limits["calibrate"] == calibrate


@pytest.mark.parametrize("name", ["", "/lora.safetensors"])
def test_what_to_type_next_names_the_run_of_the_adapter(name, draw, tmp_path, capsys, make_run):
    folder = make_run({"a.png": "val"}, data="wounds")
    word = {"<sore>": torch.zeros(1, 32)}
    write_adapter(f"{folder}/lora.safetensors", word, tokens="<sore>")
    draw(tmp_path / "out", *FOOT, "--lora", folder + name, "--num-images", 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"evaluate.py wounds {tmp_path / 'out'} --run {folder}")


def test_copies_of_real_images_are_refused_where_asked(draw, images, tmp_path, monkeypatch):
    real = [Image.open(f"{images}/calm/{n}.png") for n in (0, 2, 4)]

    def copies(base, jobs, *how):
        for _, number in jobs:
            yield real[number]

    monkeypatch.setattr(sample, "generate", copies)
    flags = ["--reference", images, "--min-ssim", -1, "--drop-copies", "--max-attempts", 1]
    draw(tmp_path, "--prompt", "x", "--num-images", 3, *flags)
    assert not manifest(tmp_path)
    assert len(names(tmp_path / "refused")) == 3


def test_both_scores_stand_in_a_files_name_and_the_picture_is_known_again(tmp_path):
    args = SimpleNamespace(out=tmp_path, format="png", selector="s", reference=None)
    record = {"settings": "x", "prompt": "x", "model": "x", "adapter": "none", "seed": 0}
    drawing = sample.Drawing(sample.Row("", "", "x"), 0, "x-0000", "x", record)
    scores = {"quality": "0.91", "alignment": "0.23"}
    folder = sample.Manifest(tmp_path)
    finished = [(drawing, Image.new("RGB", (8, 8)), "", scores)]
    sample.write_pictures(finished, 1, folder, args)
    folder.write()
    assert names(tmp_path) == ["x-0000_quality_0.91_alignment_0.23.png"]
    assert not sample.Manifest(tmp_path).unfinished([drawing], 1)


def test_a_folder_called_refused_is_a_folder_like_others(draw, tmp_path, capsys):
    flags = ["--prompt", "胸部", "--num-images", 1]
    for drawn in (1, 0):
        draw(tmp_path / "refused", *flags)
        assert f"{drawn} drawn now" in capsys.readouterr().out
    assert [row["file"] for row in manifest(tmp_path / "refused")] == ["prompt-0000.png"]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--selector", "BAD"], "selector"),
        (["--min-quality", "2", "--selector", "S"], "--min-quality"),
        (["--selector", "S", "--min-alignment", "0.5"], "label"),
        (["--reference", "NOWHERE"], "NOWHERE"),
    ],
)
def test_quality_control_that_cannot_be_is_one_line(change, message, refusal, tmp_path):
    write_selector(tmp_path / "S")
    (tmp_path / "BAD").write_bytes(b"no selector")
    change = [tmp_path / word if word in ("S", "BAD") else word for word in change]
    assert message in refusal(tmp_path / "out", "--prompt", "a foot", *change)


def test_a_limit_of_zero_is_a_limit(draw, refusal, tmp_path):
    selector = write_selector(tmp_path / "s.safetensors")
    flags = [*FOOT, "--num-images", 2, "--selector", selector, "--max-attempts", 1]
    draw(tmp_path / "out", *flags, "--min-quality", 0)
    assert len(manifest(tmp_path / "out")) == 2
    assert "other settings" in refusal(tmp_path / "out", *flags)


def test_prompts_that_are_too_long_for_the_base_are_said(draw, tmp_path, capsys):
    words = [f"w{i}" for i in range(500)]  # this base reads a letter a token
    prompts = ["--prompt", " ".join(words), "--prompt", "short", "--negative-prompt", "n" * 76]

    draw(tmp_path, *prompts, "--num-images", 1)

    err = capsys.readouterr().err
    assert "prompts longer than 77 tokens: 2; " in err
    assert 'their end, such as that of "w0 w1 w2' in err
