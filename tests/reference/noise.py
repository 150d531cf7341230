"""Numbers as torch draws them, for our generator to be compared with, bit for bit.

    python tests/reference/noise.py                       # writes tests/golden/noise

`draws.safetensors` has one tensor for each sequence of draws, called `SEED/COUNT,COUNT,…`: what
`torch.Generator("cpu").manual_seed(SEED)` gives for `torch.randn(COUNT)`, one after the other. Long ones are kept as the
first and last 16 numbers and the sum of all bit patterns (`…/sum`).
"""
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "tests/golden/noise"
SEEDS = (0, 1, 42, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1)
COUNTS = [*range(1, 41), 47, 48, 49, 63, 64, 65, 100, 105, 255, 1000]
LONG = (4 * 64 * 64, 4 * 96 * 64, 3 * 37 * 53, 4 * 128 * 128)
MIXED = (
    # A pair drawn one by one leaves its second number over, and what is drawn in blocks does not take it.
    [1, 1, 1], [3, 16, 1, 2], [1, 17, 15, 33, 1], [15, 15, 15], [16, 15, 16, 15], [5, 100, 5, 31, 5], [33, 17, 4096, 7, 7],
    # Across the end of the generator's 624 words.
    [600, 20, 20], [311, 1, 2, 3], [1] * 20, [16] * 45, [620, 3, 3, 16],
)


def bits(x):
    return x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    out = {}
    sequences = [(seed, [count]) for seed in (0, 2**32 - 1) for count in COUNTS]
    sequences += [(seed, [count]) for seed in SEEDS for count in (1, 15, 16, 17, 31, 33)]
    sequences += [(seed, draws) for seed in (7, 2**63) for draws in MIXED]
    sequences += [(seed, [count]) for seed in (1, 2**64 - 1) for count in LONG]
    for seed, draws in sequences:
        # torch takes 64 bits, signed or not.
        generator = torch.Generator("cpu").manual_seed(seed)
        numbers = torch.cat([torch.randn(count, generator=generator) for count in draws])
        name = f"{seed}/{','.join(map(str, draws))}"
        if len(numbers) > 1000:
            out[f"{name}/sum"] = bits(numbers).sum()[None]
            numbers = torch.cat([numbers[:16], numbers[-16:]])
        out[name] = numbers
    save_file(out, OUT / "draws.safetensors")


if __name__ == "__main__":
    main()
