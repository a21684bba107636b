"""Drawing: the pictures are keyed, the files are safe, and diffusers' own pipeline agrees."""
import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample

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


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_diffusers_pipeline_draws_the_same_picture_from_the_same_noise(base, loaded, guidance):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    ours = next(sample.generate(loaded, [("a wound", 4)], steps=6, guidance_scale=guidance, negative_prompt="blur", seed=3))
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 8, 8, generator=sample.generator(3, "sample", "a wound", 4))[None]
    theirs = pipe("a wound", negative_prompt="blur", num_inference_steps=6, guidance_scale=guidance, latents=noise,
                  height=64, width=64).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_v_prediction_and_epsilon_targets_describe_the_same_noising(loaded):
    """x0 and noise recovered from what the network should say are those that went in (Salimans & Ho 2022)."""
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([10, 500, 990])
    a = loaded.alphas_cumprod[t].double()[:, None, None, None]
    noisy, epsilon, _ = sample.noised_and_target(loaded, latents, noise, t)
    torch.testing.assert_close(noisy.double(), a.sqrt() * latents + (1 - a).sqrt() * noise, rtol=1e-5, atol=1e-5)
    assert torch.equal(epsilon, noise)
    loaded.schedule["prediction_type"] = "v_prediction"
    _, v, _ = sample.noised_and_target(loaded, latents, noise, t)
    loaded.schedule["prediction_type"] = "epsilon"
    torch.testing.assert_close((a.sqrt() * noisy - (1 - a).sqrt() * v).float(), latents, rtol=1e-4, atol=1e-4)


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
    assert abs(expected.mean().item() - mean) < 1e-3    # the value in the literature's table
    torch.testing.assert_close(weight.double(), expected / expected.mean(), rtol=1e-4, atol=1e-6)
    assert abs(weight.mean().item() - 1) < 1e-4


def test_a_run_leaves_pictures_with_their_settings_a_manifest_and_a_grid(base, tmp_path, run):
    run(sample, "--base", base, "--prompt", "a wound", "--prompt", "a chest film", "--num-images", 3, "--steps", 2,
        "--label", "ulcer", "--out", tmp_path, "--grid", "--grey")
    rows = list(csv.DictReader(open(tmp_path / "manifest.csv", newline="")))
    assert [row["file"] for row in rows] == sorted(f"{s}-{i:04d}.png" for s in ("a-wound", "a-chest-film") for i in range(3))
    assert set(rows[0]) == set(sample.MANIFEST) and rows[0]["prompt"] == "a chest film" and rows[0]["label"] == "ulcer"
    for row in rows:
        image = Image.open(tmp_path / row["file"])
        assert image.mode == "L" and image.size == (64, 64) and image.info["synthetic"] == "true"
        assert image.info["parameters"].startswith(row["prompt"] + "\nNegative prompt: ") and "Seed: 0" in image.info["parameters"]
        assert sample.content_hash(tmp_path / row["file"]) == row["sha256"]
    assert Image.open(tmp_path / "grid.png").width > 64


def test_the_same_command_again_draws_only_what_is_missing_or_torn(base, tmp_path, run, capsys):
    flags = ["--base", base, "--prompt", "a wound", "--num-images", 4, "--steps", 2, "--out", tmp_path]
    run(sample, *flags)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "a-wound-0001.png").unlink()
    torn = tmp_path / "a-wound-0002.png"
    torn.write_bytes(torn.read_bytes()[:200])
    capsys.readouterr()
    run(sample, *flags)
    assert capsys.readouterr().out.startswith("2 images drawn, 2 were there")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_settings_in_the_same_folder_are_refused_unless_overwrite(base, tmp_path, run, refused):
    flags = ["--base", base, "--prompt", "a wound", "--num-images", 2, "--steps", 2, "--out", tmp_path]
    run(sample, *flags)
    before = (tmp_path / "a-wound-0000.png").read_bytes()
    assert "other settings" in refused(sample, *flags, "--seed", 1)
    assert (tmp_path / "a-wound-0000.png").read_bytes() == before
    run(sample, *flags, "--seed", 1, "--overwrite")
    assert (tmp_path / "a-wound-0000.png").read_bytes() != before


