"""The published checkpoint format of FlowMo: names, shapes and the configuration they imply."""

import math
import re

import torch

from flowmo_diffusers.models.autoencoder_flowmo import FlowMoAutoencoder


# What this library calls a part, and what the published files call it. "img" is the patch stream, "txt" the tokens.
_BLOCK_PARTS = {
    "attn.{stream}.to_qkv": "{published}_attn.qkv",
    "attn.{stream}.norm_q.weight": "{published}_attn.norm.query_norm.scale",
    "attn.{stream}.norm_k.weight": "{published}_attn.norm.key_norm.scale",
    "attn.{stream}.to_out": "{published}_attn.proj",
    "{stream}.modulation": "{published}_mod.lin",
    "{stream}.mlp.0": "{published}_mlp.0",
    "{stream}.mlp.2": "{published}_mlp.2",
}
_STREAMS = {"patches": "img", "tokens": "txt"}
_OUTER_PARTS = {
    "patch_in": "img_in",
    "token_in": "txt_in",
    "latent_token": "txt_in.bias",
    "time_in.linear_1": "time_in.in_layer",
    "time_in.linear_2": "time_in.out_layer",
    "head.modulation": "final_layer_{read}.adaLN_modulation.1",
    "head.linear": "final_layer_{read}.linear",
}
_READ_STREAM = {"encoder": "txt", "decoder": "img"}


def published_name(name: str) -> str:
    """The published name of one of [`FlowMoAutoencoder`]'s parameters."""
    trunk, _, rest = name.partition(".")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", rest):
        layer, part = match.groups()
        for stream, published in _STREAMS.items():
            for ours, theirs in _BLOCK_PARTS.items():
                ours, theirs = ours.format(stream=stream), theirs.format(published=published)
                if part == ours or part.startswith(ours + "."):
                    return f"{trunk}.double_blocks.{layer}.{theirs}{part[len(ours) :]}"
    for ours, theirs in _OUTER_PARTS.items():
        if rest == ours or rest.startswith(ours + "."):
            return f"{trunk}.{theirs.format(read=_READ_STREAM[trunk])}{rest[len(ours) :]}"
    raise KeyError(name)


