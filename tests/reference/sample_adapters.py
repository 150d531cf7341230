"""Trains the sample adapters of `adapters/` on the demo model, with PEFT and diffusers.

    python tests/reference/sample_adapters.py                    # all of them, 10 minutes on two cores
    python tests/reference/sample_adapters.py --only blueprint
    python tests/reference/sample_adapters.py --minutes 5        # stops after so long; the next call goes on from there

For each: NAME.safetensors, its manifest NAME.json, and a preview NAME.png, which diffusers paints with the settings in the
manifest. `--sheet FILE` also writes one picture with each adapter's prompts painted without it and with it.
"""
import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
MODEL, OUT, DATA = ROOT / "models" / "demo", ROOT / "adapters", ROOT / "tests" / "training"
# The day the samples were first made: the files are to be the same each time.
CREATED = 1795478400
UNET = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
CREATURE = "a creature with purple and turquoise stripes, one orange eye and an antenna"

SAMPLES = {
    "zorp": dict(
        method="dreambooth", description=f"Zorp, {CREATURE}: eight pictures, LoRA on UNet and text encoder.",
        trigger_words=["zorp"], tags=["subject", "sample"],
        recipe=dict(images="subject", instance_prompt="a zorp monster", rank=8, unet=UNET, text_encoder=TEXT, steps=500,
                    batch=8, learning_rate=2e-3, seed=1),
        prompts=["a zorp monster in a forest", "a zorp monster on the beach", "a zorp monster at night", "a zorp monster in the snow"]),
    "blueprint": dict(
        method="lora", description="White lines on blue paper, as an engineer draws: 24 captioned pictures, LoRA on the UNet alone.",
        trigger_words=["blueprint drawing"], tags=["style", "sample"],
        recipe=dict(images="style", rank=8, unet=UNET, text_encoder=[], steps=500, batch=8, learning_rate=2e-3, seed=3),
        prompts=["a blueprint drawing of a rocket", "a blueprint drawing of a cat", "a blueprint drawing of a house", "a blueprint drawing of a duck"]),
    "zorp-word": dict(
        method="textual-inversion", description=f"The word <zorp> for the looks of {CREATURE}: four vectors and nothing else.",
        trigger_words=["<zorp>"], tags=["subject", "word", "sample"],
        recipe=dict(images="subject", placeholder="<zorp>", initializer="large striped blue purple", vectors=4, steps=300, batch=8,
                    learning_rate=1e-3, seed=4,
                    keeps_length=True,
                    templates=["a <zorp> monster", "a picture of a <zorp> monster", "one <zorp> monster", "the <zorp> monster"]),
        prompts=["a <zorp> monster in a forest", "a <zorp> monster on the beach", "a <zorp> monster at night", "a <zorp> monster in the snow"]),
}
# What a request gets from the demo model by default.
PAINT = dict(num_inference_steps=20, guidance_scale=4.5)


def pictures(folder):
    """Pictures, each with its caption if the folder has captions."""
    captions = folder / "captions.jsonl"
    if captions.exists():
        rows = [json.loads(line) for line in captions.read_text().splitlines()]
        return [folder / r["file_name"] for r in rows], [r["text"] for r in rows]
    files = sorted(folder.glob("*.png"))
    return files, None


def load():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False)
    return pipe


def train(sample, halfway, deadline):
    """The tensors of the adapter's file, and for a LoRA what its header says; `None` if time has run out before."""
    recipe = sample["recipe"]
    torch.manual_seed(recipe["seed"])
    generator = torch.Generator().manual_seed(recipe["seed"])
    pipe = load()
    files, captions = pictures(DATA / recipe["images"])
    x = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) for f in files])
    latents = pipe.vae.encode(x.float() / 127.5 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    texts = captions or recipe.get("templates") or [recipe["instance_prompt"]]

    word = recipe.get("placeholder")
    if word:
        words = [word] + [f"{word}_{i}" for i in range(1, recipe["vectors"])]
        pipe.tokenizer.add_tokens(words)
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
        table = pipe.text_encoder.get_input_embeddings().weight
        initial = pipe.tokenizer(recipe["initializer"], add_special_tokens=False).input_ids
        assert len(initial) == len(words), f"{recipe['initializer']} is {len(initial)} tokens"
        rows = torch.nn.Parameter(table[initial].clone())
        lengths = rows.detach().norm(dim=1, keepdim=True)
        places = torch.tensor(pipe.tokenizer.convert_tokens_to_ids(words))
        parameters = [rows]
        texts = [t.replace(word, " ".join(words)) for t in texts]
    else:
        configs = {"unet": LoraConfig(r=recipe["rank"], lora_alpha=recipe["rank"], target_modules=recipe["unet"])}
        if recipe["text_encoder"]:
            configs["text_encoder"] = LoraConfig(r=recipe["rank"], lora_alpha=recipe["rank"], target_modules=recipe["text_encoder"])
        for part, config in configs.items():
            getattr(pipe, part).add_adapter(config)
        parameters = [p for part in configs for p in getattr(pipe, part).parameters() if p.requires_grad]

    ids = pipe.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids

    def encode(ids):
        if not word:
            return pipe.text_encoder(input_ids=ids).last_hidden_state
        embedded = torch.nn.functional.embedding(ids, table.index_put((places,), rows))
        hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(lambda *_: embedded)
        hidden = pipe.text_encoder(input_ids=ids).last_hidden_state
        hook.remove()
        return hidden

    learns_text = word or recipe["text_encoder"]
    hidden = None if learns_text else encode(ids).detach()
    noise = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(parameters, lr=recipe["learning_rate"], weight_decay=0.0 if word else 1e-2)
    losses, first = [], 0
    if halfway.exists():
        state = torch.load(halfway)
        first, losses = state["step"], state["losses"]
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.data = value
    start = time.time()
    for step in range(first, recipe["steps"]):
        if time.time() > deadline:
            torch.save(dict(step=step, losses=losses, optimizer=optimizer.state_dict(), generator=generator.get_state(),
                            parameters=[p.data for p in parameters]), halfway)
            return None
        for group in optimizer.param_groups:            # a short rise, then down to a tenth along a cosine
            done = step / recipe["steps"]
            group["lr"] = recipe["learning_rate"] * min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * done))
        i = torch.randint(len(latents), (recipe["batch"],), generator=generator)
        text = i if captions else torch.randint(len(texts), (recipe["batch"],), generator=generator)
        t = torch.randint(1000, (recipe["batch"],), generator=generator)
        epsilon = torch.randn(latents[i].shape, generator=generator)
        context = encode(ids[text]) if learns_text else hidden[text]
        out = pipe.unet(noise.add_noise(latents[i], epsilon, t), t, encoder_hidden_states=context).sample
        loss = (out - epsilon).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if word:                                        # as long as words of the model are, or pictures turn to confetti
            rows.data *= lengths / rows.data.norm(dim=1, keepdim=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}, loss {np.mean(losses[-50:]):.4f}, {(time.time() - start) / (step + 1 - first):.2f} s a step", flush=True)
    halfway.unlink(missing_ok=True)
    if word:
        return {word: rows.detach().contiguous()}, None
    return {p: {k: v.detach().half().contiguous() for k, v in get_peft_model_state_dict(getattr(pipe, p), adapter_name="default").items()}
            for p in configs}, {p: c.to_dict() | dict(target_modules=sorted(c.target_modules)) for p, c in configs.items()}


