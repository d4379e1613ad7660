"""A 1D tokenizer in the manner of TiTok (arXiv 2406.07550), a peer of FlowMo: that of the package titok-pytorch."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn


class TiTokModel(ModelMixin, ConfigMixin):
    """
    `titok_pytorch.TiTokTokenizer` as a model of diffusers: patches and learned tokens through a transformer, the
    learned tokens quantized, and a second transformer from them and mask tokens to the pixels.

    The package's are both transformers, all other layers, the quantizer, and the way from an image to indices and from
    these to an image. Ours is what it leaves open or does not do:

    - The quantizer's loss, which `TiTokTokenizer.forward` drops, is returned.
    - The codes are trained by the optimiser, an option of the quantizer, instead of following the encoder by moving
      averages, which are buffers: so whoever averages weights averages codes and encoder alike. Codes that hardly any
      token takes are replaced by tokens of the batch, another option of it.
    - The decoder has rotary positions, an option of the transformer: without any it is given a set of codes, not a
      sequence, since `TiTokTokenizer` gives positions to image tokens only.
    - Queries and keys are normalised, another option of the transformer, and learned tokens and codes start further
      apart.
    - Quantizing is in float32 also under autocast, in which the nearest code would be another.

    Args:
        sample_size: Height and width of images in pixels; there are no others.
        patch_size: Side of a patch in pixels, a divisor of `sample_size`.
        hidden_size: Channels of both transformers.
        encoder_num_layers: Blocks of attention and MLP.
        decoder_num_layers: Likewise.
        num_attention_heads: Of both transformers.
        attention_head_dim: Channels of a head, an even number; of a single head `hidden_size`.
        num_latent_tokens: Indices of an image.
        codebook_size: Codes; an index is log2(codebook_size) bits.
        codebook_dim: Channels of a code, between linear projections.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If a size is not a positive whole number, or does not fit the others.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        hidden_size: int = 64,
        encoder_num_layers: int = 3,
        decoder_num_layers: int = 3,
        num_attention_heads: int = 2,
        attention_head_dim: int = 32,
        num_latent_tokens: int = 128,
        codebook_size: int = 256,
        codebook_dim: int = 8,
    ):
        super().__init__()
        self._check()
        try:
            from titok_pytorch import TiTokTokenizer  # optional
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            raise ImportError(f'TiTok needs titok-pytorch: pip install "flowmo_diffusers[peers]" ({error})') from error
        blocks = {"attn_qk_norm": True}
        self.tokenizer = TiTokTokenizer(
            dim=hidden_size,
            image_size=sample_size,
            patch_size=patch_size,
            num_latent_tokens=num_latent_tokens,
            enc_depth=encoder_num_layers,
            enc_heads=num_attention_heads,
            enc_dim_head=attention_head_dim,
            dec_depth=decoder_num_layers,
            dec_heads=num_attention_heads,
            dec_dim_head=attention_head_dim,
            codebook_size=codebook_size,
            enc_kwargs=blocks,
            dec_kwargs=blocks | {"rotary_pos_emb": True, "rotary_emb_dim": attention_head_dim},
        )
        # Not by `vq_kwargs`, in which the package takes no `codebook_dim`.
        quantizer = VectorQuantize(
            dim=hidden_size,
            codebook_dim=codebook_dim,
            codebook_size=codebook_size,
            learnable_codebook=True,
            ema_update=False,
            threshold_ema_dead_code=0.5,
            # The package looks once in a process, which may be before there are others.
            sync_codebook=torch.distributed.is_available() and torch.distributed.is_initialized(),
        )
        self.tokenizer.vq = _Float32Quantizer(quantizer)
        self._spread()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """
        Images (b, 3, sample_size, sample_size) in [-1, 1] to indices (b, tokens), int64; without gradient, and of a
        model in evaluation mode: training replaces codes.
        """
        return self.tokenizer.tokenize(x)

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices (b, tokens) to images (b, 3, sample_size, sample_size), about [-1, 1], not clamped."""
        return self.tokenizer.codebook_ids_to_images(indices)

    def forward(self, x: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        For training, with the output of diffusers' `VQModel`.

        Args:
            x: As in [`~TiTokModel.encode`].
            return_dict: Or a tuple.

        Returns:
            `sample`, the reconstruction, and `commit_loss`, that of the codebook, a scalar: the mean of (e - z)^2, z
            what the encoder gives and e the codes nearest to it, which trains both; 0 in evaluation mode.
        """
        _, y = self.tokenizer(x, return_recon_images=True)
        loss, self.tokenizer.vq.loss = self.tokenizer.vq.loss, None  # which holds all that its gradient needs
        return DecoderOutput(sample=y, commit_loss=loss) if return_dict else (y, loss)

    def _spread(self) -> None:
        """
        Learned tokens and codes as far apart as what they are added to or compared with. The package's are near 0:
        then all tokens read the same of the image, its mean colour, and encoder and codes stay together there.
        """
        tokenizer = self.tokenizer
        for tokens in (tokenizer.latents, tokenizer.pos_emb, tokenizer.mask_tokens):
            nn.init.normal_(tokens)
        nn.init.normal_(tokenizer.vq.quantizer._codebook.embed, std=3**-0.5)  # as what `project_in` gives

    def _check(self) -> None:
        sizes = {name: value for name, value in self.config.items() if name[0] != "_"}
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if sizes["sample_size"] % sizes["patch_size"]:
            raise ValueError(f"patch_size={sizes['patch_size']} must divide sample_size={sizes['sample_size']}")
        width, heads, hidden = (sizes[n] for n in ("attention_head_dim", "num_attention_heads", "hidden_size"))
        if width % 2:
            raise ValueError(f"attention_head_dim={width} must be even")
        if heads == 1 and width != hidden:  # the package has no projection after a single head
            raise ValueError(f"attention_head_dim={width} of a single head must be hidden_size={hidden}")


class _Float32Quantizer(nn.Module):
    """A quantizer of vector_quantize_pytorch that autocast does not reach, and whose last loss is kept."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.quantizer = quantizer
        self.loss: torch.Tensor | None = None

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            quantized, indices, self.loss = self.quantizer(z.to(self.quantizer.codebook.dtype))
        return quantized, indices, self.loss

    def get_output_from_indices(self, indices: torch.Tensor) -> torch.Tensor:
        return self.quantizer.get_output_from_indices(indices)
