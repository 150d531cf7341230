"""Golden files for adapters: one small file in each dialect, and what it does to the weights.

Writes tests/golden/adapters/ for the tiny models of models.py. PEFT, diffusers and LyCORIS write their own files; for the
others the names and formulas of the tools are written out below (kohya's sd-scripts, cloneofsimo/lora, A1111).

    python tests/reference/adapters.py
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lycoris.kohya import LycorisNetworkKohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests/golden/models"
OUT = ROOT / "tests/golden/adapters"
TWO, THREE = "two-levels", "three-levels"

cases, expected = [], {}
generator = torch.Generator().manual_seed(5)


def parts(model):
    """UNet and text encoder in f64: the expected values shall have all the digits of f32."""
    unet = UNet2DConditionModel.from_pretrained(MODELS / model / "unet", variant="fp16" if model == THREE else None)
    text = CLIPTextModel.from_pretrained(MODELS / model / "text_encoder", variant="fp16" if model == THREE else None)
    return {"unet": unet.double(), "text_encoder": text.double()}


def site(part, path):
    """A module's name as `models::Site` has it."""
    if part == "text_encoder":
        path = "text_model." + path.removeprefix("text_model.")
    return f"{part}.{path}"


def weights(model):
    out = {}
    for part, module in parts(model).items():
        for path, weight in module.state_dict().items():
            out[site(part, path.removesuffix(".weight"))] = weight
    return out


def randn(*shape, dtype=torch.float32):
    return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)


def case(name, model, tensors, deltas, dialect, *, biases={}, embeddings={}, unmatched=(), tokens=(), metadata=None):
    """Stores a file and what it should give; `deltas` are W' - W in f64."""
    if tensors is not None:
        order = torch.randperm(len(tensors), generator=generator).tolist()
        keys = list(tensors)
        save_file({keys[i]: tensors[keys[i]].clone().contiguous() for i in order}, OUT / f"{name}.safetensors", metadata)
    for key, value in deltas.items():
        expected[f"{name}/{key}"] = value.detach().float().contiguous()
    for key, value in biases.items():
        expected[f"{name}/{key}+bias"] = value.detach().float().contiguous()
    for key, value in embeddings.items():
        expected[f"{name}/{key}+token"] = value.detach().float().clone().contiguous()
    cases.append({"name": name, "model": model, "dialect": dialect, "unmatched": sorted(unmatched), "tokens": list(tokens)})


# PEFT and diffusers, which write their own files.


def with_lora(model, configs, dtype=torch.float32):
    modules = parts(model)
    for part, config in configs.items():
        inject_adapter_in_model(config, modules[part])
        for path, parameter in modules[part].named_parameters():
            if "lora_magnitude" in path:
                parameter.data *= 1 + randn(*parameter.shape).double()
            elif "lora_" in path:
                parameter.data = randn(*parameter.shape, dtype=dtype).double()
            if "lora_" in path:
                # What the file can hold.
                parameter.data = parameter.data.to(dtype).double()
    return modules


def peft_deltas(modules):
    """By PEFT's own merge."""
    out, biases = {}, {}
    for part, module in modules.items():
        for path, layer in module.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            before = layer.get_base_layer().weight.detach().clone()
            bias = layer.get_base_layer().bias
            bias = bias.detach().clone() if bias is not None else 0
            layer.merge()
            out[site(part, path)] = layer.get_base_layer().weight.detach() - before
            if layer.lora_bias["default"]:
                biases[site(part, path)] = layer.get_base_layer().bias.detach() - bias
    return out, biases


def save_peft(name, model, modules, configs, dtype=torch.float32, metadata=True):
    state = {p: {k: v.to(dtype).contiguous() for k, v in get_peft_model_state_dict(modules[p]).items()} for p in configs}
    meta = {p: c.to_dict() for p, c in configs.items()} if metadata else {}
    StableDiffusionPipeline.save_lora_weights(
        OUT, state.get("unet"), state.get("text_encoder"), weight_name=f"{name}.safetensors",
        unet_lora_adapter_metadata=meta.get("unet"), text_encoder_lora_adapter_metadata=meta.get("text_encoder"),
    )
    deltas, biases = peft_deltas(modules)
    case(name, model, None, deltas, "PEFT", biases=biases)


