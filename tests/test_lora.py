"""Adapters: the arithmetic, the files, and what other people's loaders make of them."""

import argparse
import json
import math
import pickle
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize
from test_bases import CPU, difference, pipeline, theirs
from torch import nn

import lora
import sample


class Block(nn.Module):
    """A model with every kind of layer an adapter can sit on."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict(
            {"to_q": nn.Linear(6, 8), "conv": nn.Conv2d(3, 6, 3, stride=2, padding=1)}
        )

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
        assert (
            a.abs().max() <= 1 / math.sqrt(400)
            and abs(a.std().item() - 1 / math.sqrt(3 * 400)) < 2e-3
        )
        assert not b.any()


def test_the_adapter_acts_with_alpha_over_rank(model):
    x = torch.randn(2, 3, 8, 8)
    weights = lora.inject(model, "to_q", rank=4, alpha=8)
    fill(weights)
    hidden = model.block["conv"](x).mean((2, 3))
    q, a, b = (
        model.block["to_q"],
        weights["unet.block.to_q.lora_A.weight"],
        weights["unet.block.to_q.lora_B.weight"],
    )
    torch.testing.assert_close(model(x), hidden @ q.weight.T + q.bias + 2 * hidden @ a.T @ b.T)


def test_merged_weights_draw_what_the_injected_layers_draw_and_come_back_to_the_bit(
    model, tmp_path
):
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
    both = {
        "unet.block.to_q": (
            torch.cat([pair[0][0], pair[1][0]]),
            torch.cat([0.7 * pair[0][1], 0.3 * pair[1][1]], 1),
        )
    }
    x = torch.randn(2, 3, 8, 8)
    with lora.merged(
        {"unet": model}, [({"unet.block.to_q": pair[0]}, 0.7), ({"unet.block.to_q": pair[1]}, 0.3)]
    ):
        stacked = model(x)
    with lora.merged({"unet": model}, [(both, 1.0)]):
        torch.testing.assert_close(model(x), stacked, rtol=1e-5, atol=1e-6)


def test_a_file_holds_diffusers_names_alpha_folded_and_is_the_same_bytes_twice(model, tmp_path):
    weights = lora.inject(model, "all", rank=4, alpha=8)
    fill(weights)
    for name in ("a", "b"):
        lora.save(
            tmp_path / name, weights, {"rank": 4, "alpha": 8, "prompt": "a “wound”", "base": "tiny"}
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors = load_file(tmp_path / "a")
    assert set(tensors) == {
        f"unet.block.{layer}.lora_{x}.weight" for layer in ("to_q", "conv") for x in "AB"
    }
    assert torch.equal(
        tensors["unet.block.to_q.lora_B.weight"], 2 * weights["unet.block.to_q.lora_B.weight"]
    )
    assert lora.load(tmp_path / "a")[1]["prompt"] == "a “wound”"


def test_rank_16_on_the_attention_of_stable_diffusion_has_the_known_number_of_weights():
    """SD 1.5: 3,188,736 and SD 2.1: 3,319,808 in 128 pairs (r · (14 ΣC + 2 · 16 · width) over 16 blocks)."""
    from diffusers import UNet2DConditionModel

    for width, heads, expected in ((768, 8, 3_188_736), (1024, (5, 10, 20, 20), 3_319_808)):
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                cross_attention_dim=width,
                attention_head_dim=heads,
                use_linear_projection=width == 1024,
            )
        found = [unet.get_submodule(name) for name in lora.find_targets(unet, "attention")]
        assert (
            len(found) == 128
            and sum(16 * (m.in_features + m.out_features) for m in found) == expected
        )


def random_adapter(folder, path, rank=4, alpha=8.0):
    """An adapter with weights on a base's UNet, saved as train.py saves it."""
    base = sample.load_base(folder, CPU)
    weights = lora.inject(base.unet, "attention", rank, alpha)
    fill(weights)
    lora.save(path, weights, {"rank": rank, "alpha": alpha, "base": folder})


