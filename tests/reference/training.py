"""Golden files for training: the loss and the gradients of each method, and twenty steps of an optimiser.

Writes tests/golden/training/, for the tiny model `two-levels` of models.py and for the demo model, by PyTorch, diffusers
and PEFT; README.md beside this file says what is in it.

    python tests/reference/training.py                   # 30 seconds
    python tests/reference/training.py --only dora       # cases whose name contains "dora"; cases.json stays as it is
"""

import argparse
import hashlib
import json
import zlib
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/training"
FOLDERS = {"two-levels": ROOT / "tests/golden/models/two-levels", "demo": ROOT / "models/demo"}
TINY, DEMO = FOLDERS

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "proj_in", "proj_out"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
WORD = "<zorp>"
# How large an adapter's first difference is beside its weight: no gradient is lost in rounding.
SHARE = 0.3
# Latents, height and width: not square. The tiny model halves its picture once, the demo model twice.
LATENT = {TINY: (10, 6), DEMO: (16, 12)}

# The cases


def case(method, *, unet=(), text=(), batch=2, dora=False, rslora=False, objective="epsilon", min_snr_gamma=None,
         prior_weight=None, vectors=0, captions=("a red circle", "a photo of a cat")):
    return dict(method=method, unet=list(unet), text=list(text), batch=batch, dora=dora, rslora=rslora, objective=objective,
                min_snr_gamma=min_snr_gamma, prior_weight=prior_weight, vectors=vectors, captions=list(captions))


def all_cases(model):
    worded = (f"a photo of {WORD}", f"{WORD}, a red {WORD} at night")
    yield case("lora-unet", unet=ATTENTION)
    yield case("lora-unet-text", unet=ATTENTION, text=TEXT, batch=4 if model == TINY else 2, prior_weight=0.7,
               captions=("a zorp monster", "a monster"))
    yield case("lora-convs", unet=ATTENTION + FEED_FORWARD + CONVOLUTIONS, objective="v-prediction", min_snr_gamma=5.0)
    yield case("dora", unet=ATTENTION, dora=True)
    yield case("rslora", unet=ATTENTION, rslora=True)
    if model == TINY:
        yield case("dora-convs", unet=["to_v", "conv1", "conv_shortcut", "downsamplers.0.conv"], dora=True, rslora=True)
    yield case("textual-inversion", vectors=2, captions=worded)
    yield case("pivotal", unet=ATTENTION, text=TEXT, vectors=2, captions=worded)


TRAJECTORY = dict(steps=20, unet=1e-3, text=5e-4, weight_decay=1e-2, schedule="cosine", warmup=3)
# Where gradients are clipped: diffusers' 1.0 is never reached here, these are in about half of the steps.
CLIP = {TINY: 0.75, DEMO: 0.15}
# After which steps the weights are kept.
KEPT = {TINY: [2, 5, 10, 20], DEMO: [20]}


# What is trained