def peft():
    configs = {
        "unet": LoraConfig(
            r=3, lora_alpha=5, target_modules=["to_q", "to_out.0", "proj_in", "net.2"],
            rank_pattern={"attn2.to_q": 5, "mid_block.attentions.0.proj_in": 1},
            alpha_pattern={r"down_blocks\.\d+\..*attn1\.to_q": 7, "attn2.to_q": 2.5, "mid_block.attentions.0.proj_in": 0.5},
        ),
        "text_encoder": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 7}, alpha_pattern={"layers.1.mlp.fc1": 1}),
    }
    modules = with_lora(TWO, configs)
    save_peft("peft", TWO, modules, configs)

    configs = {"unet": LoraConfig(r=5, lora_alpha=3, use_rslora=True, target_modules=["to_k", "proj_out", "conv1", "conv_shortcut", "downsamplers.0.conv"])}
    modules = with_lora(THREE, configs, torch.float16)
    save_peft("peft-rslora-convolutions", THREE, modules, configs, torch.float16)

    configs = {"unet": LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=["to_v", "conv2"])}
    modules = with_lora(TWO, configs)
    save_peft("peft-dora", TWO, modules, configs)

    configs = {"unet": LoraConfig(r=3, lora_alpha=9, lora_bias=True, target_modules=["to_out.0"])}
    modules = with_lora(TWO, configs)
    save_peft("peft-bias", TWO, modules, configs)

    # Without metadata the scale is 1, whatever it was in training; the other spelling of the text encoder.
    configs = {"text_encoder": LoraConfig(r=3, lora_alpha=3, target_modules=["out_proj"])}
    modules = with_lora(THREE, configs)
    save_peft("peft-plain", THREE, modules, configs, metadata=False)
    file = OUT / "peft-plain.safetensors"
    prefix = "text_encoder.text_model."
    save_file({prefix + k.removeprefix("text_encoder.").removeprefix("text_model."): v for k, v in load_file(file).items()}, file)


# The others, by formula.


def low_rank(up, down, scale=1.0):
    return scale * up.double().flatten(1) @ down.double().flatten(1)


def pair(weight, rank, dtype=torch.float32, flat=False):
    """Factors for a weight: `down` in the form of a kernel if the weight is one."""
    out, *rest = weight.shape
    down, up = randn(rank, *rest, dtype=dtype), randn(out, rank, dtype=dtype)
    if len(rest) == 3 and not flat:
        up = up[:, :, None, None]
    return (down.flatten(1) if flat else down), up


def kohya(name):
    part, path = name.split(".", 1)
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + path.replace(".", "_")


def diffusers_2023():
    W = weights(TWO)
    block = "unet.up_blocks.1.attentions.1.transformer_blocks.0"
    names = [f"{block}.attn1.to_q", f"{block}.attn2.to_out.0", "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"]
    tensors, deltas = {}, {}
    for rank, name in zip((1, 4, 3), names):
        down, up = pair(W[name], rank)
        infix = "lora" if name.startswith("unet") else "lora_linear_layer"
        tensors |= {f"{name}.{infix}.down.weight": down, f"{name}.{infix}.up.weight": up}
        deltas[name] = low_rank(up, down)
    case("diffusers-2023", TWO, tensors, deltas, "diffusers (training scripts of 2023)")


def processors():
    W = weights(TWO)
    block = "mid_block.attentions.0.transformer_blocks.0"
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    for name, prefix in (("processors", "unet."), ("processors-bare", "")):
        tensors, deltas = {}, {}
        for rank, (layer, old) in enumerate({"to_q": "to_q_lora", "to_k": "to_k_lora", "to_v": "to_v_lora", "to_out.0": "to_out_lora"}.items(), 2):
            ours = f"unet.{block}.attn2.{layer}"
            down, up = pair(W[ours], rank)
            key = f"{prefix}{block}.attn2.processor.{old}"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
            deltas[ours] = low_rank(up, down)
        if prefix:
            for layer, old in {"q_proj": "to_q_lora", "out_proj": "to_out_lora"}.items():
                down, up = pair(W[f"{text}.{layer}"], 3)
                tensors |= {f"{text}.{old}.down.weight": down, f"{text}.{old}.up.weight": up}
                deltas[f"{text}.{layer}"] = low_rank(up, down)
        case(name, TWO, tensors, deltas, "diffusers (attention processors)")


