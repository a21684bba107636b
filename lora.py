"""Low-rank adapters: put them into a model, save and load them, add them to its weights, look inside a file.

    python lora.py info runs/dfu/lora.safetensors
    python lora.py convert runs/dfu/lora.safetensors --to kohya --out dfu.safetensors
    python lora.py merge a.safetensors:0.7 b.safetensors:0.3 --out both.safetensors

An adapter file is safetensors in the dialect diffusers' `load_lora_weights` reads: `unet.<module>.lora_A.weight`
(rank, in[, k, k]) and `….lora_B.weight` (out, rank[, 1, 1]). alpha/rank is folded into B, because that dialect has no
alpha tensor and every loader then gives the same picture; the true rank and alpha stand in the metadata.
Read as well: diffusers' two older dialects, and kohya's (A1111, ComfyUI), which `convert` also writes.
Method: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". Imports none of our files.
"""

import contextlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from metrics import Flags, fail, replacing, run_script

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


# ---------------------------------------------------------------------------------------------- adapters in layers


class LoRALayer:
    """Mixed in before nn.Linear or nn.Conv2d by `inject`: y = layer(x) + alpha/rank · B(A(dropout(x)))."""

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.lora_scale


class LoRALinear(LoRALayer, nn.Linear):
    pass


class LoRAConv2d(LoRALayer, nn.Conv2d):
    pass


