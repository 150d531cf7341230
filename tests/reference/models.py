"""Golden files for the models: tiny random ones and the demo model, as diffusers computes them.

Writes tests/golden/models/. Each tiny model is a folder in diffusers' layout, with the weights in
another of the forms that real folders come in, and a `golden.safetensors` with inputs and outputs
(pictures channels-last). Needs torch, diffusers, transformers, tokenizers and safetensors:

    python tests/reference/models.py
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models/demo"
OUT = ROOT / "tests/golden/models"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "A Photo of a CAT",
    "  leading,   inner\t\ttabs\nand newlines  ",
    "don't, we'll, I'm, they've, you're, he'd, it's",
    "DON'T WE'LL",
    "'s alone 'tis rock'n'roll",
    "4k 8K 1920x1080 3.14159 ½ ² Ⅷ ٣",
    "masterpiece, best quality, (ultra-detailed:1.2), [blurry]",
    "café naïve Ångström São Paulo",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "İstanbul ẞ ß ﬁ ﬀ",
    "\u01c5 \u1e9e \u03a3\u03c2",
    "猫の写真、美しい",
    "漢字かな交じり文 한국어 텍스트",
    "한국어",
    "Привет, мир!",
    "مرحبا بالعالم",
    "שלום עולם",
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
    "😀😃😄 emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "a<|startoftext|>b",
    "<|startoftext|> a cat <|endoftext|>",
    "<|STARTOFTEXT|> <|EndOfText|>",
    "<|startoftext",
    "<lora:name:0.8>, trigger",
    "!!!???...---___***",
    "a!b?c.d-e_f*g",
    "Stop! now!! wow!",
    "$100 €50 £20 ¥10 50% #1 @home a&b c=d e+f",
    "non\u00a0breaking\u2003em\u3000ideographic",
    "zero\u200bwidth\u200djoiner\ufeffbom",
    "control\x00\x01\x1f chars\x7f",
    "soft\u00adhyphen and \u2028 line \u2029 separators",
    "\U0001d4d0\U0001d4d1\U0001d4d2 math \U00010348",
    "\ufffd\uffff\U0010ffff",
    "https://example.com/path?query=1&x=y#frag",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "word " * 200,
    "x" * 1000,
    "the of and " * 40 + "éè" * 60,
    "\"quoted\" 'single' ‘curly’ “double” `tick`",
    "tab\tcr\rcrlf\r\nff\x0cvt\x0bnel\x85",
]


def nhwc(x):
    return x.permute(0, 2, 3, 1).contiguous()


def randomise(module, generator):
    """Weights of a size that keeps activations near one, and norms and biases that matter."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("bias"):
            p.data = 0.1 * noise
        elif p.dim() == 1:
            p.data = 1.0 + 0.1 * noise
        elif "embedding.weight" in name and "time_" not in name:
            p.data = 0.5 * noise
        else:
            p.data = noise / (p[0].numel() ** 0.5)


def round_to(module, dtype):
    """What a file of that dtype can hold, still computed in f32."""
    for p in module.parameters():
        p.data = p.data.to(dtype).float()


def train_merges(count):
    """Byte-pair merges for CLIP's words of TEXTS. (The trainer of `tokenizers` breaks ties another way each time.)"""
    backend = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    pieces = Counter()
    for text in TEXTS:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            pieces[(*word[:-1], word[-1] + "</w>")] += 1
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, times in pieces.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += times
        merge = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(merge)
        merged = Counter()
        for word, times in pieces.items():
            out = []
            for symbol in word:
                if out and (out[-1], symbol) == merge:
                    out[-1] += symbol
                else:
                    out.append(symbol)
            merged[tuple(out)] += times
        pieces = merged
    return merges


def tiny_tokenizer(path, pad, files):
    """A byte-level BPE with a few merges, written in one of three forms.

    `plain`: the older two files, special tokens as strings. `sd2`: the same, but as Stable Diffusion 2 has them, with
    objects, and a pad token that tokenizer_config.json and special_tokens_map.json disagree about. `json`: tokenizer.json.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = train_merges(300)
    vocab = {}
    for token in alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges] + [BOS, EOS]:
        vocab.setdefault(token, len(vocab))
    path.mkdir(parents=True)
    if files == "json":
        CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77).save_pretrained(path)
        return CLIPTokenizer.from_pretrained(path), len(vocab)
    (path / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (path / "merges.txt").write_text("#version: 0.2\n" + lines)
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
    if files == "sd2":
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        special = {key: {"content": token} | flags for key, token in special.items()}
        config |= {key: {"__type": "AddedToken"} | token for key, token in special.items()} | {"pad_token": EOS}
        (path / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": pad}))
    else:
        config |= special | {"pad_token": pad}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(path), len(vocab)


def save_scheduler(path):
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        path / "scheduler"
    )


def save_index(path):
    parts = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1"} | parts
    (path / "model_index.json").write_text(json.dumps(index, indent=1))


def rename_keys(file, rename, reshape=lambda key, t: t):
    tensors = {rename(k): reshape(k, t).contiguous() for k, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def old_vae_names(file):
    """As files from before diffusers 0.14, with 1x1 convolutions for the attention's maps."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key):
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        return key

    def reshape(key, t):
        attention = ".attentions." in key and key.endswith("weight") and t.dim() == 2
        return t[:, :, None, None] if attention else t

    rename_keys(file, rename, reshape)