def kohya_files():
    W = weights(TWO)
    block = "unet.down_blocks.0.attentions.0"
    tensors, deltas = {}, {}
    # name, rank, alpha, flat
    for name, rank, alpha in (
        (f"{block}.proj_in", 3, torch.tensor(1.5)),
        (f"{block}.transformer_blocks.0.ff.net.0.proj", 5, torch.tensor(2)),
        (f"{block}.transformer_blocks.0.attn1.to_out.0", 2, torch.tensor(0.0)),
        ("unet.up_blocks.0.resnets.0.time_emb_proj", 4, None),
        ("unet.down_blocks.0.resnets.0.conv1", 3, torch.tensor(1.0, dtype=torch.bfloat16)),
        ("unet.up_blocks.0.resnets.0.conv_shortcut", 1, torch.tensor([2.0])),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc2", 7, torch.tensor(3.0, dtype=torch.float64)),
        ("text_encoder.text_model.encoder.layers.1.self_attn.k_proj", 2, torch.tensor(4.0)),
    ):
        down, up = pair(W[name], rank, torch.bfloat16)
        if name.endswith("proj_in"):
            # As from a model that has a 1x1 convolution here.
            tensors |= {f"{kohya(name)}.lora_down.weight": down[:, :, None, None], f"{kohya(name)}.lora_up.weight": up[:, :, None, None]}
        else:
            tensors |= {f"{kohya(name)}.lora_down.weight": down, f"{kohya(name)}.lora_up.weight": up}
        scale = 1.0
        if alpha is not None:
            tensors[f"{kohya(name)}.alpha"] = alpha
            scale = (float(alpha) or rank) / rank
        deltas[name] = low_rank(up, down, scale)
    foreign = ["lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha", "lora_unet_input_blocks_77_1_proj_in.lora_up.weight"]
    tensors |= {key: torch.ones(1) for key in foreign}
    case("kohya", TWO, tensors, deltas, "kohya", unmatched=foreign, metadata={"ss_output_name": "kohya", "ss_v2": "False"})

    # OneTrainer and SDXL's scripts say te1; maps where the model has 1x1 convolutions.
    W = weights(THREE)
    tensors, deltas = {}, {}
    for name, key in (
        ("text_encoder.text_model.encoder.layers.2.self_attn.v_proj", "lora_te1_text_model_encoder_layers_2_self_attn_v_proj"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te1_encoder_layers_0_mlp_fc1"),
        ("unet.down_blocks.1.attentions.2.proj_in", "lora_unet_down_blocks_1_attentions_2_proj_in"),
    ):
        down, up = pair(W[name], 3, flat=True)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        deltas[name] = low_rank(up, down, 2 / 3)
    case("kohya-te1", THREE, tensors, deltas, "kohya")


def sgm():
    """Numbered by hand for three levels of three layers: level n begins at 1 + 4n in, 4n out."""
    W = weights(THREE)
    tensors, deltas = {}, {}
    names = {
        "conv_in": "input_blocks_0_0",
        "conv_out": "out_2",
        "time_embedding.linear_1": "time_embed_0",
        "time_embedding.linear_2": "time_embed_2",
        "down_blocks.0.attentions.0.proj_in": "input_blocks_1_1_proj_in",
        "down_blocks.0.resnets.2.conv1": "input_blocks_3_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_4_0_op",
        "down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q": "input_blocks_6_1_transformer_blocks_1_attn1_to_q",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_5_0_skip_connection",
        "down_blocks.2.resnets.2.time_emb_proj": "input_blocks_11_0_emb_layers_1",
        "mid_block.resnets.0.conv2": "middle_block_0_out_layers_3",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "middle_block_1_transformer_blocks_0_ff_net_2",
        "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
        "up_blocks.0.resnets.3.conv1": "output_blocks_3_0_in_layers_2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_3_1_conv",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0": "output_blocks_6_1_transformer_blocks_0_attn2_to_out_0",
        "up_blocks.1.upsamplers.0.conv": "output_blocks_7_2_conv",
        "up_blocks.2.attentions.3.proj_out": "output_blocks_11_1_proj_out",
    }
    for rank, (path, key) in enumerate(names.items(), 1):
        rank = rank % 5 + 1
        down, up = pair(W[f"unet.{path}"], rank)
        key = f"lora_unet_{key}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        deltas[f"unet.{path}"] = low_rank(up, down, 2 / rank)
    case("kohya-sgm", THREE, tensors, deltas, "kohya (SGM block names)")


# LyCORIS, which writes its own files.


def with_lycoris(name, maps, *, algo="lora", train_norm=False, dtype=torch.float32):
    """A network on the modules that `maps` names, each with its settings, as kohya's trainer makes and saves it.

    What a module does is computed as its forward pass does, and compared with that: `get_diff_weight`, which merging
    takes, applies the scale of LoHa and LoKr twice (in 4.1.3).
    """
    modules = parts(THREE)
    paths = {part: {path.split(".", 1)[1]: config for path, config in maps.items() if path.startswith(part)} for part in modules}
    LycorisNetworkKohya.apply_preset({
        "enable_conv": True, "use_fnmatch": True, "module_algo_map": {}, "name_algo_map": paths["unet"] | paths["text_encoder"],
        "unet_target_module": [], "unet_target_name": list(paths["unet"]),
        "text_encoder_target_module": [], "text_encoder_target_name": list(paths["text_encoder"]),
    })
    network = LycorisNetworkKohya(modules["text_encoder"], modules["unet"], network_module=algo, train_norm=train_norm)
    assert len(network.loras) == len(maps), name
    names = {id(m): site(part, path) for part in modules for path, m in modules[part].named_modules()}
    deltas, biases, checks = {}, {}, []
    for module in network.loras:
        module.double()
        for key, parameter in module.named_parameters():
            if key == "scalar":
                value = torch.tensor(0.5)
            elif key == "dora_scale":
                value = parameter.detach() * (1 + randn(*parameter.shape).double())
            else:
                value = randn(*parameter.shape)
            # What the file can hold.
            parameter.data = value.to(dtype).double()
        layer = module.org_module[0]
        weight, bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
        with torch.no_grad():
            delta, of_bias = effect(module, weight)
        deltas[names[id(layer)]] = delta
        if of_bias is not None:
            biases[names[id(layer)]] = of_bias
            bias = bias + of_bias
        checks.append((module, layer, weight + delta, bias))
    network.apply_to(modules["text_encoder"], modules["unet"], True, True)
    for module, layer, weight, bias in checks:
        channels = weight.shape[-1] if weight.dim() < 3 else weight.shape[1]
        shape = [2, channels, 5, 4] if module.module_type in ("conv2d", "groupnorm") else [3, channels]
        x = torch.randn(shape, generator=generator).double()
        with torch.no_grad():
            found, wanted = layer(x), module.op(x, weight=weight, bias=bias, **module.kw_dict)
        assert (found - wanted).norm() < 1e-10 * wanted.norm(), f"{name}: {module.lora_name}"
    network.save_weights(OUT / f"{name}.safetensors", dtype, {"ss_network_module": "lycoris.kohya"})
    case(name, THREE, None, deltas, "kohya", biases=biases)


def effect(module, base):
    """What a module adds to its layer's weight and bias."""
    if module.name in ("full", "norm", "ia3"):
        return tuple(None if x is None else x.detach().clone() for x in module.get_diff_weight())
    if module.name == "locon":
        delta = module.make_weight() * module.scale
    else:
        delta = module.get_weight(module.shape) * module.scalar
    if module.wd:
        delta = module.apply_weight_decompose(base + delta) - base
    return delta, None


def lycoris():
    resnet = "unet.down_blocks.1.resnets.0"
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    text = "text_encoder.encoder.layers.1.mlp.fc2"
    tucker = {"use_tucker": True}

    with_lycoris("locon-tucker", {
        f"{resnet}.conv1": {"dim": 3, "alpha": 2, **tucker},
        f"{resnet}.conv2": {"dim": 2, "alpha": 2},
        f"{resnet}.conv_shortcut": {"dim": 3, "alpha": 1, **tucker},    # 1x1: no core
        f"{block}.attn1.to_q": {"dim": 4, "alpha": 3, "rs_lora": True},
        f"{block}.attn1.to_v": {"dim": 2, "use_scalar": True},
        text: {"dim": 1, "alpha": 5},
    }, dtype=torch.float16)

    with_lycoris("loha", {
        f"{block}.attn1.to_k": {"dim": 3, "alpha": 1},
        f"{block}.attn1.to_q": {"dim": 4, "alpha": 3, "rs_lora": True},
        f"{block}.attn2.to_k": {"dim": 2, "alpha": 3, "use_scalar": True},
        f"{resnet}.conv2": {"dim": 2, "alpha": 5},
        f"{resnet}.conv1": {"dim": 3, "alpha": 2, **tucker},
        f"{resnet}.conv_shortcut": {"dim": 1, "alpha": 2},
        text: {"dim": 4, "alpha": 4},
    }, algo="loha")

    # Whole and factored blocks on either side.
    both = {"decompose_both": True}
    with_lycoris("lokr", {
        f"{block}.attn1.to_q": {"dim": 2, "alpha": 77, "full_matrix": True},
        f"{block}.attn1.to_k": {"dim": 2, "alpha": 3, "factor": 2},
        f"{block}.attn1.to_v": {"dim": 1, "alpha": 2, "rs_lora": True, **both},
        f"{block}.attn1.to_out.0": {"dim": 9, "alpha": 2},
        f"{block}.ff.net.0.proj": {"dim": 3, "alpha": 2, "factor": 4, "unbalanced_factorization": True, **both},
        f"{resnet}.conv1": {"dim": 1, "alpha": 3, "factor": 2, "use_scalar": True},
        f"{resnet}.conv2": {"dim": 1, "alpha": 1, **tucker, **both},
        f"{resnet}.conv_shortcut": {"dim": 2, "alpha": 1, "full_matrix": True},
        text: {"dim": 2, "alpha": 1},
    }, algo="lokr")

    with_lycoris("ia3", {
        f"{block}.attn2.to_k": {},
        f"{block}.ff.net.2": {"train_on_input": True},
        f"{resnet}.conv1": {"train_on_input": True},
        f"{resnet}.conv2": {},
        text: {},
    }, algo="ia3")

    with_lycoris("full", {
        f"{block}.attn2.to_v": {}, f"{resnet}.conv_shortcut": {}, text: {},
        f"{resnet}.norm1": {}, f"{block}.norm2": {}, "text_encoder.final_layer_norm": {},
    }, algo="full", train_norm=True)

    rows, columns = {"weight_decompose": True}, {"weight_decompose": True, "wd_on_out": False}
    with_lycoris("dora", {
        f"{block}.attn1.to_q": {"dim": 3, "alpha": 2, **rows},
        f"{block}.attn1.to_k": {"dim": 3, "alpha": 2, **columns},
        f"{block}.attn2.to_k": {"algo": "loha", "dim": 2, "alpha": 1, **columns},
        f"{block}.attn2.to_v": {"algo": "lokr", "dim": 2, "alpha": 1, **rows},
        f"{block}.ff.net.2": {"algo": "loha", "dim": 2, "alpha": 3, **rows},
        f"{resnet}.conv1": {"dim": 3, "alpha": 2, **rows},
        f"{resnet}.conv2": {"dim": 3, "alpha": 2, **columns},
        f"{resnet}.conv_shortcut": {"algo": "lokr", "dim": 1, "alpha": 1, **columns},
        text: {"dim": 3, "alpha": 1, **rows},
    })


def shapes_of_others():
    """Vectors as other tools shape them: lengths without a second side, gains with one."""
    W = weights(THREE)
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    name = f"{block}.attn1.to_v"
    base, (down, up) = W[name], pair(W[name], 3)
    v = base + low_rank(up, down, 2 / 3)
    lengths = (base.norm(dim=1) * (1 + randn(len(base)).double())).float()
    key = kohya(name)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0), f"{key}.dora_scale": lengths}
    case("dora-vector", THREE, tensors, {name: v * (lengths.double() / v.norm(dim=1))[:, None] - base}, "kohya")

    tensors, deltas = {}, {}
    for name, on_input in ((f"{block}.attn2.to_k", 0), (f"{block}.ff.net.2", 1)):
        out, inner = W[name].shape
        w = randn(1, inner) if on_input else randn(out, 1)
        tensors |= {f"{kohya(name)}.weight": w, f"{kohya(name)}.on_input": torch.tensor(on_input)}
        deltas[name] = W[name] * w.double()
    case("ia3-matrix", THREE, tensors, deltas, "kohya")


