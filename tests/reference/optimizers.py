"""What optimisers, learning-rate schedules and loss weights come to, for ours to be compared with.

    python tests/reference/optimizers.py                  # writes tests/golden/training/{optimizers,weights}.safetensors

AdamW and clipping are torch's own, schedules and signal-to-noise ratios diffusers'. Prodigy is its authors' prodigyopt, with
the two options that diffusers' scripts switch on, bias correction and the safeguard for warm-ups. It starts near zero: its first
steps are of 1e-6, which beside values of one is the last bit of f32 (from there the library in f64 ends with another distance
by 4 %).

bitsandbytes has 8-bit optimisers for GPUs only. What it has for CPUs is what makes them 8-bit, its map of codes and its
operations that quantise and dequantise blocks; between these stands its update of AdamW, written out from
kOptimizerStatic8bit2StateBlockwise in csrc/kernels.cu. (Its CPU kernel for f32 looks codes up in a table that is coarse below a
thousandth of the scale; its fallback for other types takes the nearest code and is what runs here. Left out is that the GPU's
kernel gives a first moment just below zero the first negative code, where the nearest is zero.)
"""
from pathlib import Path

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from prodigyopt import Prodigy
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "tests/golden/training"
SHAPES = {"one": (1,), "seven": (7,), "matrix": (3, 37)}
STEPS = 25
# Prodigy begins with steps of 1e-6 and takes its time to see that they are small.
LONG = 60
# bitsandbytes' for optimisers.
BLOCK = 256


def gradient(name, values, step):
    """Towards a target, through another curvature for each value, and noise."""
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    curvature = torch.linspace(0.1, 3, values.numel()).view_as(values)
    target = torch.linspace(-1, 1, values.numel()).view_as(values)
    return curvature * (values - target) + 0.1 * torch.randn(values.shape, generator=generator)


def multipliers(name, warmup, steps, count):
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kind = "constant_with_warmup" if name == "constant" and warmup else name
    schedule = get_scheduler(kind, dummy, num_warmup_steps=warmup, num_training_steps=steps)
    found = []
    for _ in range(count):
        found.append(schedule.get_last_lr()[0])
        dummy.step()
        schedule.step()
    return found