def test_info_prints_plain_figures(base, tmp_path, capsys):
    random_adapter(base, tmp_path / "lora.safetensors")
    pairs, _, _ = lora.load(tmp_path / "lora.safetensors")
    lora.info(str(tmp_path / "lora.safetensors"))
    lines = capsys.readouterr().out.splitlines()
    assert {"dialect: diffusers", "pairs: 32", "rank: 4", "alpha: 8.0", "parameters: 8192"} <= set(
        lines
    )
    assert f"base: {base}" in lines
    norms = {
        line.split(":")[0]: float(line.split(":")[1]) for line in lines if line.startswith("norm")
    }
    assert set(norms) == {
        "norm",
        "norm unet.down_blocks.1",
        "norm unet.mid_block",
        "norm unet.up_blocks.0",
    }
    parts = [
        lora.delta(*pair).norm()
        for name, pair in pairs.items()
        if name.startswith("unet.mid_block.")
    ]
    assert norms["norm unet.mid_block"] == pytest.approx(torch.stack(parts).norm().item(), rel=1e-3)
    assert norms["norm"] == pytest.approx(
        math.hypot(*[norms[key] for key in norms if key != "norm"]), rel=1e-3
    )


# ------------------------------------------------------------------------------------------ other trainers' files


def stable_diffusion(kind):
    """The UNet of SD 1.5, SD 2.1 or SDXL without its weights."""
    from diffusers import UNet2DConditionModel

    flags = {
        "sd15": {"cross_attention_dim": 768},
        "sd21": {"cross_attention_dim": 1024, "use_linear_projection": True},
        "sdxl": {
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ["DownBlock2D"] + 2 * ["CrossAttnDownBlock2D"],
            "up_block_types": 2 * ["CrossAttnUpBlock2D"] + ["UpBlock2D"],
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }[kind]
    with torch.device("meta"):
        return UNet2DConditionModel(**flags)


def layers(model):
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_every_layer_of_stable_diffusion_is_read_from_its_underscored_name(kind):
    for name in layers(stable_diffusion(kind)):
        assert lora.layer_name("lora_unet_" + name.replace(".", "_")) == "unet." + name


def test_every_layer_of_sdxl_has_the_sgm_name_that_diffusers_reads_as_this_layer():
    from diffusers.loaders import lora_conversion_utils as reference
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    unet = stable_diffusion("sdxl")
    sgm = {ours: kohya for kohya, ours in lora.sgm_names(2).items()}
    names = {
        "lora_unet_" + lora.translate(name, sgm).replace(".", "_"): name for name in layers(unet)
    }
    assert len(names) == 794
    assert lora.from_sgm(list(map(lora.layer_name, names))) == {
        lora.layer_name(stem): f"unet.{name}" for stem, name in names.items()
    }
    keys = {
        f"{stem}.lora_{part}.weight": name
        for stem, name in names.items()
        for part in ("down", "up")
    }
    found, _ = reference._convert_non_diffusers_lora_to_diffusers(
        reference._maybe_map_sgm_blocks_to_diffusers(keys, unet.config)
    )
    for key, name in convert_unet_state_dict_to_peft(found).items():
        assert key.startswith(f"unet.{name}.lora_")


UNET, TEXT = "transformer_blocks", "text_model.encoder.layers"
BY_HAND = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": f"unet.down_blocks.1.attentions.0.{UNET}.0.attn2.to_k",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": f"unet.mid_block.attentions.0.{UNET}.0.attn1.to_out.0",
    "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_2": f"unet.down_blocks.2.attentions.1.{UNET}.9.ff.net.2",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_output_blocks_5_2_conv": "unet.up_blocks.1.upsamplers.0.conv",
    "lora_unet_output_blocks_8_0_in_layers_2": "unet.up_blocks.2.resnets.2.conv1",
    "diffusion_model.output_blocks.0.1.proj_out": "unet.up_blocks.0.attentions.0.proj_out",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": f"text_encoder.{TEXT}.0.self_attn.q_proj",
    "lora_te1_text_model_encoder_layers_11_mlp_fc1": f"text_encoder.{TEXT}.11.mlp.fc1",
    "lora_te2_text_model_encoder_layers_0_self_attn_out_proj": f"text_encoder_2.{TEXT}.0.self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora": f"text_encoder.{TEXT}.3.self_attn.out_proj",
    "text_encoder.encoder.layers.3.mlp.fc2.lora_linear_layer": f"text_encoder.{TEXT}.3.mlp.fc2",
}


