"""Paints whole pictures with diffusers, for our own pipeline to be compared with.

    python tests/reference/pictures.py                    # models/demo -> tests/golden/pictures
    python tests/reference/pictures.py --check            # paint again, compare, write nothing
    python tests/reference/pictures.py --only euler       # cases whose name contains "euler"

Everything is f32 on the CPU, from the model's fp16 weights. Every case is one request's worth of settings; `index.json`
lists them all with the pictures they gave. Picture i of a case is drawn from
`torch.Generator("cpu").manual_seed(seed + i)`. README.md beside this file says what is in which file.
"""
import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: spinning threads crawl on a machine at work
import diffusers
import numpy as np
import torch
import transformers
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler,
                       EulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, StableDiffusionImg2ImgPipeline,
                       StableDiffusionInpaintPipeline, StableDiffusionPipeline, UniPCMultistepScheduler)
from PIL import Image, ImageDraw
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
if not hasattr(transformers.CLIPTextModel, "text_model"):
    # transformers 5 took this level away; diffusers' clip_skip still reaches through it to the final layer norm.
    transformers.CLIPTextModel.text_model = property(lambda self: self)

# Our names, and what they are in diffusers: a class, and what it overrides in the model's scheduler_config.json.
SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, dict(algorithm_type="dpmsolver++")),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, dict(algorithm_type="dpmsolver++", use_karras_sigmas=True)),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++")),
    "dpmpp_2m_sde_karras": (DPMSolverMultistepScheduler, dict(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}
INPUTS = {"square": "input-square.png", "wide": "input-wide.png", "mask": "mask-square.png", "wide mask": "mask-wide.png"}
INNER = ("ddim", "euler_a-three", "inpaint-dpmpp_2m")    # cases whose latents and text embeddings are kept too


def case(name, prompt, scheduler, seed, *, negative="", width=128, height=128, steps=16, guidance=5.0, n=1, clip_skip=0,
         source=None, mask=None, strength=None):
    files = [f"{name}.png"] if n == 1 else [f"{name}-{i}.png" for i in range(n)]
    return dict(name=name, files=files, prompt=prompt, negative_prompt=negative, width=width, height=height, steps=steps,
                guidance_scale=guidance, seed=seed, n=n, scheduler=scheduler, clip_skip=clip_skip, strength=strength,
                input=INPUTS[source] if source else None, mask=INPUTS[mask] if mask else None,
                tensors=f"{name}.safetensors" if name in INNER else None)


def all_cases():
    """One picture for each scheduler, then what else a request can ask for."""
    yield case("ddim", "a red mushroom in a meadow", "ddim", 11, steps=20)
    yield case("ddpm", "a pink house in the snow", "ddpm", 12, steps=20)
    yield case("euler", "a white boat on the beach on the left", "euler", 13)
    yield case("euler_a", "a blue car in a city", "euler_a", 14, negative="a yellow car at night")
    yield case("heun", "a red heart on a white background", "heun", 15, steps=12)
    yield case("dpmpp_2m", "a pink flower on a yellow background", "dpmpp_2m", 16)
    yield case("dpmpp_2m_karras", "a small blue balloon on the right in the snow", "dpmpp_2m_karras", 17, steps=12)
    yield case("dpmpp_2m_sde", "a cute blue monster on the beach", "dpmpp_2m_sde", 18)
    yield case("dpmpp_2m_sde_karras", "a striped orange butterfly in a meadow", "dpmpp_2m_sde_karras", 19, negative="dotted")
    yield case("unipc", "a polka dot green mushroom in the forest", "unipc", 20, steps=12)
    yield case("lcm", "a large purple balloon at sunset", "lcm", 21, steps=12)

    yield case("ddim-tall", "a green tree in a meadow", "ddim", 31, width=96, height=160, negative="a house in a city")
    yield case("dpmpp_2m-wide", "a striped blue fish under the sea", "dpmpp_2m", 32, width=160, height=96, steps=20)
    yield case("euler_a-tall", "a purple monster in a forest", "euler_a", 33, width=96, height=160, steps=20)
    yield case("ddim-large", "a yellow duck on the beach", "ddim", 34, width=192, height=192, steps=12)
    yield case("euler-small", "a pink house in the snow", "euler", 36, width=64, height=96, steps=25)
    yield case("dpmpp_2m_sde-wide", "a brown cup in a room", "dpmpp_2m_sde", 35, width=160, height=96, steps=20)

    yield case("ddim-three", "a grey robot on a pink background", "ddim", 41, n=3, steps=12)
    yield case("euler_a-three", "a black cat in a room", "euler_a", 42, n=3, steps=12)
    yield case("ddim-no-guidance", "a red umbrella in a city", "ddim", 51, guidance=1.0, negative="not read without guidance")
    yield case("euler-no-guidance", "a red umbrella in a city", "euler", 52, guidance=0.5)
    yield case("ddim-clip-skip", "a red mushroom in a meadow", "ddim", 11, steps=20, clip_skip=1)
    yield case("dpmpp_2m-clip-skip-two", "a white cat at night", "dpmpp_2m", 53, clip_skip=2, negative="a blue fish")
    yield case("ddim-empty-prompt", "", "ddim", 54, steps=12)
    yield case("ddim-words-unknown", "Ein Pilz, naïve; 赤い 🍄 MUSHROOM it's", "ddim", 55, steps=12)
    yield case("ddim-one-step", "a yellow star on a blue background", "ddim", 57, steps=1)
    yield case("euler-four-steps", "an orange rocket at night", "euler", 58, steps=4)
    yield case("ddim-fifty-steps", "an orange rocket at night", "ddim", 59, steps=50)
    yield case("euler-seed-above-32-bits", "a yellow star on a blue background", "euler", 2**40 + 2**32 + 7, steps=12)

    monster = "a purple monster in a forest"
    for i, scheduler in enumerate(SCHEDULERS):
        yield case(f"img2img-{scheduler}", monster, scheduler, 200 + i, steps=16, source="square", strength=0.75)
    for i, scheduler in enumerate(("ddim", "euler", "euler_a", "dpmpp_2m", "heun", "unipc", "lcm")):
        yield case(f"img2img-{scheduler}-little", monster, scheduler, 220 + i, steps=20, source="square", strength=0.3)
        yield case(f"img2img-{scheduler}-full", monster, scheduler, 230 + i, steps=12, source="square", strength=1.0)
    yield case("img2img-euler-wide", monster, "euler", 240, steps=16, source="wide", strength=0.45, width=160, height=96,
               negative="at night")
    yield case("img2img-ddim-three", monster, "ddim", 241, steps=12, source="square", strength=0.7, n=3)

    # One picture each: with several, diffusers encodes the input once, from the first generator alone, so that its second
    # picture is not the one that seed + 1 gives by itself; ours is.
    duck = "a yellow duck on the beach"
    for i, scheduler in enumerate(("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "heun", "unipc", "lcm")):
        yield case(f"inpaint-{scheduler}", duck, scheduler, 300 + i, steps=16, source="square", mask="mask", strength=0.6)
        yield case(f"inpaint-{scheduler}-full", duck, scheduler, 320 + i, steps=12, source="square", mask="mask", strength=1.0)
    yield case("inpaint-ddim-wide", duck, "ddim", 340, steps=16, source="wide", mask="wide mask", strength=0.8, width=160,
               height=96, negative="at night")
    yield case("inpaint-ddim-no-guidance", duck, "ddim", 341, steps=12, source="square", mask="mask", strength=0.75,
               guidance=1.0)


def make_inputs(folder, subject):
    """The pictures and masks to start from; made once, from two of the DreamBooth subject's, then kept."""
    if all((folder / f).exists() for f in INPUTS.values()):
        return
    if not subject:
        sys.exit(f"{folder} lacks the input pictures: pass --subject FOLDER (128 px pictures, and 256/ with large ones)")
    Image.open(subject / "03.png").convert("RGB").save(folder / INPUTS["square"], optimize=True)
    Image.open(subject / "256" / "02.png").convert("RGB").resize((160, 160), Image.LANCZOS).crop((0, 50, 160, 146)).save(
        folder / INPUTS["wide"], optimize=True)
    for key, size, shape in (("mask", (128, 128), (50, 29, 121, 118)), ("wide mask", (160, 96), (67, 5, 155, 83))):
        mask = Image.new("L", size, 0)                  # its edge lies across the latents' 8 x 8 blocks
        ImageDraw.Draw(mask).ellipse(shape, fill=255)
        mask.save(folder / INPUTS[key], optimize=True)


class Painter:
    def __init__(self, model, folder):
        self.folder = folder
        self.text = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None,
                                                            local_files_only=True)
        self.config = self.text.scheduler.config
        self.image = StableDiffusionImg2ImgPipeline(**self.text.components, requires_safety_checker=False)
        self.inpaint = StableDiffusionInpaintPipeline(**self.text.components, requires_safety_checker=False)
        for pipe in (self.text, self.image, self.inpaint):
            pipe.set_progress_bar_config(disable=True)

    def paint(self, c, **more):
        """The case's pictures, and on the way: the noise-free latents they were decoded from, and the embeddings."""
        pipe, extra = self.text, dict(width=c["width"], height=c["height"])
        if c["input"]:
            source = Image.open(self.folder / c["input"]).convert("RGB")
            assert source.size == (c["width"], c["height"]), c["name"]      # so that diffusers resizes nothing
            pipe, extra = self.image, dict(image=source, strength=c["strength"])
        if c["mask"]:
            mask = Image.open(self.folder / c["mask"])
            assert mask.size == source.size, c["name"]
            pipe = self.inpaint
            extra |= dict(mask_image=mask, width=c["width"], height=c["height"])
        cls, overrides = SCHEDULERS[c["scheduler"]]
        pipe.scheduler = cls.from_config(self.config, **overrides)
        tensors = {}

        def look(pipe, i, t, values):
            tensors.setdefault("first_latents", values["latents"].clone())
            tensors["final_latents"] = values["latents"].clone()
            return {}

        images = pipe(c["prompt"], negative_prompt=c["negative_prompt"], num_inference_steps=c["steps"],
                      guidance_scale=c["guidance_scale"], num_images_per_prompt=c["n"], clip_skip=c["clip_skip"] or None,
                      generator=[torch.Generator("cpu").manual_seed(c["seed"] + i) for i in range(c["n"])],
                      callback_on_step_end=look, **extra, **more).images
        positive, negative = pipe.encode_prompt(c["prompt"], "cpu", 1, c["guidance_scale"] > 1, c["negative_prompt"],
                                                clip_skip=c["clip_skip"] or None)
        tensors["prompt_embeds"] = positive
        if negative is not None:
            tensors["negative_prompt_embeds"] = negative
        return images, {k: v.detach().contiguous() for k, v in tensors.items()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", type=Path, default=ROOT / "models" / "demo")
    p.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "pictures")
    p.add_argument("--subject", type=Path, help="folder of subject pictures, needed only while the input pictures are not there")
    p.add_argument("--only", help="paint the cases whose name contains this; index.json stays as it is")
    p.add_argument("--check", action="store_true", help="compare with the pictures there, write nothing")
    p.add_argument("--sheet", type=Path, help="also write all pictures into one")
    args = p.parse_args()
    torch.set_num_threads(2)
    args.out.mkdir(parents=True, exist_ok=True)
    make_inputs(args.out, args.subject)
    painter, cases, made, worst = Painter(args.model, args.out), list(all_cases()), [], 0
    assert len({f for c in cases for f in c["files"]}) == sum(len(c["files"]) for c in cases)
    for c in cases:
        if args.only and args.only not in c["name"]:
            continue
        start = time.time()
        pictures, tensors = painter.paint(c)
        for file, picture in zip(c["files"], pictures, strict=True):
            assert picture.size == (c["width"], c["height"]), c["name"]
            made.append(picture)
            if args.check:
                a, b = (np.asarray(i.convert("RGB")).astype(int) for i in (picture, Image.open(args.out / file)))
                worst = max(worst, np.abs(a - b).max())
                print(f"{file}: differs by {np.abs(a - b).max()} at most, {np.abs(a - b).mean():.4f} on average")
            else:
                picture.save(args.out / file, optimize=True)
        if c["tensors"] and not args.check:
            save_file(tensors, args.out / c["tensors"])
        print(f"{c['name']}: {time.time() - start:.1f} s", flush=True)
    if not args.check and not args.only:
        wanted = {f for c in cases for f in [*c["files"], c["tensors"]]} | {*INPUTS.values(), "index.json"}
        for old in args.out.iterdir():
            if old.name not in wanted:
                old.unlink()
        weights = {str(f.relative_to(args.model)): sha256(f) for f in sorted(args.model.glob("*/*.safetensors"))}
        about = dict(made_by="tests/reference/pictures.py", torch=torch.__version__, diffusers=diffusers.__version__,
                     transformers=transformers.__version__, model_sha256=weights)
        (args.out / "index.json").write_text(json.dumps(dict(about=about, cases=cases), indent=1, ensure_ascii=False) + "\n")
    if args.sheet:
        sheet = Image.new("RGB", (8 * 196 + 4, -(-len(made) // 8) * 196 + 4), "white")
        for i, picture in enumerate(made):
            sheet.paste(picture, (4 + i % 8 * 196, 4 + i // 8 * 196))
        sheet.save(args.sheet)
    if args.check:
        print(f"largest difference: {worst} of 255")
        sys.exit(worst > 1)


if __name__ == "__main__":
    main()
