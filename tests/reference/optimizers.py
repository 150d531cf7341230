"""What optimisers, learning-rate schedules and loss weights come to, for ours to be compared with.

    python tests/reference/optimizers.py                  # writes tests/golden/training/{optimizers,weights}.safetensors

AdamW and clipping are torch's own, schedules and signal-to-noise ratios diffusers'. Prodigy is written out here from algorithm
4 of its paper (https://arxiv.org/abs/2306.06101), state in f32 and sums in f64, with the two options that diffusers' scripts
switch on: bias correction, and the safeguard for warm-ups (the denominator's sum without the learning rate).
"""
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "tests/golden/training"
SHAPES = {"one": (1,), "seven": (7,), "matrix": (3, 37)}
STEPS = 25
# Prodigy begins with steps of 1e-6 and takes its time to see that they are small.
LONG = 60


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


class Prodigy:
    def __init__(self, parameters, betas, eps, weight_decay):
        self.parameters, (self.beta1, self.beta2), self.eps, self.decay = parameters, betas, eps, weight_decay
        self.d0 = self.d = 1e-6
        self.numerator, self.k = 0.0, 0
        zeros = lambda: [np.zeros(p.numel(), np.float32) for p in parameters]
        self.m, self.v, self.s = zeros(), zeros(), zeros()
        self.start = [p.detach().numpy().reshape(-1).copy() for p in parameters]

    def step(self, lr):
        if lr == 0:
            return
        self.k += 1
        f = np.float32
        b1, b2, b3, d = self.beta1, self.beta2, self.beta2**0.5, self.d
        correction = (1 - b2**self.k) ** 0.5 / (1 - b1**self.k)
        stride = d * lr * correction
        self.numerator *= b3
        denominator = 0.0
        for i, p in enumerate(self.parameters):
            x, g = p.detach().numpy().reshape(-1), p.grad.numpy().reshape(-1)
            away = self.start[i].astype(np.float64) - x.astype(np.float64)
            self.numerator += d / self.d0 * stride * float(g.astype(np.float64) @ away)
            self.m[i] = self.m[i] * f(b1) + f(d * (1 - b1)) * g
            self.v[i] = self.v[i] * f(b2) + f(d * d * (1 - b2)) * g * g
            self.s[i] = self.s[i] * f(b3) + f(d / self.d0 * d) * g
            denominator += float(np.abs(self.s[i]).sum(dtype=np.float64))
        self.d = max(d, self.numerator / denominator)
        for i, p in enumerate(self.parameters):
            x = p.detach().numpy().reshape(-1)
            x *= f(1 - stride * self.decay)
            x -= f(stride) * self.m[i] / (np.sqrt(self.v[i]) + f(self.d * self.eps))


def trajectory(out, case, rates, lr, clip=None, prodigy=False, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    generator = torch.Generator().manual_seed(len(case))
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    group = list(parameters.values())
    if prodigy:
        optimizer = Prodigy(group, betas, eps, weight_decay)
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
        if prodigy:
            optimizer.step(lr * rate)
        else:
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
        distances.append(optimizer.d if prodigy else 1.0)
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
    save_file(optimizers(), OUT / "optimizers.safetensors")
    save_file(weights(), OUT / "weights.safetensors")


if __name__ == "__main__":
    main()
