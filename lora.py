"""Low-rank adapters: put them into a model, save and load them, merge them, look inside a file.

    python lora.py info runs/dfu/lora.safetensors
    python lora.py convert runs/dfu/lora.safetensors --to kohya --out dfu.safetensors
    python lora.py merge a.safetensors:0.7 b.safetensors:0.3 --out both.safetensors

A file is safetensors as diffusers' `load_lora_weights` reads it: `unet.<layer>.lora_A.weight` is
(rank, in[, k, k]) and `….lora_B.weight` (out, rank[, 1, 1]). alpha/rank is multiplied into B,
because no key holds alpha; the settings are one JSON string in the header. Method: Hu et al. 2021,
"LoRA: Low-Rank Adaptation of Large Language Models".
"""

import contextlib
import json
import math
import os
import re
from collections import defaultdict

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from metrics import Flags, command, fail, run_script, write_file

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

    alpha defaults to the rank. Returns the new weights, {"unet.<layer>.lora_A.weight": …, …}.
    """
    model.requires_grad_(False)
    for name in find_targets(model, targets):
        layer = model.get_submodule(name)
        device = layer.weight.device
        if isinstance(layer, nn.Linear):
            layer.__class__ = LoRALinear
            layer.lora_A = PairLinear(layer.in_features, rank, bias=False, device=device)
            layer.lora_B = PairLinear(rank, layer.out_features, bias=False, device=device)
        else:
            layer.__class__ = LoRAConv2d
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            layer.lora_A = PairConv2d(layer.in_channels, rank, *geometry, bias=False, device=device)
            layer.lora_B = PairConv2d(rank, layer.out_channels, 1, bias=False, device=device)
        # A: U(±1/√fan_in), drawn on the CPU: the same on every device. B: zero
        start = torch.empty(layer.lora_A.weight.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        layer.lora_A.weight.data.copy_(start)
        nn.init.zeros_(layer.lora_B.weight)
        layer.lora_dropout = nn.Dropout(dropout)
        layer.lora_scale = 1.0 if alpha is None else alpha / rank
    return {f"{prefix}.{name}": w for name, w in model.named_parameters() if w.requires_grad}


def find_targets(model, targets):
    """Names of the layers that "attention", "all" (inside the blocks) or "to_q,ff.net.2" means."""
    layers = [n for n, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if targets == "all":
        return [name for name in layers if "block" in name]
    endings = ATTENTION if targets == "attention" else targets.replace(" ", "").split(",")
    chosen = set()
    for ending in endings:
        matches = [name for name in layers if f".{name}".endswith(f".{ending}")]
        if not matches:
            fail(f"--targets: no layer is called {ending}; say attention, all or to_q,to_v")
        chosen.update(matches)
    return [name for name in layers if name in chosen]


# ---------------------------------------------------------------- saving and loading


def save_tensors(path, tensors, metadata=None):
    """Write safetensors, atomically. Only one metadata key: several are written in random order."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, serialize(tensors, metadata or {"format": "pt"}))


def save(path, weights, metadata):
    """Write the weights of `inject`. metadata: the settings, "rank" and "alpha" among them."""
    scale = float(metadata["alpha"]) / float(metadata["rank"])
    tensors = {}
    for name, weight in weights.items():
        weight = weight.detach().float()
        tensors[on_disk(name)] = weight * scale if ".lora_B." in name else weight
    save_tensors(path, tensors, {"medlora": json.dumps(metadata)})


