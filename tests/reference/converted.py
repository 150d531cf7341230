"""Loads in diffusers what `lorikeet adapter convert --to peft` writes, and compares what it does to the weights.

    python tests/reference/converted.py target/release/lorikeet

Every file of tests/golden/adapters that PEFT's form can hold is converted; one that it cannot hold must be refused in words.
diffusers loads it with `load_lora_weights` and merges it, in f64; W' - W must equal what the tool that wrote the original
does, which stands in expected.safetensors, and nothing else may have changed. Words go into a file of their own, which is not
looked at. Writes nothing; exit status 0 means all are equal.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
# f32 keeps the factors' product to a millionth of it; the scale is folded into one factor before that.
TOLERANCE = 2e-6


def weights(pipe):
    out = {}
    for part in ("unet", "text_encoder"):
        for path, value in getattr(pipe, part).state_dict().items():
            if part == "text_encoder":
                path = "text_model." + path.removeprefix("text_model.")
            out[f"{part}.{path.replace('.base_layer', '')}"] = value.double().clone()
    return {key: value for key, value in out.items() if ".lora_" not in key}


def load(model):
    variant = "fp16" if model == "three-levels" else None
    pipe = StableDiffusionPipeline.from_pretrained(GOLDEN / "models" / model, safety_checker=None, local_files_only=True, vae=None,
                                                   variant=variant, dtype=torch.float64)
    return pipe


def main():
    lorikeet = sys.argv[1]
    expected = load_file(GOLDEN / "adapters/expected.safetensors")
    failed = []
    for case in json.loads((GOLDEN / "adapters/index.json").read_text())["cases"]:
        name, model = case["name"], case["model"]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "converted.safetensors"
            tokens = [part for token in case["tokens"] for part in ("--token", token)]
            ran = subprocess.run([lorikeet, "adapter", "convert", GOLDEN / f"adapters/{name}.safetensors", "--to", "peft", "-o", file,
                                  "--drop-unmatched", "--model", GOLDEN / "models" / model, *tokens], capture_output=True, text=True)
            if ran.returncode:
                print(f"{name:26} refused: {ran.stderr.strip().splitlines()[-1]}")
                continue
            # Words alone stay words in diffusers' own form.
            if not any(".lora_A." in key for key in load_file(file)):
                print(f"{name:26} words alone")
                continue
            pipe = load(model)
            before = weights(pipe)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    pipe.load_lora_weights(folder, weight_name=file.name)
                except ValueError as error:
                    # diffusers tells a text encoder's keys by those of attention, and knows no file without any.
                    text = [key for key in load_file(file) if key.startswith("text_encoder.")]
                    assert text and not any("_proj." in key for key in text) and "infer state dict type" in str(error), error
                    print(f"{name:26} diffusers loads no text encoder's adapter without attention")
                    continue
                for part in ("unet", "text_encoder"):
                    for layer in getattr(pipe, part).modules():
                        if hasattr(layer, "lora_A"):
                            layer.double().merge()
            after = weights(pipe)
        assert after.keys() == before.keys(), name
        changed = {key.removesuffix(".weight"): after[key] - before[key] for key in before if not torch.equal(after[key], before[key])}
        wanted = {key.removeprefix(f"{name}/"): value.double() for key, value in expected.items()
                  if key.startswith(f"{name}/") and not key.endswith("+token")}
        words = [str(warning.message) for warning in said if "match" in str(warning.message)]
        if changed.keys() != wanted.keys() or words:
            failed.append(name)
            print(f"{name:26} other sites: {sorted(changed.keys() ^ wanted.keys())[:4]} {words}")
            continue
        worst = max(((changed[key] - wanted[key]).norm() / wanted[key].norm()).item() for key in wanted)
        if worst > TOLERANCE:
            failed.append(name)
        print(f"{name:26} {len(wanted):3} sites, relative error {worst:.1e}")
    if failed:
        sys.exit(f"not the same in diffusers: {', '.join(failed)}")


main()
