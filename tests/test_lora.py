"""Adapters: the arithmetic, the files, and what other people's loaders make of them."""

import argparse
import json
import math
import pickle
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize
from test_bases import CPU, difference, pipeline, theirs
from torch import nn

import lora
import sample

ATTN = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
NAME = f"{ATTN}.to_q"
KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
A = {f"{NAME}.lora_A.weight": torch.ones(4, 32)}
B = {f"{NAME}.lora_B.weight": torch.ones(32, 4)}
KOHYA = {f"{KEY}.lora_down.weight": torch.ones(4, 32), f"{KEY}.lora_up.weight": torch.ones(32, 4)}


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
    for weight in weights.values():
        weight.data.copy_(torch.randn(weight.shape, generator=draw) * 0.3)


def delta(a, b):
    """What a pair adds to its layer's weight, B·A."""
    return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


def picture(base):
    """The picture that our sampler draws with a base."""
    settings = sample.Settings(steps=5, guidance_scale=5.0)
    return next(sample.generate(base, [("a sore foot", 0)], settings))


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trainable(model):
    x = torch.randn(2, 3, 8, 8)
    before = model(x)

    weights = lora.inject(model, "all", rank=4)

    assert torch.equal(model(x), before)
    trainable = {f"unet.{name}" for name, w in model.named_parameters() if w.requires_grad}
    assert trainable == set(weights)
    assert len(weights) == 4
    assert all(weight.dtype == torch.float32 for weight in weights.values())


@pytest.mark.parametrize("rank", [4, 64])
def test_a_starts_kaiming_uniform_whatever_the_rank_and_b_at_zero(rank):
    layer = nn.Module()
    layer.to_q = nn.Linear(400, 10)

    weights = lora.inject(layer, "to_q", rank=rank, generator=torch.Generator().manual_seed(0))

    a = weights["unet.to_q.lora_A.weight"]
    assert a.abs().max() <= 1 / math.sqrt(400)
    assert abs(a.std().item() - 1 / math.sqrt(3 * 400)) < 2e-3
    assert not weights["unet.to_q.lora_B.weight"].any()


def test_the_adapter_acts_with_alpha_over_rank(model):
    x = torch.randn(2, 3, 8, 8)
    weights = lora.inject(model, "to_q", rank=4, alpha=8)
    fill(weights)

    result = model(x)

    q = model.block["to_q"]
    a = weights["unet.block.to_q.lora_A.weight"]
    b = weights["unet.block.to_q.lora_B.weight"]
    hidden = model.block["conv"](x).mean((2, 3))
    torch.testing.assert_close(result, hidden @ q.weight.T + q.bias + 2 * hidden @ a.T @ b.T)