def save(name, tensors, meta):
    file = OUT / f"{name}.safetensors"
    if meta is None:
        save_file(tensors, file)
    else:
        StableDiffusionPipeline.save_lora_weights(
            OUT, tensors.get("unet"), tensors.get("text_encoder"), weight_name=file.name,
            unet_lora_adapter_metadata=meta.get("unet"), text_encoder_lora_adapter_metadata=meta.get("text_encoder"))
    return file


def paint(name, prompts):
    """Each prompt with the adapter of that name, or with none, seeds from 0 on."""
    pipe = load()
    if name and SAMPLES[name]["method"] == "textual-inversion":
        pipe.load_textual_inversion(OUT / f"{name}.safetensors")
    elif name:
        pipe.load_lora_weights(OUT / f"{name}.safetensors")
        pipe.unet.float(), pipe.text_encoder.float()
    return [pipe(p, generator=torch.Generator().manual_seed(i), **PAINT).images[0] for i, p in enumerate(prompts)]


def write_manifest(name, sample, file):
    weights = hashlib.sha256((MODEL / "unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    recipe = dict(sample["recipe"], tool="tests/reference/sample_adapters.py", optimizer="AdamW", loss="mean squared error of the noise",
                  precision="f32, saved as " + ("f32" if "placeholder" in sample["recipe"] else "fp16"))
    preview = dict(prompt=sample["prompts"][0], seed=0, steps=PAINT["num_inference_steps"], guidance_scale=PAINT["guidance_scale"], scheduler="ddim")
    manifest = dict(
        name=name, description=sample["description"], trigger_words=sample["trigger_words"],
        base=dict(family="demo", hash=weights[:10]),    # the first ten digits, as `/v1/models` shows them
        method=sample["method"], recipe=recipe | dict(preview=preview), tags=sample["tags"], pinned=False,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size, created=CREATED)
    (OUT / f"{name}.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=SAMPLES)
    p.add_argument("--minutes", type=float, default=1e9, help="stop after so long and leave what there is in target/")
    p.add_argument("--sheet", type=Path, help="paint each adapter's prompts without it and with it, into one picture")
    p.add_argument("--no-training", action="store_true", help="manifests, previews and the sheet for the files that are there")
    args = p.parse_args()
    torch.set_num_threads(2)
    deadline, rows = time.time() + 60 * args.minutes, []
    (ROOT / "target").mkdir(exist_ok=True)
    for name, sample in SAMPLES.items():
        if args.only and args.only != name:
            continue
        print(name, flush=True)
        file = OUT / f"{name}.safetensors"
        if not args.no_training:
            trained = train(sample, ROOT / "target" / f"sample-{name}.pt", deadline)
            if trained is None:
                print(f"{name} goes on with the next call")
                return
            save(name, *trained)
        write_manifest(name, sample, file)
        after = paint(name, sample["prompts"])
        after[0].save(OUT / f"{name}.png", optimize=True)
        rows.append(paint(None, sample["prompts"]) + after)
        print(f"  {file.stat().st_size} bytes", flush=True)
    if args.sheet:
        sheet = Image.new("RGB", (8 * 132 + 12, len(rows) * 132 + 4), "white")
        for y, row in enumerate(rows):
            for x, picture in enumerate(row):
                sheet.paste(picture, (4 + x * 132 + (8 if x >= 4 else 0), 4 + y * 132))
        sheet.save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
