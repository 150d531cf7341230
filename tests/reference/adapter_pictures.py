"""Paints with adapters in diffusers, for our own server to be compared with.

    python tests/reference/adapter_pictures.py                  # tests/golden/adapter-pictures
    python tests/reference/adapter_pictures.py --check          # paint again, compare, write nothing
    python tests/reference/adapter_pictures.py --only kohya     # cases whose name contains "kohya"

First it writes the adapters that are painted with: random ones for the demo model, one in each dialect that diffusers
loads (a seed each, so that they stay the same), beside the samples of `adapters/`, which are there already. Then as
pictures.py does, which this builds on: f32 on the CPU, one request's worth of settings in each case.
"""
import argparse
import contextlib
import json
import os
import sys
import time
import zlib
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import diffusers
import numpy as np
import peft
import torch
import transformers
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file, save_file

from pictures import ROOT, SCHEDULERS, Painter, case, sha256

OUT = ROOT / "tests" / "golden" / "adapter-pictures"
# How large a random difference is beside its weight: plain to see, and the picture is still a picture.
SHARE = 0.35
# Mean difference of a picture's values from the base's picture of the same request, in 255ths: below it an adapter could
# be left out and nobody would notice.
LEAST = 3.0


# The adapters


class Random:
    """Factors for the weights of a model, always the same under one name."""

    def __init__(self, model, name):
        pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None,
                                                       local_files_only=True)
        self.parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def weight(self, part, path):
        return self.parts[part].get_submodule(path).weight.detach()

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def factors(self, weight, rank, scale=1.0):
        """`down` and `up` whose product times `scale` has `SHARE` of the weight's norm."""
        out, *rest = weight.shape
        down, up = self.randn(rank, *rest), self.randn(out, rank, *[1] * (len(rest) - 1))
        size = (up.flatten(1) @ down.flatten(1)).norm() * scale
        by = (SHARE * weight.norm() / size).sqrt()
        return (down * by).half().contiguous(), (up * by).half().contiguous()

    def names(self, part, *ends):
        """Modules by the ends of their names."""
        return [path for path, _ in self.parts[part].named_modules() if any(path.endswith(end) for end in ends)]


def write(name, tensors, metadata=None):
    save_file(tensors, OUT / f"{name}.safetensors", metadata)


def write_peft(model, name, **configs):
    """As diffusers' training scripts save what PEFT has trained."""
    random = Random(model, name)
    for part, config in configs.items():
        inject_adapter_in_model(config, random.parts[part])
        for path, layer in random.parts[part].named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            weight = layer.get_base_layer().weight
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            down, up = random.factors(weight, a.shape[0], layer.scaling["default"])
            a.data, b.data = down.float(), up.float()
            for magnitude in layer.lora_magnitude_vector.values():
                magnitude.weight.data *= 1 + 0.2 * random.randn(*magnitude.weight.shape)
    state = {p: {k: v.half().contiguous() for k, v in get_peft_model_state_dict(random.parts[p]).items()} for p in configs}
    meta = {p: c.to_dict() | dict(target_modules=sorted(c.target_modules)) for p, c in configs.items()}    # sets have no order
    StableDiffusionPipeline.save_lora_weights(
        OUT, state.get("unet"), state.get("text_encoder"), weight_name=f"{name}.safetensors",
        unet_lora_adapter_metadata=meta.get("unet"), text_encoder_lora_adapter_metadata=meta.get("text_encoder"))


def write_peft_files(model):
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    write_peft(
        model, "peft",
        unet=LoraConfig(r=2, lora_alpha=3, target_modules=[*attention, "proj_in", "net.2"],
                        rank_pattern={"attn2.to_q": 3, "mid_block.attentions.0.proj_in": 1},
                        alpha_pattern={"attn2.to_q": 1.5, "mid_block.attentions.0.proj_in": 0.5}),
        text_encoder=LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "v_proj", "fc1"], rank_pattern={"fc1": 3},
                                alpha_pattern={"layers.1.mlp.fc1": 4}))
    write_peft(model, "peft-unet", unet=LoraConfig(r=3, lora_alpha=3, target_modules=attention))
    write_peft(model, "peft-text", text_encoder=LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]))
    write_peft(model, "peft-rslora-convolutions", unet=LoraConfig(
        r=2, lora_alpha=3, use_rslora=True,
        target_modules=["conv1", "conv_shortcut", "proj_out", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "conv_in"]))
    write_peft(model, "peft-dora", unet=LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["to_q", "to_v", "conv2"]))