def trajectory(out, case, rates, lr, clip=None, prodigy=False, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    generator = torch.Generator().manual_seed(len(case))
    size = 1e-4 if prodigy else 1.0
    parameters = {name: torch.nn.Parameter(size * torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    group = list(parameters.values())
    if prodigy:
        optimizer = Prodigy(group, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, use_bias_correction=True,
                            safeguard_warmup=True)
    else:
        optimizer = torch.optim.AdamW(group, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    values = {name: [p.detach().clone()] for name, p in parameters.items()}
    gradients, norms, distances = {name: [] for name in SHAPES}, [], []
    for step, rate in enumerate(rates):
        for name, p in parameters.items():
            p.grad = gradient(name, p.detach(), step)
            gradients[name].append(p.grad.clone())
        # Norms are in f64: torch's own f32 sums are good for seven digits at best.
        norms.append(sum(float((p.grad.double() ** 2).sum()) for p in group) ** 0.5)
        if clip:
            torch.nn.utils.clip_grad_norm_(group, clip)
        optimizer.param_groups[0]["lr"] = lr * rate
        optimizer.step()
        distances.append(optimizer.param_groups[0]["d"] if prodigy else 1.0)
        for name, p in parameters.items():
            values[name].append(p.detach().clone())
    for name in SHAPES:
        out[f"{case}/{name}.values"] = torch.stack(values[name])
        out[f"{case}/{name}.gradients"] = torch.stack(gradients[name])
    for name, numbers in dict(multipliers=rates, norms=norms, distances=distances).items():
        out[f"{case}/{name}"] = torch.tensor(numbers, dtype=torch.float64)
    print(case, "norms", norms[0], norms[-1], "distance", distances[-1])


def optimizers():
    out = {}
    trajectory(out, "adamw", multipliers("constant", 0, STEPS, STEPS), 1e-2)
    trajectory(out, "adamw-clipped", multipliers("cosine", 5, STEPS, STEPS), 3e-3, clip=1.0)
    trajectory(out, "adamw-odd", multipliers("linear", 3, STEPS, STEPS), 5e-2, betas=(0.4, 0.95), eps=1e-3, weight_decay=0.3)
    trajectory(out, "prodigy", multipliers("constant", 0, LONG, LONG), 1.0, prodigy=True)
    trajectory(out, "prodigy-warm", multipliers("cosine", 4, LONG, LONG), 0.7, clip=0.5, prodigy=True, betas=(0.9, 0.99), weight_decay=0)
    for name in ("constant", "linear", "cosine"):
        for warmup, steps in ((0, 40), (7, 40), (40, 40), (1, 2), (60, 40)):
            numbers = multipliers(name, warmup, steps, steps)
            out[f"schedule/{name}/{warmup}/{steps}"] = torch.tensor(numbers, dtype=torch.float64)
    return out


def quantise(numbers, code):
    return torch.ops.bitsandbytes.quantize_blockwise(numbers.double(), code, BLOCK)


def dequantise(codes, scales, code):
    return dequantize_blockwise(codes, absmax=scales, code=code, blocksize=BLOCK)


def quantised():
    """Codes of numbers of many sizes, and a trajectory of AdamW with moments in eight bits."""
    out = {}
    generator = torch.Generator().manual_seed(8)
    randn = lambda count: torch.randn(count, generator=generator)
    for name, signed in ("signed", True), ("unsigned", False):
        code = create_dynamic_map(signed)
        numbers = randn(5 * BLOCK + 77) * 10 ** (4 * torch.rand(5 * BLOCK + 77, generator=generator) - 6)
        numbers = numbers if signed else numbers.abs()
        codes, scales = quantise(numbers, code)
        out[f"eight/{name}.map"] = code
        out[f"eight/{name}.numbers"] = numbers
        out[f"eight/{name}.codes"] = codes
        out[f"eight/{name}.scales"] = scales
        out[f"eight/{name}.again"] = dequantise(codes, scales, code)
    size, lr, beta1, beta2, eps, decay = 4096 + 77, 1e-2, 0.9, 0.999, 1e-8, 1e-2
    value = randn(size)
    maps = [create_dynamic_map(True), create_dynamic_map(False)]
    moments = [quantise(torch.full((size,), 1e-30), code) for code in maps]
    values, gradients = [value.clone()], []
    for step in range(1, 11):
        g = gradient("eight", value, step)
        first, second = (dequantise(*moment, code) for moment, code in zip(moments, maps))
        first = first * beta1 + (1 - beta1) * g
        second = second * beta2 + (1 - beta2) * g * g
        correction1, correction2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
        value = value - lr * correction2 / correction1 * (first / (second.sqrt() + correction2 * eps))
        value = value * (1 - lr * decay)
        moments = [quantise(m, code) for m, code in zip((first, second), maps)]
        if step % 5 == 0:
            values.append(value.clone())
        gradients.append(g)
    out["eight/values"], out["eight/gradients"] = torch.stack(values), torch.stack(gradients)
    return out


def weights():
    """Ratios of Stable Diffusion's schedule, and of one with zero terminal ratio, at every ninth step and the ends; and what
    diffusers' train_text_to_image.py multiplies the loss with."""
    out = {}
    for name, extra in {"plain": {}, "zero": dict(rescale_betas_zero_snr=True)}.items():
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **extra)
        timesteps = torch.tensor([*range(0, 999, 9), 998, 999])
        snr = compute_snr(scheduler, timesteps)
        out[f"{name}/timesteps"] = timesteps
        out[f"{name}/alphas_cumprod"] = scheduler.alphas_cumprod.clone()
        out[f"{name}/snr"] = snr
        for gamma in (1.0, 5.0):
            least = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
            out[f"{name}/epsilon/{gamma:.0f}"] = least / snr
            out[f"{name}/velocity/{gamma:.0f}"] = least / (snr + 1)
    return out


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    save_file(optimizers() | quantised(), OUT / "optimizers.safetensors")
    save_file(weights(), OUT / "weights.safetensors")


if __name__ == "__main__":
    main()
