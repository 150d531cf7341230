"""Whole trajectories of diffusers' schedulers, for ours to be compared with.

    python tests/reference/schedulers.py                  # writes tests/golden/schedulers, half a minute

One safetensors file for each scheduler, and `index.json` with the cases. README.md beside this file says what is in which
file. In place of a UNet stands a formula of sample and timestep in plain f32 arithmetic (`model` below), which the Rust test
repeats to the bit; so what differs is the scheduler.
"""
import json
import shutil
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file

from pictures import SCHEDULERS

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/schedulers"
SHAPE = (1, 3, 2, 3)    # 18 values: what torch draws at once ends in an incomplete block of 16
STEPS = (1, 4, 20, 50)

STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
CONFIGS = {
    # As in the folder of Stable Diffusion 1.5.
    "sd15": dict(_class_name="PNDMScheduler", _diffusers_version="0.6.0", **STABLE_DIFFUSION, num_train_timesteps=1000,
                 set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None, clip_sample=False),
    "demo": json.loads((ROOT / "models/demo/scheduler/scheduler_config.json").read_text()),
    # Every class by its own defaults, which differ.
    "defaults": {},
    # As in the folder of Stable Diffusion 2.1, and as its fine-tunes to a zero terminal signal have it.
    "v": dict(**STABLE_DIFFUSION, prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False),
    "v-zero-snr": dict(**STABLE_DIFFUSION, prediction_type="v_prediction", timestep_spacing="trailing",
                       rescale_betas_zero_snr=True, clip_sample=False, set_alpha_to_one=False),
    "sample-linspace": dict(**STABLE_DIFFUSION, prediction_type="sample", timestep_spacing="linspace", clip_sample=True,
                            clip_sample_range=1.5),
    # The less usual choices together.
    "cosine": dict(beta_schedule="squaredcos_cap_v2", timestep_spacing="leading", steps_offset=2, clip_sample=True,
                   clip_sample_range=2.0, solver_order=3, solver_type="heun",
                   lambda_min_clipped=-5.1, variance_type="fixed_large", use_karras_sigmas=True),
    "sigma-min": dict(beta_schedule="linear", num_train_timesteps=777, timestep_spacing="trailing", clip_sample=False,
                            solver_order=3, solver_type="bh1", final_sigmas_type="sigma_min", lower_order_final=False,
                            euler_at_final=True, variance_type="fixed_small_log", interpolation_type="log_linear",
                            timestep_scaling=7.5, disable_corrector=[0, 3]),
    "exponential": dict(**STABLE_DIFFUSION, clip_sample=False, solver_order=1, use_exponential_sigmas=True,
                        timestep_spacing="trailing", sigma_min=0.05, sigma_max=12.5),
    "v-continuous": dict(**STABLE_DIFFUSION, prediction_type="v_prediction", timestep_type="continuous",
                         timestep_spacing="leading", solver_order=3),
}
EQUAL = "the last step goes from the smallest of the sigmas to itself, which is 0 / 0 to a method of second order"
# Classes that a config cannot be given to, and why.
IMPOSSIBLE = {
    ("euler_a", "sample-linspace"): "the class does not implement sample prediction",
    ("dpmpp_2m_karras", "sigma-min"): EQUAL,
    ("dpmpp_2m_sde_karras", "sigma-min"): EQUAL,
}
STRENGTHS = {"demo": (0.3, 0.75, 1.0), "v-zero-snr": (0.5,)}


def model(x, t, prediction):
    """A model that shrinks what it is given, a little bent. All scalars are f32: the order of operations is the test's."""
    u = np.float32(t) / np.float32(1000)
    one, two, half = np.float32(1), np.float32(2), np.float32(0.5)
    slope = {"epsilon": u * (two - u), "v_prediction": half * u, "sample": one - half * u}[prediction]
    x = x.numpy()
    return torch.from_numpy(x * slope + np.float32(0.25) * (x / (one + x * x)) - np.float32(0.125))


def build(kind, config):
    cls, overrides = SCHEDULERS[kind]
    if kind.startswith("dpmpp"):    # the name decides
        overrides = dict(use_karras_sigmas=False) | overrides
        if overrides["use_karras_sigmas"]:
            overrides["use_exponential_sigmas"] = False
    return cls.from_config(config, **overrides)