def find_targets(model, targets):
    """Names of the Linear and Conv2d layers of `model` that `targets` means.

    targets: "attention" (to_q, to_k, to_v, to_out.0), "all" (every such layer inside the blocks: attention,
    feed-forward, projections, resnets, samplers), or a comma list of name endings such as "to_q,ff.net.2".
    """
    layers = [
        name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    if targets == "all":
        return [name for name in layers if "block" in name]
    endings = (
        ATTENTION
        if targets == "attention"
        else tuple(filter(None, targets.replace(" ", "").split(",")))
    )
    unknown = [
        end for end in endings if not any(("." + name).endswith("." + end) for name in layers)
    ]
    if unknown or not endings:
        fail(
            f"--targets {targets}: no layer of the model is called {', '.join(unknown) or 'so'}; "
            "say attention, all, or name endings such as to_q,to_v"
        )
    return [name for name in layers if any(("." + name).endswith("." + end) for end in endings)]


def inject(
    model, targets="attention", rank=16, alpha=None, dropout=0.0, generator=None, prefix="unet"
):
    """Freeze `model` and give each target layer a trainable fp32 pair; the layer's output is unchanged at first.

    A (rank, in[, k, k]) is kaiming-uniform with a=√5, that is U(±1/√fan_in), B (out, rank[, 1, 1]) zero: the step
    that lr makes then does not depend on the rank. alpha defaults to the rank (scale 1).
    Returns {name: parameter} of the new weights, names such as "unet.….to_q.lora_A.weight".
    """
    model.requires_grad_(False)
    for name in find_targets(model, targets):
        layer = model.get_submodule(name)
        device = layer.weight.device
        if isinstance(layer, nn.Linear):
            layer.__class__ = LoRALinear
            layer.lora_A = nn.Linear(layer.in_features, rank, bias=False, device=device)
            layer.lora_B = nn.Linear(rank, layer.out_features, bias=False, device=device)
        else:
            layer.__class__ = LoRAConv2d
            layer.lora_A = nn.Conv2d(
                layer.in_channels,
                rank,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                bias=False,
                device=device,
            )
            layer.lora_B = nn.Conv2d(rank, layer.out_channels, 1, bias=False, device=device)
        start = torch.empty(
            layer.lora_A.weight.shape
        )  # drawn on the CPU: the same start on every device
        layer.lora_A.weight.data.copy_(
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        )
        nn.init.zeros_(layer.lora_B.weight)
        layer.lora_dropout = nn.Dropout(dropout)
        layer.lora_scale = (rank if alpha is None else alpha) / rank
    return {
        f"{prefix}.{name}": weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


# ---------------------------------------------------------------------------------------------- names of layers

# The names that have an underscore of their own: with them a kohya name, whose dots became underscores, is read again.
WORDS = re.compile(
    "(?:"
    + "|".join(
        (
            "(?:down|up|input|output|transformer)_blocks|(?:mid|middle)_block|to_(?:[qkv]|out)|(?:proj|conv)_(?:in|out)",
            "conv_shortcut|time_emb_proj|(?:time|add)_embedding|linear_[12]|in_layers|out_layers|emb_layers|skip_connection",
            "time_embed|label_emb|text_model|self_attn|[qkv]_proj|out_proj|text_projection",
        )
    )
    + ")(?=_|$)|[^_]+"
)
PAIR = re.compile(
    r"(.+?)(?:[._]lora(?:_linear_layer)?[._](A|B|down|up)\.weight|(?:[._]lora)?\.(alpha))"
)
KOHYA = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
REFUSED = {
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_": "OFT",
    r"\.lora_mid": "LoCon with a Tucker core",
    r"\.diff(_b)?$": "an adapter of whole differences",
}


def on_disk(name):
    """A weight's name in files: a text encoder's layers lie below `text_model.`, whatever this transformers does."""
    return re.sub(
        r"^(text_encoder(?:_2)?)\.(?!text_model\.|text_projection)", r"\1.text_model.", name
    )


def layer_name(stem):
    """What any trainer calls a layer → "unet.<path>", "text_encoder.<path>" or "text_encoder_2.<path>"."""
    kohya = re.fullmatch(r"lora_(unet|te1?|te2)_(.+)", stem)
    if kohya:
        stem = f"{KOHYA[kohya[1]]}.{'.'.join(WORDS.findall(kohya[2]))}"
    elif not stem.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
        stem = "unet." + stem.removeprefix("diffusion_model.")
    stem = re.sub(r"\.processor(?=\.)", "", stem)
    stem = re.sub(
        r"(\.self_attn\.)to_(?:([qkv])|out)$", lambda m: f"{m[1]}{m[2] or 'out'}_proj", stem
    )
    return on_disk(re.sub(r"\.to_out$", ".to_out.0", stem))


def sgm_names(layers):
    """Stability's names of a UNet's layers → diffusers', of `layers` resnets a level (2 in every Stable Diffusion)."""
    resnet = {
        "in_layers.2": "conv1",
        "out_layers.3": "conv2",
        "emb_layers.1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
    }
    table = {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    for n in (1, 2):
        table[f"time_embed.{2 * n - 2}"] = f"time_embedding.linear_{n}"
        table[f"label_emb.0.{2 * n - 2}"] = f"add_embedding.linear_{n}"
    for level, j in itertools.product(range(4), range(layers + 1)):
        n, down, up = level * (layers + 1) + j, f"down_blocks.{level}", f"up_blocks.{level}"
        resnets[f"output_blocks.{n}.0"], table[f"output_blocks.{n}.1"] = (
            f"{up}.resnets.{j}",
            f"{up}.attentions.{j}",
        )
        if j < layers:
            resnets[f"input_blocks.{n + 1}.0"] = f"{down}.resnets.{j}"
            table[f"input_blocks.{n + 1}.1"] = f"{down}.attentions.{j}"
        else:
            table[f"input_blocks.{n + 1}.0.op"] = f"{down}.downsamplers.0.conv"
            for k in (1, 2):  # 2 after an attention
                table[f"output_blocks.{n}.{k}.conv"] = f"{up}.upsamplers.0.conv"
    return table | {
        f"{theirs}.{x}": f"{ours}.{y}"
        for theirs, ours in resnets.items()
        for x, y in resnet.items()
    }


def translate(path, table):
    """A dotted path with the longest beginning that `table` knows in the table's words; None where it knows none."""
    parts = path.split(".")
    return next(
        (
            ".".join([table[start], *parts[k:]])
            for k in range(len(parts), 0, -1)
            if (start := ".".join(parts[:k])) in table
        ),
        None,
    )


def from_sgm(names):
    """{name: itself, in diffusers' words}.

    Where the samplers stand tells the number of resnets a level: a name that 2 makes impossible means 1.
    """
    sgm = re.compile(
        r"unet\.((?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\..+)"
    )
    paths = {found[0]: found[1] for found in map(sgm.fullmatch, names) if found}
    tables = [sgm_names(2), sgm_names(1)]
    table = next(
        (t for t in tables if all(translate(path, t) for path in paths.values())), tables[0]
    )
    return {
        name: f"unet.{translate(paths[name], table) or paths[name]}" if name in paths else name
        for name in names
    }


def listed(names, most=5):
    """Names for an error line: all of them, or the first and how many more."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


# ---------------------------------------------------------------------------------------------- adapters on disk

# base → what kohya's files call it; the width of the text an attn2.to_k reads tells the family
VERSIONS = {"sd15": "sd_v1", "sd21-base": "sd_v2", "sd21": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}
WIDTHS = {768: "sd15", 1024: "sd21-base", 2048: "sdxl"}


def to_bytes(tensors, metadata):
    """A safetensors file as bytes, the same ones every time: the library writes its metadata in random order."""
    plain = serialize(tensors)
    length = int.from_bytes(plain[:8], "little")
    texts = {key: str(value) for key, value in sorted({"format": "pt", **metadata}.items())}
    header = json.dumps({"__metadata__": texts, **json.loads(plain[8 : 8 + length])}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[8 + length :]


def save(path, weights, metadata):
    """Write {name: tensor} as `inject` names them, atomically; metadata: {"rank": …, "alpha": …, "base": …, …}."""
    scale = float(metadata["alpha"]) / float(metadata["rank"])
    tensors = {
        on_disk(name): (w.detach().float() * (scale if ".lora_B." in name else 1))
        .cpu()
        .contiguous()
        for name, w in weights.items()
    }
    with replacing(path) as file:
        file.write(to_bytes(tensors, metadata))


def open_file(path):
    """A safetensors file, its header read. Nothing is unpickled."""
    if not os.path.isfile(path):
        fail(f"{path}: no such file; give an adapter (.safetensors)")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as why:
        fail(f"{path}: not a readable safetensors file ({why}); make it again or copy it again")


def load(path):
    """Read an adapter: ({"unet.<module>": (A, B)}, metadata, extra), alpha/rank already folded into B, all fp32.

    The dialects of diffusers (three) and kohya are told by their keys; metadata gains "dialect", "rounding" (the
    relative error of folding alpha in) and, where it lacks them, "rank", "alpha" and "base".
    extra: what is no pair: the projection of a foreign text encoder, or the vectors of new tokens. Stops with one line
    on a file that is missing, truncated, no safetensors, of another method (DoRA, LoKr, LoHa, …), holds NaN, or has
    keys that are no pairs: what does not fit is listed, never dropped in silence.
    """
    file = open_file(path)
    tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    extra = {
        key: tensors.pop(key).float()
        for key in list(tensors)
        if key.startswith("text_projection.") or key in metadata.get("tokens", "").split()
    }
    found, odd = sort_keys(path, tensors)
    if odd or not (found or extra):
        fail(
            f"{path}: not an adapter: {f'{len(odd)} keys are of no pair: {listed(odd)}' if odd else 'it is empty'}"
        )
    pairs, alphas, rounding = {}, {}, 0.0
    for name in sorted({name for name, _ in found}):
        a, b = found[name, "A"], found[name, "B"]
        if min(a.ndim, b.ndim) < 2 or not len(a) == b.shape[1] == b[0].numel() or not a.numel():
            fail(
                f"{path}: {name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit together"
            )
        alpha = found.get((name, "alpha"), header_alpha(path, metadata, name, len(a)))
        alphas[name] = float(alpha)
        exact = b.double() * (alphas[name] / len(a))
        pairs[name] = a, b = a.float(), exact.float()
        rounding = max(rounding, ((exact - b).norm() / exact.norm().clamp(min=1e-30)).item())
    for name, value in [
        *extra.items(),
        *((name, half) for name, pair in pairs.items() for half in pair),
    ]:
        if not value.isfinite().all():
            fail(f"{path}: {name} holds NaN or infinity; the training that made it failed")
    own = {
        "rank": "/".join(map(str, sorted({len(a) for a, _ in pairs.values()}))),
        "alpha": "/".join(f"{alpha:g}" for alpha in sorted(set(alphas.values()))),
        "base": {theirs: ours for ours, theirs in VERSIONS.items()}.get(
            metadata.get("ss_base_model_version"), ""
        ),
    }
    return (
        pairs,
        {**own, **metadata, "dialect": dialect(tensors), "rounding": f"{rounding:.2g}"},
        extra,
    )


def dialect(keys):
    """The name of the dialect that these keys are in."""
    text = " ".join(keys)
    if re.search(r"\blora_(unet|te)", text):
        return "kohya" + " sgm" * bool(re.search("_(in|out)put_blocks|_middle_block", text))
    old = re.search(r"(\.lora|_layer)\.down", text)
    return "diffusers" + " processor" * ("_lora." in text) + " lora.down" * bool(old)


def sort_keys(path, tensors):
    """What the keys of a file mean: {(layer, "A", "B" or "alpha"): tensor}, and the keys that belong to no pair."""
    for key, (pattern, method) in itertools.product(tensors, REFUSED.items()):
        if re.search(pattern, key):
            fail(
                f"{path}: {method} ({key}) is not supported, only LoRA of linear and convolution layers; train again "
                "without it, or merge it into a base with the tool that made it"
            )
    keys = {
        key: match
        for key, match in zip(tensors, map(PAIR.fullmatch, tensors))
        if match and (tensors[key].numel() == 1 if match[3] else tensors[key].is_floating_point())
    }
    names, places = from_sgm({layer_name(match[1]) for match in keys.values()}), {}
    for key, match in keys.items():
        part = {"down": "A", "up": "B"}.get(match[2], match[2] or "alpha")
        places.setdefault((names[layer_name(match[1])], part), []).append(key)
    good = {
        place: found[0]
        for place, found in places.items()
        if (place[0], "A") in places and (place[0], "B") in places and len(found) == 1
    }
    return {place: tensors[key] for place, key in good.items()}, sorted(
        set(tensors) - set(good.values())
    )


def header_alpha(path, metadata, name, rank):
    """A layer's alpha as newer diffusers writes it into the header (peft's settings of each model), else its rank."""
    root, layer = name.split(".", 1)
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        patterns = config.get(
            f"{root}.alpha_pattern", {}
        ).items()  # regular expressions; the first that fits counts
        alpha = next(
            (other for pattern, other in patterns if re.fullmatch(rf"(.*\.)?({pattern})", layer)),
            config.get(f"{root}.lora_alpha", rank),
        )
        return alpha * (
            math.sqrt(rank) if config.get(f"{root}.use_rslora") else 1.0
        )  # rank-stabilised: alpha/√rank
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error):
        fail(f"{path}: its header's lora_adapter_metadata cannot be read; save the adapter again")


def kohya_tensors(pairs, metadata):
    """An adapter in kohya's words, and what its header says: SDXL's UNet by Stability's names, others by diffusers'.

    .alpha is the true one where taking it out of B again loses no bit (alpha/rank is a power of two), else the rank,
    with alpha/rank left in B.
    """
    text = " ".join(pairs)
    xl = metadata["base"] == "sdxl" or re.search(
        r"text_encoder_2\.|\.transformer_blocks\.1\.|add_embedding", text
    )
    down, up = (
        set(re.findall(rf"{side}_blocks\.\d+\.[ra]\w+\.(\d+)", text)) for side in ("down", "up")
    )
    layers = 1 if (down, up) == ({"0"}, {"0", "1"}) else 2
    table = {ours: theirs for theirs, ours in sgm_names(layers).items()} if xl else {}
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if xl else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    tensors, ranks, scale = {}, {len(a) for a, _ in pairs.values()}, 1.0
    with contextlib.suppress(
        ValueError, ZeroDivisionError
    ):  # "4/8", or what another program wrote there
        told = float(metadata["alpha"]) / float(metadata["rank"])
        scale = told if math.frexp(told)[0] == 0.5 and ranks == {float(metadata["rank"])} else 1.0
    for name, (a, b) in pairs.items():
        root, path = name.split(".", 1)
        stem = prefixes[root] + (translate(path, table) or path).replace(".", "_")
        tensors |= {
            f"{stem}.lora_down.weight": a,
            f"{stem}.lora_up.weight": b / scale,
            f"{stem}.alpha": torch.tensor(len(a) * scale),
        }
    base = metadata["base"] if metadata["base"] in VERSIONS else family(pairs)
    return tensors, {
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
        "ss_network_dim": max(ranks),
        "ss_network_alpha": f"{max(ranks) * scale:g}",
        "ss_v2": base.startswith("sd21"),
        "ss_base_model_version": VERSIONS.get(base, ""),
    }


def family(pairs):
    """The base an adapter was made for, by the width of the text that its layers read; "" where none tells."""
    return next(
        (
            WIDTHS[a.shape[1]]
            for name, (a, _) in pairs.items()
            if re.search(r"attn2\.to_[kv]$", name) and a.shape[1] in WIDTHS
        ),
        "",
    )


def write(path, pairs, metadata, extra, to="diffusers"):
    """Write what `load` gave, atomically. In diffusers' dialect all pairs get one rank, the smaller ones by zeros:
    of mixed ranks without alphas some releases of it make a wrong scale."""
    about, tensors, rank = (
        metadata,
        dict(extra),
        max((len(a) for a, _ in pairs.values()), default=0),
    )
    if to == "kohya":
        tensors, more = kohya_tensors(pairs, metadata)
        about = metadata | more
    else:
        for name, (a, b) in pairs.items():
            tensors[f"{name}.lora_A.weight"] = torch.cat(
                [a, a.new_zeros(rank - len(a), *a.shape[1:])]
            )
            tensors[f"{name}.lora_B.weight"] = torch.cat(
                [b, b.new_zeros(len(b), rank - len(a), *b.shape[2:])], 1
            )
    stale = ("dialect", "rounding", "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash")
    with replacing(path) as file:
        file.write(
            to_bytes(
                {key: value.contiguous() for key, value in tensors.items()},
                {key: value for key, value in about.items() if key not in stale and value != ""},
            )
        )


def delta(a, b):
    """What a pair adds to its layer's weight: B·A, (out, in) or (out, in, k, k)."""
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


@contextlib.contextmanager
def merged(models, adapters):
    """Add adapters to the weights for a while: models {"unet": module, …}, adapters [(pairs, weight), …].

    The sums are made in fp32; the originals come back by copy, not by subtraction, so they are the same to the bit.
    Stops with one line when a pair names a layer the models do not have, or one of another shape.
    """
    updates, missing = {}, []
    for pairs, weight in adapters:
        for name, (a, b) in pairs.items():
            layer = find_layer(models, name)
            if (
                layer is None
                or layer.weight.numel() != b.shape[0] * a[0].numel()
                or len(layer.weight) != b.shape[0]
            ):
                missing.append(name)
            else:
                updates.setdefault(layer, []).append((a, b, weight))
    if missing:
        fail(
            f"the adapter does not fit this base: {len(missing)} of its layers are absent or of another shape: "
            f"{listed(missing)}; was it trained on another --base?"
        )
    originals = {layer: layer.weight.data for layer in updates}
    try:
        for layer, parts in updates.items():
            total = layer.weight.data.float()
            for a, b, weight in parts:
                change = delta(a.to(total.device), b.to(total.device)).reshape(total.shape)
                total = total + weight * change
            layer.weight.data = total.to(originals[layer].dtype)
        yield
    finally:
        for layer, original in originals.items():
            layer.weight.data = original


def find_layer(models, name):
    """The layer an adapter's key means, or None. transformers 5.6 dropped CLIPTextModel's `text_model.` level."""
    root, _, path = name.partition(".")
    for candidate in (path, path.removeprefix("text_model.")):
        with contextlib.suppress(KeyError, AttributeError):
            layer = models[root].get_submodule(candidate)
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                return layer
    return None


# ---------------------------------------------------------------------------------------------- the commands


def split_weight(text):
    """ "PATH:0.7" → (PATH, 0.7); "PATH" → (PATH, 1.0)."""
    path, colon, weight = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if colon and not os.path.exists(text) and math.isfinite(float(weight)):
            return path, float(weight)
    return text, 1.0


def merge(args):
    """Write one adapter that adds what several would: A's one below the other, weighted B's side by side."""
    pairs, headers = {}, []
    for path, weight in map(split_weight, args.files):
        found, metadata, extra = load(path)
        headers.append(metadata)
        if extra:
            fail(
                f"{path} holds {listed(sorted(extra))}, which cannot be added up; give sample.py --lora twice"
            )
        for name, (a, b) in found.items():
            first_a, first_b = pairs.get(name, (a[:0], b[:, :0]))
            if (a[0].numel(), len(b)) != (first_a.shape[1:].numel(), len(first_b)):
                fail(
                    f"{path}: {name} has another shape than in the files before; the adapters are of different bases"
                )
            pairs[name] = (
                torch.cat([first_a, a.reshape(-1, *first_a.shape[1:])]),
                torch.cat([first_b, weight * b.reshape(*b.shape[:2], *first_b.shape[2:])], 1),
            )
            if not pairs[name][1].isfinite().all():
                fail(f"{path}:{weight:g}: the weight is too large")
    about = dict(set.intersection(*({*header.items()} for header in headers)))  # what they agree on
    about["merged"] = " ".join(map(os.path.basename, args.files))
    finish(args, pairs, about)


def finish(args, pairs, about):
    """Write a new adapter with alpha 1/1 and print what it is."""
    rank = max(len(a) for a, _ in pairs.values())
    about = {key: value for key, value in about.items() if not key.startswith("ss_")}
    write(args.out, pairs, {**about, "rank": rank, "alpha": rank}, {})
    print(f"pairs: {len(pairs)}\nrank: {rank}")


def convert(args):
    """Write an adapter in another dialect; what has no place there is refused."""
    pairs, metadata, extra = load(args.file)
    if args.to == "kohya" and extra:
        fail(f"{args.file} holds {listed(sorted(extra))}, for which kohya's dialect has no place")
    write(args.out, pairs, metadata, extra, args.to)
    print(
        f"pairs: {len(pairs)}\nfrom: {metadata['dialect']}\nto: {args.to}\nrelative error: {metadata['rounding']}"
    )


def info(path):
    """Print what an adapter file holds, a figure a line."""
    pairs, metadata, extra = load(path)
    base = metadata.pop("base") or (
        f"of the {family(pairs)} family" if family(pairs) else "unknown"
    )
    count = sum(a.numel() + b.numel() for a, b in pairs.values()) + sum(
        e.numel() for e in extra.values()
    )
    print(
        f"dialect: {metadata.pop('dialect')}\nbase: {base}\nrank: {metadata.pop('rank')}\n"
        f"alpha: {metadata.pop('alpha')}\npairs: {len(pairs)}\nparameters: {count}"
    )
    blocks = {"": 0.0}
    for name, (a, b) in pairs.items():  # |B·A|² = tr(BᵀB · AAᵀ): the full matrix is never made
        a, b = a.double().flatten(1), b.double().flatten(1)
        block = re.match(r"unet\.(?:down|up)_blocks\.\d+|unet\.\w+|\w+", name)[0]
        square = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).item()
        blocks[block], blocks[""] = blocks.get(block, 0.0) + square, blocks[""] + square
    for block, square in sorted(blocks.items()):
        print(f"norm{' ' * bool(block)}{block}: {math.sqrt(square):.4g}")
    for key, value in sorted(metadata.items()):
        if key not in ("format", "rounding"):
            print(
                f"{key}: {json.dumps(value, ensure_ascii=False) if not value.isprintable() else value}"[
                    :200
                ]
            )


# ---------------------------------------------------------------- flags


def parse_args():
    parser = Flags(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in (
            ("info", "dialect, base, rank, alpha, pairs, parameters and norms of an adapter"),
            ("convert", "write an adapter in another dialect"),
            ("merge", "one adapter that acts as several at once, exactly"),
        )
    }
    for name in ("info", "convert"):
        made[name].add_argument("file", help="an adapter, .safetensors")
    made["convert"].add_argument(
        "--to", required=True, choices=["diffusers", "kohya"], help="kohya: A1111 and ComfyUI"
    )
    made["merge"].add_argument("files", nargs="+", metavar="FILE[:WEIGHT]")
    for name, command in made.items():
        command.error = fail
        if name != "info":
            command.add_argument(
                "--out", required=True, metavar="FILE", help="the adapter to write, .safetensors"
            )
    return parser.parse_args()


def main(args):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        if args.command == "info":
            return info(args.file)
        {"convert": convert, "merge": merge}[args.command](args)
    except OSError as why:
        fail(f"{getattr(args, 'out', args.command)}: {why.strerror or why}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"written: {args.out}\nnext: {shlex.join(['python', sys.argv[0], 'info', args.out])}")


if __name__ == "__main__":
    run_script(main, parse_args)
