"""Every kind of base: it trains, and diffusers' own pipeline draws its pictures and adapters."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bench
import numpy as np
import pytest
import torch
from PIL import Image

import lora
import sample
import train
from metrics import generator

CPU = torch.device("cpu")
KINDS = ["base", "sd21", "sdxl"]


def pipeline(folder):
    """diffusers' own pipeline of a base, with DDIM as it is configured there."""
    from diffusers import DiffusionPipeline

    options = {} if "sdxl" in folder else {"safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(base, prompt, negative=""):
    """Our picture of a prompt, number 0."""
    settings = sample.Settings(steps=5, guidance_scale=5, negative_prompt=negative)
    return next(sample.generate(base, [(prompt, 0)], settings))


def theirs(pipe, prompt, **flags):
    """The picture of diffusers' pipeline from the same noise."""
    noise = torch.randn(4, 8, 8, generator=generator(0, "sample", prompt, 0))[None]
    how = {"num_inference_steps": 5, "guidance_scale": 5, "height": 64, "width": 64, **flags}
    return pipe(prompt, latents=noise, **how).images[0]


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_a_picture_is_that_of_diffusers_own_pipeline(kind, negative, request):
    folder = request.getfixturevalue(kind)
    picture = ours(sample.load_base(folder, CPU), "a film", negative)
    expected = theirs(pipeline(folder), "a film", negative_prompt=negative or None)
    assert difference(picture, expected) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_unet_and_text_encoders_trains_and_opens_in_diffusers(
    kind, request, images, tmp_path, run
):
    pytest.importorskip("peft")
    folder = request.getfixturevalue(kind)
    flags = ["--base", folder, "--data", images, "--prompt", "a {label} foot", "--steps", 8]
    flags += ["--rank", 2, "--lr", 0.03, "--text-lora", "--val-samples", 1, "--val-steps", 1]
    run(train, *flags, "--out", tmp_path)
    base = sample.load_base(folder, CPU)
    pipe = pipeline(folder)
    plain = ours(base, "a sore foot")
    pairs, _, _ = lora.load(tmp_path / "lora.safetensors")
    with lora.merged(base.parts(), [(pairs, 1.0)]):
        adapted = ours(base, "a sore foot")
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert {name.split(".")[0] for name in pairs} == set(base.parts())
    assert difference(adapted, theirs(pipe, "a sore foot")) <= 2
    assert difference(adapted, plain) > 2


def test_all_targets_reach_linear_and_convolution_layers_and_open_in_diffusers(
    base, images, tmp_path, run
):
    pytest.importorskip("peft")
    flags = ["--base", base, "--data", images, "--prompt", "a foot", "--steps", 6, "--rank", 2]
    flags += ["--lr", 0.03, "--targets", "all", "--val-samples", 0]
    run(train, *flags, "--out", tmp_path)
    pairs, _, _ = lora.load(tmp_path / "lora.safetensors")
    loaded = sample.load_base(base, CPU)
    pipe = pipeline(base)
    with lora.merged(loaded.parts(), [(pairs, 1.0)]):
        picture = ours(loaded, "a foot")
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert {a.ndim for a, _ in pairs.values()} == {2, 4}
    assert any("resnets" in name for name in pairs)
    assert difference(picture, theirs(pipe, "a foot")) <= 2


def changed(folder, target, part, **values):
    """A copy of a base with other values in the configuration of one of its parts."""
    shutil.copytree(folder, target)
    path = next(Path(target, part).glob("*config.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


def test_what_cannot_work_is_refused(base, images, tmp_path, refused):
    flags = ["--data", images, "--prompt", "x", "--out", tmp_path / "out", "--steps", 2]
    broken = changed(base, tmp_path / "ztsnr", "scheduler", rescale_betas_zero_snr=True)
    assert "rescale_betas_zero_snr" in refused(train, *flags, "--base", broken)


KINDS_OF_OTHERS = [
    ("scheduler", {"num_train_timesteps": 0}),
    ("scheduler", {"num_train_timesteps": 500}),
    ("scheduler", {"timestep_type": "continuous"}),
    ("scheduler", {"timestep_spacing": "quadratic"}),
    ("scheduler", {"beta_schedule": "sigmoid"}),
    ("scheduler", {"trained_betas": [0.01] * 1000}),
    ("scheduler", {"prediction_type": "sample"}),
    ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
    ("scheduler", {"_class_name": "EDMEulerScheduler"}),
    ("vae", {"latents_mean": [0.0] * 4}),
    ("vae", {"latents_std": [1.0] * 4}),
    ("vae", {"shift_factor": 0.1}),
    ("scheduler", {"_class_name": "EDMDPMSolverMultistepScheduler"}),
    ("scheduler", {"_class_name": "CosineDPMSolverMultistepScheduler"}),
    ("scheduler", {"_class_name": "SomeNewScheduler"}),
    ("scheduler", {"use_flow_sigmas": True}),
    ("scheduler", {"rescale_betas_zero_snr": True}),
    ("unet", {"in_channels": 9}),
    ("unet", {"out_channels": 8}),
    ("unet", {"_class_name": "UNetMotionModel"}),
    ("vae", {"_class_name": "AutoencoderTiny"}),
]


@pytest.mark.parametrize("part, values", KINDS_OF_OTHERS)
def test_a_base_of_another_kind_is_refused(part, values, base, tmp_path, refused):
    other = changed(base, tmp_path / "base", part, **values)
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # never loaded
    line = refused(sample, "--base", other, "--prompt", "x", "--out", tmp_path / "out")
    assert line.startswith(f"error: --base {other}: ")
    for name, value in values.items():
        assert name in line or value in line


DAMAGES = [
    ("text_encoder/model.safetensors", 500),
    ("unet/config.json", 1),
    ("unet/diffusion_pytorch_model.safetensors", 0),
]


@pytest.mark.parametrize("part, length", DAMAGES)
def test_a_damaged_base_is_one_line(part, length, base, tmp_path, refused):
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / part
    path.write_bytes(path.read_bytes()[:length])
    flags = ["--base", tmp_path / "base", "--prompt", "x", "--steps", 1]
    refused(sample, *flags, "--out", tmp_path / "out")


def test_a_tokenizer_that_knows_no_length_reads_as_much_as_its_text_encoder(base, tmp_path):
    length = 10**30  # what transformers writes then
    endless = changed(base, tmp_path / "endless", "tokenizer", model_max_length=length)
    loaded = sample.load_base(endless, CPU)
    states = sample.encode_text(loaded, ["a film " * 100])["encoder_hidden_states"]
    assert states.shape[1] == 77


def test_a_tokenizer_of_another_text_encoder_is_one_line(base, tmp_path, refused):
    other = changed(base, tmp_path / "other", "tokenizer", eos_token="<|another|>")
    line = refused(sample, "--base", other, "--prompt", "x", "--out", tmp_path / "out")
    assert "does not know the tokenizer's special tokens" in line


def test_a_base_that_is_gone_from_the_hub_is_redirected_and_one_that_cannot_be_had_says_what_to_do(
    refused, monkeypatch, capsys
):
    gone = "runwayml/stable-diffusion-v1-5"
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", lambda name, **_: f"/downloaded/{name}")
        folder = sample.find_base(gone)
    assert folder == f"/downloaded/{sample.BASES['sd15']}"
    # the tests run with HF_HUB_OFFLINE=1
    with pytest.raises(SystemExit):
        sample.load_base(gone, CPU)
    assert f"{gone}: gone from the Hub; taking {sample.BASES['sd15']}\n" in capsys.readouterr().err
    line = refused(sample, "--base", "some-owner/some-model", "--prompt", "x")
    assert "hf download some-owner/some-model --local-dir some-model`" in line
    assert "--base ./some-model" in line and "did you mean" not in line
    assert "did you mean tiny?" in refused(sample, "--base", "tyni", "--prompt", "x")
    assert "did you mean" not in refused(sample, "--base", "sd15", "--prompt", "x")


@pytest.mark.parametrize(
    "name, ending",
    [
        ("sd15", "/stable-diffusion-v1-5"),
        ("sd21-base", "/stable-diffusion-2-1-base"),
        ("sd21", "/stable-diffusion-2-1"),
        ("sdxl", "/stable-diffusion-xl-base-1.0"),
    ],
)
def test_a_short_name_is_the_base_that_it_says(name, ending, monkeypatch):
    monkeypatch.setattr(sample, "from_hub", lambda place, _: place)
    assert sample.find_base(name).endswith(ending)


def test_in_fp16_the_vae_of_sdxl_stays_fp32_for_it_overflows(base, sdxl):
    loaded = [sample.load_base(folder, CPU, "fp16") for folder in (base, sdxl)]
    assert [each.unet.dtype for each in loaded] == [torch.float16, torch.float16]
    assert [each.vae.dtype for each in loaded] == [torch.float16, torch.float32]


# ---- at real size

# numbers of weights as published: UNet, text encoders
PUBLISHED = {
    "sd15": [859520964, 123060480],
    "sd21-base": [865910724, 340387840],
    "sd21": [865910724, 340387840],
    "sdxl": [2567463684, 123060480, 694659840],
}


def typed(script, *flags):
    """Run a script as a user does; print what it took."""
    began = time.time()
    process = subprocess.Popen([sys.executable, bench.ROOT / script, *map(str, flags)])
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.time() - began
    memory = used.ru_maxrss / 1e6
    cpu = used.ru_utime + used.ru_stime
    print(f"{script}: {seconds:.0f} s, {cpu:.0f} s of the processor, {memory:.1f} GB", flush=True)
    assert status == 0


def real_base(shape, room):
    """bench.make_base in a process of its own, whose memory no script inherits."""
    made = "import sys, bench; bench.make_base(*sys.argv[1:])"
    command = [sys.executable, "-c", made, shape, room / "base"]
    subprocess.run(command, cwd=bench.ROOT / "tests", check=True)
    return room / "base"


@pytest.fixture
def room(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep


def count_weights(pipe):
    """The weights of the UNet and of each text encoder."""
    models = [pipe.unet, pipe.text_encoder]
    if hasattr(pipe, "text_encoder_2"):
        models.append(pipe.text_encoder_2)
    return [sum(w.numel() for w in model.parameters()) for model in models]


@pytest.mark.slow
@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_base_of_real_size_trains_draws_and_its_adapter_opens_in_diffusers_and_survives_kohya(
    shape, room
):
    from diffusers import DDIMScheduler, DiffusionPipeline

    folder = real_base(shape, room)
    adapter = room / "run" / "lora.safetensors"
    kohya = room / "kohya.safetensors"
    again = room / "again.safetensors"
    bench.make_images(room / "images", 4, 128)
    flags = ["--base", folder, "--data", room / "images", "--resolution", 128, "--steps", 1]
    flags += ["--batch-size", 2, "--lr", 0.1, "--precision", "bf16", "--text-lora"]
    flags += ["--val-split", 0, "--val-samples", 0]
    typed("train.py", *flags, "--out", adapter.parent)
    flags = ["--lora", adapter, "--prompt", "a film", "--num-images", 1, "--steps", 2]
    typed("sample.py", *flags, "--precision", "bf16", "--out", room / "drawn")
    typed("lora.py", "convert", adapter, "--to", "kohya", "--out", kohya)
    typed("lora.py", "convert", kohya, "--to", "diffusers", "--out", again)
    before, _, _ = lora.load(adapter)
    after, _, _ = lora.load(again)
    assert list(before) == list(after)
    for name in before:
        for a, b in zip(before[name], after[name], strict=True):
            assert torch.equal(a, b)

    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert count_weights(pipe) == PUBLISHED[shape]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(4, 16, 16, generator=generator(0, "sample", "a film", 0))[None].bfloat16()
    how = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 128, "width": 128}
    plain = pipe("a film", latents=noise, **how).images[0]
    pipe.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    adapted = pipe("a film", latents=noise, **how).images[0]
    drawn = np.asarray(Image.open(next((room / "drawn").glob("a-film*.png"))), float)
    near = abs(drawn - np.asarray(adapted, float)).mean()
    far = abs(drawn - np.asarray(plain, float)).mean()
    print(f"{shape}: {near:.2f} grey levels from diffusers' picture, {far:.2f} without the adapter")
    # in bf16 it matters that they add the adapter to outputs, we to weights
    assert near < 0.2 * far
