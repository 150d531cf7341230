"""Times diffusers and lorikeet side by side: one run, the same cores, turn and turn about. Prints a Markdown table.

    cargo build --release --bin lorikeet --example bench
    python benches/random_sd15.py /tmp/sd15
    python benches/compare.py --sd15 /tmp/sd15            # everything, about 10 minutes on two cores
    python benches/compare.py --only picture,start        # no SD 1.5 folder needed
    python benches/compare.py --sd15 /tmp/sd15 --skip-ours

What it calls of ours (every figure in seconds is wall time after one untimed call):

    lorikeet serve --model models/demo --listen 127.0.0.1:PORT
        POST /v1/images/generations, Accept: image/png, one kept-alive connection
    lorikeet generate PROMPT --model demo --seed 1 --steps 20 --guidance 4.5 --scheduler ddim --size 128x128 -o FILE
    target/release/examples/bench unet    --model DIR --batch 2 --width 32 --height 32 --rounds N      (latent sizes)
    target/release/examples/bench vae     --model DIR --width 32 --height 32 --rounds N                (latent sizes)
    target/release/examples/bench picture --model DIR --width W --height H --steps S --guidance G --scheduler ddim
                                          --seed 1 --rounds N                                          (pixels)

`bench` prints one line of JSON, {"name": …, "seconds": [one number a round], "peak_rss_mb": …}; in a line with "name" and
"error" it says why it could not. Both sides compute in f32.
"""
import argparse
import datetime
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red mushroom in a meadow"
STEPS, GUIDANCE, SIDE = 20, 4.5, 128
COLD = """
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
torch.set_num_threads({threads})
p = StableDiffusionPipeline.from_pretrained({model!r}, torch_dtype=torch.float32, safety_checker=None, local_files_only=True)
p.scheduler = DDIMScheduler.from_config(p.scheduler.config)
p({prompt!r}, num_inference_steps={steps}, guidance_scale={guidance}, height={side}, width={side},
  generator=torch.Generator("cpu").manual_seed(1)).images[0].save({out!r})
"""


class Absent(Exception):
    """A side that cannot be measured here, and why."""


