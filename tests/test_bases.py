"""Every kind of base: it trains, its pictures are those of diffusers' own pipeline, and its adapter opens there."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import lora
import sample
import train

CPU = torch.device("cpu")
KINDS = ["base", "sd21", "sdxl"]


def pipeline(folder):
    """diffusers' own pipeline of a base, with DDIM as it is configured there."""
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(folder, **({} if "sdxl" in folder else {"safety_checker": None}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, prompt, **flags):
    noise = torch.randn(4, 8, 8, generator=sample.generator(0, "sample", prompt, 0))[None]
    return pipe(prompt, num_inference_steps=5, guidance_scale=5, latents=noise, height=64, width=64, **flags).images[0]


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_a_picture_is_that_of_diffusers_own_pipeline(kind, negative, request):
    folder = request.getfixturevalue(kind)
    ours = next(sample.generate(sample.load_base(folder, CPU), [("a film", 0)], 5, 5, negative_prompt=negative))
    assert difference(ours, theirs(pipeline(folder), "a film", negative_prompt=negative or None)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_unet_and_text_encoders_trains_and_opens_in_diffusers(kind, request, images, tmp_path, run):
    pytest.importorskip("peft")
    folder = request.getfixturevalue(kind)
    run(train, "--base", folder, "--data", images, "--prompt", "a {label} foot", "--steps", 8, "--rank", 2, "--lr", 0.03,
        "--text-lora", "--val-samples", 1, "--val-steps", 1, "--out", tmp_path)
    base, pipe = sample.load_base(folder, CPU), pipeline(folder)
    plain = next(sample.generate(base, [("a sore foot", 0)], 5, 5))
    pairs, _, _ = lora.load(tmp_path / "lora.safetensors")
    assert {name.split(".")[0] for name in pairs} == set(base.parts())
    with lora.merged(base.parts(), [(pairs, 1.0)]):
        ours = next(sample.generate(base, [("a sore foot", 0)], 5, 5))
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert difference(ours, theirs(pipe, "a sore foot")) <= 2 < difference(ours, plain)


def test_all_targets_reach_linear_and_convolution_layers_and_open_in_diffusers(base, images, tmp_path, run):
    pytest.importorskip("peft")
    run(train, "--base", base, "--data", images, "--prompt", "a foot", "--steps", 6, "--rank", 2, "--lr", 0.03, "--targets",
        "all", "--val-samples", 0, "--out", tmp_path)
    pairs, _, _ = lora.load(tmp_path / "lora.safetensors")
    assert {a.ndim for a, _ in pairs.values()} == {2, 4} and any("resnets" in name for name in pairs)
    ours, pipe = sample.load_base(base, CPU), pipeline(base)
    with lora.merged(ours.parts(), [(pairs, 1.0)]):
        picture = next(sample.generate(ours, [("a foot", 0)], 5, 5))
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert difference(picture, theirs(pipe, "a foot")) <= 2


def changed(folder, target, part, **values):
    """A copy of a base with other values in the configuration of one of its parts."""
    shutil.copytree(folder, target)
    path = next(Path(target, part).glob("*config.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return target


def test_what_cannot_work_is_refused(base, sd21, images, tmp_path, refused):
    flags = ["--data", images, "--prompt", "x", "--out", tmp_path / "out", "--steps", 2]
    assert "overflows in fp16" in refused(train, *flags, "--base", sd21, "--precision", "fp16")
    broken = changed(base, tmp_path / "ztsnr", "scheduler", rescale_betas_zero_snr=True)
    assert "pure noise" in refused(train, *flags, "--base", broken)


@pytest.mark.parametrize("part, damage", [
    ("text_encoder/model.safetensors", lambda data: data[:500]), ("unet/config.json", lambda data: b"{"),
    ("unet/diffusion_pytorch_model.safetensors", lambda data: b""), ("vae/config.json", lambda data: b"[]")])
def test_a_damaged_base_is_one_line(part, damage, base, tmp_path, refused):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / part).write_bytes(damage((tmp_path / "base" / part).read_bytes()))
    refused(sample, "--base", tmp_path / "base", "--prompt", "x", "--steps", 1, "--out", tmp_path / "out")


def test_a_base_that_is_gone_from_the_hub_is_redirected_and_one_that_cannot_be_had_says_what_to_do(refused, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: f"/downloaded/{name}")
    assert sample.find_base("runwayml/stable-diffusion-v1-5") == f"/downloaded/{sample.BASES['sd15']}"
    assert "is gone from the Hub" in capsys.readouterr().out
    monkeypatch.undo()
    line = refused(sample, "--base", "some-owner/some-model", "--prompt", "x")   # the tests run with HF_HUB_OFFLINE=1
    assert "hf download some-owner/some-model" in line


def test_in_fp16_the_vae_of_sdxl_stays_fp32_for_it_overflows(base, sdxl):
    found = [sample.load_base(name, torch.device("cpu"), "fp16") for name in (base, sdxl)]
    assert [each.unet.dtype for each in found] == [torch.float16] * 2
    assert [each.vae.dtype for each in found] == [torch.float16, torch.float32]
