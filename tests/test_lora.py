"""Adapters: the arithmetic, the files, and what other people's loaders make of them."""
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import sample


class Block(nn.Module):
    """A model with every kind of layer an adapter can sit on."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"to_q": nn.Linear(6, 8), "conv": nn.Conv2d(3, 6, 3, stride=2, padding=1)})

    def forward(self, x):
        return self.block["to_q"](self.block["conv"](x).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block()


def fill(weights, seed=1):
    """Give every adapter weight a value, B too, as a training would."""
    draw = torch.Generator().manual_seed(seed)
    for w in weights.values():
        w.data.copy_(torch.randn(w.shape, generator=draw) * 0.3)


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trainable(model):
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    weights = lora.inject(model, "all", rank=4)
    assert torch.equal(model(x), before)
    assert {f"unet.{n}" for n, w in model.named_parameters() if w.requires_grad} == set(weights)
    assert all(w.dtype == torch.float32 for w in weights.values()) and len(weights) == 4


def test_a_starts_kaiming_uniform_whatever_the_rank_and_b_at_zero():
    for rank in (4, 64):
        layer = nn.Module()
        layer.to_q = nn.Linear(400, 10)
        weights = lora.inject(layer, "to_q", rank=rank, generator=torch.Generator().manual_seed(0))
        a, b = weights["unet.to_q.lora_A.weight"], weights["unet.to_q.lora_B.weight"]
        assert a.abs().max() <= 1 / math.sqrt(400) and abs(a.std().item() - 1 / math.sqrt(3 * 400)) < 2e-3
        assert not b.any()


def test_the_adapter_acts_with_alpha_over_rank(model):
    x = torch.randn(2, 3, 8, 8)
    weights = lora.inject(model, "to_q", rank=4, alpha=8)
    fill(weights)
    hidden = model.block["conv"](x).mean((2, 3))
    q, a, b = model.block["to_q"], weights["unet.block.to_q.lora_A.weight"], weights["unet.block.to_q.lora_B.weight"]
    torch.testing.assert_close(model(x), hidden @ q.weight.T + q.bias + 2 * hidden @ a.T @ b.T)


def test_merged_weights_draw_what_the_injected_layers_draw_and_come_back_to_the_bit(model, tmp_path):
    x, plain = torch.randn(2, 3, 8, 8), Block()
    plain.load_state_dict(model.state_dict())
    weights = lora.inject(model, "all", rank=4, alpha=3)
    fill(weights)
    lora.save(tmp_path / "a.safetensors", weights, {"rank": 4, "alpha": 3})
    pairs, _, _ = lora.load(tmp_path / "a.safetensors")
    originals, before = {k: v.clone() for k, v in plain.state_dict().items()}, plain(x)
    with lora.merged({"unet": plain}, [(pairs, 1.0)]):
        torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(plain(x), before)
    assert all(torch.equal(v, originals[k]) for k, v in plain.state_dict().items())


def test_two_adapters_equal_one_of_the_ranks_together(model):
    draw = torch.Generator().manual_seed(0)
    pair = [(torch.randn(r, 6, generator=draw), torch.randn(8, r, generator=draw)) for r in (2, 5)]
    both = {"unet.block.to_q": (torch.cat([pair[0][0], pair[1][0]]), torch.cat([0.7 * pair[0][1], 0.3 * pair[1][1]], 1))}
    x = torch.randn(2, 3, 8, 8)
    with lora.merged({"unet": model}, [({"unet.block.to_q": pair[0]}, 0.7), ({"unet.block.to_q": pair[1]}, 0.3)]):
        stacked = model(x)
    with lora.merged({"unet": model}, [(both, 1.0)]):
        torch.testing.assert_close(model(x), stacked, rtol=1e-5, atol=1e-6)


def test_a_file_holds_diffusers_names_alpha_folded_and_is_the_same_bytes_twice(model, tmp_path):
    weights = lora.inject(model, "all", rank=4, alpha=8)
    fill(weights)
    for name in ("a", "b"):
        lora.save(tmp_path / name, weights, {"rank": 4, "alpha": 8, "prompt": "a “wound”", "base": "tiny"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors = load_file(tmp_path / "a")
    assert set(tensors) == {f"unet.block.{layer}.lora_{x}.weight" for layer in ("to_q", "conv") for x in "AB"}
    assert torch.equal(tensors["unet.block.to_q.lora_B.weight"], 2 * weights["unet.block.to_q.lora_B.weight"])
    assert lora.load(tmp_path / "a")[1]["prompt"] == "a “wound”"


def test_rank_16_on_the_attention_of_stable_diffusion_has_the_known_number_of_weights():
    """SD 1.5: 3,188,736 and SD 2.1: 3,319,808 in 128 pairs (r · (14 ΣC + 2 · 16 · width) over 16 blocks)."""
    from diffusers import UNet2DConditionModel
    for width, heads, expected in ((768, 8, 3_188_736), (1024, (5, 10, 20, 20), 3_319_808)):
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=width, attention_head_dim=heads,
                                        use_linear_projection=width == 1024)
        found = [unet.get_submodule(name) for name in lora.find_targets(unet, "attention")]
        assert len(found) == 128 and sum(16 * (m.in_features + m.out_features) for m in found) == expected


def random_adapter(folder, path, rank=4, alpha=8.0):
    """An adapter with weights on a base's UNet, saved as train.py saves it."""
    base = sample.load_base(folder, torch.device("cpu"))
    weights = lora.inject(base.unet, "attention", rank, alpha)
    fill(weights)
    lora.save(path, weights, {"rank": rank, "alpha": alpha, "base": folder})


