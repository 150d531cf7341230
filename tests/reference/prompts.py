"""Weighted and long prompts as AUTOMATIC1111's formulas have them, for our own conditioning to be compared with.

    python tests/reference/prompts.py        # models/demo -> tests/golden/prompts

Nothing is parsed here: each case says by hand which part of the prompt weighs how much (None is a BREAK), so that a
mistake in a parser cannot be made twice. Tokens and hidden states are transformers'. README.md beside this file says
what is in which file.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO, OUT = ROOT / "models/demo", ROOT / "tests/golden/prompts"
ROOM, LOOK_BACK = 75, 20
COLUMNS = 8                 # every eighth column is kept: the mean that is restored is over all of them anyway

COLOURS = "red, orange, yellow, green, blue, purple, pink, brown, black, white, grey, "
SCENES = "in a meadow, on the beach, in the snow, at night, in the desert, under the sea, at sunset, in a city, "
LONG = "a striped blue fish, " + COLOURS + SCENES + "a large dotted red mushroom on the left in the centre of the red, grey meadow under the blue city at night, " + COLOURS + "a cat"
RUN = "a small black cat in the snow on the right and a red house at night and a tree and a blue car in a city " * 4

CASES = [
    dict(name="empty", prompt="", parts=[]),
    dict(name="plain", prompt="a red fox, in the snow: don't", parts=[("a red fox, in the snow: don't", 1)]),
    dict(name="stronger", prompt="a ((red)) (mushroom) in a meadow",
         parts=[("a ", 1), ("red", 1.1 * 1.1), (" ", 1), ("mushroom", 1.1), (" in a meadow", 1)]),
    dict(name="weaker", prompt="a [red] [[striped]] boat",
         parts=[("a ", 1), ("red", 1 / 1.1), (" ", 1), ("striped", 1 / 1.1 / 1.1), (" boat", 1)]),
    dict(name="numbers", prompt="a (large:1.5) (green:0.3) tree, (at night:2)",
         parts=[("a ", 1), ("large", 1.5), (" ", 1), ("green", 0.3), (" tree, ", 1), ("at night", 2)]),
    dict(name="nested", prompt="a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
         parts=[("a ", 1), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.5 * 1.1),
                (", sun, ", 1.1), ("sky", 1.1 ** 4), (".", 1.1)]),
    dict(name="negative", prompt="a cat (dotted:-0.5)", parts=[("a cat ", 1), ("dotted", -0.5)]),
    dict(name="escaped", prompt=r"a duck \(yellow\) (\[beach\]:1.2)", parts=[("a duck (yellow) ", 1), ("[beach]", 1.2)]),
    dict(name="glued", prompt="a mush(room) and a mush([room])",
         parts=[("a mush", 1), ("room", 1.1), (" and a mushroom", 1)]),
    dict(name="break", prompt="a (red:1.4) cup BREAK in a [room]BREAK",
         parts=[("a ", 1), ("red", 1.4), (" cup", 1), None, ("in a ", 1), ("room", 1 / 1.1), None]),
    dict(name="long", prompt=LONG, parts=[(LONG, 1)]),
    dict(name="long-without-commas", prompt=RUN, parts=[(RUN, 1)]),
    dict(name="long-weighted", prompt=f"({LONG}:1.2), [{COLOURS}a dog] (in a room", parts=[
        (LONG, 1.2), (", ", 1), (COLOURS + "a dog", 1 / 1.1), (" ", 1), ("in a room", 1.1)]),
    dict(name="clip-skip", prompt="a (purple:1.6) monster", clip_skip=1, parts=[("a ", 1), ("purple", 1.6), (" monster", 1)]),
]


def chunks_of(tokens, comma):
    """Cuts a run of (id, weight) between two breaks, by where the cuts lie."""
    while len(tokens) > ROOM:
        cut = ROOM
        if tokens[ROOM][0] != comma:        # else the phrase ends just here
            commas = [at for at in range(ROOM - LOOK_BACK, ROOM) if tokens[at][0] == comma]
            cut = commas[-1] + 1 if commas else ROOM
        yield tokens[:cut]
        tokens = tokens[cut:]
    yield tokens


def encode(case, text, tokenizer):
    comma = tokenizer(",", add_special_tokens=False).input_ids
    assert len(comma) == 1
    runs = [[]]
    for part in case["parts"]:
        if part is None:
            runs.append([])
        else:
            ids = tokenizer(part[0], add_special_tokens=False, truncation=False).input_ids
            runs[-1] += [(i, part[1]) for i in ids]
    if len(runs) > 1 and not runs[-1]:
        runs.pop()                          # a BREAK at the end starts nothing
    ids, weights = [], []
    for chunk in (chunk for run in runs for chunk in chunks_of(run, comma[0])):
        fill = ROOM - len(chunk)
        ids.append([tokenizer.bos_token_id] + [i for i, _ in chunk] + [tokenizer.eos_token_id]
                   + [tokenizer.pad_token_id] * fill)
        weights.append([1.0] + [w for _, w in chunk] + [1.0] * (fill + 1))
    ids, weights = torch.tensor(ids), torch.tensor(weights, dtype=torch.float32)
    norm = text.text_model.final_layer_norm if hasattr(text, "text_model") else text.final_layer_norm
    hidden = []
    for row, weight in zip(ids, weights):
        out = text(row[None], output_hidden_states=True)
        z = norm(out.hidden_states[-1 - case.get("clip_skip", 0)])[0]
        if (weight != 1).any():
            mean = z.double().mean()        # in f32 over there; f64 has the digits that f32 rounds off
            z = z * weight[:, None]
            z = z * (mean / z.double().mean()).float()
        hidden.append(z)
    return ids, torch.stack(hidden)[..., ::COLUMNS].contiguous()


@torch.inference_mode()
def main():
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer", local_files_only=True)
    text = CLIPTextModel.from_pretrained(DEMO / "text_encoder", dtype=torch.float32, local_files_only=True).eval()
    tensors, cases = {}, []
    for case in CASES:
        ids, hidden = encode(case, text, tokenizer)
        tensors[f"{case['name']}.ids"], tensors[f"{case['name']}.hidden"] = ids, hidden
        cases.append(dict(name=case["name"], prompt=case["prompt"], clip_skip=case.get("clip_skip", 0)))
        print(f"{case['name']}: {len(ids)} chunks, {[int((row == tokenizer.eos_token_id).int().argmax()) - 1 for row in ids]}")
    OUT.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT / "golden.safetensors", metadata={"format": "pt"})
    (OUT / "index.json").write_text(json.dumps(dict(columns=COLUMNS, cases=cases), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