@pytest.mark.parametrize("stem", BY_HAND)
def test_names_of_other_trainers_are_those_of_diffusers(stem, tmp_path):
    between = "." if stem.endswith(("_lora", "_layer")) else ".lora_"
    save_file(
        {
            f"{stem}{between}down.weight": torch.ones(2, 3),
            f"{stem}{between}up.weight": torch.ones(4, 2),
        },
        tmp_path / "a.safetensors",
    )
    assert list(lora.load(tmp_path / "a.safetensors")[0]) == [BY_HAND[stem]]


OTHERS = {
    "diffusers": "{}.lora_{A}.weight",
    "diffusers lora.down": "{}.lora.{down}.weight",
    "diffusers processor": "{processor}_lora.{down}.weight",
    "kohya": "lora_{flat}.lora_{down}.weight",
}


def written_by_another(dialect, pairs, prefix=True, alpha=None):
    """{key: tensor} of pairs {"unet.<layer>": (A, B)} as other trainers write them."""
    tensors = {}
    for name, pair in pairs.items():
        words = {
            "flat": name.replace(".", "_"),
            "processor": name.replace(".to_", ".processor.to_").removesuffix(".0"),
        }
        for part, old, value in zip("AB", ("down", "up"), pair):
            key = OTHERS[dialect].format(name, A=part, down=old, **words)
            tensors[key if prefix else key.removeprefix("unet.")] = value
        if alpha is not None:
            tensors[f"lora_{words['flat']}.alpha"] = torch.tensor(float(alpha))
    return tensors


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("dialect", ["diffusers", "diffusers lora.down", "diffusers processor"])
def test_an_adapter_of_rank_8_in_bf16_by_another_trainer_is_read(
    dialect, prefix, tmp_path, run, capsys
):
    unet = stable_diffusion("sd15")
    pairs = {
        f"unet.{name}": (
            torch.full((8, layer.in_features), 0.5, dtype=torch.bfloat16),
            torch.full((layer.out_features, 8), 0.25, dtype=torch.bfloat16),
        )
        for name, layer in layers(unet).items()
        if name.endswith(lora.ATTENTION)
    }
    tensors = written_by_another(dialect, pairs, prefix)
    assert len(tensors) == 256
    save_file(tensors, tmp_path / "theirs.safetensors")
    found, _, _ = lora.load(tmp_path / "theirs.safetensors")
    assert set(found) == set(pairs) and all(
        a.dtype == b.dtype == torch.float32 for a, b in found.values()
    )
    run(lora, "info", tmp_path / "theirs.safetensors")
    assert {
        f"dialect: {dialect}",
        "rank: 8",
        "alpha: 8",
        "pairs: 128",
        "parameters: 1594368",
        "base: of the sd15 family",
    } <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("dialect", OTHERS)
def test_all_dialects_give_the_same_change_and_alpha_counts_where_there_is_one(
    dialect, base, tmp_path
):
    random_adapter(base, tmp_path / "ours.safetensors")
    pairs, _, _ = lora.load(tmp_path / "ours.safetensors")
    alpha = 2 if dialect == "kohya" else None
    save_file(written_by_another(dialect, pairs, alpha=alpha), tmp_path / "theirs.safetensors")
    found, metadata, _ = lora.load(tmp_path / "theirs.safetensors")
    scale = 0.5 if dialect == "kohya" else 1
    assert metadata["dialect"] == dialect and set(found) == set(pairs)
    assert all(
        torch.equal(lora.delta(*found[name]), scale * lora.delta(*pair))
        for name, pair in pairs.items()
    )


