"""Drawing: the pictures are keyed, the files are safe, and diffusers' own pipeline agrees."""

import csv
import errno
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_selector
from PIL import Image
from safetensors.torch import load_file, save_file

import lora
import sample
import train
from metrics import read_image, read_table

CPU = torch.device("cpu")
JOBS = [("a wound", 0), ("a wound", 1), ("a film", 0), ("", 3), ("a film", 7)]


@pytest.fixture(scope="module")
def loaded(base):
    return sample.load_base(base, CPU)


def pixels(images):
    return np.stack([np.asarray(image, int) for image in images])


@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
def test_the_same_pictures_whatever_the_batch_size(loaded, scheduler):
    one = pixels(sample.generate(loaded, JOBS, steps=4, scheduler=scheduler, batch_size=1))
    three = pixels(sample.generate(loaded, JOBS, steps=4, scheduler=scheduler, batch_size=3))
    assert np.abs(one - three).max() <= 1
    assert np.abs(one[0] - one[1]).max() > 5  # and they are different pictures


@pytest.fixture(scope="module")
def peer(base):
    """theirs(scheduler, job, config={}, **flags): the picture of diffusers' own pipeline from our job's noise, seed 3."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config

    def draw(scheduler, job, changed=(), **flags):
        pipe.scheduler = sample.SCHEDULERS[scheduler].from_config(
            {**config, "skip_prk_steps": True, **dict(changed)}
        )
        key = sample.generator(3, "sample", *job)
        noise = torch.randn(4, 8, 8, generator=key)[None]
        return pipe(job[0], latents=noise, height=64, width=64, generator=[key], **flags).images[0]

    return draw


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
def test_few_steps_of_every_scheduler_are_diffusers_own(loaded, peer, scheduler, steps):
    ours = next(sample.generate(loaded, [("a wound", 4)], steps, 5, scheduler, seed=3))
    theirs = peer(scheduler, ("a wound", 4), num_inference_steps=steps, guidance_scale=5)
    assert np.abs(pixels([ours]) - pixels([theirs])).max() <= 1


TERMINAL = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize(
    "config", [{"prediction_type": "v_prediction"}, TERMINAL], ids=["v", "zero terminal SNR"]
)
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm"])
def test_v_prediction_with_rescaled_guidance_is_diffusers_own(base, peer, scheduler, config):
    ours = sample.load_base(base, CPU)
    ours.schedule.update(config)
    plain, rescaled = (
        next(
            sample.generate(ours, [("a film", 0)], 4, 12, scheduler, seed=3, guidance_rescale=share)
        )
        for share in (0.0, 0.7)
    )
    theirs = peer(
        scheduler,
        ("a film", 0),
        config,
        num_inference_steps=4,
        guidance_scale=12,
        guidance_rescale=0.7,
    )
    assert (
        np.abs(pixels([rescaled]) - pixels([theirs])).max()
        <= 1
        < np.abs(pixels([plain]) - pixels([rescaled])).max()
    )


def test_a_scheduler_that_knows_no_zero_terminal_snr_is_refused(base, capsys):
    ours = sample.load_base(base, CPU)
    ours.schedule.update(TERMINAL)
    with pytest.raises(SystemExit):
        next(sample.generate(ours, JOBS, scheduler="pndm"))
    assert "pndm" in capsys.readouterr().err


def test_low_memory_draws_the_same_with_half_the_rows(base, loaded, tmp_path, run, monkeypatch):
    rows, tiles, denoise, decode = [], [], sample.denoise, sample.decode
    monkeypatch.setattr(
        sample, "denoise", lambda base, x, *rest: rows.append(len(x)) or denoise(base, x, *rest)
    )
    monkeypatch.setattr(
        sample,
        "decode",
        lambda base, x: (
            tiles.append((base.vae.use_slicing, base.vae.use_tiling)) or decode(base, x)
        ),
    )
    flags = ["--base", base, "--prompt", "a wound", "--num-images", 3, "--steps", 3]
    run(sample, *flags, "--out", tmp_path / "a")
    run(sample, *flags, "--out", tmp_path / "b", "--low-memory")
    assert rows == [6] * 3 + [3] * 6 and tiles == [(False, False), (True, True)]
    for path in (tmp_path / "a").glob("*.png"):
        assert (
            np.abs(
                pixels([Image.open(path)]) - pixels([Image.open(tmp_path / "b" / path.name)])
            ).max()
            <= 1
        )


def test_compile_is_asked_of_the_unet(base, tmp_path, run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: asked.append(type(module).__name__)
    )
    run(
        sample,
        "--base",
        base,
        "--prompt",
        "a wound",
        "--num-images",
        1,
        "--steps",
        1,
        "--out",
        tmp_path,
        "--compile",
    )
    assert asked == ["UNet2DConditionModel"]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_diffusers_pipeline_draws_the_same_picture_from_the_same_noise(base, loaded, guidance):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    ours = next(
        sample.generate(
            loaded,
            [("a wound", 4)],
            steps=6,
            guidance_scale=guidance,
            negative_prompt="blur",
            seed=3,
        )
    )
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 8, 8, generator=sample.generator(3, "sample", "a wound", 4))[None]
    theirs = pipe(
        "a wound",
        negative_prompt="blur",
        num_inference_steps=6,
        guidance_scale=guidance,
        latents=noise,
        height=64,
        width=64,
    ).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_v_prediction_and_epsilon_targets_describe_the_same_noising(loaded):
    """x0 and noise recovered from what the network should say are those that went in (Salimans & Ho 2022)."""
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([10, 500, 990])
    a = loaded.alphas_cumprod[t].double()[:, None, None, None]
    noisy, epsilon, _ = sample.noised_and_target(loaded, latents, noise, t)
    torch.testing.assert_close(
        noisy.double(), a.sqrt() * latents + (1 - a).sqrt() * noise, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(epsilon, noise)
    loaded.schedule["prediction_type"] = "v_prediction"
    _, v, _ = sample.noised_and_target(loaded, latents, noise, t)
    loaded.schedule["prediction_type"] = "epsilon"
    torch.testing.assert_close(
        (a.sqrt() * noisy - (1 - a).sqrt() * v).float(), latents, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind, mean", [("epsilon", 0.917), ("v_prediction", 0.294)])
def test_min_snr_weights_have_the_published_shape_and_mean_one(loaded, kind, mean):
    t = torch.arange(1000)
    x = torch.zeros(1000, 1, 1, 1)
    loaded.schedule["prediction_type"] = kind
    weight = sample.noised_and_target(loaded, x, x, t, snr_gamma=5.0)[2]
    assert torch.equal(sample.noised_and_target(loaded, x, x, t)[2], torch.ones(1000))
    loaded.schedule["prediction_type"] = "epsilon"
    a = loaded.alphas_cumprod.double()
    snr = a / (1 - a)
    expected = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    assert abs(expected.mean().item() - mean) < 1e-3  # the value in the literature's table
    torch.testing.assert_close(weight.double(), expected / expected.mean(), rtol=1e-4, atol=1e-6)
    assert abs(weight.mean().item() - 1) < 1e-4


def test_a_run_leaves_pictures_with_their_settings_a_manifest_and_a_grid(base, tmp_path, run):
    run(
        sample,
        "--base",
        base,
        "--prompt",
        "a wound",
        "--prompt",
        "a chest film",
        "--num-images",
        3,
        "--steps",
        2,
        "--label",
        "ulcer",
        "--out",
        tmp_path,
        "--grid",
        "--grey",
    )
    rows = list(csv.DictReader(open(tmp_path / "manifest.csv", newline="")))
    assert [row["file"] for row in rows] == sorted(
        f"{s}-{i:04d}.png" for s in ("a-wound", "a-chest-film") for i in range(3)
    )
    assert (
        set(rows[0]) == set(sample.MANIFEST)
        and rows[0]["prompt"] == "a chest film"
        and rows[0]["label"] == "ulcer"
    )
    for row in rows:
        image = Image.open(tmp_path / row["file"])
        assert image.mode == "L" and image.size == (64, 64) and image.info["synthetic"] == "true"
        assert (
            image.info["parameters"].startswith(row["prompt"] + "\nNegative prompt: ")
            and "Seed: 0" in image.info["parameters"]
        )
        assert sample.content_hash(tmp_path / row["file"]) == row["sha256"]
    assert Image.open(tmp_path / "grid.png").width > 64


def test_the_same_command_again_draws_only_what_is_missing_or_torn(base, tmp_path, run, capsys):
    flags = [
        "--base",
        base,
        "--prompt",
        "a wound",
        "--num-images",
        4,
        "--steps",
        2,
        "--out",
        tmp_path,
    ]
    run(sample, *flags)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "a-wound-0001.png").unlink()
    torn = tmp_path / "a-wound-0002.png"
    torn.write_bytes(torn.read_bytes()[:200])
    capsys.readouterr()
    run(sample, *flags)
    assert capsys.readouterr().out.startswith("2 images drawn, 2 were there")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_settings_in_the_same_folder_are_refused_unless_overwrite(
    base, tmp_path, run, refused
):
    flags = [
        "--base",
        base,
        "--prompt",
        "a wound",
        "--num-images",
        2,
        "--steps",
        2,
        "--out",
        tmp_path,
    ]
    run(sample, *flags)
    before = (tmp_path / "a-wound-0000.png").read_bytes()
    assert "other settings" in refused(sample, *flags, "--seed", 1)
    assert (tmp_path / "a-wound-0000.png").read_bytes() == before
    run(sample, *flags, "--seed", 1, "--overwrite")
    assert (tmp_path / "a-wound-0000.png").read_bytes() != before


def test_a_base_trained_on_is_another_setting(base, tmp_path, run, refused):
    shutil.copytree(base, tmp_path / "base")
    flags = [
        "--base",
        tmp_path / "base",
        "--prompt",
        "a wound",
        "--num-images",
        1,
        "--steps",
        2,
        "--out",
        tmp_path / "out",
    ]
    run(sample, *flags)
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.1 for name, value in load_file(weights).items()}, weights)
    assert "other settings" in refused(sample, *flags)
    shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
    run(sample, *flags)  # the same again
    config = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    assert "other settings" in refused(sample, *flags)


def test_another_format_replaces_and_a_killed_overwrite_leaves_no_false_row(
    base, tmp_path, run, refused, monkeypatch, capsys
):
    flags = [
        "--base",
        base,
        "--prompt",
        "a wound",
        "--num-images",
        3,
        "--batch-size",
        1,
        "--steps",
        2,
        "--out",
        tmp_path,
    ]
    run(sample, *flags)
    assert "other settings" in refused(sample, *flags, "--format", "dcm")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "draw", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(sample, *flags, "--format", "dcm", "--overwrite")
    assert not read_table(tmp_path / "manifest.csv")
    run(sample, *flags, "--format", "dcm", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"a-wound-000{n}.dcm" for n in range(3)),
        "manifest.csv",
    ]
    (tmp_path / "a-wound-0000.txt").write_text("a caption of somebody's")
    Image.new("RGB", (9, 9)).save(tmp_path / "a-wound-0001.png")
    run(sample, *flags, "--format", "dcm")
    assert (
        "0 images drawn, 3 were there" in capsys.readouterr().out
        and (tmp_path / "a-wound-0000.txt").exists()
    )


def test_a_label_is_told_only_where_all_rows_of_a_caption_agree(base, tmp_path, refused):
    for n, label in enumerate(("calm", "calm", "sore")):
        Image.new("RGB", (64, 64), (n, 9, 9)).save(tmp_path / f"{n}.png")
    (tmp_path / "t.csv").write_text(
        "file_name,text,label,modality\n0.png,one,calm,x\n1.png,two  words,calm,x\n2.png,one,sore,x\n"
    )
    (tmp_path / "p.csv").write_text(
        "prompt,label\none,calm\n none ,\n"
    )  # of pictures that are nowhere
    args = SimpleNamespace(
        prompt=[],
        prompts=None,
        labels_from=tmp_path / "t.csv",
        num_images=2,
        label="",
        negative_prompt="",
    )
    found = [(p["prompt"], p["label"], p["modality"]) for p in sample.read_prompts(args, [])]
    assert found == [("one", "", "x"), ("two words", "calm", "x")]
    args.labels_from, args.prompts = None, str(tmp_path / "p.csv")
    assert [(p["prompt"], p["label"]) for p in sample.read_prompts(args, [])] == [
        ("one", "calm"),
        ("none", ""),
    ]
    (tmp_path / "p.csv").write_text("x,y\n1,2\n")
    assert "no column of captions" in refused(
        sample, "--base", base, "--prompts", tmp_path / "p.csv"
    )


def test_the_label_that_is_given_comes_before_that_of_the_row(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,label\none,calm\ntwo,\n")
    for flags, labels in (([], ["calm", ""]), (["--label", "sore"], ["sore", "sore"])):
        args = sample.parse_args(["--prompts", str(tmp_path / "p.csv"), *flags])
        assert [p["label"] for p in sample.read_prompts(args, [])] == labels


def test_somebody_elses_picture_is_not_overwritten(base, tmp_path, run, refused):
    Image.new("RGB", (9, 9)).save(tmp_path / "a-wound-0000.png")
    flags = [
        "--base",
        base,
        "--prompt",
        "a wound",
        "--num-images",
        1,
        "--steps",
        1,
        "--out",
        tmp_path,
    ]
    assert "a-wound-0000.png" in refused(sample, *flags)
    assert Image.open(tmp_path / "a-wound-0000.png").size == (9, 9)


def test_prompts_come_from_a_text_file_or_a_data_set_and_labels_travel(base, images, tmp_path, run):
    (tmp_path / "prompts.txt").write_text("a wound\n\nWound: größe ø\nA wound!\n", encoding="utf-8")
    run(
        sample,
        "--base",
        base,
        "--prompts",
        tmp_path / "prompts.txt",
        "--num-images",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "a",
    )
    names = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert len(names) == 3 and "a-wound-0000.png" in names  # two prompts with one slug: two files
    run(
        sample,
        "--base",
        base,
        "--labels-from",
        images,
        "--prompt",
        "a {label} foot",
        "--num-images",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "b",
    )
    rows = list(csv.DictReader(open(tmp_path / "b" / "manifest.csv", newline="")))
    assert [(row["prompt"], row["label"]) for row in rows] == [
        ("a calm foot", "calm"),
        ("a sore foot", "sore"),
    ]


def test_a_prompt_cannot_leave_the_folder(base, tmp_path, run):
    run(
        sample,
        "--base",
        base,
        "--prompt",
        "../../etc/x",
        "--prompt",
        "",
        "--prompt",
        "🦶",
        "--num-images",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "out",
    )
    assert len(list((tmp_path / "out").glob("*.png"))) == 3 and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--prompt", "x", "--steps", "0"], "--steps 0"),
        (["--prompt", "x", "--height", "65"], "--height 65"),
        (["--prompt", "x", "--steps", "1000"], "--steps 1000"),
        (["--prompt", "x", "--steps", "999", "--scheduler", "dpm"], "at most 998"),
        (["--prompt", "x", "--guidance-rescale", "1.5"], "--guidance-rescale 1.5"),
        (["--prompt", "x", "--guidance-scale", "nan"], "--guidance-scale nan"),
        (["--prompt", "x", "--scheduler", "magic"], "magic"),
        (["--num-images", "2"], "nothing to draw"),
        (["--prompts", "no-such-file.txt"], "no-such-file.txt"),
        (["--prompt", "x", "--lora", "no-such-file.safetensors"], "no-such-file.safetensors"),
        (["--prompt", "x", "--base", "no/such/folder"], "no/such/folder"),
        (["--prompt", "x", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_flags_are_one_line(flags, said, base, tmp_path, refused):
    assert said in refused(sample, "--base", base, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_flag_file_gives_flags_and_the_command_line_overrides_it(tmp_path, monkeypatch):
    (tmp_path / "try.txt").write_text(
        "# a recipe\n\n--steps 7\n--prompt a wound, with = and spaces\n--grid\n--seed 3\n"
    )
    monkeypatch.setattr("sys.argv", ["sample.py", f"@{tmp_path / 'try.txt'}", "--seed", "5"])
    args = sample.parse_args()
    assert (args.steps, args.prompt, args.grid, args.seed) == (
        7,
        ["a wound, with = and spaces"],
        True,
        5,
    )


def test_sdxl_is_told_height_before_width(sdxl, monkeypatch):
    base = sample.load_base(sdxl, CPU)
    cond, seen = sample.encode_text(base, ["x"]), []
    monkeypatch.setattr(
        base.unet,
        "forward",
        lambda x, t, added_cond_kwargs, **_: seen.append(added_cond_kwargs["time_ids"]) or (x,),
    )
    sample.denoise(base, torch.zeros(1, 4, 8, 16), torch.tensor([5]), cond)
    assert seen[0].tolist() == [[64, 128, 0, 0, 64, 128]]  # diffusers' order


def test_the_latents_implied_by_v_are_those_that_went_in(sd21):
    base = sample.load_base(sd21, CPU)
    latents, noise, t = (
        torch.randn(3, 4, 8, 8),
        torch.randn(3, 4, 8, 8),
        torch.tensor([10, 500, 990]),
    )
    noisy, v, _ = sample.noised_and_target(base, latents, noise, t)
    torch.testing.assert_close(
        sample.predicted_latents(base, noisy, v, t), latents, rtol=1e-4, atol=1e-4
    )


def test_every_flag_of_drawing_reaches_the_sampler(base, tmp_path, run, monkeypatch):
    seen, whole = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *given: seen.append(given[2:]) or whole(*given))
    run(
        sample,
        "--base",
        base,
        "--prompt",
        "x",
        "--num-images",
        2,
        "--steps",
        3,
        "--guidance-scale",
        4,
        "--scheduler",
        "euler",
        "--height",
        64,
        "--width",
        72,
        "--negative-prompt",
        "blur",
        "--batch-size",
        2,
        "--seed",
        9,
        "--guidance-rescale",
        0.5,
        "--out",
        tmp_path,
    )
    assert seen == [(3, 4.0, "euler", 64, 72, "blur", 2, 9, 0.5, False)]


# ---- what a run of train.py left


def same_pictures(one, other):
    names = sorted(path.name for path in one.glob("*.png"))
    assert names and names == sorted(path.name for path in other.glob("*.png"))
    return all(
        np.array_equal(pixels([Image.open(one / n)]), pixels([Image.open(other / n)]))
        for n in names
    )


@pytest.mark.parametrize(
    "method, flags, result",
    [
        ("lora", ["--text-lora", "--rank", 2, "--alpha", 5, "--lr", 0.03], "lora.safetensors"),
        (
            "textual-inversion",
            ["--token", "<sore>", "--prompt", "a <sore> foot", "--lr", 0.5],
            "embeddings.safetensors",
        ),
        ("full", ["--lr", 0.01], "model"),
    ],
)
def test_a_checkpoint_draws_what_the_runs_own_result_draws(
    method, flags, result, base, images, tmp_path, run
):
    run(
        train,
        "--base",
        base,
        "--data",
        images,
        "--prompt",
        "a foot",
        "--steps",
        4,
        "--val-samples",
        0,
        "--val-split",
        0,
        "--method",
        method,
        *flags,
        "--out",
        tmp_path / "run",
    )
    how = ["--num-images", 2, "--steps", 3, "--precision", "fp32"]
    run(
        sample,
        "--checkpoint",
        tmp_path / "run" / "checkpoints" / "latest.pt",
        *how,
        "--out",
        tmp_path / "a",
    )
    prompt = "a <sore> foot" if method == "textual-inversion" else "a foot"
    run(
        sample,
        "--base" if method == "full" else "--lora",
        tmp_path / "run" / result,
        "--prompt",
        prompt,
        *how,
        "--out",
        tmp_path / "b",
    )
    run(sample, "--base", base, "--prompt", prompt, *how, "--out", tmp_path / "plain")
    assert same_pictures(tmp_path / "a", tmp_path / "b") and not same_pictures(
        tmp_path / "a", tmp_path / "plain"
    )
    rows = list(csv.DictReader(open(tmp_path / "a" / "manifest.csv", newline="")))
    assert (
        rows[0]["prompt"] == prompt
        and rows[0]["base"] == base
        and rows[0]["lora"].endswith("latest.pt:1")
    )


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
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def adapter(path, tensors, **metadata):
    lora.save(path, tensors, {"rank": 1, "alpha": 1, **metadata})
    return path


def test_an_adapter_draws_at_the_size_it_was_trained_at(base, tmp_path, run):
    word = adapter(
        tmp_path / "word.safetensors",
        {"<sore>": torch.zeros(1, 32)},
        tokens="<sore>",
        resolution=96,
    )
    run(
        sample,
        "--base",
        base,
        "--lora",
        word,
        "--prompt",
        "x",
        "--num-images",
        1,
        "--steps",
        1,
        "--width",
        64,
        "--out",
        tmp_path,
    )
    assert Image.open(tmp_path / "x-0000.png").size == (64, 96)


def test_adapters_add_up_and_those_that_exclude_each_other_are_refused(
    base, tmp_path, run, refused
):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    one, two, both = (
        {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        for a, b in (
            (torch.ones(1, 32), torch.ones(32, 1)),
            (torch.arange(32.0)[None] / 9, torch.ones(32, 1)),
            (
                torch.stack([torch.ones(32), torch.arange(32.0) / 9]),
                torch.tensor([[0.5, 2.0]]).repeat(32, 1),
            ),
        )
    )
    flags = [
        "--base",
        base,
        "--prompt",
        "a <sore> and <calm> foot",
        "--num-images",
        1,
        "--steps",
        2,
    ]
    one, two, both = (
        adapter(tmp_path / f"{i}.safetensors", each) for i, each in enumerate((one, two, both))
    )
    run(sample, *flags, "--lora", f"{one}:0.5", "--lora", f"{two}:2", "--out", tmp_path / "a")
    run(sample, *flags, "--lora", both, "--out", tmp_path / "b")
    a, b = (
        np.asarray(Image.open(next((tmp_path / out).glob("*.png")))).astype(int) for out in "ab"
    )
    assert abs(a - b).max() <= 1  # 0.5 A + 2 B is rounded in another order
    sore, calm = (
        adapter(
            tmp_path / f"{word}.safetensors",
            {f"<{word}>": torch.full((2, 32), value)},
            tokens=f"<{word}>",
        )
        for word, value in (("sore", 0.3), ("calm", -0.3))
    )
    run(sample, *flags, "--lora", sore, "--lora", calm, "--lora", both, "--out", tmp_path / "c")
    run(sample, *flags, "--lora", sore, "--lora", both, "--out", tmp_path / "d")
    assert not same_pictures(tmp_path / "c", tmp_path / "d")
    own = {"text_projection.weight": torch.zeros(32, 8), "text_projection.bias": torch.zeros(32)}
    bert, clip = (
        adapter(tmp_path / "bert.safetensors", own),
        adapter(
            tmp_path / "clip.safetensors",
            {
                "text_encoder.x.lora_A.weight": torch.ones(1, 32),
                "text_encoder.x.lora_B.weight": torch.ones(32, 1),
            },
        ),
    )
    for files, said in (
        ((sore, sore), "the word <sore>"),
        ((bert, bert), "a text encoder of its own"),
        ((bert, clip), "adapts"),
        ((f"{sore}:0.5",), "there or not"),
    ):
        assert said in refused(
            sample,
            *flags,
            *[x for file in files for x in ("--lora", file)],
            "--out",
            tmp_path / "e",
        )
    assert not (tmp_path / "e").exists()


def test_a_weight_below_zero_takes_an_adapter_away(base, tmp_path, run):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    one, less = (
        adapter(
            tmp_path / f"{up}.safetensors",
            {
                f"{layer}.lora_A.weight": torch.arange(32.0)[None],
                f"{layer}.lora_B.weight": torch.full((32, 1), up),
            },
        )
        for up in (1.0, -0.5)
    )
    for lora_flag, out in ((f"{one}:-0.5", "a"), (less, "b"), (f"{one}:0.5", "c")):
        run(
            sample,
            "--base",
            base,
            "--prompt",
            "x",
            "--num-images",
            1,
            "--steps",
            2,
            "--lora",
            lora_flag,
            "--out",
            tmp_path / out,
        )
    assert same_pictures(tmp_path / "a", tmp_path / "b") and not same_pictures(
        tmp_path / "a", tmp_path / "c"
    )


# ---- prompts


def test_a_prompt_with_fields_is_a_format_of_the_captions_of_a_table(
    base, images, tmp_path, run, refused
):
    (tmp_path / "p.csv").write_text("Text,Modality,label\na disc,Fundus,x\nan organ,CT,y\n")
    flags = ["--base", base, "--num-images", 1, "--steps", 1]
    run(
        sample,
        *flags,
        "--prompts",
        tmp_path / "p.csv",
        "--prompt",
        "{Modality}: {Text}",
        "--prompt",
        "plain",
        "--out",
        tmp_path / "a",
    )
    rows = read_table(tmp_path / "a" / "manifest.csv")
    assert sorted((row["prompt"], row["modality"], row["label"]) for row in rows) == [
        ("CT: an organ", "CT", "y"),
        ("Fundus: a disc", "Fundus", "x"),
        ("plain", "", ""),
    ]
    assert "which is missing" in refused(
        sample, *flags, "--prompt", "a {label} foot", "--out", tmp_path / "b"
    )
    assert "takes one" in refused(
        sample,
        *flags,
        "--prompts",
        tmp_path / "p.csv",
        "--prompt",
        "{Text}",
        "--prompt",
        "{label}",
        "--out",
        tmp_path / "b",
    )
    run(
        sample, *flags, "--prompt", "film {ap} view", "--out", tmp_path / "c"
    )  # a caption's own braces
    assert read_table(tmp_path / "c" / "manifest.csv")[0]["prompt"] == "film {ap} view"
    assert "has labels and no captions" in refused(
        sample, *flags, "--labels-from", images, "--out", tmp_path / "b"
    )
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    own = adapter(
        tmp_path / "own.safetensors",
        {f"{layer}.lora_A.weight": torch.ones(1, 32), f"{layer}.lora_B.weight": torch.ones(32, 1)},
        prompt="a {label} foot",
    )
    run(sample, *flags, "--lora", own, "--labels-from", images, "--out", tmp_path / "b")
    assert {row["prompt"] for row in read_table(tmp_path / "b" / "manifest.csv")} == {
        "a calm foot",
        "a sore foot",
    }


def test_a_folder_called_refused_is_a_folder_like_others(base, tmp_path, run, capsys):
    for drawn in (1, 0):
        run(
            sample,
            "--base",
            base,
            "--prompt",
            "胸部",
            "--num-images",
            1,
            "--steps",
            1,
            "--out",
            tmp_path / "refused",
        )
        assert f"{drawn} images drawn" in capsys.readouterr().out
    assert [row["file"] for row in read_table(tmp_path / "refused" / "manifest.csv")] == [
        "prompt-0000.png"
    ]


def test_the_words_that_are_cut_are_said(base, tmp_path, run, capsys):
    words = [f"w{i}" for i in range(500)]  # this base reads a letter a token, so 75 of 1890
    run(
        sample,
        "--base",
        base,
        "--prompt",
        " ".join(words),
        "--prompt",
        "short",
        "--negative-prompt",
        "n" * 76,
        "--num-images",
        1,
        "--steps",
        1,
        "--out",
        tmp_path,
    )
    said = capsys.readouterr().out
    assert (
        'the prompt "w0 w1 w2' in said
        and "75 tokens" in said
        and 'cut: "w28 w29' in said
        and 'w499"' in said
    )
    assert f'cut: "{"n" * 76}"' in said and "short" not in said
    row = list(csv.DictReader(open(tmp_path / "manifest.csv", newline="")))[1]
    assert row["prompt"].split() == words and len(row["file"]) < 80


@pytest.mark.parametrize("prompt", ["x" * 10001, "a\0b", "a \udc80 film"])
def test_prompts_that_no_file_can_hold_are_refused(prompt, base, tmp_path, refused):
    assert "give text" in refused(
        sample, "--base", base, "--prompt", prompt, "--out", tmp_path / "out"
    )
    assert "give text" in refused(
        sample, "--base", base, "--prompt", "x", "--label", prompt, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


# ---- files


@pytest.mark.parametrize("kind", ["dcm"])
@pytest.mark.parametrize("grey", [[], ["--grey"]])
def test_other_formats_hold_the_same_picture_and_their_settings(
    kind, grey, base, tmp_path, run, refused, capsys
):
    pytest.importorskip("pydicom")
    flags = [
        "--base",
        base,
        "--prompt",
        "größe 🦶, a wound",
        "--num-images",
        2,
        "--steps",
        2,
        *grey,
    ]
    run(sample, *flags, "--out", tmp_path / "png")
    flags += ["--format", kind, "--out", tmp_path / kind]
    run(sample, *flags, "--grid")
    for path in (tmp_path / "png").glob("*.png"):
        difference = np.abs(
            pixels([read_image(path)])
            - pixels([read_image(tmp_path / kind / f"{path.stem}.{kind}")])
        )
        assert difference.max() == 0
        assert (
            sample.parameters_of(tmp_path / kind / f"{path.stem}.{kind}")
            == sample.parameters_of(path)
            != ""
        )
    before = {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()}
    torn = tmp_path / kind / f"groe-a-wound-0001.{kind}"
    torn.write_bytes(before[torn.name][:-300])
    capsys.readouterr()
    run(sample, *flags)
    assert capsys.readouterr().out.startswith("1 images drawn, 1 were there")
    assert {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()} == before
    assert "other settings" in refused(sample, *flags, "--steps", 3)


def test_a_dicom_file_says_that_it_is_synthetic_and_of_nobody(base, tmp_path, run):
    pydicom = pytest.importorskip("pydicom")
    run(
        sample,
        "--base",
        base,
        "--prompt",
        "a wound",
        "--num-images",
        2,
        "--steps",
        1,
        "--format",
        "dcm",
        "--out",
        tmp_path,
    )
    first, second = (pydicom.dcmread(path) for path in sorted(tmp_path.glob("*.dcm")))
    assert first.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7" and list(first.ImageType) == [
        "DERIVED",
        "SECONDARY",
        "OTHER",
    ]
    assert all(
        "SYNTHETIC" in str(first[name].value)
        for name in ("SeriesDescription", "ImageComments", "PatientName")
    )
    assert (
        first.PatientBirthDate == first.PatientSex == first.StudyDate == ""
        and first.ConversionType == "SYN"
    )
    for name in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID"):
        assert first[name].value != second[name].value and len(first[name].value) <= 64
    assert len({first.SOPInstanceUID, first.StudyInstanceUID, first.SeriesInstanceUID}) == 3
    assert all(
        uid.is_valid
        for uid in (first.SOPInstanceUID, first.StudyInstanceUID, first.SeriesInstanceUID)
    )


def test_a_missing_package_is_said_before_anything_is_drawn(base, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    flags = ["--base", base, "--prompt", "x", "--format", "dcm", "--out", tmp_path / "o"]
    assert "pip install pydicom" in refused(sample, *flags)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "error, status", [(OSError(errno.ENOSPC, "No space left"), 2), (KeyboardInterrupt(), 130)]
)
def test_what_was_drawn_before_a_full_disk_or_an_interrupt_stays(
    error, status, base, tmp_path, monkeypatch, capsys, run
):
    flags = [
        "--base",
        base,
        "--prompt",
        "a wound",
        "--num-images",
        6,
        "--steps",
        1,
        "--batch-size",
        1,
    ]
    run(sample, *flags, "--out", tmp_path / "whole")
    save, calls = sample.save_png, []

    def fails_once(image, path, parameters):
        calls.append(path)
        if len(calls) == 4:
            raise error
        save(image, path, parameters)

    monkeypatch.setitem(sample.WRITERS, "png", fails_once)
    monkeypatch.setattr(
        sample, "main", lambda args, main=sample.main: sample.run_script(main, lambda: args)
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(sample, *flags, "--out", tmp_path / "out")
    assert stop.value.code == status and "Traceback" not in capsys.readouterr().err
    there = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    listed = [
        row["file"] for row in csv.DictReader(open(tmp_path / "out" / "manifest.csv", newline=""))
    ]
    assert 3 <= len(there) < 6 and listed == there and not list((tmp_path / "out").glob(".*"))
    run(sample, *flags, "--out", tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_two_processes_share_the_images_and_leave_what_one_leaves(
    batch_size, base, tmp_path, run, monkeypatch, capsys
):
    flags = [
        "--base",
        base,
        "--prompt",
        "a wound",
        "--prompt",
        "a film",
        "--num-images",
        5,
        "--steps",
        2,
    ]
    run(sample, *flags, "--out", tmp_path / "one")
    monkeypatch.setattr(sample, "WORLD", 2)
    for rank, count in ((1, 5), (0, 10)):
        monkeypatch.setattr(sample, "RANK", rank)
        run(sample, *flags, "--batch-size", batch_size, "--out", tmp_path / "two")
        assert len(list((tmp_path / "two").glob("*.png"))) == count
        assert (tmp_path / "two" / "manifest.csv").exists() == (rank == 0)
    for path in (tmp_path / "one").glob(
        "*.png"
    ):  # kernels differ with the batch size, by a grey level
        assert (
            np.abs(
                pixels([Image.open(path)]) - pixels([Image.open(tmp_path / "two" / path.name)])
            ).max()
            <= 1
        )
    rows = [
        row["file"] for row in csv.DictReader(open(tmp_path / "two" / "manifest.csv", newline=""))
    ]
    assert rows == sorted(path.name for path in (tmp_path / "one").glob("*.png"))


def test_a_pictures_bits_do_not_depend_on_its_neighbours(base, tmp_path, run):
    flags = [
        "--base",
        base,
        "--prompt",
        "a wound",
        "--prompt",
        "a film",
        "--num-images",
        5,
        "--steps",
        3,
        "--batch-size",
        4,
    ]
    run(sample, *flags, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for lost in ("a-wound-0001", "a-film-0000", "a-film-0002", "a-film-0003", "a-film-0004"):
        (tmp_path / f"{lost}.png").unlink()
    run(sample, *flags, "--out", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- quality control


def test_what_the_selector_refuses_is_drawn_anew_and_filter_agrees(
    base, images, tmp_path, run, capsys
):
    import filter as filter_script

    selector = write_selector(tmp_path / "s.safetensors")
    flags = [
        "--base",
        base,
        "--prompt",
        "a foot",
        "--num-images",
        12,
        "--steps",
        2,
        "--height",
        64,
        "--width",
        64,
    ]
    run(sample, *flags, "--out", tmp_path / "plain")
    run(
        filter_script,
        tmp_path / "plain",
        "--reference",
        images,
        "--selector",
        selector,
        "--min-quality",
        0,
        "--out",
        tmp_path / "all",
        "--dry-run",
    )
    quality = [float(row["quality"]) for row in read_table(tmp_path / "all" / "decisions.csv")]
    limit = np.round(np.median(quality), 4)  # so that half of the first drawings fail
    control = ["--selector", selector, "--min-quality", limit, "--max-attempts", 2]
    run(sample, *flags, *control, "--out", tmp_path / "a", "--grid")
    rows = read_table(tmp_path / "a" / "manifest.csv")
    first = [row for row in rows if row["attempts"] == "1"]
    assert len(first) == sum(q >= limit for q in quality) and {row["attempts"] for row in rows} == {
        "1",
        "2",
    }
    for row in first:  # the picture of a run without control
        stem = row["file"].split("_quality_")[0]
        assert row["file"] == f"{stem}_quality_{float(row['quality']):.2f}.png"
        assert np.array_equal(
            *(
                np.asarray(Image.open(path))
                for path in (tmp_path / "a" / row["file"], tmp_path / "plain" / f"{stem}.png")
            )
        )
    refused = sorted(path.name for path in (tmp_path / "a" / "refused").iterdir())
    assert (
        len(refused) + len(rows) == 12
        and f"{len(refused)} did not in 2 attempts" in capsys.readouterr().out
    )
    run(
        filter_script,
        tmp_path / "a",
        "--reference",
        images,
        "--selector",
        selector,
        "--min-quality",
        limit,
        "--out",
        tmp_path / "b",
        "--dry-run",
    )
    decisions = read_table(tmp_path / "b" / "decisions.csv")
    assert [row["kept"] for row in decisions] == ["1"] * len(rows)
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "a").rglob("*.png")
        if path.name != "grid.png"
    }
    sorted(before)[0].unlink()
    run(
        sample, *flags, *control, "--out", tmp_path / "a"
    )  # goes on: the one that is gone alone is drawn
    assert "1 images drawn, 11 were there" in capsys.readouterr().out and set(before) == {
        path for path in (tmp_path / "a").rglob("*.png") if path.name != "grid.png"
    }
    assert sum(path.stat().st_mtime_ns != then for path, then in before.items()) == 1
    run(
        sample,
        *flags,
        "--selector",
        selector,
        "--min-quality",
        limit,
        "--max-attempts",
        40,
        "--out",
        tmp_path / "a",
    )
    assert (
        len(read_table(tmp_path / "a" / "manifest.csv"))
        + len(list((tmp_path / "a" / "refused").iterdir()))
        == 12
    )
    assert len(read_table(tmp_path / "a" / "manifest.csv")) > len(rows)


def test_pictures_are_held_against_real_ones_as_filter_does(base, images, tmp_path, run, capsys):
    flags = [
        "--base",
        base,
        "--prompt",
        "a foot",
        "--num-images",
        6,
        "--steps",
        2,
        "--height",
        64,
        "--width",
        64,
    ]
    run(
        sample,
        *flags,
        "--reference",
        images,
        "--min-ssim",
        0.99,
        "--max-attempts",
        1,
        "--out",
        tmp_path / "a",
    )
    said = capsys.readouterr().out
    assert (
        "0 passed, of 6 drawings" in said
        and "nothing passed" in said
        and "--min-ssim 0.99 would refuse" in said
    )
    assert not read_table(tmp_path / "a" / "manifest.csv")
    run(
        sample,
        *flags,
        "--reference",
        images,
        "--min-ssim",
        -1,
        "--drop-copies",
        "--out",
        tmp_path / "a",
        "--overwrite",
    )
    assert len(read_table(tmp_path / "a" / "manifest.csv")) == 6 and not list(
        (tmp_path / "a" / "refused").iterdir()
    )


def test_copies_of_real_images_are_refused_where_asked(base, images, tmp_path, run, monkeypatch):
    real = [Image.open(f"{images}/calm/{n}.png") for n in (0, 2, 4)]
    monkeypatch.setattr(
        sample, "generate", lambda base, jobs, *how: (real[number] for _, number in jobs)
    )
    run(
        sample,
        "--base",
        base,
        "--prompt",
        "x",
        "--num-images",
        3,
        "--reference",
        images,
        "--max-attempts",
        1,
        "--min-ssim",
        -1,
        "--drop-copies",
        "--out",
        tmp_path,
    )
    assert (
        not read_table(tmp_path / "manifest.csv")
        and len(list((tmp_path / "refused").iterdir())) == 3
    )


def test_the_scores_in_a_files_name_are_found_again(tmp_path):
    args = SimpleNamespace(out=tmp_path, format="png", kept_by="x", max_attempts=2)
    planned = {"name": "x-0000.png", "parameters": "x", "path": None}
    sample.write_picture(
        Image.new("RGB", (8, 8)),
        {**planned, "quality": "0.91", "alignment": "0.23", "refused": False, "attempts": 1},
        args,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x-0000_quality_0.91_alignment_0.23.png"]
    (found,), _ = sample.look_up([planned], args)
    assert (found["quality"], found["alignment"]) == ("0.91", "0.23")


def test_a_file_of_flags_says_any_text_and_a_table_of_prompts_may_have_a_loud_name(
    base, tmp_path, monkeypatch
):
    (tmp_path / "flags.txt").write_text(
        "# a comment\n--negative-prompt -blurry, grey\n--prompt @ 9 o'clock\n--grid\n\n--steps=3\n"
    )
    monkeypatch.setattr("sys.argv", ["sample.py", f"@{tmp_path / 'flags.txt'}", "--steps", "2"])
    args = sample.parse_args()
    assert (args.negative_prompt, args.prompt, args.grid, args.steps) == (
        "-blurry, grey",
        ["@ 9 o'clock"],
        True,
        2,
    )
    (tmp_path / "P.CSV").write_text("file_name,text\nP.CSV,a foot\n")
    args.prompt, args.prompts = [], str(tmp_path / "P.CSV")
    assert [p["prompt"] for p in sample.read_prompts(args, [])] == ["a foot"]


@pytest.mark.parametrize(
    "change, said",
    [
        (["--min-quality", "0.5"], "needs --selector"),
        (["--max-lpips", "0.3"], "needs --reference"),
        (["--selector", "BAD"], "not a readable selector"),
        (["--min-quality", "2", "--selector", "S"], "--min-quality"),
        (["--selector", "S", "--min-alignment", "0.5"], "does not know the label"),
        (["--selector", "SEVERAL"], "without modality"),
        (["--reference", "NOWHERE"], "NOWHERE"),
    ],
)
def test_quality_control_that_cannot_be_is_one_line(change, said, base, tmp_path, refused):
    write_selector(tmp_path / "S")
    write_selector(tmp_path / "SEVERAL", modalities=["ct", "mri"])
    (tmp_path / "BAD").write_bytes(b"no selector")
    change = [tmp_path / word if word in ("S", "SEVERAL", "BAD") else word for word in change]
    assert said in refused(
        sample, "--base", base, "--prompt", "a foot", "--out", tmp_path / "out", *change
    )
