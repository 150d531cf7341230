"""Paints with an adapter file in diffusers and in lorikeet, and compares: does what we trained mean the same over there?

    cargo build --release
    python tests/reference/trained_adapters.py FILE                           # a LoRA of UNet, text encoder or both
    python tests/reference/trained_adapters.py FILE --embedding WORD_FILE     # pivotal tuning: a LoRA and a word
    python tests/reference/trained_adapters.py WORD_FILE --prompt "a <zorp> monster in a forest"
    python tests/reference/trained_adapters.py FILE --picture PNG             # which lorikeet has painted elsewhere

Exit status 0: every layer in the file was loaded by diffusers (and found by us: a file that does not fit is an error of
`lorikeet generate`), 99 % of the values are within 1 of 255, and the adapter changed the picture at all.
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
WITHIN, SHARE = 1, 0.99
# Mean difference from the base's picture, in 255ths, below which an adapter might as well have been left out.
LEAST = 1.0
# The end of the first factor's name, one for each layer, in the dialects that diffusers loads.
FACTORS = ("lora_A.weight", "lora_down.weight", ".lora.down.weight", "lora_linear_layer.down.weight")


def pipeline(model):
    pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(pipe, files):
    """Everything that is in the files, or it is an error."""
    for i, file in enumerate(files):
        keys = list(load_file(file))
        layers = sum(key.endswith(FACTORS) for key in keys)
        if not layers:
            pipe.load_textual_inversion(file)
            assert all(key in pipe.tokenizer.get_vocab() for key in keys), f"{file}: of {keys} not all are words now"
            print(f"{file.name}: {', '.join(keys)}")
            continue
        name = f"a{i}"
        pipe.load_lora_weights(file, adapter_name=name)
        loaded = {}
        for part in ("unet", "text_encoder"):
            module = getattr(pipe, part)
            module.float()              # an fp16 file brings its factors in fp16
            loaded[part] = sum(name in getattr(m, "lora_A", {}) for m in module.modules())
        assert sum(loaded.values()) == layers, f"{file}: {loaded} of {layers} layers were loaded"
        magnitudes = sum("lora_magnitude_vector" in key for key in keys)
        there = sum(name in getattr(m, "lora_magnitude_vector", {}) for p in loaded for m in getattr(pipe, p).modules())
        assert there == magnitudes, f"{file}: {there} of {magnitudes} magnitudes were loaded"
        print(f"{file.name}: layers {loaded}, magnitudes {there}")
    loras = [f"a{i}" for i, file in enumerate(files) if any(key.endswith(FACTORS) for key in load_file(file))]
    if loras:
        pipe.set_adapters(loras)


def paint(pipe, args):
    return pipe(args.prompt, num_inference_steps=args.steps, guidance_scale=args.guidance, height=args.side, width=args.side,
                generator=torch.Generator("cpu").manual_seed(args.seed)).images[0]


def ours(args, files):
    """What `lorikeet generate` paints with the files, laid into a folder of adapters."""
    if args.picture:
        return Image.open(args.picture)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "adapters").mkdir()
        command = [args.binary.resolve(), "generate", args.prompt, "--model", args.model.resolve(), "--seed", args.seed,
                   "--steps", args.steps, "--guidance", args.guidance, "--scheduler", "ddim", "--size", f"{args.side}x{args.side}",
                   "--adapters", folder / "adapters", "-o", folder / "out.png"]
        for i, file in enumerate(files):
            shutil.copy(file, folder / "adapters" / f"a{i}.safetensors")
            command += ["--adapter", f"a{i}"]
        done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"lorikeet generate ended with {done.returncode}: {done.stderr.strip()}")
        return Image.open(folder / "out.png").convert("RGB")


def differences(a, b):
    return np.abs(np.asarray(a.convert("RGB")).astype(int) - np.asarray(b.convert("RGB")).astype(int))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("adapter", type=Path)
    p.add_argument("--embedding", type=Path, help="a file with the word that belongs to it")
    p.add_argument("--prompt", default="a zorp monster in a forest")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--guidance", type=float, default=4.5)
    p.add_argument("--side", type=int, default=128)
    p.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    p.add_argument("--binary", type=Path, default=ROOT / "target" / "release" / "lorikeet")
    p.add_argument("--picture", type=Path, help="lorikeet's picture for these settings; else it is painted now")
    p.add_argument("--keep", type=Path, help="write the three pictures into one: base, diffusers, lorikeet")
    args = p.parse_args()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    files = [f for f in (args.adapter, args.embedding) if f]
    base, pipe = paint(pipeline(args.model), args), pipeline(args.model)
    load(pipe, files)
    theirs, mine = paint(pipe, args), ours(args, files)
    if args.keep:
        sheet = Image.new("RGB", (3 * args.side, args.side))
        for i, picture in enumerate((base, theirs, mine)):
            sheet.paste(picture, (i * args.side, 0))
        sheet.save(args.keep)
    changed, apart = differences(base, theirs).mean(), differences(theirs, mine)
    near = (apart <= WITHIN).mean()
    print(f"{changed:.1f} of 255 from the base; diffusers and lorikeet: {100 * near:.2f} % within {WITHIN}, {apart.max()} at most")
    sys.exit(bool(near < SHARE or changed < LEAST))


if __name__ == "__main__":
    main()