def test_merged_weights_draw_what_the_injected_layers_draw_and_come_back_to_the_bit(
    model, tmp_path
):
    x = torch.randn(2, 3, 8, 8)
    plain = Block()
    plain.load_state_dict(model.state_dict())
    originals = {name: weight.clone() for name, weight in plain.state_dict().items()}
    before = plain(x)
    weights = lora.inject(model, "all", rank=4, alpha=3)
    fill(weights)
    lora.save(tmp_path / "a.safetensors", weights, {"rank": 4, "alpha": 3})
    pairs, _, _ = lora.load(tmp_path / "a.safetensors")

    with lora.merged({"unet": plain}, [(pairs, 1.0)]):
        changed = plain(x)

    torch.testing.assert_close(changed, model(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(changed, before)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, originals[name])


def test_two_adapters_equal_one_of_the_ranks_together(model):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    a, b = torch.randn(2, 6, generator=draw), torch.randn(8, 2, generator=draw)
    other_a, other_b = torch.randn(5, 6, generator=draw), torch.randn(8, 5, generator=draw)
    both = (torch.cat([a, other_a]), torch.cat([0.7 * b, 0.3 * other_b], dim=1))
    name = "unet.block.to_q"

    two = [({name: (a, b)}, 0.7), ({name: (other_a, other_b)}, 0.3)]
    with lora.merged({"unet": model}, two):
        result = model(x)
    with lora.merged({"unet": model}, [({name: both}, 1.0)]):
        expected = model(x)

    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_a_file_holds_diffusers_names_alpha_folded_and_is_the_same_bytes_twice(model, tmp_path):
    weights = lora.inject(model, "all", rank=4, alpha=8)
    fill(weights)
    settings = {"rank": 4, "alpha": 8, "prompt": "a “wound”", "base": "tiny", "crop": None}

    for name in ("a", "b"):
        lora.save(tmp_path / name, weights, settings)

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tensors = load_file(tmp_path / "a")
    assert set(tensors) == set(weights)
    name = "unet.block.to_q.lora_B.weight"
    assert torch.equal(tensors[name], 2 * weights[name])
    with safe_open(tmp_path / "a", "pt") as file:
        assert list(file.metadata()) == ["medlora"]
    assert lora.load(tmp_path / "a")[1] == {**settings, "dialect": "diffusers"}


@pytest.mark.parametrize("kind, expected", [("sd15", 3_188_736), ("sd21", 3_319_808)])
def test_rank_16_on_the_attention_of_stable_diffusion_has_the_known_number_of_weights(
    kind, expected
):
    """r · (14 ΣC + 2 · 16 · width) over 16 blocks, in 128 pairs."""
    unet = stable_diffusion(kind)

    names = lora.find_targets(unet, "attention")

    count = 0
    for name in names:
        layer = unet.get_submodule(name)
        count += 16 * (layer.in_features + layer.out_features)
    assert len(names) == 128
    assert count == expected


def random_adapter(folder, path, rank=4, alpha=8.0):
    """An adapter with weights on a base's UNet, saved as train.py saves it."""
    base = sample.load_base(folder, CPU)
    weights = lora.inject(base.unet, "attention", rank, alpha)
    fill(weights)
    lora.save(path, weights, {"rank": rank, "alpha": alpha, "base": folder})


def test_info_prints_plain_figures(base, tmp_path, run, capsys):
    random_adapter(base, tmp_path / "lora.safetensors")

    run(lora, "info", tmp_path / "lora.safetensors")

    lines = capsys.readouterr().out.splitlines()
    assert {"dialect: diffusers", "pairs: 32", "rank: 4", "alpha: 8.0"} <= set(lines)
    assert {"parameters: 8192", f"base: {base}"} <= set(lines)


# ---------------------------------------------------------------- other trainers' files


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
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            found[name] = layer
    return found


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_every_layer_of_stable_diffusion_is_read_from_its_underscored_name(kind):
    for name in layers(stable_diffusion(kind)):
        assert lora.layer_name("lora_unet_" + name.replace(".", "_")) == "unet." + name


def test_every_layer_of_sdxl_has_the_sgm_name_that_diffusers_reads_as_this_layer():
    from diffusers.loaders import lora_conversion_utils as reference
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    unet = stable_diffusion("sdxl")
    to_sgm = {ours: theirs for theirs, ours in lora.SGM_NAMES.items()}
    keys = {}
    for name in layers(unet):
        stem = "lora_" + lora.translate(f"unet.{name}", to_sgm).replace(".", "_")
        assert lora.layer_name(stem) == f"unet.{name}"
        keys[f"{stem}.lora_down.weight"] = name
        keys[f"{stem}.lora_up.weight"] = name
    assert len(keys) == 2 * 794

    read, _ = reference._convert_non_diffusers_lora_to_diffusers(
        reference._maybe_map_sgm_blocks_to_diffusers(keys, unet.config)
    )
    for key, name in convert_unet_state_dict_to_peft(read).items():
        assert key.startswith(f"unet.{name}.lora_")


TRANSFORMER, TEXT = "transformer_blocks", "text_model.encoder.layers"
BY_HAND = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (
        f"unet.down_blocks.1.attentions.0.{TRANSFORMER}.0.attn2.to_k"
    ),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": (
        f"unet.mid_block.attentions.0.{TRANSFORMER}.0.attn1.to_out.0"
    ),
    "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_2": (
        f"unet.down_blocks.2.attentions.1.{TRANSFORMER}.9.ff.net.2"
    ),
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_output_blocks_5_2_conv": "unet.up_blocks.1.upsamplers.0.conv",
    "lora_unet_output_blocks_8_0_in_layers_2": "unet.up_blocks.2.resnets.2.conv1",
    "diffusion_model.output_blocks.0.1.proj_out": "unet.up_blocks.0.attentions.0.proj_out",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (
        f"text_encoder.{TEXT}.0.self_attn.q_proj"
    ),
    "lora_te1_text_model_encoder_layers_11_mlp_fc1": f"text_encoder.{TEXT}.11.mlp.fc1",
    "lora_te2_text_model_encoder_layers_0_self_attn_out_proj": (
        f"text_encoder_2.{TEXT}.0.self_attn.out_proj"
    ),
    "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora": (
        f"text_encoder.{TEXT}.3.self_attn.out_proj"
    ),
    "text_encoder.encoder.layers.3.mlp.fc2.lora_linear_layer": f"text_encoder.{TEXT}.3.mlp.fc2",
}


@pytest.mark.parametrize("stem", BY_HAND)
def test_names_of_other_trainers_are_those_of_diffusers(stem, tmp_path):
    between = ".lora_"
    if stem.endswith(("_lora", "_layer")):
        between = "."
    tensors = {
        f"{stem}{between}down.weight": torch.ones(2, 3),
        f"{stem}{between}up.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")

    pairs, _, _ = lora.load(tmp_path / "a.safetensors")

    assert list(pairs) == [BY_HAND[stem]]


OTHERS = {
    "diffusers": "{}.lora_{A}.weight",
    "diffusers lora.down": "{}.lora.{down}.weight",
    "diffusers processor": "{processor}_lora.{down}.weight",
    "kohya": "lora_{flat}.lora_{down}.weight",
}


def written_by_another(dialect, pairs, prefix=True, alpha=None):
    """{key: tensor} of pairs {"unet.<layer>": (A, B)} as other trainers write them."""
    tensors = {}
    for name, (a, b) in pairs.items():
        flat = name.replace(".", "_")
        processor = name.replace(".to_", ".processor.to_").removesuffix(".0")
        for part, direction, value in (("A", "down", a), ("B", "up", b)):
            key = OTHERS[dialect].format(
                name, A=part, down=direction, flat=flat, processor=processor
            )
            if not prefix:
                key = key.removeprefix("unet.")
            tensors[key] = value
        if alpha is not None:
            tensors[f"lora_{flat}.alpha"] = torch.tensor(float(alpha))
    return tensors


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("dialect", ["diffusers", "diffusers lora.down", "diffusers processor"])
def test_an_adapter_of_rank_8_in_bf16_by_another_trainer_is_read(
    dialect, prefix, tmp_path, run, capsys
):
    pairs = {}
    for name, layer in layers(stable_diffusion("sd15")).items():
        if name.endswith(lora.ATTENTION):
            a = torch.full((8, layer.in_features), 0.5, dtype=torch.bfloat16)
            b = torch.full((layer.out_features, 8), 0.25, dtype=torch.bfloat16)
            pairs[f"unet.{name}"] = (a, b)
    tensors = written_by_another(dialect, pairs, prefix)
    assert len(tensors) == 256
    save_file(tensors, tmp_path / "theirs.safetensors")

    read, _, _ = lora.load(tmp_path / "theirs.safetensors")
    run(lora, "info", tmp_path / "theirs.safetensors")

    assert set(read) == set(pairs)
    assert all(a.dtype == b.dtype == torch.float32 for a, b in read.values())
    lines = set(capsys.readouterr().out.splitlines())
    assert {f"dialect: {dialect}", "rank: 8", "alpha: 8", "pairs: 128"} <= lines
    assert {"parameters: 1594368", "family: sd15"} <= lines


