"""What llama.cpp's converter does to tensors: each function here changes some of a checkpoint's in place."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.models.converter.metadata import Config, head_dim, heads, kv_heads, layers, rope

Tensors = dict[str, Tensor]


def each(*endings: str) -> Callable[[Callable[[Tensor, Config], Tensor]], Callable[[Tensors, Config], None]]:
    """Make a change of one tensor that of all whose name ends so."""

    def make(change: Callable[[Tensor, Config], Tensor]) -> Callable[[Tensors, Config], None]:
        def apply(tensors: Tensors, c: Config) -> None:
            for name in tensors:
                if name.endswith(endings):
                    tensors[name] = change(tensors[name], c)

        return apply

    return make


def permute(weight: Tensor, num_heads: int) -> Tensor:
    """From halves of a head to neighbours."""
    return weight.unflatten(0, (num_heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)


permuted_q = each("q_proj.weight", "q_proj.bias")(lambda t, c: permute(t, heads(c)))
permuted_k = each("k_proj.weight", "k_proj.bias")(lambda t, c: permute(t, kv_heads(c) or heads(c)))
PERMUTED = (permuted_q, permuted_k)
one_more = each("norm.weight")(lambda t, c: t + 1)
squeezed = each("conv1d.weight")(lambda t, c: t.squeeze())
negated = each(".A_log")(lambda t, c: -torch.exp(t))
gpt2_turned = each("c_attn.weight", "c_proj.weight", "c_fc.weight")(lambda t, c: t.t())


@each("query_key_value.weight", "query_key_value.bias")
def ungrouped(t: Tensor, c: Config) -> Tensor:
    """Falcon: from each group's q, k, v to all q, all k, all v."""
    groups = t.unflatten(0, (c["num_kv_heads"], -1, head_dim(c)))
    return torch.cat((groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)))


@each("query_key_value.weight", "query_key_value.bias")
def unmixed(t: Tensor, c: Config) -> Tensor:
    """Bloom, NeoX: from each head's q, k, v to all q, all k, all v."""
    return t.unflatten(0, (heads(c), 3, -1)).swapaxes(0, 1).flatten(0, 2)


def experts_stacked(tensors: Tensors, c: Config) -> None:
    found: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name in list(tensors):
        if match := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name):
            found.setdefault((match[1], match[3]), {})[int(match[2])] = tensors.pop(name)
    for (prefix, matrix), experts in found.items():
        layer = re.search(r"\.(\d+)\.", prefix)[1]
        name = f"layers.{layer}.feed_forward" if matrix.startswith("w") else f"model.layers.{layer}.mlp"
        tensors[f"{name}.experts.{matrix}.weight"] = torch.stack([experts[i] for i in range(len(experts))])


def heads_stacked(tensors: Tensors, c: Config) -> None:
    """StableLM: the norms of heads, one after another."""
    for which in ("q", "k"):
        for layer in range(layers(c)):
            prefix, found = f"model.layers.{layer}.self_attn.{which}_layernorm", []
            while (name := f"{prefix}.norms.{len(found)}.weight") in tensors:
                found.append(tensors.pop(name))
            if found:
                tensors[f"{prefix}.weight"] = torch.stack(found)


def split(name: str, parts: Mapping[str, Callable[[Tensor, Config], Tensor]]) -> Callable[[Tensors, Config], None]:
    """Take a tensor apart; the names of parts stand where its own stood."""

    def apply(tensors: Tensors, c: Config) -> None:
        for known in [known for known in tensors if name in known]:
            whole = tensors.pop(known)
            tensors.update({known.replace(name, part): cut(whole, c) for part, cut in parts.items()})

    return apply


def nth(index: int, dim: int, count: int) -> Callable[[Tensor, Config], Tensor]:
    return lambda t, c: t.chunk(count, dim)[index].contiguous()


def keys_of_latents(t: Tensor, c: Config) -> Tensor:
    by_head = t.unflatten(0, (heads(c), -1))
    return by_head[:, : c["qk_nope_head_dim"]].transpose(1, 2)


def values_of_latents(t: Tensor, c: Config) -> Tensor:
    return t.unflatten(0, (heads(c), -1))[:, c["qk_nope_head_dim"] :]


latents_split = split("kv_b_proj", {"k_b_proj": keys_of_latents, "v_b_proj": values_of_latents})
pack_split = split("self_attn.W_pack", {f"self_attn.{part}_proj": nth(i, 0, 3) for i, part in enumerate("qkv")})


llama4_experts = split(
    "experts.gate_up_proj",
    {
        f"experts.{name}_proj.weight": lambda t, c, i=i: t.transpose(1, 2).chunk(2, 1)[i]
        for i, name in enumerate(("gate", "up"))
    },
)
llama4_down = split("experts.down_proj", {"experts.down_proj.weight": lambda t, c: t.transpose(1, 2)})