def cloneofsimo():
    """Places in the order of `_find_modules` over the model of 2022."""
    W = weights(TWO)
    walk = []
    for block in ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "mid_block.attentions.0"):
        block = f"unet.{block}.transformer_blocks.0"
        walk += [f"{block}.attn1.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")] + [f"{block}.ff.net.0.proj"]
        walk += [f"{block}.attn2.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")]
    text = [f"text_encoder.text_model.encoder.layers.{i}.self_attn.{x}" for i in (0, 1) for x in ("k_proj", "v_proj", "q_proj", "out_proj")]
    tensors, deltas = {}, {}
    metadata = {"unet": json.dumps(["CrossAttention", "Attention", "GEGLU"]), "text_encoder": json.dumps(["CLIPAttention"]), "<s1>": "<embed>"}
    for part, names in (("unet", walk), ("text_encoder", text)):
        for i, name in enumerate(names):
            rank = 1 + i % 3
            down, up = pair(W[name], rank)
            tensors |= {f"{part}:{i}:up": up, f"{part}:{i}:down": down}
            metadata[f"{part}:{i}:rank"] = str(rank)
            deltas[name] = low_rank(up, down)
    tensors["<s1>"] = randn(10)
    case("cloneofsimo", TWO, tensors, deltas, "cloneofsimo", embeddings={"<s1>": tensors["<s1>"][None]}, metadata=metadata)