def write_kohya_files(model):
    # One alpha in each file, as the tools write: where they differ, diffusers loses them (it makes patterns of keys with
    # `.processor.` and `_lora.down.weight` in them, which fit nothing).
    def put(random, tensors, part, path, rank, alpha):
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part]
        key = prefix + path.removeprefix("text_model.").replace(".", "_")
        down, up = random.factors(random.weight(part, path), rank, alpha / rank)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(alpha))}

    random, tensors = Random(model, "kohya"), {}
    layers = [".to_q", ".to_k", ".to_v", ".to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2"]
    for i, path in enumerate(random.names("unet", *layers)):
        put(random, tensors, "unet", path, 1 + i % 3, 1)
    for i, path in enumerate(random.names("text_encoder", "_proj", "fc1", "fc2")):
        put(random, tensors, "text_encoder", path, 1 + i % 2, 1)
    write("kohya", tensors, {"ss_network_module": "networks.lora"})

    # LoCon: kernels too.
    random, tensors = Random(model, "locon"), {}
    for i, path in enumerate(random.names("unet", ".conv1", ".conv2", "conv_shortcut", "samplers.0.conv", ".to_q", ".to_v")):
        put(random, tensors, "unet", path, 1 + i % 2, 1.5)
    write("locon", tensors, {"ss_network_module": "lycoris.kohya"})


def write_old_files(model):
    def put(random, tensors, part, path, key, rank):
        down, up = random.factors(random.weight(part, path), rank)
        tensors |= {f"{part}.{key}.down.weight": down, f"{part}.{key}.up.weight": up}

    random, tensors = Random(model, "diffusers-2023"), {}
    for path in random.names("unet", ".to_q", ".to_k", ".to_v", ".to_out.0"):
        put(random, tensors, "unet", path, f"{path}.lora", 2)
    for path in random.names("text_encoder", "_proj"):
        put(random, tensors, "text_encoder", path, f"text_model.{path.removeprefix('text_model.')}.lora_linear_layer", 2)
    write("diffusers-2023", tensors)

    random, tensors = Random(model, "processors"), {}
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        for path in random.names("unet", f".{layer}"):
            key = f"{path.removesuffix('.' + layer)}.processor.{layer.removesuffix('.0')}_lora"
            put(random, tensors, "unet", path, key, 2)
    write("processors", tensors)


def write_words(model):
    for name, key, n in (("words", "<golden>", 3), ("words-nameless", "emb_params", 2)):
        random = Random(model, name)
        rows = random.parts["text_encoder"].get_input_embeddings().weight.detach()
        # Larger than the model's own, which would change little.
        write(name, {key: (3 * rows.std() * random.randn(n, rows.shape[1])).contiguous()})


# The cases


def used(file, unet=1.0, text_encoder=1.0, word=None):
    """An adapter of a case: of this folder, or a sample."""
    folder = "adapters" if (ROOT / "adapters" / f"{file}.safetensors").exists() else "tests/golden/adapter-pictures"
    return dict(file=f"{folder}/{file}.safetensors", unet=unet, text_encoder=text_encoder, word=word)


def with_adapters(name, prompt, scheduler, seed, adapters, *, scale=None, source=False, width=64, height=64, steps=6, **more):
    c = case(name, prompt, scheduler, seed, width=width, height=height, steps=steps, **more)
    if source:
        c |= dict(input="tests/golden/pictures/input-square.png", width=128, height=128)
    # What cross_attention_kwargs={"scale": …} multiplies all strengths with; those of the case are the products.
    return c | dict(adapters=adapters, scale=scale)