@pytest.mark.parametrize("dialect", OTHERS)
def test_all_dialects_give_the_same_change_and_alpha_counts_where_there_is_one(
    dialect, base, tmp_path
):
    random_adapter(base, tmp_path / "ours.safetensors")
    pairs, _, _ = lora.load(tmp_path / "ours.safetensors")
    alpha, scale = None, 1
    if dialect == "kohya":
        alpha, scale = 2, 0.5
    save_file(written_by_another(dialect, pairs, alpha=alpha), tmp_path / "theirs.safetensors")

    read, metadata, _ = lora.load(tmp_path / "theirs.safetensors")

    assert metadata["dialect"] == dialect
    assert set(read) == set(pairs)
    for name, pair in pairs.items():
        assert torch.equal(delta(*read[name]), scale * delta(*pair))


@pytest.mark.parametrize(
    "patterns, q",
    [
        ({"to_k": 1}, 4),
        ({"to_.": 1, "to_k": 2, "to_q": 8}, 0.5),  # regular expressions, the first that fits
        ({".*k": 1}, 4),
    ],
)
def test_the_alpha_in_the_header_of_newer_diffusers_counts(patterns, q, tmp_path):
    tensors = {}
    for layer in ("to_q", "to_k"):
        tensors[f"{ATTN}.{layer}.lora_A.weight"] = torch.ones(2, 2)
        tensors[f"{ATTN}.{layer}.lora_B.weight"] = torch.ones(2, 2)
    settings = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": patterns}
    save_file(tensors, tmp_path / "a", {"lora_adapter_metadata": json.dumps(settings)})

    pairs, _, _ = lora.load(tmp_path / "a")

    assert pairs[f"{ATTN}.to_k"][1][0, 0] == 0.5
    assert pairs[f"{ATTN}.to_q"][1][0, 0] == q


def test_rank_stabilised_adapters_act_with_alpha_over_the_root_of_the_rank(tmp_path):
    settings = {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_rslora": True}
    tensors = {f"{NAME}.lora_A.weight": torch.ones(4, 2), f"{NAME}.lora_B.weight": torch.ones(2, 4)}
    save_file(tensors, tmp_path / "a", {"lora_adapter_metadata": json.dumps(settings)})

    pairs, _, _ = lora.load(tmp_path / "a")

    assert pairs[NAME][1][0, 0] == 2  # 4 / √4


# ---------------------------------------------------------------- alpha wherever it is kept

PEFT_SETTINGS = [
    {"lora_alpha": 8},
    {"lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 2, "q_proj": 1}},
    {"lora_alpha": 6, "rank_pattern": {"attn1.to_q": 2, "layers.1.self_attn.v_proj": 3}},
    {
        "lora_alpha": 6,
        "use_rslora": True,
        "alpha_pattern": {r"^.*\.to_v": 3, r"^(text_model\.)?encoder\.layers\.0\..*q_proj": 1},
    },
]
PEFT_TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "v_proj"],
    "text_encoder_2": ["q_proj", "v_proj", "text_projection"],
}