def load(path):
    """Read an adapter of any dialect: (pairs, metadata, extra), all tensors fp32.

    pairs: {"unet.<layer>": (A, B)}, alpha/rank multiplied into B. metadata: the settings, always
    with rank, alpha, base and dialect. extra: vectors of new words, or the projection of another
    text encoder. A file that holds anything else, or NaN, is refused in one line.
    """
    tensors, metadata, peft = read_file(path)
    words = (metadata.get("tokens") or "").split()
    extra = {}
    for key in list(tensors):
        if key in words or key.startswith("text_projection."):
            extra[key] = tensors.pop(key).float()
    layers, dialect = sort_keys(path, tensors)
    if not layers and not extra:
        fail(f"{path}: not an adapter: it is empty")
    pairs = {}
    ranks = set()
    alphas = set()
    for name, parts in sorted(layers.items()):
        a, b = parts["A"], parts["B"]
        if min(a.ndim, b.ndim) < 2 or not len(a) == b.shape[1] == b[0].numel():
            fail(f"{path}: {name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit together")
        alpha = parts["alpha"].item() if "alpha" in parts else peft_alpha(peft, name, len(a))
        ranks.add(str(len(a)))
        alphas.add(f"{alpha:g}")
        # the product in fp64, so that B is rounded once
        pairs[name] = (a.float(), (b.double() * (alpha / len(a))).float())
        if not all(tensor.isfinite().all() for tensor in pairs[name]):
            fail(f"{path}: {name} holds NaN or infinity; the training that made it failed")
    defaults = {"rank": "/".join(sorted(ranks)), "alpha": "/".join(sorted(alphas))}
    return pairs, {**defaults, **metadata, "dialect": dialect}, extra


def read_file(path):
    """Tensors, settings and PEFT's settings of a safetensors file. Nothing is unpickled."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
        peft = json.loads(metadata.pop("lora_adapter_metadata", "{}"))
        if "medlora" in metadata:  # others, and older files of ours, have one key a setting
            metadata = json.loads(metadata["medlora"])
    except (SafetensorError, OSError, ValueError) as error:
        fail(f"{path}: not a readable safetensors file ({error}); make it or copy it again")
    base = VERSIONS.get(metadata.get("ss_base_model_version"), "")
    return tensors, {"base": base, **metadata}, peft


def sort_keys(path, tensors):
    """{layer: {"A": tensor, "B": …[, "alpha": …]}} and the dialect; other keys are an error."""
    layers = defaultdict(dict)
    unpaired = []
    dialect = "diffusers"
    for key, tensor in tensors.items():
        for pattern, method in OTHER_METHODS.items():
            if re.search(pattern, key):
                fail(
                    f"{path}: {method} ({key}) is not supported, only LoRA: train again without it"
                )
        dialect, layer, part = read_key(key)
        if part in layers[layer]:
            unpaired.append(key)
        layers[layer][part] = tensor
    unpaired += [layer for layer, parts in layers.items() if not {"A", "B"} <= parts.keys()]
    if unpaired:
        some = ", ".join(unpaired[:5])
        fail(f"{path}: not an adapter: {len(unpaired)} names have no pair A, B, such as {some}")
    return layers, dialect


def peft_alpha(settings, name, rank):
    """A layer's alpha as diffusers writes it into the header (PEFT's settings), else its rank."""
    model, layer = name.split(".", 1)
    alpha = settings.get(f"{model}.lora_alpha", rank)
    for pattern, value in settings.get(f"{model}.alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):  # the first that fits counts
            alpha = value
            break
    if settings.get(f"{model}.use_rslora"):  # rank-stabilised: the scale is alpha/√rank
        alpha *= math.sqrt(rank)
    return alpha


# ---------------------------------------------------------------- which keys mean what

# The keys of each dialect: the layer, then which tensor of its pair. The first that fits counts.
KEYS = (
    ("diffusers", r"(.+)\.lora_(A|B)\.weight"),
    ("diffusers lora.down", r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight"),
    ("diffusers processor", r"(.+)_lora\.(down|up)\.weight"),
    ("kohya", r"(.+)\.lora_(down|up)\.weight"),
    ("kohya", r"(.+?)(?:[._]lora)?\.(alpha)"),
)
PARTS = {"A": "A", "B": "B", "down": "A", "up": "B", "alpha": "alpha"}
# What other trainers call a layer → what diffusers calls it, in the order of replacement.
RENAMED = (
    (r"^lora\.te2\.", "text_encoder_2."),
    (r"^lora\.te1?\.", "text_encoder."),
    (r"^(lora\.unet|diffusion_model)\.", "unet."),
    (r"^(?!unet\.|text_encoder)", "unet."),
    (r"\.processor(?=\.)", ""),
    (r"(\.self_attn\.)to_([qkv]|out)$", r"\1\2_proj"),
    (r"\.to_out$", ".to_out.0"),
)
# The words of a kohya name, whose dots became underscores; those that contain one are listed.
WORDS = re.compile(
    r"(?:(?:down|up|input|output|transformer)_blocks|(?:mid|middle)_block|to_(?:[qkv]|out)"
    r"|(?:proj|conv)_(?:in|out)|conv_shortcut|time_emb_proj|(?:time|add)_embedding|linear_[12]"
    r"|(?:in|out|emb)_layers|skip_connection|time_embed|label_emb|text_model|self_attn"
    r"|[qkv]_proj|out_proj|text_projection)(?=_|$)|[^_]+"
)
# Methods other than LoRA, by what their keys contain.
OTHER_METHODS = {
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_": "OFT",
    r"\.lora_mid": "LoCon with a Tucker core",
    r"\.diff(_b)?$": "an adapter of whole differences",
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
    """What any trainer calls a layer → "unet.<path>", "text_encoder.…" or "text_encoder_2.…"."""
    if text.startswith("lora_"):
        text = ".".join(WORDS.findall(text))
    for pattern, replacement in RENAMED:
        text = re.sub(pattern, replacement, text)
    return on_disk(translate(text, SGM_NAMES))


def on_disk(name):
    """A name as files have it: with the level `text_model.`, which transformers 5.6 dropped."""
    return re.sub(r"^(text_encoder(_2)?)\.(?!text_)", r"\1.text_model.", name)


def translate(path, names):
    """A dotted path whose longest beginning that is in `names` is replaced."""
    words = path.split(".")
    for length in range(len(words), 0, -1):
        beginning = ".".join(words[:length])
        if beginning in names:
            return names[beginning] + path.removeprefix(beginning)
    return path


def sgm_names():
    """Stability's name of each part of a UNet → diffusers'. kohya's SDXL files have the former."""
    names = {
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.2": "conv_out",
    }
    for n in (1, 2):
        names[f"time_embed.{2 * n - 2}"] = f"time_embedding.linear_{n}"
        names[f"label_emb.0.{2 * n - 2}"] = f"add_embedding.linear_{n}"
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
        if ".resnets." in ours:
            names[f"{theirs}.in_layers.2"] = f"{ours}.conv1"
            names[f"{theirs}.out_layers.3"] = f"{ours}.conv2"
            names[f"{theirs}.emb_layers.1"] = f"{ours}.time_emb_proj"
            names[f"{theirs}.skip_connection"] = f"{ours}.conv_shortcut"
    return {f"unet.{theirs}": f"unet.{ours}" for theirs, ours in names.items()}