def formula(shape, period):
    """Numbers in -1..1 that the test can make again: no need to store large inputs."""
    h, w, c = shape
    y, x, k = torch.meshgrid(torch.arange(h), torch.arange(w), torch.arange(c), indexing="ij")
    return ((y * 7919 + x * 10473 + k * 12997) % period).float() / period * 2 - 1


@torch.no_grad()
def golden(text, unet, vae, ids, latent, lengths, timesteps, generator, tiled=None):
    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    out = {"text.ids": ids}
    hidden = text(ids, output_hidden_states=True)
    norm = text.text_model.final_layer_norm if hasattr(text, "text_model") else text.final_layer_norm
    assert torch.equal(norm(hidden.hidden_states[-1]), hidden.last_hidden_state)
    for skip in range(3):
        out[f"text.skip{skip}"] = norm(hidden.hidden_states[-1 - skip])

    h, w = latent
    width = unet.config.cross_attention_dim
    sample = randn(len(timesteps), unet.config.in_channels, h, w)
    rows = []
    for i, t in enumerate(timesteps):
        context = randn(1, lengths[i], width)
        out[f"unet.context{i}"] = context[0].clone()
        row = unet(sample[i : i + 1], torch.tensor(t), encoder_hidden_states=context)
        rows.append(row.sample)
    out["unet.timesteps"] = torch.tensor(timesteps)
    out["unet.sample"] = nhwc(sample)
    out["unet.out"] = nhwc(torch.cat(rows))

    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    x = randn(2, 3, 4 * factor, 6 * factor).clamp(-1, 1)
    posterior = vae.encode(x).latent_dist
    out["vae.x"] = nhwc(x)
    out["vae.mean"] = nhwc(posterior.mean)
    out["vae.logvar"] = nhwc(posterior.logvar)
    out["vae.std"] = nhwc(posterior.std)
    z = randn(2, vae.config.latent_channels, 5, 3)
    out["vae.z"] = nhwc(z)
    out["vae.out"] = nhwc(vae.decode(z).sample)

    if tiled:
        # The tile is that of SD 1.5, as the crate's is for every model.
        vae.tile_latent_min_size, vae.tile_sample_min_size = 64, 64 * factor
        vae.enable_tiling()
        h, w = tiled
        z = formula((h, w, vae.config.latent_channels), 1009).permute(2, 0, 1)[None]
        # Every 7th row and 5th column: the whole would be most of the golden files.
        out["tiled.out"] = nhwc(vae.decode(z).sample)[:, ::7, ::5].contiguous()
        x = formula((h * factor, w * factor, 3), 1013).permute(2, 0, 1)[None]
        out["tiled.mean"] = nhwc(vae.encode(x).latent_dist.mean)[:, ::7, ::5].contiguous()
        vae.disable_tiling()
    return {k: t.float() if t.is_floating_point() else t for k, t in out.items()}


def tiny(name, seed, *, tokenizer, pad, dtype, text, unet, vae, save, latent, lengths, timesteps, tiled=None):
    path = OUT / name
    shutil.rmtree(path, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    clip, vocab = tiny_tokenizer(path / "tokenizer", pad, tokenizer)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=vocab, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, **text)).eval()
    unet = UNet2DConditionModel(**unet).eval()
    vae = AutoencoderKL(**vae).eval()
    for module in (text, unet, vae):
        randomise(module, generator)
        round_to(module, dtype)
    ids = clip(["a photo of a cat", "Привет, don't 猫"], padding="max_length", max_length=text.config.max_position_embeddings, truncation=True, return_tensors="pt").input_ids
    save_file(golden(text, unet, vae, ids, latent, lengths, timesteps, generator, tiled), path / "golden.safetensors")
    for part, module in (("text_encoder", text), ("unet", unet), ("vae", vae)):
        module.to(dtype).save_pretrained(path / part, **save)
    save_scheduler(path)
    save_index(path)
    tokens(clip, path / "tokens.json")
    return path