def with_peft(model, root, **settings):
    """A model with PEFT's adapter, filled with random numbers, in PEFT's wrapper."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=PEFT_TARGETS[root], **settings)
    wrapped = peft.get_peft_model(model, config)
    fill({n: w for n, w in sorted(wrapped.named_parameters()) if "lora_" in n})
    return wrapped


def changes_by_peft(wrapped, root):
    """{layer: what PEFT adds to its weight}, by PEFT itself."""
    changes = {}
    for name, layer in wrapped.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            changes[lora.on_disk(f"{root}.{name}")] = layer.get_delta_weight("default").detach()
    return changes


def assert_same_changes(pairs, changes):
    assert set(pairs) == set(changes)
    for name, change in changes.items():
        torch.testing.assert_close(delta(*pairs[name]), change, rtol=0, atol=1e-6)


def test_sample_draws_with_peft_s_folder_and_a_weight(base, tmp_path, run):
    wrapped = with_peft(sample.load_base(base, CPU).unet, "unet", lora_alpha=8)
    wrapped.save_pretrained(tmp_path / "peft")
    flags = ("--base", base, "--prompt", "x", "--steps", 2, "--num-images", 1)

    run(sample, *flags, "--lora", f"{tmp_path}/peft:0.5", "--out", tmp_path / "half")
    run(sample, *flags, "--out", tmp_path / "none")

    drawn = [next((tmp_path / name).glob("*.png")).read_bytes() for name in ("half", "none")]
    assert drawn[0] != drawn[1]
    assert "adapter_model.safetensors:0.5" in (tmp_path / "half" / "manifest.csv").read_text()


@pytest.mark.filterwarnings("ignore:The following")  # patterns that name layers of another part
@pytest.mark.parametrize("settings", PEFT_SETTINGS)
@pytest.mark.parametrize("kind, root", [("base", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_peft_s_folder_is_read_with_its_settings_as_the_part_it_was_made_for(
    kind, root, settings, request, tmp_path, capsys
):
    parts = sample.load_base(request.getfixturevalue(kind), CPU).parts()
    for name in ("unet", root):
        wrapped = with_peft(parts[name], name, **settings)
        wrapped.save_pretrained(tmp_path / name)

        in_folder, metadata, _ = lora.load(tmp_path / name)
        as_file, _, _ = lora.load(tmp_path / name / "adapter_model.safetensors")

        assert metadata["dialect"] == "PEFT"
        assert_same_changes(in_folder, changes_by_peft(wrapped, name))
        assert_same_changes(as_file, changes_by_peft(wrapped, name))
        assert "alpha" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The following")  # patterns that name layers of another part
@pytest.mark.parametrize("settings", PEFT_SETTINGS)
def test_both_ways_of_diffusers_to_save_give_peft_s_changes(settings, base, tmp_path):
    from diffusers import StableDiffusionPipeline

    peft = pytest.importorskip("peft")
    unet = pipeline(base).unet
    config = peft.LoraConfig(r=4, target_modules=PEFT_TARGETS["unet"], **settings)
    unet.add_adapter(config)
    fill({n: w for n, w in sorted(unet.named_parameters()) if "lora_" in n})
    changes = {}
    for name, layer in unet.named_modules():
        if hasattr(layer, "get_delta_weight"):
            changes[f"unet.{name}"] = layer.get_delta_weight("default").detach()

    unet.save_lora_adapter(tmp_path, weight_name="unet.safetensors")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        peft.get_peft_model_state_dict(unet),
        weight_name="pipe.safetensors",
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )

    assert_same_changes(lora.load(tmp_path / "unet.safetensors")[0], changes)
    assert_same_changes(lora.load(tmp_path / "pipe.safetensors")[0], changes)


HEADERS = [  # plain keys, as other scripts write them, and alpha/rank of to_q
    ({"r": "2", "lora_alpha": "8"}, 4),
    ({"unet.r": "2", "unet.lora_alpha": "8", "text_encoder.lora_alpha": "1"}, 4),
    ({"lora_alpha": "8.0", "use_rslora": "True"}, 8 / math.sqrt(2)),
    ({"lora_alpha": "8", "use_rslora": "False"}, 4),
]


@pytest.mark.parametrize("header, scale", HEADERS)
def test_alpha_in_plain_keys_of_the_header_counts(header, scale, tmp_path, capsys):
    tensors = {f"{NAME}.lora_A.weight": torch.ones(2, 8), f"{NAME}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "a", header)

    pairs, _, _ = lora.load(tmp_path / "a")

    torch.testing.assert_close(pairs[NAME][1], torch.full((8, 2), float(scale)))
    assert "alpha" not in capsys.readouterr().err


def test_a_header_whose_alpha_is_no_number_is_refused(tmp_path, refused):
    save_file({**A, **B}, tmp_path / "a", {"lora_alpha": "much"})
    assert f"the alpha of {NAME} cannot be read" in refused(lora, "info", tmp_path / "a")


def test_a_peft_config_that_is_no_json_is_refused(tmp_path, refused):
    save_file({**A, **B}, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8')
    assert "adapter_config.json" in refused(lora, "info", tmp_path / "a.safetensors")


def test_a_folder_without_peft_s_file_is_refused(tmp_path, refused):
    assert "adapter_model.safetensors" in refused(lora, "info", tmp_path)


def peft_keys(tensors):
    return {f"base_model.model.{key.removeprefix('unet.')}": each for key, each in tensors.items()}


@pytest.mark.parametrize("kind", ["diffusers", "PEFT", "kohya"])
def test_where_no_alpha_is_found_one_line_says_that_the_rank_was_taken(kind, tmp_path, capsys):
    tensors = {"diffusers": {**A, **B}, "PEFT": peft_keys({**A, **B}), "kohya": KOHYA}[kind]
    save_file(tensors, tmp_path / "a.safetensors")

    pairs, metadata, _ = lora.load(tmp_path / "a.safetensors")

    assert torch.equal(pairs[NAME][1], torch.ones(32, 4))
    assert metadata["alpha"] == "4"
    (line,) = capsys.readouterr().err.splitlines()
    assert "alpha = rank" in line


def test_of_our_own_file_no_such_line_is_printed(tmp_path, capsys):
    three_layers(tmp_path / "a", 1, 2, 5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_a_file_of_any_precision_equals_its_truth(dialect, kind, tmp_path):
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(4, 32, generator=draw).to(getattr(torch, kind))
    b = torch.randn(32, 4, generator=draw).to(getattr(torch, kind))
    tensors = written_by_another(dialect, {NAME: (a, b)})
    settings = {"unet.lora_alpha": 3}
    if dialect == "kohya":
        tensors[f"{KEY}.alpha"] = torch.tensor(3.0).to(getattr(torch, kind))
    save_file(tensors, tmp_path / "a", {"lora_adapter_metadata": json.dumps(settings)})

    pairs, _, _ = lora.load(tmp_path / "a")

    assert torch.equal(pairs[NAME][0], a.float())
    assert torch.equal(pairs[NAME][1], (b.double() * 0.75).float())


# ---------------------------------------------------------------- layers of other models


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_every_layer_of_stable_diffusion_is_known_as_one(kind):
    for name in layers(stable_diffusion(kind)):
        assert lora.LAYERS.fullmatch(f"unet.{name}")


def test_every_layer_of_the_text_encoders_is_known_as_one(sdxl):
    parts = sample.load_base(sdxl, CPU).parts()
    for root in ("text_encoder", "text_encoder_2"):
        for name in layers(parts[root]):
            assert lora.LAYERS.fullmatch(lora.on_disk(f"{root}.{name}"))


FOREIGN = {  # a layer, by the names of its own trainer, and what the line says
    "transformer.single_transformer_blocks.0.attn.to_q": "Flux",
    "lora_unet_double_blocks_0_img_attn_qkv": "Flux",
    "lora_transformer_single_transformer_blocks_3_attn_to_k": "Flux",
    "diffusion_model.single_blocks.7.linear1": "Flux",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "SD 3",
    "lora_unet_joint_blocks_0_context_block_attn_qkv": "SD 3",
    "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": "SD 3",
    "transformer.transformer_blocks.0.attn.add_k_proj": "a transformer",
    "base_model.model.transformer_blocks.0.attn.to_q": "a transformer",
    "lora_prior_unet_down_blocks_0_2_attention_attn_to_q": "Stable Cascade",
    "unet.down_blocks.0.1.kv_mapper.1": "Stable Cascade",
    "base_model.model.model.layers.0.self_attn.q_proj": "a language model",
    "base_model.model.bert.encoder.layer.0.attention.self.query": "a language model",
    "base_model.model.transformer.h.0.attn.c_attn": "a language model",
    "controlnet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "a ControlNet",
    "control_model.input_blocks.1.1.proj_in": "a ControlNet",
    "vae.decoder.mid_block.attentions.0.to_q": "a VAE",
    "first_stage_model.decoder.mid.attn_1.q": "a VAE",
    "encoder.down_blocks.0.resnets.0.conv1": "a VAE",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": "ComfyUI's",
    "clip_g.transformer.text_model.encoder.layers.0.mlp.fc1": "ComfyUI's",
    "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q": "of another kind",
    "unet.down_blocks.0.attentions.0.to_q": "of another kind",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q": "of another kind",
    "text_encoder.text_model.encoder.layers.0.self_attn.o_proj": "a language model",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_layer_of_another_model_is_refused_by_its_first_key(name, tmp_path, refused):
    ends = ("lora_A", "lora_B")
    if name.startswith("lora_"):
        ends = ("lora_down", "lora_up")
    tensors = {f"{name}.{ends[0]}.weight": torch.ones(4, 16)}
    tensors[f"{name}.{ends[1]}.weight"] = torch.ones(16, 4)
    save_file({**A, **B, **tensors}, tmp_path / "a.safetensors")

    for flags in (["info"], ["convert", "--to", "kohya", "--out", tmp_path / "out"]):
        line = refused(lora, flags[0], tmp_path / "a.safetensors", *flags[1:])

        assert f"{name}.{ends[0]}.weight ({FOREIGN[name]}" in line
        assert "no Stable Diffusion UNet or text encoder has this layer" in line
    assert not (tmp_path / "out").exists()


CLASSES = {
    "ControlNetModel": "a ControlNet",
    "AutoencoderKL": "a VAE",
    "LlamaForCausalLM": "a language model",
    "SD3Transformer2DModel": "SD 3",
    "UNet3DConditionModel": "of another kind",
}


@pytest.mark.parametrize("name", CLASSES)
def test_peft_s_adapter_of_another_class_is_refused_though_its_layers_are_called_as_ours(
    name, tmp_path, refused
):
    save_file(peft_keys({**A, **B}), tmp_path / "adapter_model.safetensors")
    config = {"lora_alpha": 8, "auto_mapping": {"base_model_class": name}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    line = refused(lora, "info", tmp_path)

    assert f"lora_A.weight ({CLASSES[name]})" in line


@pytest.mark.parametrize(
    "stem",
    [
        f"module.{NAME}",
        f"unet.module.{NAME.removeprefix('unet.')}",
        f"_orig_mod.{NAME.removeprefix('unet.')}",
        f"module._orig_mod.{NAME.removeprefix('unet.')}",
        f"base_model.model._orig_mod.{NAME.removeprefix('unet.')}",
        f"unet.base_model.model.{NAME.removeprefix('unet.')}",
        KEY.replace("lora_unet_", "lora_unet__orig_mod_"),
        KEY.replace("lora_unet_", "lycoris_"),
    ],
)
def test_what_wrappers_put_before_a_name_is_taken_off(stem, tmp_path):
    ends = ("lora_A.default", "lora_B.default")
    if "mid_block_" in stem:
        ends = ("lora_down", "lora_up")
    tensors = {
        f"{stem}.{ends[0]}.weight": torch.ones(4, 32),
        f"{stem}.{ends[1]}.weight": torch.ones(32, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors")

    assert list(lora.load(tmp_path / "a.safetensors")[0]) == [NAME]


PEFT_NAME = f"base_model.model.{NAME.removeprefix('unet.')}"
OTHER_METHODS = {  # what the line says: the keys beside the pair
    "DoRA": [f"{KEY}.dora_scale"],
    "DoRA ": [f"{NAME}.lora_magnitude_vector"],
    "DoRA  ": [f"{PEFT_NAME}.lora_magnitude_vector.weight"],
    "LoKr": [f"{KEY}.lokr_w1", f"{KEY}.lokr_w2"],
    "LoKr ": [f"{PEFT_NAME}.lokr_w1", f"{PEFT_NAME}.lokr_w2"],
    "LoHa": [f"{KEY}.hada_w1_a", f"{KEY}.hada_w1_b"],
    "OFT": [f"{KEY}.oft_blocks"],
    "OFT ": [f"{PEFT_NAME}.boft_R"],
    "OFT  ": [f"{PEFT_NAME}.oft_R.weight"],
    "IA3": [f"{KEY}.on_input", f"{KEY}.weight"],
    "IA3 ": [f"{PEFT_NAME}.ia3_l"],
    "LyCORIS norms": ["lora_unet_mid_block_resnets_0_norm1.w_norm"],
    "an embedding; tell OneTrainer": ["bundle_emb.ulcer.clip_l"],
    "an embedding; tell OneTrainer ": ["bundle_emb.ulcer.string_to_param.*"],
    "an embedding, of": ["emb_params"],
    "an embedding, of ": ["clip_g", "clip_l"],
    "an embedding, of  ": ["<ulcer>"],
    "of another kind": [f"{KEY}.glora"],
    "of another kind ": [f"{KEY}.lora_mid.weight"],
    "of another kind  ": [f"{KEY}.diff"],
}


@pytest.mark.parametrize("pair", [{}, {**KOHYA, f"{KEY}.alpha": torch.tensor(4.0)}])
@pytest.mark.parametrize("kind", OTHER_METHODS)
def test_another_method_or_an_embedding_is_refused_by_its_name(kind, pair, tmp_path, refused):
    tensors = {key: torch.ones(4, 4) for key in OTHER_METHODS[kind]}
    save_file({**pair, **tensors}, tmp_path / "a.safetensors")

    line = refused(lora, "info", tmp_path / "a.safetensors")

    assert f"{OTHER_METHODS[kind][0]} (" in line
    assert kind.strip() in line
    assert "give a LoRA" in line


# ---------------------------------------------------------------- to other programs


def everywhere(folder, path, alpha, rank=4):
    """An adapter on every kind of layer: attention, feed-forward, convolutions, text encoders."""
    weights = {}
    for root, part in sample.load_base(folder, CPU).parts().items():
        targets = "all" if root == "unet" else "q_proj,out_proj,fc1"
        weights |= lora.inject(part, targets, rank, alpha, prefix=root)
    fill(weights)
    for weight in weights.values():
        weight.data *= 0.3
    lora.save(path, weights, {"rank": rank, "alpha": alpha, "base": folder})


SGM_WORDS = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "_op.": "_conv.",
    "input_blocks": "down_blocks",
    "middle_block": "mid_block",
    "output_blocks": "up_blocks",
}


@pytest.fixture(scope="module")
def sdxl_2(sdxl, tmp_path_factory):
    """A base of SDXL's kind with two resnets a level, as in every SDXL: names depend on it."""
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(sdxl, tmp_path_factory.mktemp("sdxl") / "base")
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(folder / "unet")
    unet = UNet2DConditionModel.from_config({**config, "layers_per_block": 2})
    unet.save_pretrained(folder / "unet")
    return str(folder)


