"""diffusers' image autoencoders and TiTok as reconstructors, and any peer by a word."""

import math
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from flowmo_diffusers.engine.digests import config_entries, module_digest
from flowmo_diffusers.engine.seeding import keyed_generator
from flowmo_diffusers.metrics.codecs import CODECS, CodecReconstructor
from flowmo_diffusers.metrics.reconstructors import Reconstruction, Reconstructor
from flowmo_diffusers.models.titok import TiTokModel


# The entry of its configuration that says by how much a class divides height and width: the factor itself, or the
# widths of levels, all but one of which halve them.
_LEVELS = {
    "AsymmetricAutoencoderKL": "down_block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
    "AutoencoderKL": "block_out_channels",
    "AutoencoderKLFlux2": "block_out_channels",
    "AutoencoderKLHunyuanImage": "spatial_compression_ratio",
    "AutoencoderKLKVAE": "ch_mult",
    "AutoencoderTiny": "encoder_block_out_channels",
    "ConsistencyDecoderVAE": "encoder_block_out_channels",
    "VQModel": "block_out_channels",
}

# Classes of diffusers that take images (b, 3, h, w) and give them back in that size.
SUPPORTED = (*_LEVELS, "AutoencoderRAE")

# What is stored of an image, where it is not float16 latents.
_INDICES = "log2(codebook size) bits an index"
_COUNTED = {"AutoencoderTiny": "8 bits a number of the latents", "VQModel": _INDICES}


