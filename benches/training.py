"""Times DreamBooth-LoRA training steps of diffusers and PEFT, and ours. Prints a line of JSON for each arm, as examples/bench.rs does.

    python benches/training.py --only demo                  # models/demo at 128 px, batch 4, 10 steps
    python benches/training.py --sd15 /tmp/sd15             # SD 1.5's size at 256 px, batch 1, 3 steps, too: 5 minutes

A step is what train_dreambooth_lora.py does with latents and embeddings at hand: noise, forward, loss, backward, clipping,
AdamW. LoRA of rank 4 on the UNet's attention, f32, without and with gradient checkpointing, each in both memory layouts
torch can compute in, of which the better one is to be compared with. Every arm has a process of its own and one untimed
step first.

    {"name": …, "seconds": [one number a step], "median": …, "peak_rss_mb": …, "resident_mb": …, "peak_step_rss_mb": …, "numbers": …}

`peak_rss_mb` is that of the whole process (getrusage), loading included; `resident_mb` what it holds before the first step;
`peak_step_rss_mb` the peak of the timed steps. All count torch's own libraries and all weights.

With --lorikeet target/release/examples/bench the same work of ours takes turns with it, as arms of that binary.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Latents are an eighth of the picture.
WORK = {"demo": dict(side=128, batch=4, steps=10), "sd15": dict(side=256, batch=1, steps=3)}
RANK = 4


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def forget_peak():
    """From here on the kernel counts a new peak, where it lets us; getrusage's is then the new one too."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(name, model, threads, side, batch, steps, checkpointing, layout):
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32)
    layout = getattr(torch, layout)
    unet.requires_grad_(False).to(memory_format=layout)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian",
                                target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    noise = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    latents = torch.randn(batch, unet.config.in_channels, side // 8, side // 8).contiguous(memory_format=layout)
    context = torch.randn(batch, 77, unet.config.cross_attention_dim)

    def step():
        epsilon = torch.randn_like(latents)
        t = torch.randint(noise.config.num_train_timesteps, (batch,))
        out = unet(noise.add_noise(latents, epsilon, t), t, encoder_hidden_states=context).sample
        loss = F.mse_loss(out, epsilon)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    held = resident()
    step()
    before, anew = peak(), forget_peak()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(dict(
        name=name, seconds=seconds, median=statistics.median(seconds),
        peak_rss_mb=max(before, peak()), resident_mb=held, peak_step_rss_mb=peak() if anew else None, numbers=sum(p.numel() for p in parameters))), flush=True)


def ours(args, name, model, checkpointing, side, batch, steps):
    """Runs the same work in examples/bench, and prints its line under `name`; whether it failed."""
    latents = str(side // 8)
    command = [args.lorikeet, "step", "--model", model, "--batch", str(batch), "--width", latents, "--height", latents,
               "--ranks", str(RANK), "--rounds", str(args.steps or steps)] + ["--checkpointing"] * checkpointing
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(json.dumps({**json.loads(child.stdout or "{}"), "name": name}), flush=True)
    return child.returncode != 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sd15", type=Path, help="a folder that random_sd15.py wrote; without it SD 1.5's size is left out")
    p.add_argument("--only", default="", help="arms whose name contains this")
    p.add_argument("--steps", type=int, help="timed steps of each arm [default: demo 10, sd15 3]")
    p.add_argument("--cores", default="0,1", help="the cores, and as many threads")
    p.add_argument("--lorikeet", type=Path, help="the built example bench; without it diffusers alone is timed")
    p.add_argument("--arm", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.arm:
        return measure(**json.loads(args.arm))
    cores = {int(c) for c in args.cores.split(",")} & os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)      # children inherit it
    failed = False
    for work, model in (("demo", ROOT / "models" / "demo"), ("sd15", args.sd15)):
        for checkpointing in (False, True):
            for layout in ("contiguous_format", "channels_last"):
                name = f"diffusers-{work}{'-checkpointing' if checkpointing else ''}-{layout.removesuffix('_format')}"
                if not model or args.only not in name:
                    continue
                arm = dict(WORK[work], name=name, model=str(model), threads=len(cores), checkpointing=checkpointing, layout=layout)
                if args.steps:
                    arm["steps"] = args.steps
                child = subprocess.run([sys.executable, __file__, "--arm", json.dumps(arm)], stderr=subprocess.PIPE, text=True)
                if child.returncode:
                    failed = True
                    print(json.dumps(dict(name=name, error=child.stderr.strip()[-300:])), flush=True)
            name = f"lorikeet-{work}{'-checkpointing' if checkpointing else ''}"
            if args.lorikeet and model and args.only in name:
                failed |= ours(args, name, model, checkpointing, **WORK[work])
    sys.exit(failed)


if __name__ == "__main__":
    main()