def as_a1111_and_comfyui_read_it(path, parts):
    """Add a kohya file to a model by the rules of A1111 and ComfyUI, which know nothing of ours.

    The part of a key before the first dot names a layer: the model's own names with underscores
    after lora_unet_ and lora_te_ (lora_te1_, lora_te2_ of SDXL, whose UNet has Stability's names).
    W += alpha/rank · up·down, where the rank is the number of rows of down.
    """
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    tensors = load_file(path)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    if "text_encoder_2" in parts:
        prefixes |= {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
        assert any(key.startswith("lora_unet_input_blocks_") for key in tensors)
        assert not any(key.startswith("lora_unet_down_blocks_") for key in tensors)
        tensors = _maybe_map_sgm_blocks_to_diffusers(
            tensors, argparse.Namespace(layers_per_block=2)
        )
        for sgm, diffusers in SGM_WORDS.items():
            tensors = {key.replace(sgm, diffusers): value for key, value in tensors.items()}
    known = {}
    for root, part in parts.items():
        for name, layer in layers(part).items():
            if name.startswith("encoder."):
                name = f"text_model.{name}"
            known[prefixes[root] + name.replace(".", "_")] = layer
    stems = {key.split(".", 1)[0] for key in tensors}
    assert stems <= set(known)
    assert len(tensors) == 3 * len(stems)
    for stem in stems:
        up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
        scale = tensors[f"{stem}.alpha"].item() / len(down)
        change = torch.einsum("or,r...->o...", up.reshape(len(up), -1), down)
        known[stem].weight.data += scale * change


def peft_folders(base, path, out, alpha):
    """An adapter as PEFT saves it: a folder for each part, alpha in its adapter_config.json."""
    peft = pytest.importorskip("peft")
    pairs, _, _ = lora.load(path)
    folders = []
    for root, part in sample.load_base(base, CPU).parts().items():
        names = {n.removeprefix(f"{root}."): n for n in pairs if n.startswith(f"{root}.")}
        if root != "unet" and not hasattr(part, "text_model"):
            names = {n.removeprefix("text_model."): each for n, each in names.items()}
        config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=list(names))
        wrapped = peft.get_peft_model(part, config)
        for name, layer in wrapped.get_base_model().named_modules():
            if name in names:
                a, b = pairs[names[name]]
                layer.lora_A["default"].weight.data.copy_(a)
                layer.lora_B["default"].weight.data.copy_(b * (4 / alpha))
        wrapped.save_pretrained(out / root)
        folders.append(out / root)
    return folders


