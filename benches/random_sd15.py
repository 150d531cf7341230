"""Writes a Stable Diffusion 1.5 with random weights, in diffusers layout, to measure speed and memory with.

    python benches/random_sd15.py OUT_DIR                 # fp16 files, 2.1 GB
    python benches/random_sd15.py OUT_DIR --dtype f32     # 4.3 GB

Every shape and config is SD 1.5's; it paints nothing. The tokenizer is that of models/demo (919 tokens, which are valid
numbers in the text encoder's vocabulary of 49,408 too), as SD 1.5's own is not ours to pass on and plays no part in speed.
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]


def unet():
    return UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, center_input_sample=False, flip_sin_to_cos=True, freq_shift=0,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2, attention_head_dim=8, cross_attention_dim=768, norm_num_groups=32, norm_eps=1e-5, act_fn="silu")


def vae():
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=32,
        sample_size=512, scaling_factor=0.18215, act_fn="silu")


def text_encoder():
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=768,
        bos_token_id=49406, eos_token_id=49407, pad_token_id=1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--dtype", choices=("fp16", "f32"), default="fp16")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.manual_seed(args.seed)
    dtype = {"fp16": torch.float16, "f32": torch.float32}[args.dtype]
    for name, make in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        make().eval().to(dtype).save_pretrained(args.out / name, safe_serialization=True)
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                  set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1).save_pretrained(args.out / "scheduler")
    shutil.copytree(ROOT / "models" / "demo" / "tokenizer", args.out / "tokenizer", dirs_exist_ok=True)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0", "feature_extractor": [None, None],
             "image_encoder": [None, None], "requires_safety_checker": False, "safety_checker": [None, None],
             "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"]}
    (args.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (args.out / "README.md").write_text("Random weights in SD 1.5's shapes, from benches/random_sd15.py. The tokenizer is "
                                        "that of models/demo.\n")
    total = sum(f.stat().st_size for f in args.out.rglob("*.safetensors"))
    print(f"{args.out}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