def test_the_alpha_in_the_header_of_newer_diffusers_counts(tmp_path):
    tensors = {
        f"unet.{layer}.lora_{part}.weight": torch.ones(2, 2)
        for layer in ("to_q", "to_k")
        for part in "AB"
    }
    for patterns in (
        {"to_k": 1},
        {"to_.": 1, "to_k": 2, "to_q": 8},
        {".*k": 1},
    ):  # regular expressions, the first that fits
        header = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": patterns}
        save_file(
            tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(header)}
        )
        pairs, metadata, _ = lora.load(tmp_path / "a.safetensors")
        assert pairs["unet.to_k"][1][0, 0] == 0.5 and pairs["unet.to_q"][1][0, 0] == (
            0.5 if "to_." in patterns else 4
        )


def test_rank_stabilised_adapters_act_with_alpha_over_the_root_of_the_rank(tmp_path):
    header = {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_rslora": True}
    save_file(
        {"unet.to_q.lora_A.weight": torch.ones(4, 2), "unet.to_q.lora_B.weight": torch.ones(2, 4)},
        tmp_path / "a",
        {"lora_adapter_metadata": json.dumps(header)},
    )
    assert lora.load(tmp_path / "a")[0]["unet.to_q"][1][0, 0] == 2  # 4 / sqrt(4)


# ------------------------------------------------------------------------------------------ to other programs


def everywhere(folder, path, alpha, rank=4):
    """An adapter on every kind of layer that adapters sit on: attention, feed-forward, convolutions, text encoders."""
    parts = sample.load_base(folder, CPU).parts()
    weights = {}
    for root, part in parts.items():
        weights |= lora.inject(
            part, "all" if root == "unet" else "q_proj,out_proj,fc1", rank, alpha, prefix=root
        )
    fill(weights)
    for name, w in weights.items():
        w.data *= 0.3
    lora.save(path, weights, {"rank": rank, "alpha": alpha, "base": folder})


def as_a1111_and_comfyui_read_it(path, parts, layers_a_level):
    """Add a kohya file to a model by the rules of A1111 and ComfyUI, which know nothing of ours.

    The part before the first dot names a layer: the model's own names with underscores below lora_unet_ and lora_te_
    (lora_te1_, lora_te2_ of SDXL, whose UNet has Stability's names); W += alpha/rank · up·down, rank the rows of down.
    """
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    tensors, known, sdxl = load_file(path), {}, "text_encoder_2" in parts
    prefixes = ("lora_unet_", "lora_te1_" if sdxl else "lora_te_", "lora_te2_")
    for prefix, part in zip(prefixes, parts.values()):
        for name, layer in layers(part).items():
            name = "text_model." * name.startswith("encoder.") + name
            known[prefix + name.replace(".", "_")] = layer
    if sdxl:
        assert any(key.startswith("lora_unet_input_blocks_") for key in tensors)
        assert not any(key.startswith("lora_unet_down_blocks_") for key in tensors)
        tensors = _maybe_map_sgm_blocks_to_diffusers(
            tensors, argparse.Namespace(layers_per_block=layers_a_level)
        )
        for sgm, diffusers in (
            ("in_layers_2", "conv1"),
            ("out_layers_3", "conv2"),
            ("emb_layers_1", "time_emb_proj"),
            ("skip_connection", "conv_shortcut"),
            ("_op.", "_conv."),
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            tensors = {key.replace(sgm, diffusers): value for key, value in tensors.items()}
    stems = {key.split(".", 1)[0] for key in tensors}
    assert stems <= set(known) and len(tensors) == 3 * len(stems)
    with torch.no_grad():
        for stem in stems:
            up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
            scale = tensors[f"{stem}.alpha"].item() / down.shape[0]
            known[stem].weight += scale * torch.einsum(
                "or,r...->o...", up.reshape(len(up), -1), down
            )


@pytest.mark.parametrize("kind, alpha", [("base", 8), ("sd21", 6), ("sdxl", 2)])
def test_the_same_picture_comes_from_every_file_and_every_program(
    kind, alpha, request, tmp_path, run
):
    pytest.importorskip("peft")
    folder, ours, kohya = (
        request.getfixturevalue(kind),
        tmp_path / "ours.safetensors",
        tmp_path / "kohya.safetensors",
    )
    everywhere(folder, ours, alpha)
    run(lora, "convert", ours, "--to", "kohya", "--out", kohya)
    plain = next(sample.generate(sample.load_base(folder, CPU), [("a sore foot", 0)], 5, 5))
    pictures = []
    for path in (ours, kohya):
        mine, pipe = sample.load_base(folder, CPU), pipeline(folder)
        with lora.merged(mine.parts(), [(lora.load(path)[0], 1.0)]):
            pictures.append(next(sample.generate(mine, [("a sore foot", 0)], 5, 5)))
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
        pictures.append(theirs(pipe, "a sore foot"))
    webui = sample.load_base(folder, CPU)
    as_a1111_and_comfyui_read_it(kohya, webui.parts(), layers_a_level=1)
    pictures.append(next(sample.generate(webui, [("a sore foot", 0)], 5, 5)))
    assert (
        max(difference(pictures[0], picture) for picture in pictures)
        <= 2
        < difference(pictures[0], plain)
    )


@pytest.mark.parametrize("alpha", [8, 1, 6])
def test_diffusers_to_kohya_and_back_is_the_same_to_the_bit(alpha, sdxl, tmp_path, run, capsys):
    there, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    everywhere(sdxl, tmp_path / "a.safetensors", alpha)
    run(lora, "convert", tmp_path / "a.safetensors", "--to", "kohya", "--out", there)
    run(lora, "convert", there, "--to", "diffusers", "--out", back)
    assert capsys.readouterr().out.count("relative error: 0\n") == 2
    one, other = load_file(tmp_path / "a.safetensors"), load_file(back)
    assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    with safe_open(there, "pt") as file:
        about = file.metadata()
    alphas = {value.item() for key, value in load_file(there).items() if key.endswith(".alpha")}
    assert alphas == {
        4 if alpha == 6 else alpha
    }  # 6/4 taken out of B would not come back to the bit
    assert about["ss_network_dim"] == "4" and about["ss_network_alpha"] == f"{alphas.pop()}"[:1]
    assert about["alpha"] == str(alpha) and about["ss_v2"] == "False"


def test_a_whole_number_may_be_an_alpha_and_a_weight_too_large_is_refused(
    tmp_path, run, refused, capsys
):
    pairs = {"unet.mid_block.to_q": (torch.ones(2, 8), torch.ones(8, 2))}
    tensors = written_by_another("kohya", pairs, alpha=1)
    save_file(
        {key: value.long() if key.endswith("alpha") else value for key, value in tensors.items()},
        tmp_path / "k",
    )
    run(lora, "info", tmp_path / "k")  # as diffusers writes them
    assert "alpha: 1\n" in capsys.readouterr().out
    assert "too large" in refused(lora, "merge", f"{tmp_path / 'k'}:1e39", "--out", tmp_path / "m")


def test_where_alpha_does_not_fold_to_the_bit_the_error_is_said(tmp_path, run, capsys):
    draw = torch.Generator().manual_seed(0)
    pairs = {
        "unet.mid_block.to_q": (
            torch.randn(3, 8, generator=draw),
            torch.randn(8, 3, generator=draw),
        )
    }
    save_file(written_by_another("kohya", pairs, alpha=1), tmp_path / "k.safetensors")
    run(
        lora,
        "convert",
        tmp_path / "k.safetensors",
        "--to",
        "diffusers",
        "--out",
        tmp_path / "d.safetensors",
    )
    said = float(re.search(r"relative error: (\S+)", capsys.readouterr().out)[1])
    b = load_file(tmp_path / "d.safetensors")["unet.mid_block.to_q.lora_B.weight"]
    exact = pairs["unet.mid_block.to_q"][1].double() / 3
    assert 0 < said < 1e-7 and said == pytest.approx(
        ((b.double() - exact).norm() / exact.norm()).item(), rel=0.1
    )


# ------------------------------------------------------------------------------------------ merge


def three_layers(path, seed, rank, alpha, names=("to_q", "to_k", "conv")):
    """An adapter file with pairs on some of three layers, and what it adds to each."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"to_q": ((6,), ()), "to_k": ((20,), ()), "conv": ((3, 3, 3), (1, 1))}
    weights = {}
    for name in names:
        weights[f"unet.block.{name}.lora_A.weight"] = torch.randn(
            rank, *shapes[name][0], generator=draw
        )
        weights[f"unet.block.{name}.lora_B.weight"] = torch.randn(
            8, rank, *shapes[name][1], generator=draw
        )
    lora.save(
        path, weights, {"rank": rank, "alpha": alpha, "base": "tiny", "prompt": f"prompt {seed}"}
    )
    return {name: lora.delta(*pair) for name, pair in lora.load(path)[0].items()}


def test_merging_is_the_weighted_sum_whatever_the_ranks_alphas_and_layers(tmp_path, run, capsys):
    one = three_layers(tmp_path / "a", 1, 2, 5, ("to_q", "conv"))
    two = three_layers(tmp_path / "b", 2, 3, 3, ("to_q", "to_k"))
    run(
        lora,
        "merge",
        f"{tmp_path}/a:0.7",
        f"{tmp_path}/b:-0.3",
        "--out",
        tmp_path / "c.safetensors",
    )
    pairs, metadata, _ = lora.load(tmp_path / "c.safetensors")
    assert (
        {len(a) for a, _ in pairs.values()} == {5}
        and metadata["rank"] == "5"
        and metadata["base"] == "tiny"
    )
    assert (
        metadata["merged"] == "a:0.7 b:-0.3"
        and "prompt" not in metadata
        and str(tmp_path) not in str(metadata)
    )
    for name in one | two:
        wanted = sum(w * d[name] for w, d in ((0.7, one), (-0.3, two)) if name in d)
        torch.testing.assert_close(lora.delta(*pairs[name]), wanted, rtol=1e-5, atol=1e-6)


def test_a_merged_adapter_of_mixed_ranks_opens_in_diffusers(base, tmp_path, run):
    pytest.importorskip("peft")
    everywhere(base, tmp_path / "a.safetensors", 8)
    random_adapter(base, tmp_path / "b.safetensors", rank=2, alpha=1.0)
    run(
        lora,
        "merge",
        tmp_path / "a.safetensors",
        f"{tmp_path}/b.safetensors:0.2",
        "--out",
        tmp_path / "c.safetensors",
    )
    stacked = sample.load_base(base, CPU)
    with lora.merged(
        stacked.parts(),
        [
            (lora.load(tmp_path / "a.safetensors")[0], 1.0),
            (lora.load(tmp_path / "b.safetensors")[0], 0.2),
        ],
    ):
        picture = next(sample.generate(stacked, [("a foot", 0)], 5, 5))
    pipe = pipeline(base)
    pipe.load_lora_weights(str(tmp_path), weight_name="c.safetensors")
    assert difference(picture, theirs(pipe, "a foot")) <= 2


def test_what_cannot_be_done_is_refused(base, tmp_path, refused):
    out = ("--out", tmp_path / "x.safetensors")
    three_layers(tmp_path / "a", 1, 2, 2)
    random_adapter(base, tmp_path / "b")
    three_layers(tmp_path / "w", 1, 2, 2, ("to_k",))
    tensors = load_file(tmp_path / "w")
    save_file({**tensors, "unet.block.to_k.lora_A.weight": torch.ones(2, 21)}, tmp_path / "w")
    save_file({**tensors, "<word>": torch.ones(1, 32)}, tmp_path / "t", {"tokens": "<word>"})
    assert "another shape" in refused(lora, "merge", tmp_path / "a", tmp_path / "w", *out)
    assert "<word>" in refused(lora, "merge", tmp_path / "a", tmp_path / "t", *out)
    assert "<word>" in refused(lora, "convert", tmp_path / "t", "--to", "kohya", *out)
    assert "no such file" in refused(lora, "convert", tmp_path, "--to", "kohya", *out)
    (tmp_path / "file").write_text("")
    assert "file" in refused(
        lora, "convert", tmp_path / "a", "--to", "kohya", "--out", tmp_path / "file" / "x"
    )
    assert not (tmp_path / "x.safetensors").exists()


# ------------------------------------------------------------------------------------------ damaged and foreign files

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
A, B = {f"{NAME}.lora_A.weight": torch.ones(4, 32)}, {f"{NAME}.lora_B.weight": torch.ones(32, 4)}
KOHYA = {f"{KEY}.lora_down.weight": torch.ones(4, 32), f"{KEY}.lora_up.weight": torch.ones(32, 4)}
NAN, DEEP = torch.full((32, 4), math.nan), {"lora_adapter_metadata": "{" * 100_000}
WORD = {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'}
ONE = serialize({**A, **B})
DAMAGED = {  # name: the file's bytes, or its tensors (and header), and what the line says
    "no bytes": (b"", "not a readable safetensors"),
    "half of it": (ONE[: len(ONE) // 2], "not a readable safetensors"),
    "without its last byte": (ONE[:-1], "not a readable safetensors"),
    "with bytes behind": (ONE + b"more", "not a readable safetensors"),
    "a pickle": (pickle.dumps({"a": 1}), "not a readable safetensors"),
    "a zip": (b"PK\x03\x04" + bytes(200), "not a readable safetensors"),
    "a page of HTML": (
        b"<!DOCTYPE html><html><body>401 Unauthorized</body></html>",
        "not a readable safetensors",
    ),
    "a header of 10 GB": ((10**10).to_bytes(8, "little") + ONE[8:], "not a readable safetensors"),
    "a header that is no JSON": (
        (8).to_bytes(8, "little") + b"{{{{{{{{",
        "not a readable safetensors",
    ),
    "a header that points outside": (
        ONE.replace(b"[0,512]", b"[0,912]"),
        "not a readable safetensors",
    ),
    "no tensors": ({}, "it is empty"),
    "half a pair": (A, "lora_A.weight"),
    "half a kohya pair": ({f"{KEY}.lora_up.weight": torch.ones(32, 4)}, "lora_up.weight"),
    "an alpha alone": ({**A, **B, f"{KEY.replace('_q', '_k')}.alpha": torch.tensor(1.0)}, "alpha"),
    "keys of a whole UNet": (
        {"mid_block.attentions.0.proj_in.weight": torch.ones(3, 3)},
        "1 keys are of no pair",
    ),
    "one foreign key": ({**A, **B, "unet.conv_in.bias": torch.ones(3)}, "unet.conv_in.bias"),
    "a layer twice": ({**A, **B, **KOHYA}, "4 keys are of no pair"),
    "whole numbers": ({**A, **{key: b.int() for key, b in B.items()}}, "of no pair"),
    "NaN in B": ({**A, f"{NAME}.lora_B.weight": NAN}, "NaN"),
    "infinity in A": (
        {f"{NAME}.lora_A.weight": torch.full((4, 32), math.inf), **B},
        "NaN or infinity",
    ),
    "NaN in alpha": ({**KOHYA, f"{KEY}.alpha": torch.tensor(math.nan)}, "NaN"),
    "two alphas": ({**KOHYA, f"{KEY}.alpha": torch.ones(2)}, "alpha"),
    "ranks that differ": ({**A, f"{NAME}.lora_B.weight": torch.ones(32, 5)}, "do not fit together"),
    "rank zero": (
        {f"{NAME}.lora_A.weight": torch.ones(0, 32), f"{NAME}.lora_B.weight": torch.ones(32, 0)},
        "not fit",
    ),
    "vectors": (
        {f"{NAME}.lora_A.weight": torch.ones(4), f"{NAME}.lora_B.weight": torch.ones(4)},
        "do not fit",
    ),
    "a broad lora_B": (
        {
            f"{NAME}.lora_A.weight": torch.ones(4, 3, 1, 1),
            f"{NAME}.lora_B.weight": torch.ones(9, 4, 3, 3),
        },
        "do not fit",
    ),
    "DoRA": ({**KOHYA, f"{KEY}.dora_scale": torch.ones(32, 1)}, "DoRA ("),
    "DoRA of diffusers": ({**A, **B, f"{NAME}.lora_magnitude_vector": torch.ones(32)}, "DoRA ("),
    "LoKr": ({f"{KEY}.lokr_w1": torch.ones(4, 4), f"{KEY}.lokr_w2": torch.ones(8, 8)}, "LoKr ("),
    "LoHa": (
        {f"{KEY}.hada_w1_a": torch.ones(4, 4), f"{KEY}.hada_w1_b": torch.ones(4, 4)},
        "LoHa (",
    ),
    "LoCon-Tucker": (
        {**KOHYA, f"{KEY}.lora_mid.weight": torch.ones(4, 4, 3, 3)},
        "LoCon with a Tucker core (",
    ),
    "OFT": ({f"{KEY}.oft_blocks": torch.ones(4, 4, 4)}, "OFT ("),
    "a difference": ({f"{KEY}.diff": torch.ones(32, 32)}, "whole differences"),
    "a header without sense": (serialize({**A, **B}, DEEP), "lora_adapter_metadata"),
    "a header with a word for alpha": (serialize({**A, **B}, WORD), "lora_adapter_metadata"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(kind, tmp_path, refused):
    content, said = DAMAGED[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(serialize(content) if isinstance(content, dict) else content)
    line = refused(lora, "info", path)
    assert "bad.safetensors" in line and said in line


@pytest.mark.parametrize(
    "change", ["other layers", "other width", "other base", "kohya's other layers"]
)
def test_an_adapter_that_does_not_fit_the_base_is_refused_with_the_names(
    change, base, sd21, tmp_path, refused
):
    path = tmp_path / "bad.safetensors"
    random_adapter(sd21 if change == "other base" else base, path)
    tensors = load_file(path)
    if change == "other layers":
        tensors = {key.replace("unet.", "unet.elsewhere."): value for key, value in tensors.items()}
    elif change == "other width":
        tensors = {
            key: torch.cat([value, value], 1) if "lora_A" in key else value
            for key, value in tensors.items()
        }
    elif change == "other base":
        tensors |= {
            f"unet.mid_block.attentions.0.proj_in.lora_{part}.weight": torch.ones(shape)
            for part, shape in (("A", (4, 64)), ("B", (64, 4)))
        }
    else:
        tensors = {
            f"lora_unet_elsewhere_to_q.lora_{part}.weight": torch.ones(4, 4)
            for part in ("down", "up")
        }
    save_file(tensors, path)
    line = refused(
        sample,
        "--base",
        base,
        "--lora",
        path,
        "--prompt",
        "x",
        "--steps",
        2,
        "--out",
        tmp_path / "out",
    )
    assert "does not fit this base" in line and "unet." in line
    assert not list(tmp_path.glob("out/*.png"))