class Trained:
    """A model with what a case trains, its values random or given, and by the names that a file has for them."""

    def __init__(self, model, c, dtype=torch.float32, values=None):
        folder = FOLDERS[model]
        self.case, self.dtype = c, dtype
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.noise = DDPMScheduler.from_pretrained(folder / "scheduler")
        self.noise.register_to_config(prediction_type=c["objective"].replace("-", "_"))
        self.unet.requires_grad_(False)
        self.text.requires_grad_(False)
        self.random = torch.Generator().manual_seed(zlib.crc32(f"{model} {c['method']}".encode()))
        self.parameters, self.layers = {}, {}
        for part, module, targets in (("unet", self.unet, c["unet"]), ("text_encoder", self.text, c["text"])):
            if targets:
                self.add(part, module, targets, model)
        if c["vectors"]:
            self.add_word(c["vectors"])
        for name, value in (values or {}).items():
            self.parameters[name].data.copy_(value)
        self.unet.to(dtype).train()
        self.text.to(dtype).train()
        # `to` leaves parameters the objects they were.
        assert all(p.dtype == dtype and p.requires_grad for p in self.parameters.values())

    def add(self, part, module, targets, model):
        """Ranks and alphas go round in threes and fives: two layers in a row have neither in common."""
        paths = [p for p, _ in module.named_modules() if p.endswith(tuple(f".{t}" for t in targets))]
        ranks, alphas = ((3, 1, 2), (2, 3, 0.5, 1, 7)) if model == TINY else ((2, 1, 1), (1, 2, 1, 1, 1))
        if model == DEMO and "conv1" in targets:
            ranks = (1,)                    # or the file is large
        config = LoraConfig(
            r=1, lora_alpha=1, target_modules=targets, use_dora=self.case["dora"], use_rslora=self.case["rslora"],
            rank_pattern={p: ranks[i % len(ranks)] for i, p in enumerate(paths)},
            alpha_pattern={p: alphas[i % 5] for i, p in enumerate(paths)})
        module.add_adapter(config)
        for path in paths:
            layer = module.get_submodule(path)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rank, alpha = config.rank_pattern[path], config.alpha_pattern[path]
            assert len(a) == rank and layer.scaling["default"] == alpha / (rank**0.5 if self.case["rslora"] else rank), path
            a.data = torch.randn(a.shape, generator=self.random) / a[0].numel() ** 0.5
            b.data = torch.randn(b.shape, generator=self.random)
            norm = (b.flatten(1) @ a.flatten(1)).norm() * layer.scaling["default"]
            b.data *= SHARE * layer.get_base_layer().weight.norm() / norm
            if self.case["dora"]:
                magnitude = layer.lora_magnitude_vector["default"].weight
                magnitude.data *= 1 + 0.2 * torch.randn(magnitude.shape, generator=self.random)
            self.layers[f"{part}.{path}"] = dict(rank=rank, alpha=alpha)
        live = {p.data_ptr(): p for p in module.parameters() if p.requires_grad}
        saved = get_peft_model_state_dict(module, adapter_name="default")
        assert len(live) == len(saved)
        # In the order of the module, as `parameters()` gives them to an optimiser.
        named = {live[v.data_ptr()]: k for k, v in saved.items()}
        self.parameters |= {f"{part}.{named[p]}": p for p in module.parameters() if p in named}

    def add_word(self, vectors):
        """Rows behind the token embeddings, for a word and its further vectors."""
        assert len(self.clip) == self.text.config.vocab_size
        self.vectors = [WORD] + [f"{WORD}_{i}" for i in range(1, vectors)]
        self.clip.add_tokens(self.vectors)
        table = self.text.get_input_embeddings().weight
        rows = torch.nn.Parameter(torch.randn(vectors, table.shape[1], generator=self.random) * table.std())
        self.text.rows = rows               # a parameter of the module, so that `to` finds it
        # Tokens are looked up in the table and the rows behind it, of which the rows alone have a gradient.
        embeddings = self.text.get_input_embeddings()
        embeddings.forward = lambda ids: F.embedding(ids, torch.cat([embeddings.weight, rows]))
        assert self.clip.convert_tokens_to_ids(self.vectors) == list(range(len(table), len(table) + vectors))
        self.parameters[WORD] = rows

    def ids(self, captions):
        if self.case["vectors"]:
            captions = [c.replace(WORD, " ".join(self.vectors)) for c in captions]
        length = self.text.config.max_position_embeddings
        return self.clip(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    def loss(self, data):
        """As the scripts of diffusers have it; also what was on the way."""
        c, x0, noise = self.case, data["x0"].to(self.dtype), data["noise"].to(self.dtype)
        t = data["timesteps"]
        noisy = self.noise.add_noise(x0, noise, t)
        context = self.text(input_ids=data["ids"]).last_hidden_state
        prediction = self.unet(noisy, t, encoder_hidden_states=context).sample
        target = noise if c["objective"] == "epsilon" else self.noise.get_velocity(x0, noise, t)
        each = F.mse_loss(prediction, target, reduction="none").mean(dim=[1, 2, 3])
        n = len(x0)
        if c["prior_weight"] is not None:
            # train_dreambooth_lora.py: the second half is the class's.
            (ours, theirs), (target_ours, target_theirs) = prediction.chunk(2), target.chunk(2)
            loss = F.mse_loss(ours, target_ours) + c["prior_weight"] * F.mse_loss(theirs, target_theirs)
            weights = torch.tensor([1.0] * (n // 2) + [c["prior_weight"]] * (n // 2)) / (n // 2)
        elif c["min_snr_gamma"] is not None:
            # train_text_to_image_lora.py.
            snr = compute_snr(self.noise, t)
            least = torch.stack([snr, c["min_snr_gamma"] * torch.ones_like(t)], dim=1).min(dim=1)[0]
            weights = least / (snr if c["objective"] == "epsilon" else snr + 1)
            loss = (each * weights).mean()
            weights = weights / n
        else:
            loss = F.mse_loss(prediction, target)
            weights = torch.full([n], 1 / n)
        # So it can be said in one way for all: each sample's mean square, times its weight, added up.
        torch.testing.assert_close((each * weights).sum(), loss, rtol=1e-5, atol=0)
        return loss, dict(noisy=noisy, prediction=prediction, target=target, weights=weights)

    def gradients(self, data):
        loss, inner = self.loss(data)
        for p in self.parameters.values():
            p.grad = None
        loss.backward()
        gradients = {k: p.grad.clone() for k, p in self.parameters.items()}
        for name, g in gradients.items():
            assert g.norm() > 0, name
        frozen = [k for m in (self.unet, self.text) for k, p in m.named_parameters() if p.grad is not None and not p.requires_grad]
        assert not frozen, frozen
        return loss.detach(), inner, gradients

    def values(self):
        return {k: p.detach().clone() for k, p in self.parameters.items()}


# The data


def clean_latents(model, count, generator):
    """Random for the tiny model; for the demo model those of pictures, which it knows."""
    h, w = LATENT[model]
    if model == TINY:
        return torch.randn(count, 4, h, w, generator=generator)
    vae = AutoencoderKL.from_pretrained(FOLDERS[model] / "vae", torch_dtype=torch.float32)
    files = [ROOT / f"tests/training/subject/0{i}.png" for i in range(count)]
    pictures = [np.array(Image.open(f).convert("RGB").crop((16, 0, 16 + 8 * w, 8 * h))) for f in files]
    x = torch.stack([torch.from_numpy(p) for p in pictures]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(x).latent_dist.mean * vae.config.scaling_factor


def data(trained, model, c, generator):
    n = c["batch"]
    x0 = clean_latents(model, n, generator)
    half = n // len(c["captions"])
    captions = [text for text in c["captions"] for _ in range(half)]
    timesteps = torch.tensor([417, 83, 905, 640][:n])
    return dict(x0=x0, noise=torch.randn(x0.shape, generator=generator), timesteps=timesteps, ids=trained.ids(captions))


def stored(tensors):
    """Pictures channels last, and nothing that shares memory."""
    out = {}
    for name, t in tensors.items():
        if name in ("x0", "noise", "noisy", "prediction", "target"):
            t = t.movedim(-3, -1)
        out[name] = t.detach().clone().contiguous()
    return out


def under(prefix, tensors):
    return {f"{prefix}/{name}": t for name, t in tensors.items()}


def apart(found, expected):
    """The largest relative L2 distance of two sets of tensors."""
    return max(((found[k].double() - e.double()).norm() / e.double().norm()).item() for k, e in expected.items())


# Writing


def write_case(model, c):
    name = f"{model}-{c['method']}"
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    trained = Trained(model, c)
    initial, inputs = trained.values(), data(trained, model, c, generator)
    loss, inner, gradients = trained.gradients(inputs)
    exact = Trained(model, c, torch.float64, initial)
    loss64, _, gradients64 = exact.gradients(inputs)
    print(f"{name}: {len(initial)} tensors, {sum(p.numel() for p in initial.values())} numbers, loss {loss:.6f}, f32 and f64 "
          f"apart by {abs(loss / loss64 - 1):.1e}, their gradients by {apart(gradients, gradients64):.1e}", flush=True)
    if c["method"] == "lora-unet" and model == TINY:
        finite_differences(exact, inputs, gradients64)
    if c["objective"] == "epsilon":
        del inner["target"]                 # the noise
    tensors = stored(inputs) | stored(inner) | {"loss": loss} | under("initial", initial) | under("gradient", gradients)
    if model == TINY:
        tensors |= {"loss64": loss64} | under("gradient64", gradients64)
    save_file(tensors, OUT / f"{name}.safetensors")
    return described(name, model, c, trained)


def described(name, model, c, trained, trajectory=None):
    about = {k: c[k] for k in ("objective", "min_snr_gamma", "prior_weight", "dora", "rslora", "captions")}
    return dict(name=name, model=model, method=c["method"], file=f"{name}.safetensors", **about,
                word=WORD if c["vectors"] else None, vectors=c["vectors"], trajectory=trajectory, layers=trained.layers)


def finite_differences(trained, inputs, gradients):
    """PyTorch's own gradients: at each tensor's largest, in f64."""
    worst, step = 0.0, 1e-5
    for name, g in gradients.items():
        p, i = trained.parameters[name].data.view(-1), g.abs().argmax()
        value, losses = p[i].item(), []
        for sign in (1, -1):
            p[i] = value + sign * step
            with torch.no_grad():
                losses.append(trained.loss(inputs)[0].item())
        p[i] = value
        expected = g.flatten()[i].item()
        worst = max(worst, abs((losses[0] - losses[1]) / (2 * step) / expected - 1))
    print(f"  finite differences: {len(gradients)} numbers, {worst:.1e} apart at most", flush=True)
    assert worst < 1e-5, worst


def run(trained, inputs, noise, timesteps, clip, kept):
    """The steps of an optimiser, as train_dreambooth_lora.py takes them; the batch is the same in each, its noise is not."""
    T, groups = TRAJECTORY, {}
    for name, p in trained.parameters.items():
        groups.setdefault(name.split(".")[0], []).append(p)
    rates = {"unet": T["unet"], "text_encoder": T["text"]}
    optimizer = torch.optim.AdamW([dict(params=p, lr=rates[part]) for part, p in groups.items()], betas=(0.9, 0.999),
                                  weight_decay=T["weight_decay"], eps=1e-8)
    schedule = get_scheduler(T["schedule"], optimizer, num_warmup_steps=T["warmup"], num_training_steps=T["steps"])
    losses, norms, used, after = [], [], [], {}
    for step in range(T["steps"]):
        loss, _, _ = trained.gradients(inputs | dict(noise=noise[step], timesteps=timesteps[step]))
        norms.append(torch.nn.utils.clip_grad_norm_(trained.parameters.values(), clip))
        used.append(torch.tensor(schedule.get_last_lr(), dtype=torch.float64))
        optimizer.step()
        schedule.step()
        losses.append(loss)
        if step + 1 in kept:
            after |= under(f"after-{step + 1}", trained.values())
    return dict(losses=torch.stack(losses), norms=torch.stack(norms), rates=torch.stack(used)) | after


def write_trajectory(model):
    c = next(c for c in all_cases(model) if c["method"] == "lora-unet-text")
    name = f"{model}-trajectory"
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    trained = Trained(model, c)
    initial, inputs = trained.values(), data(trained, model, c, generator)
    noise = torch.randn(TRAJECTORY["steps"], *inputs["x0"].shape, generator=generator)
    timesteps = torch.randint(1000, noise.shape[:2], generator=generator)
    inputs |= dict(noise=noise, timesteps=timesteps)
    out = run(trained, inputs, noise, timesteps, CLIP[model], KEPT[model])
    exact = run(Trained(model, c, torch.float64, initial), inputs, noise, timesteps, CLIP[model], [20])
    ends = [{k: (o[f"after-20/{k}"].double() - v) for k, v in initial.items()} for o in (out, exact)]
    print(f"{name}: loss {out['losses'][0]:.4f} to {out['losses'][-1]:.4f}, norms {out['norms'].min():.3f} to {out['norms'].max():.3f}, "
          f"{(out['norms'] > CLIP[model]).sum()} clipped; "
          f"f32 and f64 apart: losses by {apart(out, dict(losses=exact['losses'])):.1e}, weights by "
          f"{apart(out, {k: v for k, v in exact.items() if k.startswith('after')}):.1e}, moves by {apart(*ends):.1e}", flush=True)
    save_file(stored(inputs) | under("initial", initial) | out, OUT / f"{name}.safetensors")
    return described(name, model, c, trained, TRAJECTORY | dict(clip=CLIP[model], kept=KEPT[model]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="cases whose name contains this; cases.json stays as it is")
    args = p.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    OUT.mkdir(parents=True, exist_ok=True)
    cases = []
    for model in FOLDERS:
        cases += [write_case(model, c) for c in all_cases(model) if args.only in f"{model}-{c['method']}"]
        if args.only in f"{model}-trajectory":
            cases.append(write_trajectory(model))
    if args.only:
        return
    wanted = {c["file"] for c in cases} | {"cases.json"}
    for old in OUT.iterdir():
        if old.name not in wanted:
            old.unlink()
    hashes = {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest()
              for folder in FOLDERS.values() for f in sorted(folder.glob("*/*.safetensors"))}
    about = dict(made_by="tests/reference/training.py", torch=torch.__version__, diffusers=diffusers.__version__,
                 transformers=transformers.__version__, peft=peft.__version__, model_sha256=hashes)
    lines = ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases)
    (OUT / "cases.json").write_text(f'{{"about": {json.dumps(about)},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
