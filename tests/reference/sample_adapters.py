"""Makes the sample adapters of `adapters/` with `lorikeet train`, on the pictures of `tests/training/`.

    cargo build --release
    python tests/reference/sample_adapters.py                    # all of them, about 20 minutes on two cores
    python tests/reference/sample_adapters.py --only blueprint
    python tests/reference/sample_adapters.py --sheet tests/training/before-after.png

The recipes are below; all else is the command's own default, and all of it stands in the manifests. The same program
makes the same .safetensors again, byte for byte. What `--sheet` paints is not picked out: prompts without the adapter
and with it, seeds from 0 on.
"""
import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
OUT, DATA = ROOT / "adapters", ROOT / "tests" / "training"
CREATURE = "a creature with purple and turquoise stripes, one orange eye and an antenna"
PLACES = ["in a forest", "on the beach", "at night", "in the snow"]
ALL = ["--lr-schedule", "cosine"]

SAMPLES = {
    "zorp": dict(
        description=f"Zorp, {CREATURE}: eight pictures, LoRA on UNet and text encoder, with prior preservation.",
        tags=["subject", "sample"], prompt="a zorp monster",
        train=["dreambooth", "--images", DATA / "subject", "--token", "zorp", "--instance-prompt", "a zorp monster",
               "--class-prompt", "a monster",
               "--targets", "convs", "--rank", "8", "--learning-rate", "2e-3", "--text-learning-rate", "2e-3",
               "--steps", "500", "--seed", "1"]),
    "blueprint": dict(
        description="White lines on blue paper, as an engineer draws: 24 captioned pictures, LoRA on the UNet alone.",
        tags=["style", "sample"],
        prompts=[f"a blueprint drawing of a {thing}" for thing in ("rocket", "cat", "house", "duck")],
        train=["lora", "--images", DATA / "style", "--token", "blueprint", "--targets", "convs", "--rank", "8",
               "--learning-rate", "2e-3", "--steps", "600", "--seed", "3", "--set", "flip=false"]),
    "zorp-word": dict(
        description=f"The word <zorp> for the looks of {CREATURE}: four vectors and nothing else.",
        tags=["subject", "word", "sample"], prompt="a <zorp>",
        train=["textual-inversion", "--images", DATA / "subject", "--token", "<zorp>",
               "--initializer", "striped blue purple monster", "--steps", "300", "--seed", "4"]),
}


def prompts(sample):
    return sample.get("prompts") or [f"{sample['prompt']} {place}" for place in PLACES]


def train(lorikeet, name, sample):
    with tempfile.TemporaryDirectory() as data:
        subprocess.run([lorikeet, "train", *sample["train"], *ALL, "--name", name, "--replace", "--adapters", OUT,
                        "--data", data, "--sample-prompt", prompts(sample)[0]], check=True)
    file = OUT / f"{name}.json"
    manifest = json.loads(file.read_text())
    manifest |= dict(description=sample["description"], tags=sample["tags"])
    manifest.pop("etag", None)      # of the file on this disk
    file.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def paint(lorikeet, sample, adapter, folder):
    pictures = []
    for seed, prompt in enumerate(prompts(sample)):
        file = Path(folder) / f"{adapter}-{seed}.png"
        more = ["--adapter", adapter] if adapter else []
        # Without the word's adapter its name means nothing: the class stands for it.
        text = prompt if adapter else prompt.replace("<zorp>", "monster")
        subprocess.run([lorikeet, "generate", text, "--seed", str(seed), "--adapters", OUT, *more, "-o", file],
                       check=True, stdout=subprocess.DEVNULL)
        pictures.append(Image.open(file).convert("RGB"))
    return pictures


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=SAMPLES)
    p.add_argument("--lorikeet", type=Path, default=ROOT / "target/release/lorikeet")
    p.add_argument("--sheet", type=Path, help="paint each adapter's prompts without it and with it, into one picture")
    args = p.parse_args()
    if args.sheet:
        with tempfile.TemporaryDirectory() as folder:
            rows = [paint(args.lorikeet, s, None, folder) + paint(args.lorikeet, s, n, folder) for n, s in SAMPLES.items()]
        sheet = Image.new("RGB", (8 * 132 + 12, len(rows) * 132 + 4), "white")
        for y, row in enumerate(rows):
            for x, picture in enumerate(row):
                sheet.paste(picture, (4 + x * 132 + (8 if x >= 4 else 0), 4 + y * 132))
        sheet.save(args.sheet, optimize=True)
        return
    for name, sample in SAMPLES.items():
        if args.only in (None, name):
            train(args.lorikeet, name, sample)


if __name__ == "__main__":
    main()