def published_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor in the published checkpoint of a model with this configuration, dead weights
    included."""
    patch = config["in_channels"] * config["patch_size"] ** 2
    channels = config["latent_channels"]
    heads = config["num_attention_heads"]
    trunks = {
        "encoder": (channels * (2 if config["quantizer"] == "kl" else 1), "encoder_hidden_size", "encoder_num_layers"),
        "decoder": (channels + 1, "decoder_hidden_size", "decoder_num_layers"),
    }
    shapes = {}
    for trunk, (tokens, hidden_size, num_layers) in trunks.items():
        dim = config[hidden_size]
        mlp = int(dim * config["mlp_ratio"])
        linears = {
            "time_in.in_layer": (dim, 256),
            "time_in.out_layer": (dim, dim),
            "img_in": (dim, patch),
            "txt_in": (dim, tokens),
            "final_layer_img.linear": (patch, dim),
            "final_layer_img.adaLN_modulation.1": (2 * dim, dim),
            "final_layer_txt.linear": (tokens, dim),
            "final_layer_txt.adaLN_modulation.1": (2 * dim, dim),
        }
        for layer in range(config[num_layers]):
            for stream in _STREAMS.values():
                prefix = f"double_blocks.{layer}.{stream}"
                linears[f"{prefix}_mod.lin"] = (6 * dim, dim)
                linears[f"{prefix}_attn.qkv"] = (3 * dim, dim)
                linears[f"{prefix}_attn.proj"] = (dim, dim)
                linears[f"{prefix}_mlp.0"] = (mlp, dim)
                linears[f"{prefix}_mlp.2"] = (dim, mlp)
                for norm in ("query_norm", "key_norm"):
                    shapes[f"{trunk}.{prefix}_attn.norm.{norm}.scale"] = (dim // heads,)
        for name, (rows, columns) in linears.items():
            shapes[f"{trunk}.{name}.weight"] = (rows, columns)
            shapes[f"{trunk}.{name}.bias"] = (rows,)
    return shapes


def infer_config(shapes: dict[str, tuple[int, ...]], **given) -> dict:
    """
    The configuration of a published checkpoint.

    Args:
        shapes: Tensor shapes by published name.
        given: Fields that shapes cannot tell (`rope_axes`, `codebook_bits`, `sample_size`, `num_latent_tokens`,
            `quantizer` "lfq" or "none", ...); `None` or absent means the published value.

    Raises:
        ValueError: If the names are not those of a FlowMo checkpoint; every missing and unknown name is listed.
    """
    given = {name: value for name, value in given.items() if value is not None}
    needed = [
        f"{trunk}.{part}"
        for trunk in ("encoder", "decoder")
        for part in (
            "txt_in.weight",
            "img_in.weight",
            "double_blocks.0.img_attn.norm.query_norm.scale",
            "double_blocks.0.img_mlp.0.weight",
        )
    ]
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(f"not a FlowMo checkpoint: tensors named {missing} are missing")

    def trunk(name: str) -> tuple[int, int, int]:
        layers = [int(m[1]) for key in shapes if (m := re.match(rf"{name}\.double_blocks\.(\d+)\.", key))]
        dim, tokens = shapes[f"{name}.txt_in.weight"]
        return max(layers) + 1, dim, tokens

    encoder_layers, encoder_dim, encoder_tokens = trunk("encoder")
    decoder_layers, decoder_dim, decoder_tokens = trunk("decoder")
    channels = decoder_tokens - 1
    config = {
        "in_channels": 3,
        "patch_size": math.isqrt(shapes["encoder.img_in.weight"][1] // 3),
        "latent_channels": channels,
        "codebook_bits": 14 if channels == 56 else 9,
        "quantizer": "kl" if encoder_tokens == 2 * channels else "lfq",
        "encoder_num_layers": encoder_layers,
        "decoder_num_layers": decoder_layers,
        "encoder_hidden_size": encoder_dim,
        "decoder_hidden_size": decoder_dim,
        "num_attention_heads": encoder_dim // shapes["encoder.double_blocks.0.img_attn.norm.query_norm.scale"][0],
        "mlp_ratio": shapes["encoder.double_blocks.0.img_mlp.0.weight"][0] / encoder_dim,
        **given,
    }
    expected = published_shapes(config)
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"not a FlowMo checkpoint: missing tensors {missing}, unknown tensors {unknown}")
    wrong = [f"{n} {tuple(shapes[n])}, expected {expected[n]}" for n in expected if tuple(shapes[n]) != expected[n]]
    if wrong:
        raise ValueError(f"tensors of unexpected shape for this configuration: {wrong}")
    return config


def from_published(state_dict: dict[str, torch.Tensor], **given) -> FlowMoAutoencoder:
    """
    A [`FlowMoAutoencoder`] that computes the published model's function; the weights nothing depends on are dropped.

    Args:
        state_dict: Published names to tensors.
        given: See [`infer_config`].
    """
    config = infer_config({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, **given)
    with torch.device("meta"):
        model = FlowMoAutoencoder(**config)
    weights = {name: state_dict[published_name(name)] for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def to_published(model: FlowMoAutoencoder) -> dict[str, torch.Tensor]:
    """
    The published names and tensors of a model. Weights the function does not depend on, which this library does not
    keep, are filled with a small constant: not zero, because the published training divides by their norms.
    """
    state_dict = {
        name: torch.ones(shape) if name.endswith(".scale") else torch.full(shape, 0.01)
        for name, shape in published_shapes(model.config).items()
    }
    for name, tensor in model.state_dict().items():
        state_dict[published_name(name)] = tensor.detach().cpu().clone()
    return state_dict