def streams_stacked(tensors: Tensors, c: Config) -> None:
    """Gemma 3n: the matrices of streams in one; a scale is a weight."""
    for name in ("altup_projections", "altup_unembed_projections"):
        matrices = [tensors.pop(f"model.{name}.{i}.weight") for i in range(c["altup_num_inputs"] - 1)]
        tensors[f"model.{name}.weight"] = torch.stack(matrices)
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[f"{name}.weight"] = tensors.pop(name)


def plamo_norms(tensors: Tensors, c: Config) -> None:
    """Weights as they multiply."""
    more = {"post_mixer_norm.weight": 1 / 5, "post_mlp_norm.weight": 5**-1.5}
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] = tensors[name] + more.get(name.rpartition(".layers.")[2].partition(".")[2], 1.0)


def internlm2_part(part: str) -> Callable[[Tensor, Config], Tensor]:
    def cut(t: Tensor, c: Config) -> Tensor:
        groups = t.unflatten(0, (kv_heads(c), -1, head_dim(c)))
        rows = {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}[part].flatten(0, 2)
        return rows if part == "v" else permute(rows, heads(c) if part == "q" else kv_heads(c))

    return cut


internlm2_split = split("attention.wqkv", {f"attention.w{part}": internlm2_part(part) for part in "qkv"})
granite_experts = split(
    "block_sparse_moe.input_linear",
    {f"mlp.experts.{name}_proj": nth(i, -2, 2) for i, name in enumerate(("gate", "up"))},
)
granite_shared = split(
    "shared_mlp.input_linear", {f"mlp.shared_expert.{name}_proj": nth(i, 0, 2) for i, name in enumerate(("gate", "up"))}
)


def gpt_oss(tensors: Tensors, c: Config) -> None:
    """Matrices [X, in, out] to [X, out, in], and gate and up, whose columns take turns, apart."""
    for name in [name for name in tensors if ".experts." in name]:
        stem, leaf = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
        t = tensors.pop(name)
        t = t.transpose(1, 2) if t.dim() == 3 else t
        if "gate_up" in stem:
            for i, part in enumerate(("gate", "up")):
                tensors[f"{stem.replace('gate_up', part)}.{leaf}"] = t[:, i::2]
        else:
            tensors[f"{stem}.{leaf}"] = t
    for layer in range(layers(c)):
        name = f"model.layers.{layer}.self_attn.sinks"
        tensors[f"{name}.weight"] = tensors.pop(name)


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors, Config], None]:
    def apply(tensors: Tensors, c: Config) -> None:
        for known in list(tensors):
            name = known
            for old, new in pairs:
                name = re.sub(old, new, name)
            tensors[name] = tensors.pop(known)

    return apply


def mamba2_shapes(tensors: Tensors, c: Config) -> None:
    for name, t in tensors.items():
        if name.endswith((".A_log", ".D")):
            tensors[name] = t.unsqueeze(-1)
        elif name.endswith("mixer.norm.weight"):
            tensors[name] = t.view(c["n_groups"], -1)


def delta_net(tensors: Tensors, c: Config) -> None:
    """Qwen3-Next: norms, but those of delta nets, larger by one; q, k, v and z of all heads apart."""
    for name, t in tensors.items():
        if name.endswith("norm.weight") and "linear_attn" not in name:
            tensors[name] = t + 1
    share = c["linear_num_value_heads"] // c["linear_num_key_heads"] * c["linear_value_head_dim"]
    sizes = [c["linear_key_head_dim"]] * 2 + [share] * 2

    def part(first: int, last: int) -> Callable[[Tensor, Config], Tensor]:
        def cut(t: Tensor, c: Config) -> Tensor:
            pieces = t.unflatten(0, (c["linear_num_key_heads"], -1)).split(sizes, 1)
            return torch.cat([piece.flatten(0, 1) for piece in pieces[first:last]])

        return cut

    split("in_proj_qkvz", {"in_proj_qkv": part(0, 3), "in_proj_z": part(3, 4)})(tensors, c)
    renamed((r"\.dt_bias", ".dt_proj.bias"))(tensors, c)