def test_diffusers_own_loader_reads_the_file_and_draws_the_same_picture(base, tmp_path):
    pytest.importorskip("peft")
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    random_adapter(base, tmp_path / "lora.safetensors")
    ours = sample.load_base(base, torch.device("cpu"))
    pairs, _, _ = lora.load(tmp_path / "lora.safetensors")
    plain = next(sample.generate(ours, [("a wound", 0)], steps=5))
    with lora.merged({"unet": ours.unet}, [(pairs, 1.0)]):
        picture = next(sample.generate(ours, [("a wound", 0)], steps=5))
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 8, 8, generator=sample.generator(0, "sample", "a wound", 0))[None]
    theirs = pipe("a wound", num_inference_steps=5, guidance_scale=7.5, latents=noise, height=64, width=64).images[0]
    difference = np.abs(np.asarray(picture, int) - np.asarray(theirs, int))
    assert difference.max() <= 2
    assert np.abs(np.asarray(plain, int) - np.asarray(theirs, int)).max() > 2  # the adapter does something


def broken(kind, folder, path):
    random_adapter(folder, path)
    tensors, data = load_file(path), path.read_bytes()
    first = next(iter(tensors))
    if kind == "truncated":
        path.write_bytes(data[:len(data) // 2])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "huge header":
        path.write_bytes((10 ** 10).to_bytes(8, "little") + data[8:])
    elif kind == "half a pair":
        save_file({k: v for k, v in tensors.items() if k != first}, path)
    elif kind == "foreign keys":
        save_file({**tensors, "unet.conv_in.hada_w1_a": torch.zeros(2)}, path)
    elif kind == "NaN":
        save_file({**tensors, first: torch.full_like(tensors[first], math.nan)}, path)
    elif kind == "other layers":
        save_file({k.replace("unet.", "unet.elsewhere."): v for k, v in tensors.items()}, path)
    elif kind == "other width":
        save_file({k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in tensors.items()}, path)


@pytest.mark.parametrize("kind", ["truncated", "pickle", "empty", "huge header", "half a pair", "foreign keys", "NaN",
                                  "other layers", "other width"])
def test_a_malformed_adapter_is_refused_in_one_line(kind, base, tmp_path, refused):
    broken(kind, base, tmp_path / "bad.safetensors")
    line = refused(sample, "--base", base, "--lora", tmp_path / "bad.safetensors", "--prompt", "x", "--steps", 2, "--out",
                   tmp_path / "out")
    assert "bad.safetensors" in line or "does not fit this base" in line
    assert not list(tmp_path.glob("out/*.png"))


def test_info_prints_plain_figures(base, tmp_path, capsys):
    random_adapter(base, tmp_path / "lora.safetensors")
    lora.info(str(tmp_path / "lora.safetensors"))
    lines = capsys.readouterr().out.splitlines()
    assert {"dialect: diffusers", "pairs: 32", "rank: 4", "alpha: 8.0", "parameters: 8192"} <= set(lines)