SGM_NAMES = sgm_names()


def guess_base(pairs):
    """The base whose layers an adapter has, "" where none tells; sd21 counts as sd21-base."""
    for name, (a, _) in pairs.items():
        if re.search(r"^text_encoder_2\.|\.transformer_blocks\.1\.|\.add_embedding\.", name):
            return "sdxl"
        if re.search(r"\.attn2\.to_[kv]$", name) and a.shape[1] in TEXT_WIDTHS:
            return TEXT_WIDTHS[a.shape[1]]
    return ""


# ---------------------------------------------------------------- merging, and the commands


@contextlib.contextmanager
def merged(models, adapters):
    """Add adapters [(pairs, weight), …] to the weights of models {"unet": module, …} for a while.

    The sums are made in fp32; the originals come back by copy, the same to the bit.
    """
    layers = {}
    for prefix, model in models.items():
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layers[on_disk(f"{prefix}.{name}")] = layer
    changes = defaultdict(list)
    misfits = []
    for pairs, weight in adapters:
        for name, (a, b) in pairs.items():
            shape = (len(b), a[0].numel())
            if name in layers and layers[name].weight.flatten(1).shape == shape:
                changes[layers[name]].append((a, b, weight))
            else:
                misfits.append(name)
    if misfits:
        some = ", ".join(misfits[:5])
        fail(f"the adapter does not fit this base: {len(misfits)} of its layers, such as {some}")
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
    """Print what an adapter file holds, a figure a line."""
    pairs, metadata, extra = load(path)
    count = sum(a.numel() + b.numel() for a, b in pairs.values())
    count += sum(tensor.numel() for tensor in extra.values())
    figures = {"pairs": len(pairs), "parameters": count, "family": guess_base(pairs)}
    for key, value in {**metadata, **figures}.items():
        print(f"{key}: {' '.join(str(value).split())}"[:200])