def all_cases():
    mushroom, boat, cat = "a red mushroom in a meadow", "a white boat on the beach", "a black cat in a room"
    dialects = ["peft", "peft-unet", "peft-text", "peft-rslora-convolutions", "peft-dora", "kohya", "locon", "diffusers-2023",
                "processors"]
    for i, file in enumerate(dialects):
        yield with_adapters(f"{file}-euler", mushroom, "euler", 400 + i, [used(file)], guidance=7.5)
        yield with_adapters(f"{file}-ddim", boat, "ddim", 420 + i, [used(file)], guidance=1.0)

    # Strengths. DoRA is not among them: PEFT puts the strength inside the norm, so that half of one is not half the way.
    yield with_adapters("peft-half", cat, "ddim", 440, [used("peft", 0.5, 0.5)])
    yield with_adapters("peft-negative", cat, "euler", 441, [used("peft", -0.8, -0.8)])
    yield with_adapters("peft-more", mushroom, "ddim", 442, [used("peft", 1.6, 1.6)])
    yield with_adapters("peft-unet-only", mushroom, "ddim", 443, [used("peft", 1.0, 0.0)], guidance=7.5)
    yield with_adapters("peft-text-only", mushroom, "euler", 444, [used("peft", 0.0, 1.3)], guidance=7.5)
    yield with_adapters("peft-apart", boat, "euler", 445, [used("peft", 0.7, -0.9)], guidance=7.5, negative="at night")
    yield with_adapters("kohya-negative", boat, "ddim", 446, [used("kohya", -1.2, -0.4)])
    yield with_adapters("convolutions-negative", boat, "euler", 447, [used("peft-rslora-convolutions", -0.7, 1.0)])
    yield with_adapters("peft-scale", cat, "euler", 448, [used("peft", 0.6, 0.6)], scale=0.6)
    yield with_adapters("two-scale", cat, "ddim", 449, [used("peft", 0.25, -0.5), used("kohya", 0.5, 0.35)], scale=0.5)

    # Several.
    yield with_adapters("two", mushroom, "euler", 450, [used("peft", 0.8, 0.5), used("kohya", 0.4, 0.9)], guidance=7.5)
    yield with_adapters("two-opposite", mushroom, "ddim", 451, [used("peft", 0.7, 0.7), used("peft-unet", -0.9, 1.0)])
    yield with_adapters("three", boat, "dpmpp_2m", 452, [used("locon", 0.5), used("peft-text", 1.0, 0.8), used("diffusers-2023", 0.4, -0.3)])

    # Sizes, pictures, schedulers that draw noise, several pictures.
    yield with_adapters("odd-size", boat, "euler", 460, [used("kohya")], width=72, height=56)
    yield with_adapters("odd-size-convolutions", boat, "ddim", 461, [used("locon", 0.8)], width=56, height=104)
    yield with_adapters("img2img", cat, "ddim", 462, [used("peft")], source=True, strength=0.6, steps=10)
    yield with_adapters("ancestral", cat, "euler_a", 463, [used("kohya", 0.8, 0.8)], n=2)
    yield with_adapters("clip-skip", cat, "ddim", 464, [used("peft-text")], clip_skip=1)

    # Words.
    golden, nameless = used("words"), used("words-nameless", word="<grey>")
    yield with_adapters("words", "a <golden> on the beach", "euler", 470, [golden], guidance=7.5)
    yield with_adapters("words-no-guidance", "a <golden> in a meadow", "ddim", 471, [golden], guidance=1.0)
    yield with_adapters("words-twice", "<golden>, a red <golden> at night", "ddim", 472, [golden])
    yield with_adapters("words-negative-prompt", mushroom, "euler", 473, [golden], negative="<golden>", guidance=7.5)
    yield with_adapters("words-nameless", "a <grey> in a room", "ddim", 474, [nameless])
    yield with_adapters("words-and-lora", "a <golden> and a <grey> in the snow", "euler", 475, [golden, used("peft", 0.6, 0.4), nameless])
    yield from samples()


def samples():
    """The samples of `adapters/`, as people use them."""
    more = dict(width=128, height=128, steps=12, guidance=4.5)
    yield with_adapters("sample-zorp", "a zorp monster in a forest", "ddim", 480, [used("zorp")], **more)
    yield with_adapters("sample-zorp-less", "a zorp monster at night", "euler", 481, [used("zorp", 0.6, 0.8)], **more)
    yield with_adapters("sample-blueprint", "a blueprint drawing of a cat", "ddim", 482, [used("blueprint")], **more)
    yield with_adapters("sample-blueprint-opposite", "a house in the snow", "euler", 483, [used("blueprint", -0.7, -0.7)], **more)
    yield with_adapters("sample-word", "a <zorp> monster on the beach", "ddim", 484, [used("zorp-word")], **more)
    yield with_adapters("sample-both", "a blueprint drawing of a zorp monster", "dpmpp_2m", 485,
                        [used("blueprint", 0.9, 0.9), used("zorp", 0.6, 0.6)], **more)


# Painting