def timed(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def run(command, **more):
    """Runs a command to its end; gives its wall time, its output and its peak resident memory in MB."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen([str(c) for c in command], stdout=out, stderr=err, **more)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if child.returncode:
            raise Absent(f"`{' '.join(map(str, command[:2]))}` ended with {child.returncode}: "
                         f"{err.read().decode(errors='replace').strip()[-200:]}")
        return seconds, out.read().decode(), usage.ru_maxrss / 1024


class Ours:
    def __init__(self, args):
        self.binary, self.example = args.target / "lorikeet", args.target / "examples" / "bench"
        self.skip = args.skip_ours

    def need(self, path):
        if self.skip:
            raise Absent("not asked for")
        if not path.exists():
            raise Absent(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path} is not built")

    def bench(self, what, model, **options):
        """One call of the example: its timed rounds, and the peak memory the system saw."""
        self.need(self.example)
        command = [self.example, what, "--model", model]
        for key, value in options.items():
            command += [f"--{key}", value]
        _, out, rss = run(command)
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if not lines or "seconds" not in lines[-1]:
            raise Absent(f"bench {what}: {lines[-1].get('error') if lines else 'printed no result'}")
        return lines[-1]["seconds"], rss


class Server:
    """`lorikeet serve` on a free port, and one connection to it."""

    def __init__(self, ours, model, log):
        ours.need(ours.binary)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        data = tempfile.mkdtemp()
        self.child = subprocess.Popen([ours.binary, "serve", "--model", model, "--listen", f"127.0.0.1:{self.port}"],
                                      stdout=log, stderr=log, cwd=data)
        for _ in range(300):
            time.sleep(0.1)
            if self.child.poll() is not None:
                raise Absent(f"lorikeet serve ended with {self.child.returncode}")
            try:
                self.link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
                self.link.request("GET", "/readyz")
                answer = self.link.getresponse()
                answer.read()
                if answer.status == 200:
                    return
            except OSError:
                pass
        self.close()
        raise Absent("lorikeet serve was not ready within 30 s")

    def paint(self):
        self.link.request("POST", "/v1/images/generations", json.dumps(dict(
            prompt=PROMPT, seed=1, steps=STEPS, guidance_scale=GUIDANCE, scheduler="ddim", size=f"{SIDE}x{SIDE}", n=1)),
            {"Content-Type": "application/json", "Accept": "image/png"})
        answer = self.link.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise Absent(f"the server answered {answer.status}: {body[:200].decode(errors='replace')}")
        return body

    def close(self):
        self.child.terminate()
        try:
            self.child.wait(20)
        except subprocess.TimeoutExpired:
            self.child.kill()


class Table:
    """Rows of the report; a side is a list of seconds, or the reason why there is none."""

    def __init__(self):
        self.rows = []

    def add(self, what, theirs, ours, goal):
        self.rows.append((what, theirs, ours, goal))
        print(self.line(*self.rows[-1]), file=sys.stderr, flush=True)

    @staticmethod
    def cell(side):
        return f"{statistics.median(side):.3f} (min {min(side):.3f}, n={len(side)})" if isinstance(side, list) else f"— ({side})"

    @classmethod
    def line(cls, what, theirs, ours, goal):
        ratio = "—"
        if isinstance(theirs, list) and isinstance(ours, list):
            ratio = f"**{statistics.median(ours) / statistics.median(theirs):.2f}** (min {min(ours) / min(theirs):.2f})"
        return f"| {what} | {cls.cell(theirs)} | {cls.cell(ours)} | {ratio} | {goal} |"

    def print(self):
        print("| work | diffusers, s | lorikeet, s | ratio of medians | goal |\n|---|---|---|---|---|")
        for row in self.rows:
            print(self.line(*row))


def side(call, into):
    """Adds one round to a side, unless the side has already turned out to be absent."""
    if isinstance(into, list):
        try:
            into.extend(call())
        except Absent as reason:
            return str(reason)
    return into


def layouts(torch, module):
    """Both memory layouts torch can compute in; the faster one is the one to be compared with."""
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        yield name, lambda layout=layout: module.to(memory_format=layout), layout


def best(sides, notes, what):
    name = min(sides, key=lambda k: statistics.median(sides[k]))
    notes.append(f"{what}: diffusers' best memory layout was {name} (" +
                 ", ".join(f"{k} {statistics.median(v):.3f} s" for k, v in sides.items()) + ").")
    return sides[name]


def demo_picture(args, ours, table, notes):
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from PIL import Image, ImageChops
    model = ROOT / "models" / "demo"
    pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def paint():
        return pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=SIDE, width=SIDE,
                    generator=torch.Generator("cpu").manual_seed(1)).images[0]

    theirs, http, inside, server, reference = {}, [], [], None, paint()
    with tempfile.TemporaryFile() as log:
        try:
            server = Server(ours, model, log)
            difference = ImageChops.difference(reference, Image.open(io.BytesIO(server.paint())).convert("RGB"))
            notes.append(f"Demo picture: the two PNGs differ by {max(high for _, high in difference.getextrema())} of 255 at most.")
        except Absent as reason:
            http = str(reason)
        try:
            for _ in range(args.rounds):
                for name, change, _layout in layouts(torch, pipe.unet):
                    change()
                    paint()
                    theirs.setdefault(name, []).extend(timed(paint)[0] for _ in range(3))
                time.sleep(0.3)
                http = side(lambda: [timed(server.paint)[0] for _ in range(3)], http)
                inside = side(lambda: ours.bench("picture", model, width=SIDE, height=SIDE, steps=STEPS, guidance=GUIDANCE,
                                                 scheduler="ddim", seed=1, rounds=3)[0], inside)
        finally:
            if server:
                server.close()
    theirs = best(theirs, notes, "Demo picture")
    table.add(f"demo picture over HTTP, {SIDE}², {STEPS} DDIM steps, guidance {GUIDANCE}", theirs, http, "≤ 0.5")
    table.add("the same, in process", theirs, inside, "≤ 0.5")
    if isinstance(http, list) and isinstance(inside, list):
        over = statistics.median(http) / statistics.median(inside) - 1
        notes.append(f"Server overhead (HTTP, queue): {over:+.1%} of a demo picture's time; goal under 2 %.")


def first_picture(args, ours, table, notes):
    theirs, mine = [], []
    model = ROOT / "models" / "demo"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "first.png"
        script = COLD.format(threads=args.threads, model=str(model), prompt=PROMPT, steps=STEPS, guidance=GUIDANCE, side=SIDE,
                             out=str(out))

        def generate():
            ours.need(ours.binary)
            out.unlink(missing_ok=True)
            seconds, _, _ = run([ours.binary, "generate", PROMPT, "--model", "demo", "--seed", 1, "--steps", STEPS,
                                 "--guidance", GUIDANCE, "--scheduler", "ddim", "--size", f"{SIDE}x{SIDE}", "-o", out], cwd=folder)
            if not out.exists():
                raise Absent("lorikeet generate wrote no file")
            return [seconds]

        for _ in range(max(3, args.rounds)):
            theirs = side(lambda: [run([sys.executable, "-c", script])[0]], theirs)
            mine = side(generate, mine)
    table.add("first demo picture from process start", theirs, mine, "< 2 s")


def sd15_unet(args, ours, table, notes):
    import torch
    from diffusers import UNet2DConditionModel
    unet = UNet2DConditionModel.from_pretrained(args.sd15, subfolder="unet", torch_dtype=torch.float32).eval()
    torch.manual_seed(1)
    x, text, t = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 768), torch.tensor([500, 500])
    theirs, mine = {}, []
    for _ in range(args.rounds):
        for name, change, layout in layouts(torch, unet):
            change()
            y = x.contiguous(memory_format=layout)
            unet(y, t, text)
            theirs.setdefault(name, []).extend(timed(lambda: unet(y, t, text))[0] for _ in range(3))
        time.sleep(0.3)
        mine = side(lambda: ours.bench("unet", args.sd15, batch=2, width=32, height=32, rounds=3)[0], mine)
    table.add("SD 1.5 UNet, batch 2, 32x32 latents, one forward", best(theirs, notes, "UNet"), mine, "≤ 1.0")


def sd15_vae(args, ours, table, notes):
    import torch
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(args.sd15, subfolder="vae", torch_dtype=torch.float32).eval()
    torch.manual_seed(1)
    z = torch.randn(1, 4, 32, 32)
    theirs, mine = {}, []
    for _ in range(args.rounds):
        for name, change, layout in layouts(torch, vae):
            change()
            y = z.contiguous(memory_format=layout)
            vae.decode(y)
            theirs.setdefault(name, []).extend(timed(lambda: vae.decode(y))[0] for _ in range(3))
        time.sleep(0.3)
        mine = side(lambda: ours.bench("vae", args.sd15, width=32, height=32, rounds=3)[0], mine)
    table.add("SD 1.5 VAE decode, 32x32 latents to 256²", best(theirs, notes, "VAE decode"), mine, "≤ 1.0")


def sd15_memory(args, ours, table, notes):
    files = [*args.sd15.rglob("*.safetensors")]
    weights = 0
    for f in files:
        with f.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for n in tensor["shape"]:
                    count *= n
                weights += 4 * count
    try:
        seconds, rss = ours.bench("picture", args.sd15, width=512, height=512, steps=2, guidance=7.5, scheduler="ddim", seed=1,
                                  rounds=1)
        above = rss - weights / 2**20
        notes.append(f"Peak memory, SD 1.5 size, 512², f32, guidance on: {rss:.0f} MiB = weights {weights / 2**20:.0f} MiB "
                     f"+ {above:.0f} MiB; goal: weights + 2560 MiB. Two steps took {min(seconds):.1f} s.")
    except Absent as reason:
        notes.append(f"Peak memory, SD 1.5 size, 512²: not measured ({reason}); the weights are {weights / 2**20:.0f} MiB in f32.")


PARTS = {"picture": demo_picture, "start": first_picture, "unet": sd15_unet, "vae": sd15_vae, "memory": sd15_memory}


def machine(args, torch):
    import diffusers
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown processor")
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    vector = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return (f"{datetime.date.today()}, {name} ({vector}), {args.threads} threads, f32, torch {torch.__version__}, diffusers "
            f"{diffusers.__version__}, lorikeet {commit}; load before the run {os.getloadavg()[0]:.1f}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sd15", type=Path, help="a folder that random_sd15.py wrote; without it the SD 1.5 rows are left out")
    p.add_argument("--only", default=",".join(PARTS), help=f"which of {','.join(PARTS)}")
    p.add_argument("--rounds", type=int, default=3, help="turns each side gets, of three timed calls each")
    p.add_argument("--cores", default="0,1", help="the cores both sides are held to")
    p.add_argument("--target", type=Path, default=ROOT / "target" / "release")
    p.add_argument("--skip-ours", action="store_true", help="time diffusers alone")
    args = p.parse_args()
    cores = {int(c) for c in args.cores.split(",")} & os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)      # children inherit it, so both sides see the same cores
    args.threads = len(cores)
    import torch
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    about, ours, table, notes = machine(args, torch), Ours(args), Table(), []
    for part in args.only.split(","):
        if part not in PARTS:
            sys.exit(f"--only: no part named {part!r}; there are {', '.join(PARTS)}")
        if part in ("unet", "vae", "memory") and not args.sd15:
            notes.append(f"{part}: left out, as no --sd15 folder was given.")
            continue
        PARTS[part](args, ours, table, notes)
    print(about + "\n")
    table.print()
    print("\n" + "\n".join(f"- {n}" for n in notes))


if __name__ == "__main__":
    main()