class DiffusersReconstructor(Reconstructor):
    """
    An image autoencoder of diffusers. What is counted is all that its decoder is given:

    - of a `VQModel` indices into its codebook, log2(codebook size) bits each, which need not be whole;
    - of an `AutoencoderTiny` 8 bits for each number of the latents, clamped and scaled by its `scale_latents`: as
      TAESD's authors store them;
    - of all others 16 bits for each number of the latents, rounded to float16; of a distribution its mode.

    Args:
        autoencoder: Of one of the classes in `SUPPORTED`, on its device, in its dtype; it is put into evaluation mode.
        name: Of its row.
        seed: Of the noise from which a `ConsistencyDecoderVAE` decodes; no other draws any.

    Raises:
        ValueError: If the class is not supported, or its images have not 3 channels.
    """

    def __init__(self, autoencoder: diffusers.ModelMixin, name: str, seed: int = 0):
        self.kind = type(autoencoder).__name__
        _check_supported(self.kind, name)
        config = config_entries(autoencoder)
        if config.get("in_channels", 3) != 3:
            raise ValueError(f"baseline {name!r} is for inputs of {config['in_channels']} channels; images have 3")
        self.autoencoder = autoencoder.eval()
        self.seed = seed
        self.codebook_size = config["num_vq_embeddings"] if self.kind == "VQModel" else None
        # aMUSEd's VQModel, the only one that looks its codes up, and RAE are trained on [0, 1], the others on [-1, 1].
        self.takes_unit_range = self.kind == "AutoencoderRAE" or config.get("lookup_from_codebook", False)
        settings = {
            "class": self.kind,
            "weights": module_digest(autoencoder),
            "autoencoder": config,
            "dtype": str(autoencoder.dtype),
            "range": [0, 1] if self.takes_unit_range else [-1, 1],
            "seed": seed,
            "counted": _COUNTED.get(self.kind, "16 bits a number of the latents"),
        }
        super().__init__(name, settings)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, numbers: Sequence[int]) -> Reconstruction:
        """
        See [`Reconstructor`].

        Raises:
            ValueError: If the autoencoder cannot divide height and width as it does.
        """
        self._check_size(*images.shape[-2:])
        autoencoder = self.autoencoder
        x = images.to(autoencoder.device, autoencoder.dtype)
        encoded = autoencoder.encode((x + 1) / 2 if self.takes_unit_range else x, return_dict=False)[0]
        z = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
        z, bits, indices = self._store(z)
        y = self._decode(z, numbers).float().cpu()
        y = (2 * y - 1 if self.takes_unit_range else y).clamp(-1, 1)
        return Reconstruction(y, torch.full((len(images),), bits / 8, dtype=torch.float64), indices)

    def _store(self, z: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor | None]:
        """Latents to what is left of them once stored, the bits of an image, and indices where there are any."""
        autoencoder, numbers = self.autoencoder, z[0].numel()
        if self.kind == "VQModel":
            _, _, (_, _, indices) = autoencoder.quantize(z)
            b, c, h, w = z.shape
            z = autoencoder.quantize.get_codebook_entry(indices, (b, h, w, c))
            return z, h * w * math.log2(self.codebook_size), indices.view(b, h * w, 1).cpu()
        if self.kind == "AutoencoderTiny":
            levels = (autoencoder.scale_latents(z.float()) * 255).round()
            return autoencoder.unscale_latents(levels / 255).to(z.dtype), 8 * numbers, None
        return z.half().to(z.dtype), 16 * numbers, None

    def _decode(self, z: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        if self.kind == "ConsistencyDecoderVAE":
            generators = [keyed_generator(self.seed, "decoding", number) for number in numbers]
            return self.autoencoder.decode(z, generator=generators).sample
        return self.autoencoder.decode(z).sample  # a VQModel finds the codebook's vectors again

    def _check_size(self, height: int, width: int) -> None:
        if self.kind == "AutoencoderRAE":
            return _check_square(self.name, self.autoencoder.decoder_image_size, height, width)
        levels = self.autoencoder.config[_LEVELS[self.kind]]
        factor = levels if isinstance(levels, int) else 2 ** (len(levels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"baseline {self.name!r} takes sides that are multiples of {factor}, not {height} x {width} pixels"
            )


class TiTokReconstructor(Reconstructor):
    """
    A [`TiTokModel`], of which indices are stored, log2(codebook size) bits each, which need not be whole.

    Args:
        model: On its device, in its dtype; it is put into evaluation mode.
        name: Of its row.
    """

    def __init__(self, model: TiTokModel, name: str):
        self.model = model.eval()
        self.codebook_size = model.config.codebook_size
        settings = {
            "class": type(model).__name__,
            "weights": module_digest(model),
            "autoencoder": config_entries(model),
            "dtype": str(model.dtype),
            "counted": _INDICES,
        }
        super().__init__(name, settings)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, numbers: Sequence[int]) -> Reconstruction:
        """
        See [`Reconstructor`].

        Raises:
            ValueError: If images are not of the model's size.
        """
        model, side = self.model, self.model.config.sample_size
        _check_square(self.name, side, *images.shape[-2:])
        indices = model.encode(images.to(model.device, model.dtype))
        y = model.decode(indices).float().cpu().clamp(-1, 1)
        bits = indices.shape[1] * math.log2(self.codebook_size)
        num_bytes = torch.full((len(images),), bits / 8, dtype=torch.float64)
        return Reconstruction(y, num_bytes, indices[..., None].cpu())


def load_baseline(
    spec: str,
    num_bytes: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> Reconstructor:
    """
    A peer by a word.

    Args:
        spec: "jpeg" or "webp", within `num_bytes`; "jpeg:75" or "webp:50", at that quality; or the folder or Hub id of
            an autoencoder of diffusers or a [`TiTokModel`], with ":" and a subfolder where it is part of something
            larger, as in "stabilityai/stable-diffusion-xl-base-1.0:vae".
        num_bytes: The most bytes an image may take of a codec without a quality; otherwise not used.
        device: Of the autoencoder.
        dtype: Of the autoencoder.
        name: Of the autoencoder's row; default: `spec`. Codecs have their own.

    Raises:
        ImportError: If the package of a [`TiTokModel`] is not installed.
        ValueError: If a codec has neither or a wrong quality, or what is named is no image autoencoder.
        OSError: If there is nothing of that name, or no safetensors in it.
    """
    codec, colon, quality = spec.partition(":")
    if codec in CODECS:
        return _load_codec(codec, quality if colon else None, num_bytes)
    path, subfolder = spec, ""
    if not Path(spec).is_dir() and ":" in spec:
        path, _, subfolder = spec.rpartition(":")
    try:
        config = diffusers.AutoencoderKL.load_config(path, subfolder=subfolder)
    except OSError as error:
        raise OSError(
            f"baseline {spec!r}: no config.json of an autoencoder can be read; the part of a pipeline is named as in "
            f"'id:vae' ({error})"
        ) from None
    kind = config.get("_class_name")
    if kind == TiTokModel.__name__:
        model_class, reconstructor = TiTokModel, TiTokReconstructor
    else:
        _check_supported(kind, spec)
        model_class, reconstructor = getattr(diffusers, kind), DiffusersReconstructor
    autoencoder, info = model_class.from_pretrained(
        path, subfolder=subfolder, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"baseline {spec!r}: its weights lack {sorted(info['missing_keys'])}")
    return reconstructor(autoencoder.to(device), name or spec)


def _load_codec(codec: str, quality: str | None, num_bytes: int | None) -> CodecReconstructor:
    if quality is None:
        if num_bytes is None:
            raise ValueError(f"baseline {codec!r} needs num_bytes, or a quality as in '{codec}:75'")
        return CodecReconstructor(codec, num_bytes=num_bytes)
    if not quality.isdecimal():
        raise ValueError(f"baseline '{codec}:{quality}': the quality must be a whole number from 1 to 100")
    return CodecReconstructor(codec, quality=int(quality))


def _check_supported(kind: str | None, name: str) -> None:
    if kind == "FlowMoAutoencoder":
        raise ValueError(
            f"baseline {name!r} is a FlowMoAutoencoder: give its pipeline as --pretrained_model_name_or_path"
        )
    if kind not in SUPPORTED:
        raise ValueError(
            f"baseline {name!r} is of class {kind}, which is no image autoencoder that can be evaluated; these can: "
            f"{', '.join((*SUPPORTED, TiTokModel.__name__))}"
        )


def _check_square(name: str, side: int, height: int, width: int) -> None:
    if (height, width) != (side, side):
        raise ValueError(f"baseline {name!r} takes images of {side} x {side} pixels, not of {height} x {width}")