class AdapterPainter(Painter):
    """A pipeline of its own for each case: what one loads the next must not see."""

    def load(self, adapters, scale):
        names, strengths = [], []
        for i, adapter in enumerate(adapters):
            file = ROOT / adapter["file"]
            if not any("lora" in key for key in load_file(file)):
                self.text.load_textual_inversion(file, token=adapter["word"])
                continue
            names.append(f"a{i}")
            with without_text_model():
                self.text.load_lora_weights(file, adapter_name=names[-1])
            strengths.append({p: adapter[p] / (scale or 1) for p in ("unet", "text_encoder")})
        if not names:
            return
        self.text.set_adapters(names, [dict(s) for s in strengths])
        for name, adapter, strength in zip(names, (a for i, a in enumerate(adapters) if f"a{i}" in names), strengths):
            self.verify(name, adapter, strength)

    def verify(self, name, adapter, strength):
        """What diffusers has made of a file: all of it, at the strength asked for, and in f32."""
        layers = 0
        for part in ("unet", "text_encoder"):
            for path, layer in getattr(self.text, part).named_modules():
                if name not in getattr(layer, "lora_A", {}):
                    continue
                layers += 1
                assert name in layer.active_adapters and not layer.disable_adapters, path
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                assert a.dtype == b.dtype == torch.float32, (path, a.dtype)
                if adapter["file"].startswith("tests/golden/"):
                    norm = (b.flatten(1) @ a.flatten(1)).norm() * layer.scaling[name]
                    share = norm / layer.get_base_layer().weight.norm()
                    wanted = SHARE * strength[part]
                    assert abs(share - wanted) <= 0.01 * abs(wanted), f"{name}: {path}: {share}, not {wanted}"
        ends = ("lora_A.weight", "lora_down.weight", ".down.weight")
        assert layers == sum(key.endswith(ends) for key in load_file(ROOT / adapter["file"])), f"{adapter}: {layers} layers"


@contextlib.contextmanager
def without_text_model():
    """For loading: by this level, which pictures.py puts back, diffusers tells how the text encoder's keys begin."""
    level = transformers.CLIPTextModel.__dict__.get("text_model")
    if level is not None:
        del transformers.CLIPTextModel.text_model
    try:
        yield
    finally:
        if level is not None:
            transformers.CLIPTextModel.text_model = level


def paint(model, c):
    painter = AdapterPainter(model, ROOT)
    painter.load(c["adapters"], c["scale"])
    return painter.paint(c, cross_attention_kwargs={"scale": c["scale"]} if c["scale"] else None)[0]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", type=Path, default=ROOT / "models" / "demo")
    p.add_argument("--only", help="paint the cases whose name contains this; index.json stays as it is")
    p.add_argument("--check", action="store_true", help="compare with the pictures there, write nothing")
    p.add_argument("--sheet", type=Path, help="also write all pictures into one, the base's to the left of each")
    args = p.parse_args()
    torch.set_num_threads(2)
    OUT.mkdir(parents=True, exist_ok=True)
    if not args.check and not args.only:
        write_peft_files(args.model)
        write_kohya_files(args.model)
        write_old_files(args.model)
        write_words(args.model)
    cases, made, worst, weak = list(all_cases()), [], 0, []
    base = Painter(args.model, ROOT)
    for c in cases:
        if args.only and args.only not in c["name"]:
            continue
        start = time.time()
        pictures = paint(args.model, c)
        plain = base.paint(c)[0]
        apart = min(np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean() for a, b in zip(pictures, plain))
        if apart < LEAST:
            weak.append((c["name"], apart))
        for file, picture, without in zip(c["files"], pictures, plain, strict=True):
            made += [without, picture]
            if args.check:
                a, b = (np.asarray(i.convert("RGB")).astype(int) for i in (picture, Image.open(OUT / file)))
                worst = max(worst, np.abs(a - b).max())
                print(f"{file}: differs by {np.abs(a - b).max()} at most, {np.abs(a - b).mean():.4f} on average")
            else:
                picture.save(OUT / file, optimize=True)
        print(f"{c['name']}: {time.time() - start:.1f} s, {apart:.1f} of 255 from the base", flush=True)
    if args.sheet:
        sheet = Image.new("RGB", (12 * 132 + 4, -(-len(made) // 12) * 132 + 4), "white")
        for i, picture in enumerate(made):
            sheet.paste(picture, (4 + i % 12 * 132, 4 + i // 12 * 132))
        sheet.save(args.sheet)
    assert not weak, f"too near the base: {weak}"
    if not args.check and not args.only:
        files = sorted({a["file"] for c in cases for a in c["adapters"]})
        wanted = {f for c in cases for f in c["files"]} | {Path(f).name for f in files} | {"index.json"}
        for old in OUT.iterdir():
            if old.name not in wanted:
                old.unlink()
        hashes = {f: sha256(ROOT / f) for f in files}
        weights = {str(f.relative_to(args.model)): sha256(f) for f in sorted(args.model.glob("*/*.safetensors"))}
        about = dict(made_by="tests/reference/adapter_pictures.py", torch=torch.__version__, diffusers=diffusers.__version__,
                     transformers=transformers.__version__, peft=peft.__version__, model_sha256=weights, adapter_sha256=hashes)
        (OUT / "index.json").write_text(json.dumps(dict(about=about, cases=cases), indent=1, ensure_ascii=False) + "\n")
    if args.check:
        print(f"largest difference: {worst} of 255")
        sys.exit(worst > 1)


if __name__ == "__main__":
    main()