def with_peft_folders(base, folders):
    """diffusers' own pipeline, its parts adapted by PEFT itself."""
    peft = pytest.importorskip("peft")
    pipe = pipeline(base)
    for folder in folders:
        adapted = peft.PeftModel.from_pretrained(getattr(pipe, folder.name), folder)
        setattr(pipe, folder.name, adapted.merge_and_unload())
    return pipe


@pytest.mark.parametrize("kind, alpha", [("base", 8), ("sd21", 6), ("sdxl_2", 2)])
def test_the_same_picture_comes_from_every_file_and_every_program(
    kind, alpha, request, tmp_path, run
):
    pytest.importorskip("peft")
    folder = request.getfixturevalue(kind)
    ours, kohya = tmp_path / "ours.safetensors", tmp_path / "kohya.safetensors"
    everywhere(folder, ours, alpha)
    run(lora, "convert", ours, "--to", "kohya", "--out", kohya)
    plain = picture(sample.load_base(folder, CPU))

    pictures = []
    for path in (ours, kohya):
        base = sample.load_base(folder, CPU)
        with lora.merged(base.parts(), [(lora.load(path)[0], 1.0)]):
            pictures.append(picture(base))
        pipe = pipeline(folder)
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
        pictures.append(theirs(pipe, "a sore foot"))
    run(lora, "merge", f"{ours}:0.75", f"{kohya}:0.25", "--out", tmp_path / "merged")
    folders = peft_folders(folder, ours, tmp_path, alpha)
    base = sample.load_base(folder, CPU)
    with lora.merged(base.parts(), [(lora.load(tmp_path / "merged")[0], 1.0)]):
        pictures.append(picture(base))
    with lora.merged(base.parts(), [(lora.load(each)[0], 1.0) for each in folders]):
        pictures.append(picture(base))
    pictures.append(theirs(with_peft_folders(folder, folders), "a sore foot"))
    webui = sample.load_base(folder, CPU)
    as_a1111_and_comfyui_read_it(kohya, webui.parts())
    pictures.append(picture(webui))

    assert max(difference(pictures[0], other) for other in pictures) <= 2
    assert difference(pictures[0], plain) > 2


