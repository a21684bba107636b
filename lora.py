"""Low-rank adapters (LoRA, Hu et al. 2021): put them into a model, convert and merge their files.

    python lora.py info runs/dfu/lora.safetensors
    python lora.py convert runs/dfu/lora.safetensors --to kohya --out dfu.safetensors
    python lora.py merge a.safetensors:0.7 b.safetensors:0.3 --out both.safetensors

info prints rank, alpha, base and settings. convert writes for diffusers, or for kohya, A1111 and
ComfyUI. merge writes the weighted sum of adapters. Files of PEFT and OneTrainer are read, too.

diffusers' `load_lora_weights` reads our files: `unet.<layer>.lora_A.weight` is (rank, in[, k, k]),
`….lora_B.weight` is (out, rank[, 1, 1]) and includes alpha/rank. The header has the settings.
"""

import contextlib
import itertools
import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import nn

from metrics import Flags, command, fail, note, run_script, write_file

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LoRALayer:
    """Mixed in before nn.Linear or nn.Conv2d: y = layer(x) + alpha/rank · B(A(dropout(x)))."""

    def forward(self, x):
        delta = self.lora_B(self.lora_A(self.lora_dropout(x)))
        return torch.add(super().forward(x), delta, alpha=self.lora_scale)


class LoRALinear(LoRALayer, nn.Linear): ...


class LoRAConv2d(LoRALayer, nn.Conv2d): ...


class PairLinear(nn.Linear):
    """fp32 weights that compute in the dtype of the input."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class PairConv2d(nn.Conv2d):
    """fp32 weights that compute in the dtype of the input."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), None)