def value_heads_in_turns(tensors: Tensors, c: Config) -> None:
    """Qwen3.5: from the value heads of one key head after another to the first of each, the second of each, …"""
    num_keys, unit = c["linear_num_key_heads"], c["linear_value_head_dim"]
    num_q_and_k = 2 * num_keys * c["linear_key_head_dim"]

    def turn(t: Tensor, size: int) -> Tensor:
        return t.unflatten(0, (num_keys, -1, size)).swapaxes(0, 1).flatten(0, 2)

    for name, t in tensors.items():
        if "linear_attn." not in name:
            continue
        if "in_proj_qkv" in name or "conv1d" in name:
            tensors[name] = torch.cat((t[:num_q_and_k], turn(t[num_q_and_k:], unit)))
        elif "in_proj_z" in name:
            tensors[name] = turn(t, unit)
        elif name.endswith(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")):
            tensors[name] = turn(t, 1)
        elif "out_proj" in name:
            tensors[name] = turn(t.t(), unit).t()


def experts_split(tensors: Tensors, c: Config) -> None:
    """Stacked ones, whose gate and up lie together."""
    split(
        "experts.gate_up_proj", {f"experts.{part}_proj.weight": nth(i, -2, 2) for i, part in enumerate(("gate", "up"))}
    )(tensors, c)
    renamed((r"experts\.down_proj$", "experts.down_proj.weight"))(tensors, c)


@each("conv.conv.weight")
def conv_squeezed(t: Tensor, c: Config) -> Tensor:
    return t.squeeze(1)


def granite_hybrid(tensors: Tensors, c: Config) -> None:
    """Gate and up apart, which are experts', shared ones' or, without experts, the layer's."""
    experts = "mlp.experts" if c.get("num_local_experts") else "mlp"
    shared = "mlp.shared_expert" if c.get("num_local_experts") else "mlp"
    parts = [(f"{name}_proj", i) for i, name in enumerate(("gate", "up"))]
    split("block_sparse_moe.input_linear", {f"{experts}.{name}": nth(i, -2, 2) for name, i in parts})(tensors, c)
    split("shared_mlp.input_linear", {f"{shared}.{name}": nth(i, 0, 2) for name, i in parts})(tensors, c)
    if not c.get("num_local_experts"):
        renamed((r"shared_mlp\.output_linear", "mlp.down_proj"))(tensors, c)


def hybrid_states(tensors: Tensors, c: Config) -> None:
    for name, t in tensors.items():
        if name.endswith((".A_log", ".D")):
            tensors[name] = (-torch.exp(t) if name.endswith(".A_log") else t).unsqueeze(-1)
        elif name.endswith("mamba.norm.weight"):
            tensors[name] = t.view(c["mamba_n_groups"], -1)
    renamed((r"\.dt_bias", ".dt_proj.bias"))(tensors, c)


def falcon_h1_multiplied(tensors: Tensors, c: Config) -> None:
    """Multipliers are taken into the weights."""
    wide, group = c["mamba_d_ssm"], c["mamba_n_groups"] * c["mamba_d_state"]
    sections = torch.repeat_interleave(
        torch.tensor(c["ssm_multipliers"]), torch.tensor([wide, wide, group, group, c["mamba_n_heads"]])
    )
    by = {
        "down_proj": c["mlp_multipliers"][1],
        "gate_proj": c["mlp_multipliers"][0],
        "k_proj": c["key_multiplier"] * c["attention_in_multiplier"],
        "q_proj": c["attention_in_multiplier"],
        "v_proj": c["attention_in_multiplier"],
        "o_proj": c["attention_out_multiplier"],
        "out_proj": c["ssm_out_multiplier"],
        "in_proj": c["ssm_in_multiplier"] * sections[:, None],
        "lm_head": c["lm_head_multiplier"],
        "embed_tokens": c["embedding_multiplier"],
    }
    for name, t in tensors.items():
        tensors[name] = t * by.get(name.split(".")[-2], 1.0)


def dbrx_experts(tensors: Tensors, c: Config) -> None:
    for name in [name for name in tensors if ".experts.mlp." in name]:
        t = tensors.pop(name).unflatten(0, (c["ffn_config"]["moe_num_experts"], -1))
        tensors[f"{name}.weight"] = t.transpose(1, 2) if name.endswith("w2") else t


def rope_divisors(tensors: Tensors, c: Config) -> None:
    """Llama 3's slowed frequencies, as what plain ones are divided by."""
    r = rope(c)
    if r.get("rope_type") != "llama3":
        return
    waves = 2 * torch.pi * r["rope_theta"] ** (torch.arange(0, head_dim(c), 2) / head_dim(c))
    old, low, high = r["original_max_position_embeddings"], r["low_freq_factor"], r["high_freq_factor"]
    kept = (old / waves - low) / (high - low)
    between = 1 / ((1 - kept) / r["factor"] + kept)
    tensors["rope_freqs.weight"] = torch.where(
        waves < old / high, torch.ones_like(waves), torch.where(waves > old / low, r["factor"], between)
    )


def longrope_factors(tensors: Tensors, c: Config) -> None:
    for length in ("long", "short"):
        if factors := rope(c).get(f"{length}_factor"):
            tensors[f"rope_factors_{length}.weight"] = torch.tensor(factors)


latent_correction = renamed(("e_score_correction_bias", "e_score_correction.bias"))
plamo2_states = renamed(
    (r"\.dt_bias$", ".dt_proj.bias"), (r"_norm_weight$", "_norm.weight"), (r"mixer\.([qk])_weight$", r"mixer.\1.weight")
)


def grok_experts(tensors: Tensors, c: Config) -> None:
    """Under the names of the first release, which are in the map."""
    experts_stacked(tensors, c)
    renamed(
        (r"model\.layers\.(\d+)\.mlp\.experts\.(\w+)\.weight", r"transformer.decoder_layer.\1.moe.\2.weight"),
        (r"model\.layers\.(\d+)\.moe_block\.gate", r"transformer.decoder_layer.\1.router"),
        (r"model\.layers\.(\d+)\.post_moe_norm", r"transformer.decoder_layer.\1.rms_norm_3"),
        (r"\.attn\.", ".self_attn."),
        (r"\.scale$", ".weight"),
    )(tensors, c)