@pytest.mark.parametrize("alpha", [8, 1, 6])
def test_diffusers_to_kohya_and_back_is_the_same_to_the_bit(alpha, sdxl, tmp_path, run):
    ours, kohya, back = (tmp_path / f"{name}.safetensors" for name in ("a", "kohya", "back"))
    everywhere(sdxl, ours, alpha)

    run(lora, "convert", ours, "--to", "kohya", "--out", kohya)
    run(lora, "convert", kohya, "--to", "diffusers", "--out", back)

    before, after = load_file(ours), load_file(back)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    alphas = {value.item() for key, value in load_file(kohya).items() if key.endswith(".alpha")}
    assert alphas == {4}  # the rank: alpha/rank is in B already
    with safe_open(kohya, "pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "4"
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["ss_v2"] == "False"
    assert lora.load(back)[1] == lora.load(ours)[1]


def test_a_whole_number_may_be_an_alpha(tmp_path, run, capsys):
    """As diffusers writes them."""
    pairs = {NAME: (torch.ones(2, 8), torch.ones(8, 2))}
    tensors = written_by_another("kohya", pairs, alpha=1)
    tensors[f"{KEY}.alpha"] = torch.tensor(1)
    save_file(tensors, tmp_path / "k")

    run(lora, "info", tmp_path / "k")

    assert "alpha: 1\n" in capsys.readouterr().out


def test_kohyas_header_names_the_base(tmp_path):
    pairs = {NAME: (torch.ones(2, 8), torch.ones(8, 2))}
    header = {"ss_base_model_version": "sd_v2_v", "ss_output_name": "feet"}
    save_file(written_by_another("kohya", pairs, alpha=1), tmp_path / "k", header)

    _, metadata, _ = lora.load(tmp_path / "k")

    assert metadata["base"] == "sd21"
    assert metadata["ss_output_name"] == "feet"


def test_alpha_is_folded_in_double_precision_and_rounded_once(tmp_path):
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 8, generator=draw), torch.randn(8, 3, generator=draw)
    tensors = written_by_another("kohya", {NAME: (a, b)}, alpha=1)
    save_file(tensors, tmp_path / "k.safetensors")

    pairs, _, _ = lora.load(tmp_path / "k.safetensors")

    assert torch.equal(pairs[NAME][1], (b.double() / 3).float())


# ---------------------------------------------------------------- merge


def three_layers(path, seed, rank, alpha, names=("to_q", "to_k", "conv")):
    """An adapter file with pairs on some of three layers, and what it adds to each."""
    draw = torch.Generator().manual_seed(seed)
    inputs = {"to_q": (6,), "to_k": (20,), "conv": (3, 3, 3)}
    weights = {}
    for name in names:
        kernel = [1] * (len(inputs[name]) - 1)
        a = torch.randn(rank, *inputs[name], generator=draw)
        b = torch.randn(8, rank, *kernel, generator=draw)
        weights[f"unet.block.{name}.lora_A.weight"] = a
        weights[f"unet.block.{name}.lora_B.weight"] = b
    settings = {"rank": rank, "alpha": alpha, "base": "tiny", "prompt": f"prompt {seed}"}
    lora.save(path, weights, settings)
    changes = {}
    for name, pair in lora.load(path)[0].items():
        changes[name] = delta(*pair)
    return changes


def test_merging_is_the_weighted_sum_whatever_the_ranks_alphas_and_layers(tmp_path, run):
    one = three_layers(tmp_path / "a", 1, 2, 5, ("to_q", "conv"))
    two = three_layers(tmp_path / "b", 2, 3, 3, ("to_q", "to_k"))

    run(lora, "merge", f"{tmp_path}/a:0.7", f"{tmp_path}/b:-0.3", "--out", tmp_path / "c")

    pairs, metadata, _ = lora.load(tmp_path / "c")
    assert {len(a) for a, _ in pairs.values()} == {5}
    assert metadata["rank"] == 5
    assert metadata["base"] == "tiny"
    assert metadata["merged"] == "a:0.7 b:-0.3"
    assert "prompt" not in metadata
    assert str(tmp_path) not in str(metadata)
    for name in one | two:
        expected = 0.7 * one.get(name, 0) - 0.3 * two.get(name, 0)
        torch.testing.assert_close(delta(*pairs[name]), expected, rtol=1e-5, atol=1e-6)


def test_a_merged_adapter_of_mixed_ranks_opens_in_diffusers(base, tmp_path, run):
    pytest.importorskip("peft")
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    everywhere(base, one, 8)
    random_adapter(base, two, rank=2, alpha=1.0)

    run(lora, "merge", one, f"{two}:0.2", "--out", tmp_path / "c.safetensors")

    ours = sample.load_base(base, CPU)
    with lora.merged(ours.parts(), [(lora.load(one)[0], 1.0), (lora.load(two)[0], 0.2)]):
        expected = picture(ours)
    pipe = pipeline(base)
    pipe.load_lora_weights(str(tmp_path), weight_name="c.safetensors")
    assert difference(expected, theirs(pipe, "a sore foot")) <= 2