def words():
    ti = "textual inversion"
    rows = randn(3, 10)
    case("words-diffusers", TWO, {"<red.fox>": rows, "sks": rows[0]}, {}, ti, embeddings={"<red.fox>": rows, "sks": rows[:1]})
    case("words-kohya", TWO, {"emb_params": rows}, {}, ti, embeddings={"fox": rows}, tokens=["fox"])
    case("words-sdxl", TWO, {"clip_l": rows, "clip_g": randn(3, 14)}, {}, ti, embeddings={"fox": rows}, tokens=["fox"], unmatched=["clip_g"])
    case("words-cog", TWO, {"text_encoders_0": rows, "text_encoders_1": randn(3, 14)}, {}, ti,
         embeddings={f"<s{i}>": rows[i : i + 1] for i in range(3)}, tokens=["<s0>", "<s1>", "<s2>"], unmatched=["text_encoders_1"])

    W = weights(TWO)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = pair(W[name], 2)
    tensors = {f"{kohya(name)}.lora_down.weight": down, f"{kohya(name)}.lora_up.weight": up}
    tensors |= {"bundle_emb.fox.string_to_param.*": rows, "bundle_emb.hen.clip_l": rows[1:], "bundle_emb.hen.clip_g": randn(2, 14)}
    case("bundle", TWO, tensors, {name: low_rank(up, down)}, "kohya", embeddings={"fox": rows, "hen": rows[1:]}, unmatched=["bundle_emb.hen.clip_g"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    peft()
    diffusers_2023()
    processors()
    kohya_files()
    sgm()
    lycoris()
    shapes_of_others()
    cloneofsimo()
    words()
    shapes = {TWO: weights(TWO), THREE: weights(THREE)}
    models = {c["name"]: c["model"] for c in cases}
    for key, value in expected.items():
        name, target = key.split("/", 1)
        if "+" not in target:
            expected[key] = value.reshape(shapes[models[name]][target].shape)
    save_file(expected, OUT / "expected.safetensors")
    (OUT / "index.json").write_text(json.dumps({"cases": cases}, indent=1) + "\n")
