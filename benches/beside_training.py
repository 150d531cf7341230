"""How much longer pictures take while a training runs on the same device.

    cargo build --release && python benches/beside_training.py target/release/lorikeet [--share 0.25] [--seconds 40]

Starts a server on the demo model. One client asks for one picture after the other (128 x 128, 20 steps), without and then
with a DreamBooth job of batch 8 under way; then four clients at once, likewise. Prints a table: median and 99th percentile of
a picture's seconds, slices' seconds from /metrics, and what is promised of them: p99 with at most 1.5 times p99 without, and
one slice. Only Python's own library is needed.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def ask(url, body=None, headers=None):
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = headers or ({"Content-Type": "application/json"} if data else {})
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=600) as response:
        return response.read()


def form(fields, files):
    mark = uuid.uuid4().hex
    parts = [f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
             for name, value in fields.items()]
    for path in files:
        head = f'--{mark}\r\nContent-Disposition: form-data; name="images"; filename="{path.name}"\r\n\r\n'
        parts.append(head.encode() + path.read_bytes() + b"\r\n")
    return b"".join(parts) + f"--{mark}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={mark}"}


def paint(url, clients, seconds):
    """Seconds of each picture."""
    took, end = [], time.monotonic() + seconds

    def client(number):
        seed = number << 20
        while time.monotonic() < end:
            began = time.monotonic()
            ask(f"{url}/v1/images/generations", {"prompt": "a red mushroom in a meadow", "seed": seed, "steps": 20})
            took.append(time.monotonic() - began)
            seed += 1

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(took)


def at(values, share):
    return values[min(len(values) - 1, int(share * len(values)))]


def slices(url):
    """Seconds all together, and how many."""
    text = ask(f"{url}/metrics").decode()
    found = {name: float(value) for name, value in re.findall(r"^lorikeet_slice_seconds(\S*) (\S+)$", text, re.M)}
    return found.get("_sum", 0.0), found.get("_count", 0.0)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("binary")
    p.add_argument("--share", default="0.25")
    p.add_argument("--seconds", type=float, default=40, help="of each of the four arms")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapters").mkdir()
        server = subprocess.Popen(
            [args.binary, "serve", "--listen", "127.0.0.1:0", "--adapters", f"{folder}/adapters", "--data", f"{folder}/data",
             "--training-share", args.share], stderr=subprocess.PIPE, text=True)
        try:
            url = next(re.search(r"ready at (\S+)", line)[1] for line in server.stderr if "ready at" in line)
            threading.Thread(target=server.stderr.read, daemon=True).start()
            paint(url, 1, 3)
            print("| clients | training | pictures | median | p99 | p99 over that without | a slice, on the average |\n|---|---|---|---|---|---|---|")
            for clients in (1, 4):
                before = None
                for training in (False, True):
                    job = None
                    if training:
                        body, headers = form({"name": f"a{clients}", "method": "dreambooth", "instance_prompt": "a zorp monster",
                                              "steps": 20000, "batch_size": 8, "sample_every": 0},
                                             sorted((ROOT / "tests/training/subject").glob("*.png")))
                        job = json.loads(ask(f"{url}/v1/training/jobs", body, headers))
                        time.sleep(3)
                    total, count = slices(url)
                    took = paint(url, clients, args.seconds)
                    after, number = slices(url)
                    mean = (after - total) / (number - count) if number > count else 0.0
                    p99 = at(took, 0.99)
                    before = before or p99
                    told = f"{mean:.3f}" if training else ""
                    print(f"| {clients} | {'yes' if training else 'no'} | {len(took)} | {at(took, 0.5):.3f} | {p99:.3f} | "
                          f"{p99 / before:.2f} | {told} |", flush=True)
                    if job:
                        ask(f"{url}/v1/training/jobs/{job['id']}/cancel", b"")
                        time.sleep(2)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