def channels_last(x):
    return x[0].permute(1, 2, 0).contiguous()


def trajectory(scheduler, steps, strength, seed):
    """As diffusers' pipelines drive a scheduler: from noise alone, or from a picture that has some of it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    scheduler.set_timesteps(steps)
    begin = 0 if strength is None else max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    timesteps, out = scheduler.timesteps[begin:], {}
    if hasattr(scheduler, "set_begin_index"):
        # The text pipeline leaves this out, and the scheduler looks its place up by the timestep; where the first two are
        # the same (Karras sigmas, cosine betas, many steps) it then starts at the second, and fails in the last step.
        scheduler.set_begin_index(begin)
    if strength is None:
        x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    else:
        original = torch.randn(SHAPE, generator=generator) / 2
        noise = torch.randn(SHAPE, generator=generator)
        x = scheduler.add_noise(original, noise, timesteps[:1])
        noised = [channels_last(x)]
    samples, prediction = [], scheduler.config.prediction_type
    takes_generator = not isinstance(scheduler, (diffusers.HeunDiscreteScheduler, diffusers.UniPCMultistepScheduler))
    for i, t in enumerate(timesteps):
        output = model(scheduler.scale_model_input(x, t), t, prediction)
        x = scheduler.step(output, t, x, **(dict(generator=generator) if takes_generator else {})).prev_sample
        samples.append(channels_last(x))
        if strength is not None and i + 1 < len(timesteps):
            noised.append(channels_last(scheduler.add_noise(original, noise, timesteps[i + 1 : i + 2])))
    out["timesteps"] = timesteps.float()
    out["samples"] = torch.stack(samples)
    if strength is not None:
        out["noised"] = torch.stack(noised)
    assert all(v.isfinite().all() for v in out.values())
    return out


def checksums():
    """One number for the timesteps of each count of steps there can be, for the three ways to lay them out."""
    out = {}
    for kind in ("ddim", "ddpm", "euler", "euler_a", "heun", "dpmpp_2m", "unipc", "lcm"):
        for spacing in ("linspace", "leading", "trailing"):
            if kind == "lcm" and spacing != "leading":
                continue    # does not look at it
            # Offset 0: with 1, `leading` leads past the last of the timesteps for more than 500 steps.
            scheduler = build(kind, dict(**STABLE_DIFFUSION, timestep_spacing=spacing, steps_offset=0))
            sums = []
            for steps in range(1, 51 if kind == "lcm" else 1001):
                scheduler.set_timesteps(steps)
                timesteps = scheduler.timesteps.double()
                if kind == "heun":
                    timesteps = torch.cat([timesteps[:1], timesteps[1::2]])
                weights = torch.arange(1, len(timesteps) + 1).double()
                # Not a number where there are more or fewer than asked for.
                sums.append((timesteps * weights).sum() if len(timesteps) == steps else torch.tensor(float("nan")).double())
            out[f"{kind}.{spacing}"] = torch.stack(sums)
    return out


def main():
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    cases = []
    for kind in SCHEDULERS:
        tensors = {}
        for name, config in CONFIGS.items():
            if (kind, name) in IMPOSSIBLE:
                continue
            for steps, strength in [(s, None) for s in STEPS] + [(20, s) for s in STRENGTHS.get(name, ())]:
                scheduler = build(kind, config)
                case = f"{name}/{steps}" + ("" if strength is None else f"/{strength}")
                seed = 1000 + len(cases)
                for key, value in trajectory(scheduler, steps, strength, seed).items():
                    tensors[f"{case}/{key}"] = value
                cases.append(dict(kind=kind, name=case, config=name, steps=steps, strength=strength, seed=seed,
                                  init_noise_sigma=float(scheduler.init_noise_sigma)))
        save_file(tensors, OUT / f"{kind}.safetensors")
    save_file(checksums(), OUT / "checksums.safetensors")
    about = dict(made_by="tests/reference/schedulers.py", torch=torch.__version__, diffusers=diffusers.__version__)
    impossible = [dict(kind=kind, config=config, why=why) for (kind, config), why in IMPOSSIBLE.items()]
    index = dict(about=about, configs=CONFIGS, impossible=impossible, cases=cases)
    (OUT / "index.json").write_text(json.dumps(index) + "\n")


if __name__ == "__main__":
    main()