def test_a_base_trained_on_is_another_setting(base, tmp_path, run, refused):
    shutil.copytree(base, tmp_path / "base")
    flags = ["--base", tmp_path / "base", "--prompt", "a wound", "--num-images", 1, "--steps", 2, "--out", tmp_path / "out"]
    run(sample, *flags)
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.1 for name, value in load_file(weights).items()}, weights)
    assert "other settings" in refused(sample, *flags)


def test_somebody_elses_picture_is_not_overwritten(base, tmp_path, run, refused):
    Image.new("RGB", (9, 9)).save(tmp_path / "a-wound-0000.png")
    flags = ["--base", base, "--prompt", "a wound", "--num-images", 1, "--steps", 1, "--out", tmp_path]
    assert "a-wound-0000.png" in refused(sample, *flags)
    assert Image.open(tmp_path / "a-wound-0000.png").size == (9, 9)


def test_prompts_come_from_a_text_file_or_a_data_set_and_labels_travel(base, images, tmp_path, run):
    (tmp_path / "prompts.txt").write_text("a wound\n\nWound: größe ø\nA wound!\n", encoding="utf-8")
    run(sample, "--base", base, "--prompts", tmp_path / "prompts.txt", "--num-images", 1, "--steps", 1, "--out",
        tmp_path / "a")
    names = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert len(names) == 3 and "a-wound-0000.png" in names  # two prompts with one slug: two files
    run(sample, "--base", base, "--labels-from", images, "--prompt", "a {label} foot", "--num-images", 1, "--steps", 1,
        "--out", tmp_path / "b")
    rows = list(csv.DictReader(open(tmp_path / "b" / "manifest.csv", newline="")))
    assert [(row["prompt"], row["label"]) for row in rows] == [("a calm foot", "calm"), ("a sore foot", "sore")]


def test_a_prompt_cannot_leave_the_folder(base, tmp_path, run):
    run(sample, "--base", base, "--prompt", "../../etc/x", "--prompt", "", "--prompt", "🦶", "--num-images", 1, "--steps", 1,
        "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3 and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("flags, said", [
    (["--prompt", "x", "--steps", "0"], "--steps 0"),
    (["--prompt", "x", "--height", "65"], "--height 65"),
    (["--prompt", "x", "--steps", "1001"], "--steps 1001"),
    (["--prompt", "x", "--guidance-scale", "nan"], "--guidance-scale nan"),
    (["--prompt", "x", "--scheduler", "magic"], "magic"),
    (["--num-images", "2"], "nothing to draw"),
    (["--prompts", "no-such-file.txt"], "no-such-file.txt"),
    (["--prompt", "x", "--lora", "no-such-file.safetensors"], "no-such-file.safetensors"),
    (["--prompt", "x", "--base", "no/such/folder"], "no/such/folder"),
    (["--prompt", "x", "--device", "cuda:99"], "cuda:99"),
])
def test_bad_flags_are_one_line(flags, said, base, tmp_path, refused):
    assert said in refused(sample, "--base", base, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_flag_file_gives_flags_and_the_command_line_overrides_it(tmp_path, monkeypatch):
    (tmp_path / "try.txt").write_text("# a recipe\n\n--steps 7\n--prompt a wound, with = and spaces\n--grid\n--seed 3\n")
    monkeypatch.setattr("sys.argv", ["sample.py", f"@{tmp_path / 'try.txt'}", "--seed", "5"])
    args = sample.parse_args()
    assert (args.steps, args.prompt, args.grid, args.seed) == (7, ["a wound, with = and spaces"], True, 5)