def convert(path, dialect, out):
    """Write an adapter in another dialect, "diffusers" or "kohya"."""
    pairs, metadata, extra = load(path)
    if dialect == "kohya" and extra:
        fail(f"{path} holds {', '.join(extra)}, which kohya's dialect has no place for")
    write(out, pairs, metadata, extra, dialect)
    print(f"pairs: {len(pairs)}\nfrom: {metadata['dialect']}\nto: {dialect}")


def merge(files, out):
    """Write one adapter that does exactly what several do: A's stacked, weighted B's joined."""
    terms = defaultdict(list)
    settings = []
    for text in files:
        path, weight = split_weight(text)
        pairs, metadata, extra = load(path)
        if extra:
            fail(f"{path} holds {', '.join(extra)}; give sample.py --lora twice instead")
        settings.append(metadata)
        for name, (a, b) in pairs.items():
            terms[name].append((a, weight * b))
    stacked = {}
    for name, layer in terms.items():
        if len({(a.shape[1:], len(b)) for a, b in layer}) > 1:
            fail(f"{name} has another shape in each file; are they for different bases?")
        stacked[name] = (torch.cat([a for a, _ in layer]), torch.cat([b for _, b in layer], dim=1))
    common = settings[0]
    for metadata in settings[1:]:
        common = {key: value for key, value in common.items() if metadata.get(key) == value}
    rank = max(len(a) for a, _ in stacked.values())
    names = " ".join(map(os.path.basename, files))
    write(out, stacked, {**common, "rank": rank, "alpha": rank, "merged": names}, {})
    print(f"pairs: {len(stacked)}\nrank: {rank}")


def split_weight(text):
    """ "PATH:0.7" → (PATH, 0.7); "PATH" → (PATH, 1.0)."""
    path, colon, weight = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if colon and not os.path.exists(text) and math.isfinite(float(weight)):
            return path, float(weight)
    return text, 1.0


def write(path, pairs, metadata, extra, dialect="diffusers"):
    """Write what `load` returned, in the dialect of diffusers or of kohya."""
    header = {"medlora": json.dumps(metadata)}
    if dialect == "diffusers":
        return save_tensors(path, diffusers_tensors(pairs) | extra, header)
    versions = {base: version for version, base in VERSIONS.items()}
    base = metadata["base"] if metadata["base"] in versions else guess_base(pairs)
    rank = str(max(len(a) for a, _ in pairs.values()))
    header |= {"ss_network_module": "networks.lora", "ss_v2": str("sd21" in base)}
    header |= {"ss_network_dim": rank, "ss_network_alpha": rank}
    header["ss_base_model_version"] = versions.get(base, "")
    save_tensors(path, kohya_tensors(pairs, base), header)


def diffusers_tensors(pairs):
    """Pairs by diffusers' keys, smaller ranks padded: some releases scale mixed ranks wrongly."""
    rank = max((len(a) for a, _ in pairs.values()), default=0)
    tensors = {}
    for name, (a, b) in pairs.items():
        pad = rank - len(a)
        tensors[f"{name}.lora_A.weight"] = torch.cat([a, a.new_zeros(pad, *a.shape[1:])])
        tensors[f"{name}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), pad, *b.shape[2:])], 1)
    return tensors


def kohya_tensors(pairs, base):
    """Pairs by kohya's keys; SDXL's UNet by Stability's names. alpha is the rank: B is scaled."""
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
    info_flags = commands.add_parser("info", description="Print what an adapter file holds.")
    info_flags.add_argument("file", help="an adapter, .safetensors")
    convert_flags = commands.add_parser("convert", description="Write another dialect.")
    convert_flags.add_argument("file", help="an adapter, .safetensors")
    convert_flags.add_argument("--to", required=True, choices=["diffusers", "kohya"])
    merge_flags = commands.add_parser("merge", description="Write one adapter for several.")
    merge_flags.add_argument("files", nargs="+", metavar="FILE[:WEIGHT]")
    for writer in (convert_flags, merge_flags):
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