def tokens(clip, file):
    rows = [[t, clip(t, add_special_tokens=False).input_ids] for t in TEXTS]
    special = {"bos": clip.bos_token_id, "eos": clip.eos_token_id, "pad": clip.pad_token_id}
    # Escaped, so that an editor cannot normalise the texts.
    file.write_text(json.dumps({"special": special, "texts": rows}))


def two_levels():
    """Odd widths, one layer, linear projections, heads per block; f32; old tokenizer files."""
    path = tiny(
        "two-levels",
        1,
        tokenizer="plain",
        pad="!",
        dtype=torch.float32,
        text=dict(hidden_size=10, intermediate_size=22, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=19, hidden_act="quick_gelu"),
        unet=dict(block_out_channels=(12, 20), layers_per_block=1, cross_attention_dim=10,
                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                  norm_num_groups=4, attention_head_dim=(3, 5), use_linear_projection=True,
                  sample_size=10),
        vae=dict(block_out_channels=(6, 10), layers_per_block=1, norm_num_groups=2,
                 down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                 scaling_factor=0.3, sample_size=20),
        save={},
        latent=(10, 6),
        lengths=(19, 19, 19),
        timesteps=[999.0, 0.0, 512.25],
        tiled=(136, 123),
    )
    # The oldest files have the prefix, newer ones do not.
    file = path / "text_encoder/model.safetensors"
    rename_keys(file, lambda k: "text_model." + k.removeprefix("text_model."))


def three_levels():
    """Three layers, three latent channels, no quantisation convolutions; fp16 variant files; tokenizer as SD 2's."""
    path = tiny(
        "three-levels",
        2,
        tokenizer="sd2",
        pad="!",
        dtype=torch.float16,
        text=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
                  max_position_embeddings=77, hidden_act="gelu"),
        unet=dict(in_channels=3, out_channels=3, block_out_channels=(8, 16, 24), layers_per_block=3,
                  cross_attention_dim=24, norm_num_groups=8, attention_head_dim=4,
                  down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
                  up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
                  transformer_layers_per_block=[1, 2, 1], flip_sin_to_cos=False, freq_shift=1,
                  upcast_attention=True, sample_size=(7, 9)),
        vae=dict(latent_channels=3, block_out_channels=(4, 8, 12), layers_per_block=2, norm_num_groups=4,
                 down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                 use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.9),
        save={"variant": "fp16"},
        latent=(7, 9),
        lengths=(77, 154, 5),
        timesteps=[1.0, 731.0, 20.5],
    )
    for part in ("text_encoder", "unet", "vae"):
        assert list((path / part).glob("*.fp16.safetensors")), part


def four_levels():
    """An odd first width, no middle block, no attention in the VAE's; bf16, in shards."""
    path = tiny(
        "four-levels",
        3,
        tokenizer="json",
        pad="!",
        dtype=torch.bfloat16,
        text=dict(hidden_size=12, intermediate_size=18, num_hidden_layers=4, num_attention_heads=1,
                  max_position_embeddings=31, hidden_act="quick_gelu", layer_norm_eps=1e-3),
        unet=dict(block_out_channels=(9, 6, 12, 18), layers_per_block=(1, 2, 1, 1), cross_attention_dim=12,
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                  norm_num_groups=3, attention_head_dim=(3, 2, 4, 6), mid_block_type=None, norm_eps=1e-4,
                  conv_in_kernel=5, conv_out_kernel=1, time_embedding_dim=14),
        vae=dict(block_out_channels=(4, 4, 6, 8), layers_per_block=1, norm_num_groups=2,
                 down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                 mid_block_add_attention=False),
        save={"max_shard_size": "60KB"},
        latent=(11, 16),
        lengths=(31, 8),
        timesteps=[981.0, 3.75],
    )
    assert (path / "unet/diffusion_pytorch_model.safetensors.index.json").exists()


def old_vae():
    """The VAE of `two-levels` under its old names."""
    old_vae_names(OUT / "two-levels/vae/diffusion_pytorch_model.safetensors")


def demo():
    path = OUT / "demo"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    text = CLIPTextModel.from_pretrained(DEMO / "text_encoder", dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(DEMO / "unet", torch_dtype=torch.float32).eval()
    vae = AutoencoderKL.from_pretrained(DEMO / "vae", torch_dtype=torch.float32).eval()
    clip = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    ids = clip(["a red circle", ""], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(4)
    out = golden(text, unet, vae, ids, (16, 16), (77, 77), [951.0, 1.0], generator)
    save_file(out, path / "golden.safetensors")
    tokens(clip, path / "tokens.json")


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_levels()
    three_levels()
    four_levels()
    old_vae()
    demo()