def inject(
    model, targets="attention", rank=16, alpha=None, dropout=0.0, generator=None, prefix="unet"
):
    """Freeze `model` and give each target layer a trainable fp32 pair; its output does not change.

    targets: see find_targets. alpha: None for the rank. dropout: 0 to 1, on A's input. Returns the
    new parameters by name: {"unet.<layer>.lora_A.weight": (rank, in[, k, k]), …}.
    """
    model.requires_grad_(False)
    for name in find_targets(model, targets):
        layer = model.get_submodule(name)
        plain = {"bias": False, "device": layer.weight.device}
        if isinstance(layer, nn.Linear):
            layer.__class__ = LoRALinear
            layer.lora_A = PairLinear(layer.in_features, rank, **plain)
            layer.lora_B = PairLinear(rank, layer.out_features, **plain)
        else:
            layer.__class__ = LoRAConv2d
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            layer.lora_A = PairConv2d(layer.in_channels, rank, *geometry, **plain)
            layer.lora_B = PairConv2d(rank, layer.out_channels, 1, **plain)
        # A: U(±1/√fan_in), drawn on the CPU: the same on every device. B: zero
        start = torch.empty(layer.lora_A.weight.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        layer.lora_A.weight.data.copy_(start)
        nn.init.zeros_(layer.lora_B.weight)
        layer.lora_dropout = nn.Dropout(dropout)
        layer.lora_scale = 1.0 if alpha is None else alpha / rank
    return {f"{prefix}.{name}": w for name, w in model.named_parameters() if w.requires_grad}


def find_targets(model, targets):
    """Names of the layers that "attention", "all" (in the blocks) or "to_q,ff.net.2" chooses."""
    layers = [n for n, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if targets == "all":
        return [name for name in layers if "block" in name]
    endings = ATTENTION if targets == "attention" else targets.replace(" ", "").split(",")
    chosen = set()
    for ending in endings:
        matches = [name for name in layers if f".{name}".endswith(f".{ending}")]
        if not matches:
            fail(f"--targets: no layer name ends in {ending}; give attention, all or to_q,to_v")
        chosen.update(matches)
    return [name for name in layers if name in chosen]


# ---------------------------------------------------------------- saving and loading


def save_tensors(path, tensors, metadata=None):
    """Write safetensors, atomically. Give one metadata key: several would be in random order."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, serialize(tensors, metadata or {"format": "pt"}))


def save(path, weights, metadata):
    """Write the weights of `inject`, B times alpha/rank. metadata: has "rank" and "alpha"."""
    scale = float(metadata["alpha"]) / float(metadata["rank"])
    tensors = {}
    for name, weight in weights.items():
        weight = weight.detach().float()
        tensors[on_disk(name)] = weight * scale if ".lora_B." in name else weight
    save_tensors(path, tensors, {"medlora": json.dumps(metadata)})


def load(path):
    """Read an adapter of any dialect: (pairs, metadata, extra), all tensors fp32.

    path: a file, or a folder of train.py or PEFT. pairs: {"unet.<layer>": (A, B times alpha/rank)}.
    metadata: settings, always with rank, alpha, base and dialect. extra: vectors of new words, or
    the projection of another text encoder. Fails on damage, NaN, other models and other methods.
    """
    tensors, metadata, settings = read_file(path)
    words = (metadata.get("tokens") or "").split()
    extra = {}
    for key in list(tensors):
        if key in words or (settings is None and key.startswith("text_projection.")):
            extra[key] = tensors.pop(key).float()
    layers, dialect = sort_keys(path, tensors, settings)
    if not layers and not extra:
        fail(f"{path}: not an adapter: it holds no tensors")
    pairs = {}
    ranks = set()
    alphas = set()
    for name, parts in sorted(layers.items()):
        if not {"A", "B"} <= parts.keys():
            fail(f"{path}: incomplete: {name} lacks its A or its B; copy the file again")
        a, b = parts["A"], parts["B"]
        if min(a.ndim, b.ndim) < 2 or not 0 < len(a) == b[:1].numel():
            fail(f"{path}: {name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit together")
        alpha = find_alpha(path, name, parts, settings)
        ranks.add(str(len(a)))
        alphas.add(f"{alpha:g}")
        # the product in fp64, so that B is rounded once
        pairs[name] = (a.float(), (b.double() * (alpha / len(a))).float())
        if not all(tensor.isfinite().all() for tensor in pairs[name]):
            fail(f"{path}: {name} holds NaN or infinity: its training failed; give another adapter")
    defaults = {"rank": "/".join(sorted(ranks)), "alpha": "/".join(sorted(alphas))}
    return pairs, {**defaults, **metadata, "dialect": dialect}, extra


def find_file(path):
    """The adapter file at a path: the path itself or, in a folder, train.py's or PEFT's file."""
    if os.path.isdir(path):
        own = os.path.join(path, "lora.safetensors")
        return own if os.path.exists(own) else os.path.join(path, "adapter_model.safetensors")
    return path


def read_file(path):
    """Tensors, metadata and PEFT's settings of a safetensors file. Nothing is unpickled.

    The settings are those of the header and adapter_config.json; None for ours, with B scaled.
    """
    path = find_file(path)
    if not os.path.exists(path):
        fail(f"{path}: no such file")
    settings = None
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
        if "medlora" in metadata:
            metadata = json.loads(metadata["medlora"])
        else:
            config = Path(path).with_name(CONFIG)
            settings = json.loads(config.read_text("utf-8")) if config.exists() else {}
            header = json.loads(metadata.pop("lora_adapter_metadata", "{}"))
            settings |= metadata | header
        base = VERSIONS.get(metadata.get("ss_base_model_version"), "")
        return tensors, {"base": base, **metadata}, settings
    except Exception as error:  # a file may hold anything
        fail(f"{path}: cannot be read as safetensors, or {CONFIG} as JSON ({str(error)[:100]})")


def sort_keys(path, tensors, settings):
    """{layer: {"A": tensor, "B": …[, "alpha": …]}} and the dialect; other keys are an error."""
    layers = defaultdict(dict)
    dialect = "diffusers"
    method = re.search(rf"init_lora_weights': '({CHANGE_THE_BASE})", str(settings))
    if method:
        fail(f"{path}: {method[1]} changes the base, too; convert it to plain LoRA with PEFT")
    model = re.search(r"'base_model_class': '(\w+)|$", str(settings))[1] or ""
    for key, tensor in tensors.items():
        dialect, layer, part = read_key(key.replace(PEFT_ROOT, f"{PEFT_ROOT}{model}."))
        if not part or (settings is not None and not LAYERS.fullmatch(layer)):
            names = f"{layer} {key}"
            kind = next(kind for pattern, kind in FOREIGN.items() if re.search(pattern, names))
            fail(
                f"{path}: {key} ({kind}): no Stable Diffusion UNet or text encoder has this "
                "layer, or it is not plain LoRA; give a LoRA of SD 1.5, SD 2.1 or SDXL"
            )
        layers[layer][part] = tensor
    if settings is not None and not re.search(r"lora_alpha|\.alpha'", f"{settings}{[*tensors]}"):
        note(f"{path}: no alpha in the file or in {CONFIG} next to it; using alpha = rank")
    return layers, dialect


def find_alpha(path, name, parts, settings):
    """A layer's alpha: of its tensor, else of PEFT's settings for its model, else its rank."""
    model, layer = name.split(".", 1)
    own = {key.removeprefix(f"{model}."): value for key, value in (settings or {}).items()}
    try:
        if "alpha" in parts:
            return parts["alpha"].item()
        alpha = float(own.get("lora_alpha", len(parts["A"])))
        for pattern, value in (own.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern.lstrip('^')})", layer):
                alpha = float(value)
                break  # the first that fits counts
        if str(own.get("use_rslora")).lower() == "true":  # rank-stabilised: alpha/√rank
            alpha *= math.sqrt(len(parts["A"]))
        return alpha
    except Exception as error:  # a header may hold anything
        fail(f"{path}: the alpha of {name} cannot be read ({error})")


# ---------------------------------------------------------------- which keys mean what

CONFIG = "adapter_config.json"  # PEFT's settings, next to an adapter
PEFT_ROOT = "base_model.model."
CHANGE_THE_BASE = "(?i:pissa|olora|corda|loftq|lora_ga)"  # PEFT's ways to begin that do so
# The keys of each dialect: the layer, then which tensor of its pair. The first that fits counts.
KEYS = (
    ("PEFT", r"(.*base_model\.model\..+)\.lora_(A|B)(?:\.[^.]+)?\.weight"),
    ("diffusers", r"(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight"),
    ("diffusers lora.down", r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight"),
    ("diffusers processor", r"(.+)_lora\.(down|up)\.weight"),
    ("kohya", r"(.+)\.lora_(down|up)\.weight"),
    ("kohya", r"(.+?)(?:[._]lora)?\.(alpha)"),
)
PARTS = {"A": "A", "B": "B", "down": "A", "up": "B", "alpha": "alpha"}
# What other trainers call a layer → what diffusers calls it, in the order of replacement.
RENAMED = (
    (r"\b(base_model\.model|module|_orig_mod|orig\.mod)\.+", ""),
    (r"^CLIPTextModelWithProjection\.|^lora\.te2\.|^(?=text_projection$)", "text_encoder_2."),
    (r"^CLIPTextModel\.|^lora\.te1?\.|^(?=(text_model\.)?encoder\.layers)", "text_encoder."),
    (r"^(UNet2DConditionModel|((lora|lycoris)\.)?unet|lycoris|diffusion_model)\.", "unet."),
    (r"^(?!unet\.|text_encoder)", "unet."),
    (r"\.processor(?=\.)", ""),
    (r"(\.self_attn\.)to_([qkv]|out)$", r"\1\2_proj"),
    (r"\.to_out$", ".to_out.0"),
)
# The words of a kohya name, whose dots became underscores; those that contain one are listed.
WORDS = re.compile(
    r"(?:(?:down|up|input|output|transformer)_blocks|(?:mid|middle)_block|to_(?:[qkv]|out)"
    r"|(?:proj|conv)_(?:in|out)|conv_shortcut|time_emb_proj|(?:time|add|class)_embedding"
    r"|linear_[12]|(?:in|out|emb)_layers|skip_connection|time_embed|label_emb|text_model"
    r"|self_attn|[qkv]_proj|(?:out|cond)_proj|text_projection)(?=_|$)|[^_]+"
)
# The layers of diffusers' UNet2DConditionModel, as SD has it, and of CLIPTextModel.
LAYERS = re.compile(
    r"unet\.(conv_(in|out)|(time|add|class)_embedding\.(linear_[12]|cond_proj)"
    r"|((down|up)_blocks\.\d+|mid_block)\.(resnets\.\d+\.(conv[12]|conv_shortcut|time_emb_proj)"
    r"|(down|up)samplers\.0\.conv|attentions\.\d+\.(proj_(in|out)|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))))|text_encoder_2\.text_projection"
    r"|text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\."
    r"(self_attn\.([qkv]|out)_proj|mlp\.fc[12])"
)
# Other methods and models, by what a key or its layer contains. The first that fits counts.
FOREIGN = {
    r"\.(dora_scale|lora_magnitude)": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.b?oft_": "OFT",
    r"\.on_input|\.ia3_": "IA3",
    r"\.[wb]_norm$": "LyCORIS norms",
    r"^bundle_emb\.": "an embedding; tell OneTrainer not to bundle embeddings",
    r" (emb_params|clip_[lg]|string_to_\w+|<.+>)$": "an embedding, of textual inversion",
    r"(?i)control": "a ControlNet",
    r"(?i)vae\b|autoencoder|first_stage|quant_conv|coder\.(down|mid|up)_": "a VAE",
    r"text_encoders\.|clip_[lgh]\.|t5xxl|cond_stage": "ComfyUI's text encoder",
    r"prior|kv_mapper|channelwise|blocks\.\d+\.\d+\.|Cascade": "Stable Cascade",
    r"\bte3\b|text_encoder_3|joint|SD3": "SD 3",
    r"(double|single)[_.](transformer_)?blocks|Flux": "Flux",
    r"layers?\.\d+\.|\.h\.\d+\.|CausalLM": "a language model",
    r"\.transformer\.|\.transformer_blocks\.\d+\.attn\.": "a transformer, such as SD 3 or Flux",
    r"": "of another kind",
}
# What kohya's files call a base; and which family reads text of which width.
VERSIONS = {"sd_v1": "sd15", "sd_v2": "sd21-base", "sd_v2_v": "sd21", "sdxl_base_v1-0": "sdxl"}
TEXT_WIDTHS = {768: "sd15", 1024: "sd21-base", 2048: "sdxl"}


def read_key(key):
    """(dialect, layer, "A", "B" or "alpha"); of an unknown key ("", key, "")."""
    for dialect, pattern in KEYS:
        match = re.fullmatch(pattern, key)
        if match:
            return dialect, layer_name(match[1]), PARTS[match[2]]
    return "", key, ""


def layer_name(text):
    """Any trainer's name of a layer → "unet.<path>", "text_encoder.…" or "text_encoder_2.…"."""
    if text.startswith(("lora_", "lycoris_")):
        text = ".".join(WORDS.findall(text))
    for pattern, replacement in RENAMED:
        text = re.sub(pattern, replacement, text)
    return on_disk(translate(text, SGM_NAMES))


def on_disk(name):
    """A layer's name as in files: with the level `text_model.`, which transformers 5.6 dropped."""
    return re.sub(r"^(text_encoder(_2)?)\.(?!text_)", r"\1.text_model.", name)


def translate(path, names):
    """A dotted path, its longest beginning among the keys of `names` replaced by the value."""
    beginnings = "|".join(sorted(names, key=len, reverse=True))
    return re.sub(rf"^({beginnings})(?![^.])", lambda match: names[match[0]], path)


RESNET_PARTS = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def sgm_names():
    """Stability's name of each part of a UNet → diffusers'. kohya's SDXL files have the former."""
    names = {
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
    }
    for n in range(12):  # three blocks a level; on the way down the third is a downsampler
        level, place = divmod(n, 3)
        for index, kind in enumerate(["resnets", "attentions"]):
            names[f"output_blocks.{n}.{index}"] = f"up_blocks.{level}.{kind}.{place}"
            if place < 2:
                names[f"input_blocks.{n + 1}.{index}"] = f"down_blocks.{level}.{kind}.{place}"
        if place == 2:
            names[f"input_blocks.{n + 1}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            names[f"output_blocks.{n}.1.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            names[f"output_blocks.{n}.2.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    for theirs, ours in list(names.items()):
        for sgm_part, part in RESNET_PARTS.items():
            names[f"{theirs}.{sgm_part}"] = f"{ours}.{part}"
    return {f"unet.{theirs}": f"unet.{ours}" for theirs, ours in names.items()}


SGM_NAMES = sgm_names()


def guess_base(pairs):
    """The base that has an adapter's layers, "" if unknown; sd21 counts as sd21-base."""
    for name, (a, _) in pairs.items():
        if re.search(r"^text_encoder_2\.|\.transformer_blocks\.1\.|\.add_embedding\.", name):
            return "sdxl"
        if re.search(r"\.attn2\.to_[kv]$", name) and a.shape[1] in TEXT_WIDTHS:
            return TEXT_WIDTHS[a.shape[1]]
    return ""


# ---------------------------------------------------------------- merging, and the commands


@contextlib.contextmanager
def merged(models, adapters):
    """Inside this context, the weights of models {"unet": module, …} are W + Σ weight · B A.

    adapters: [(pairs, weight), …]. Sums in fp32; W comes back by copy. Fails if no layer fits.
    """
    layers = {}
    for prefix, model in models.items():
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layers[on_disk(f"{prefix}.{name}")] = layer
    changes = defaultdict(list)
    for pairs, weight in adapters:
        for name, (a, b) in pairs.items():
            shape = (len(b), a[0].numel())
            if name not in layers or layers[name].weight.flatten(1).shape != shape:
                fail(f"the adapter does not fit this base: no {name} of its shape; give its --base")
            changes[layers[name]].append((a, b, weight))
    originals = {layer: layer.weight.data.cpu() for layer in changes}
    try:
        for layer, terms in changes.items():
            total = layer.weight.data.float()
            for a, b, weight in terms:
                change = b.to(total.device).flatten(1) @ a.to(total.device).flatten(1)
                total = total + weight * change.reshape(total.shape)
            layer.weight.data = total.to(originals[layer].dtype)
        yield
    finally:
        for layer, original in originals.items():
            layer.weight.data = original.to(layer.weight.device)


def info(path):
    """Print the settings and sizes of an adapter, one a line, each cut at 200 characters."""
    pairs, metadata, extra = load(path)
    count = sum(tensor.numel() for tensor in itertools.chain(extra.values(), *pairs.values()))
    metadata |= {"pairs": len(pairs), "parameters": count, "family": guess_base(pairs)}
    for key, value in metadata.items():
        print(f"{key}: {value}"[:200])


def convert(path, dialect, out):
    """Write an adapter in the dialect "diffusers" or "kohya"; kohya's holds no extra tensors."""
    pairs, metadata, extra = load(path)
    if dialect == "kohya" and extra:
        fail(f"{path}: a kohya file cannot hold {', '.join(extra)}; give --to diffusers")
    write(out, pairs, metadata, extra, dialect)


def merge(files, out):
    """Write one adapter that does what several do: A's stacked, weighted B's joined. Ranks add."""
    stacked = {}
    common = None
    for text in files:
        path, weight = split_weight(text)
        pairs, metadata, extra = load(path)
        if extra:
            fail(f"{path}: cannot merge {', '.join(extra)}; give sample.py a --lora for each file")
        if common is None:
            common = metadata
        common = {key: value for key, value in common.items() if metadata.get(key) == value}
        for name, (a, b) in pairs.items():
            first_a, first_b = stacked.get(name, (a[:0], b[:, :0]))
            if first_a.shape[1:] != a.shape[1:] or len(first_b) != len(b):
                fail(f"{path}: {name} has another shape here; merge adapters of one base")
            stacked[name] = (torch.cat([first_a, a]), torch.cat([first_b, weight * b], dim=1))
    rank = max(len(a) for a, _ in stacked.values())
    names = " ".join(map(os.path.basename, files))
    write(out, stacked, {**common, "rank": rank, "alpha": rank, "merged": names}, {})


def split_weight(text):
    """ "FILE:0.7" or "FOLDER:0.7" → (FILE, 0.7); without a weight (FILE, 1.0)."""
    path, colon, weight = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if colon and not os.path.exists(text) and math.isfinite(float(weight)):
            return find_file(path), float(weight)
    return find_file(text), 1.0


def write(path, pairs, metadata, extra, dialect="diffusers"):
    """Write what `load` returned, in the dialect of diffusers or of kohya."""
    header = {"medlora": json.dumps(metadata)}
    if dialect == "diffusers":
        return save_tensors(path, diffusers_tensors(pairs) | extra, header)
    versions = {base: version for version, base in VERSIONS.items()}
    base = metadata["base"] if metadata["base"] in versions else guess_base(pairs)
    rank = str(max(len(a) for a, _ in pairs.values()))
    header |= {
        "ss_network_module": "networks.lora",
        "ss_v2": str("sd21" in base),
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": versions.get(base, ""),
    }
    save_tensors(path, kohya_tensors(pairs, base), header)


def diffusers_tensors(pairs):
    """Pairs by diffusers' keys, all padded to one rank: some releases scale mixed ranks wrongly."""
    rank = max((len(a) for a, _ in pairs.values()), default=0)
    tensors = {}
    for name, (a, b) in pairs.items():
        pad = rank - len(a)
        tensors[f"{name}.lora_A.weight"] = torch.cat([a, a.new_zeros(pad, *a.shape[1:])])
        tensors[f"{name}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), pad, *b.shape[2:])], 1)
    return tensors


def kohya_tensors(pairs, base):
    """Pairs by kohya's keys; SDXL's UNet by Stability's names. alpha = rank, for B is scaled."""
    names = {"text_encoder": "te"}
    if base == "sdxl":
        names = {ours: theirs for theirs, ours in SGM_NAMES.items()}
        names |= {"text_encoder": "te1", "text_encoder_2": "te2"}
    tensors = {}
    for name, (a, b) in pairs.items():
        stem = "lora_" + translate(name, names).replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = a
        tensors[f"{stem}.lora_up.weight"] = b
        tensors[f"{stem}.alpha"] = torch.tensor(float(len(a)))
    return tensors


def parse_args(argv=None):
    parser = Flags(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|convert|merge")
    for_info = commands.add_parser("info", description="Print rank, alpha, base and settings.")
    for_convert = commands.add_parser("convert", description="Write an adapter in another dialect.")
    for_convert.add_argument("--to", required=True, choices=["diffusers", "kohya"], help="format")
    for_merge = commands.add_parser("merge", description="Write the weighted sum of adapters.")
    for_merge.add_argument("files", nargs="+", metavar="FILE[:WEIGHT]", help="default WEIGHT: 1")
    for reader in (for_info, for_convert):
        reader.add_argument("file", help="adapter: a .safetensors file, or its folder")
    for writer in (for_convert, for_merge):
        writer.add_argument("--out", required=True, metavar="FILE", help="the adapter to write")
    return parser.parse_args(argv)


def main(args):
    if args.command == "info":
        return info(args.file)
    if args.command == "convert":
        convert(args.file, args.to, args.out)
    else:
        merge(args.files, args.out)
    print(f"written: {args.out}\nnext: {command('lora.py', 'info', args.out)}")


if __name__ == "__main__":
    run_script(main, parse_args)