def test_what_cannot_be_done_is_refused(tmp_path, refused):
    out = ("--out", tmp_path / "x.safetensors")
    three_layers(tmp_path / "a", 1, 2, 2)
    three_layers(tmp_path / "w", 1, 2, 2, ("to_k",))
    header = {"medlora": '{"tokens": "<word>"}'}
    tensors = load_file(tmp_path / "w")
    wide = {**tensors, "unet.block.to_k.lora_A.weight": torch.ones(2, 21)}
    save_file(wide, tmp_path / "w", header)
    save_file({**tensors, "<word>": torch.ones(1, 32)}, tmp_path / "t", header)

    assert "another shape" in refused(lora, "merge", tmp_path / "a", tmp_path / "w", *out)
    assert "<word>" in refused(lora, "merge", tmp_path / "a", tmp_path / "t", *out)
    assert "<word>" in refused(lora, "convert", tmp_path / "t", "--to", "kohya", *out)
    assert "no such file" in refused(lora, "convert", tmp_path / "no", "--to", "kohya", *out)
    assert not (tmp_path / "x.safetensors").exists()


# ---------------------------------------------------------------- damaged and foreign files

PAIR = serialize({**A, **B})
UNREADABLE = "cannot be read as safetensors"
DAMAGED = {  # name: the file's bytes or its tensors, and what the line says
    "no bytes": (b"", UNREADABLE),
    "half of it": (PAIR[: len(PAIR) // 2], UNREADABLE),
    "without its last byte": (PAIR[:-1], UNREADABLE),
    "with bytes behind": (PAIR + b"more", UNREADABLE),
    "a pickle": (pickle.dumps({"a": 1}), UNREADABLE),
    "a page of HTML": (b"<!DOCTYPE html><html><body>401</body></html>", UNREADABLE),
    "a header of 10 GB": ((10**10).to_bytes(8, "little") + PAIR[8:], UNREADABLE),
    "a header that points outside": (PAIR.replace(b"[0,512]", b"[0,912]"), UNREADABLE),
    "settings of ours cut short": (serialize({**A, **B}, {"medlora": '{"rank": 4'}), UNREADABLE),
    "PEFT's settings cut short": (
        serialize({**A, **B}, {"lora_adapter_metadata": '{"unet.r": 4'}),
        UNREADABLE,
    ),
    "no tensors": ({}, "holds no tensors"),
    "half a pair": (A, NAME),
    "half a kohya pair": ({f"{KEY}.lora_up.weight": torch.ones(32, 4)}, NAME),
    "an alpha alone": ({**A, **B, "lora_unet_conv_in.alpha": torch.tensor(1.0)}, "unet.conv_in"),
    "keys of a whole UNet": ({"mid_block.proj_in.weight": torch.ones(3, 3)}, "not plain LoRA"),
    "one foreign key": ({**A, **B, "unet.conv_in.bias": torch.ones(3)}, "unet.conv_in.bias"),
    "an alpha of two numbers": ({**KOHYA, f"{KEY}.alpha": torch.ones(2)}, "the alpha of"),
    "NaN in B": ({**A, f"{NAME}.lora_B.weight": torch.full((32, 4), math.nan)}, "NaN"),
    "infinity in A": ({f"{NAME}.lora_A.weight": torch.full((4, 32), math.inf), **B}, "infinity"),
    "NaN in alpha": ({**KOHYA, f"{KEY}.alpha": torch.tensor(math.nan)}, "NaN"),
    "ranks that differ": ({**A, f"{NAME}.lora_B.weight": torch.ones(32, 5)}, "do not fit"),
    "vectors": (
        {f"{NAME}.lora_A.weight": torch.ones(4), f"{NAME}.lora_B.weight": torch.ones(4)},
        "do not fit",
    ),
    "a broad B": ({**A, f"{NAME}.lora_B.weight": torch.ones(9, 4, 3, 3)}, "do not fit"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(kind, tmp_path, refused):
    content, expected = DAMAGED[kind]
    if isinstance(content, dict):
        content = serialize(content)
    (tmp_path / "bad.safetensors").write_bytes(content)

    line = refused(lora, "info", tmp_path / "bad.safetensors")

    assert "bad.safetensors" in line
    assert expected in line


def elsewhere(tensors):
    return {re.sub(r"blocks\.\d", "blocks.7", key): value for key, value in tensors.items()}


def twice_as_wide(tensors):
    wide = {}
    for key, value in tensors.items():
        wide[key] = torch.cat([value, value], dim=1) if "lora_A" in key else value
    return wide


def with_another_layer(tensors):
    name = "unet.mid_block.attentions.0.proj_in"
    pair = {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(64, 4)}
    return {**tensors, **pair}


def kohya_elsewhere(tensors):
    return {
        f"{KEY.replace('_0_', '_7_')}.lora_down.weight": torch.ones(4, 4),
        f"{KEY.replace('_0_', '_7_')}.lora_up.weight": torch.ones(4, 4),
    }


@pytest.mark.parametrize("change", [elsewhere, twice_as_wide, with_another_layer, kohya_elsewhere])
def test_an_adapter_that_does_not_fit_the_base_is_refused_with_the_names(
    change, base, tmp_path, refused
):
    path, out = tmp_path / "bad.safetensors", tmp_path / "out"
    random_adapter(base, path)
    save_file(change(load_file(path)), path)

    flags = ("--base", base, "--lora", path, "--prompt", "x", "--steps", 2, "--out", out)
    line = refused(sample, *flags)

    assert "does not fit this base" in line
    assert "unet." in line
    assert not list(out.glob("*.png"))


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_16", "OLoRA", "corda", "loftq"])
@pytest.mark.parametrize("in_header", [True, False])
def test_an_adapter_whose_start_changed_the_base_is_refused(in_header, method, tmp_path, refused):
    header = None
    if in_header:
        settings = {"unet.lora_alpha": 4, "unet.init_lora_weights": method}
        header = {"lora_adapter_metadata": json.dumps(settings)}
    else:
        settings = {"lora_alpha": 4, "init_lora_weights": method}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({**A, **B}, tmp_path / "adapter_model.safetensors", header)

    line = refused(lora, "info", tmp_path / "adapter_model.safetensors")

    assert f"{method.split('_')[0]} changes the base" in line
