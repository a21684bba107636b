"""Every kind of base: it trains, its pictures are those of diffusers' own pipeline, and its adapter opens there."""

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

CPU = torch.device("cpu")
KINDS = ["base", "sd21", "sdxl"]


def pipeline(folder):
    """diffusers' own pipeline of a base, with DDIM as it is configured there."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        folder, **({} if "sdxl" in folder else {"safety_checker": None})
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, prompt, **flags):
    noise = torch.randn(4, 8, 8, generator=sample.generator(0, "sample", prompt, 0))[None]
    return pipe(
        prompt, num_inference_steps=5, guidance_scale=5, latents=noise, height=64, width=64, **flags
    ).images[0]


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_a_picture_is_that_of_diffusers_own_pipeline(kind, negative, request):
    folder = request.getfixturevalue(kind)
    ours = next(
        sample.generate(
            sample.load_base(folder, CPU), [("a film", 0)], 5, 5, negative_prompt=negative
        )
    )
    assert (
        difference(ours, theirs(pipeline(folder), "a film", negative_prompt=negative or None)) <= 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_unet_and_text_encoders_trains_and_opens_in_diffusers(
    kind, request, images, tmp_path, run
):
    pytest.importorskip("peft")
    folder = request.getfixturevalue(kind)
    run(
        train,
        "--base",
        folder,
        "--data",
        images,
        "--prompt",
        "a {label} foot",
        "--steps",
        8,
        "--rank",
        2,
        "--lr",
        0.03,
        "--text-lora",
        "--val-samples",
        1,
        "--val-steps",
        1,
        "--out",
        tmp_path,
    )
    base, pipe = sample.load_base(folder, CPU), pipeline(folder)
    plain = next(sample.generate(base, [("a sore foot", 0)], 5, 5))
    pairs, _, _ = lora.load(tmp_path / "lora.safetensors")
    assert {name.split(".")[0] for name in pairs} == set(base.parts())
    with lora.merged(base.parts(), [(pairs, 1.0)]):
        ours = next(sample.generate(base, [("a sore foot", 0)], 5, 5))
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert difference(ours, theirs(pipe, "a sore foot")) <= 2 < difference(ours, plain)


def test_all_targets_reach_linear_and_convolution_layers_and_open_in_diffusers(
    base, images, tmp_path, run
):
    pytest.importorskip("peft")
    run(
        train,
        "--base",
        base,
        "--data",
        images,
        "--prompt",
        "a foot",
        "--steps",
        6,
        "--rank",
        2,
        "--lr",
        0.03,
        "--targets",
        "all",
        "--val-samples",
        0,
        "--out",
        tmp_path,
    )
    pairs, _, _ = lora.load(tmp_path / "lora.safetensors")
    assert {a.ndim for a, _ in pairs.values()} == {2, 4} and any(
        "resnets" in name for name in pairs
    )
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


@pytest.mark.parametrize(
    "part, damage",
    [
        ("text_encoder/model.safetensors", lambda data: data[:500]),
        ("unet/config.json", lambda data: b"{"),
        (
            "tokenizer/tokenizer_config.json",
            lambda data: data.replace(b"<|endoftext|>", b"<|endoftoxt|>"),
        ),
        ("scheduler/scheduler_config.json", lambda data: data.replace(b"1000", b"0")),
        ("scheduler/scheduler_config.json", lambda data: data.replace(b'"epsilon"', b'"sample"')),
        ("unet/config.json", lambda data: b"[1]"),
        ("unet/config.json", lambda data: data.replace(b"sample_size", b"size")),
        ("unet/diffusion_pytorch_model.safetensors", lambda data: b""),
        ("vae/config.json", lambda data: b"[]"),
    ],
)
def test_a_damaged_base_is_one_line(part, damage, base, tmp_path, refused):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / part).write_bytes(damage((tmp_path / "base" / part).read_bytes()))
    refused(
        sample,
        "--base",
        tmp_path / "base",
        "--prompt",
        "x",
        "--steps",
        1,
        "--out",
        tmp_path / "out",
    )


def test_a_tokenizer_that_knows_no_length_reads_as_much_as_its_text_encoder(base, tmp_path):
    for length in (10**30, []):  # what transformers writes then, and damage
        endless = changed(base, tmp_path / str(length), "tokenizer", model_max_length=length)
        loaded = sample.load_base(endless, CPU)
        assert sample.encode_text(loaded, ["a film"])["encoder_hidden_states"].shape[1] == 77
        sample.say_what_is_cut(loaded, ["a film"])


def test_a_base_that_is_gone_from_the_hub_is_redirected_and_one_that_cannot_be_had_says_what_to_do(
    refused, monkeypatch, capsys
):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: f"/downloaded/{name}"
    )
    assert (
        sample.find_base("runwayml/stable-diffusion-v1-5") == f"/downloaded/{sample.BASES['sd15']}"
    )
    assert "is gone from the Hub" in capsys.readouterr().out
    monkeypatch.undo()
    line = refused(
        sample, "--base", "some-owner/some-model", "--prompt", "x"
    )  # the tests run with HF_HUB_OFFLINE=1
    assert "hf download some-owner/some-model" in line


def test_in_fp16_the_vae_of_sdxl_stays_fp32_for_it_overflows(base, sdxl):
    found = [sample.load_base(name, torch.device("cpu"), "fp16") for name in (base, sdxl)]
    assert [each.unet.dtype for each in found] == [torch.float16] * 2
    assert [each.vae.dtype for each in found] == [torch.float16, torch.float32]


# ---- at real size

# numbers of weights as published: UNet, text encoders
PUBLISHED = {
    "sd15": [859520964, 123060480],
    "sd21-base": [865910724, 340387840],
    "sd21": [865910724, 340387840],
    "sdxl": [2567463684, 123060480, 694659840],
}


def typed(script, *flags):
    """Run a script as a user does; say what it took."""
    began = time.time()
    process = subprocess.Popen([sys.executable, bench.ROOT / script, *map(str, flags)])
    _, status, used = os.wait4(process.pid, 0)
    print(
        f"{script} {flags[0]}: {time.time() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of the processor, "
        f"{used.ru_maxrss / 1e6:.1f} GB",
        flush=True,
    )
    assert status == 0


def real_base(shape, room):
    """bench.make_base in a process of its own, whose memory no script inherits."""
    made = "import sys, bench; bench.make_base(*sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", made, shape, room / "base"], cwd=bench.ROOT / "tests", check=True
    )
    return room / "base"


@pytest.fixture
def room(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep


@pytest.mark.slow
@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_base_of_real_size_trains_draws_and_its_adapter_opens_in_diffusers_and_survives_kohya(
    shape, room
):
    from diffusers import DDIMScheduler, DiffusionPipeline

    folder, adapter, drawn = (
        real_base(shape, room),
        room / "run" / "lora.safetensors",
        room / "drawn",
    )
    bench.make_images(room / "images", 4, 128)
    typed(
        "train.py",
        "--base",
        folder,
        "--data",
        room / "images",
        "--resolution",
        128,
        "--steps",
        1,
        "--batch-size",
        2,
        "--lr",
        0.1,
        "--precision",
        "bf16",
        "--text-lora",
        "--val-split",
        0,
        "--val-samples",
        0,
        "--out",
        adapter.parent,
    )
    typed(
        "sample.py",
        "--lora",
        adapter,
        "--prompt",
        "a film",
        "--num-images",
        1,
        "--steps",
        2,
        "--precision",
        "bf16",
        "--out",
        drawn,
    )
    typed("lora.py", "convert", adapter, "--to", "kohya", "--out", room / "kohya.safetensors")
    typed(
        "lora.py",
        "convert",
        room / "kohya.safetensors",
        "--to",
        "diffusers",
        "--out",
        room / "again.safetensors",
    )
    (before, _, _), (after, _, _) = (
        lora.load(path) for path in (adapter, room / "again.safetensors")
    )
    assert list(before) == list(after)
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name]))

    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert [
        sum(w.numel() for w in model.parameters())
        for model in (
            pipe.unet,
            pipe.text_encoder,
            *filter(None, [getattr(pipe, "text_encoder_2", None)]),
        )
    ] == PUBLISHED[shape]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(4, 16, 16, generator=sample.generator(0, "sample", "a film", 0))[
        None
    ].bfloat16()

    def drawn_by_pipe():
        found = pipe(
            "a film",
            num_inference_steps=2,
            guidance_scale=7.5,
            latents=noise,
            height=128,
            width=128,
        )
        return np.asarray(found.images[0], float)

    plain = drawn_by_pipe()
    pipe.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    ours, same = np.asarray(Image.open(next(drawn.glob("a-film*.png"))), float), drawn_by_pipe()
    near, far = abs(ours - same).mean(), abs(ours - plain).mean()
    print(
        f"{shape}: {near:.2f} grey levels from diffusers' picture, {far:.2f} from that without the adapter"
    )
    assert (
        near < 0.2 * far
    )  # in bf16 it matters that they add the adapter to outputs, we to weights


@pytest.mark.slow
def test_an_adapter_is_extracted_from_a_model_of_real_size(room):
    from safetensors.torch import load_file, save_file

    weights = real_base("sd15", room) / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(room / "base", room / "tuned")
    tuned = {name: w.float() for name, w in load_file(weights).items()}
    for name, w in tuned.items():
        if w.ndim > 1:  # in every layer a change of rank 4
            w += 0.1 * (
                torch.randn(len(w), 4) @ torch.randn(4, w[0].numel()) / w[0].numel() ** 0.5
            ).view_as(w)
    save_file(tuned, room / "tuned" / weights.relative_to(room / "base"))
    typed(
        "lora.py",
        "extract",
        room / "tuned",
        room / "base",
        "--rank",
        4,
        "--out",
        room / "out.safetensors",
    )
    base = load_file(weights)
    for name, (a, b) in lora.load(room / "out.safetensors")[0].items():
        name = name.removeprefix("unet.") + ".weight"
        change = tuned[name] - base[name].float()
        assert (lora.delta(a, b) - change).norm() < 1e-3 * change.norm()
        base.pop(name)
    assert not any(w.ndim > 1 for w in base.values())  # every such layer was found
