"""The parts of the demo model: tokenizer, text encoder, autoencoder, UNet and scheduler.

All are ordinary classes of transformers and diffusers in the Stable Diffusion layout, so that
`StableDiffusionPipeline` and its image-to-image and inpainting kin load the saved directory.

The autoencoder's encoder is not trained. Its weights are set by hand so that it computes a linear
map of 4x4-pixel patches onto their principal components; the latents are thus known before any
training starts, and the decoder and the UNet can be trained side by side.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from workers.demo.shapes import ALIASES, RES, WORDS

PATCH = 4
"""Pixels of a picture's side to one latent pixel."""
LATENT = 4
"""Latent channels; four as in Stable Diffusion, whose inpainting pipeline asks for it."""
DETAIL_STD = 0.6
"""Standard deviation given to the fourth component (the first three, the colours, have 1)."""
TOKENS = 77


# ----------------------------------------------------------------- tokenizer
def _byte_characters() -> list[str]:
    """The 256 printable stand-ins for bytes of the GPT-2 and CLIP tokenizers."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


def build_tokenizer(words: Iterable[str] = WORDS) -> CLIPTokenizer:
    """A CLIP tokenizer over all bytes, so nothing is unknown, in which each word is one token."""
    characters = _byte_characters()
    vocab: dict[str, int] = {}
    for unit in characters + [c + "</w>" for c in characters]:
        vocab.setdefault(unit, len(vocab))
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # from the right end: the last unit always takes part
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
            parts[-2:] = ["".join(pair)]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token numbers, (len(texts), 77)."""
    encoded: Any = tokenizer(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


# -------------------------------------------------------------------- models
def build_vae() -> AutoencoderKL:
    """The autoencoder: pictures (3, 64, 64) in -1..1, latents (4, 16, 16)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT,
        sample_size=RES,
        scaling_factor=1.0,
        block_out_channels=(24, 32, 48),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder: two layers of width 128."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


@torch.no_grad()
def add_aliases(
    tokenizer: CLIPTokenizer, text: CLIPTextModel, aliases: Mapping[str, str] = ALIASES
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text encoder that know further words, each by the embedding of a known one."""
    wider = build_tokenizer([*WORDS, *aliases])
    wider_text = build_text_encoder(wider)
    weights: dict[str, Tensor] = dict(text.state_dict())
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    old, known = weights[name], tokenizer.get_vocab()
    new = old.mean(0).repeat(len(wider), 1)
    for token, number in wider.get_vocab().items():
        word = token.removesuffix("</w>")
        source = aliases[word] + "</w>" if word != token and word in aliases else token
        if source in known:
            new[number] = old[known[source]]
    wider_text.load_state_dict({**weights, name: new})
    return wider, wider_text


def build_unet() -> UNet2DConditionModel:
    """The denoiser over latents (4, 16, 16); 3.7 million parameters."""
    return UNet2DConditionModel(
        sample_size=RES // PATCH,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(64, 80, 96),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM with v-prediction and zero terminal SNR (Lin et al. 2023, arXiv 2305.08891)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


# ------------------------------------------------------ the hand-set encoder
def patches(pictures: Tensor) -> Tensor:
    """(n, 3, h, w) to (n, h/4, w/4, 48); a patch is ordered by row, column, colour."""
    n, c, h, w = pictures.shape
    cut = pictures.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, h // PATCH, w // PATCH, PATCH * PATCH * c)


def fit_projection(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of patches: matrix (48, 4) and offset (4,).

    A patch's latent is patch @ matrix + offset.
    """
    flat = patches(pictures).reshape(-1, PATCH * PATCH * 3).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    values, vectors = values.flip(0)[:LATENT], vectors.flip(1)[:, :LATENT]
    vectors = vectors * torch.sign(vectors.sum(0) + 1e-9)
    wanted = torch.tensor([1.0, 1.0, 1.0, DETAIL_STD], dtype=torch.float64)
    matrix = vectors / values.sqrt() * wanted
    return matrix.float(), (-(mean @ matrix)).float()


def project(pictures: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Latents (n, 4, h/4, w/4) of pictures (n, 3, h, w) in -1..1."""
    return (patches(pictures) @ matrix + offset).permute(0, 3, 1, 2).contiguous()


def _space_to_depth(down: nn.Module, matrix: Tensor, offset: Tensor, second: nn.Module) -> None:
    """Write the patch projection into the encoder's two stride-2 convolutions."""
    first_w: Any = down.weight
    second_w: Any = second.weight
    second_b: Any = second.bias
    for row in range(PATCH):
        for col in range(PATCH):
            for colour in range(3):
                inner = ((row % 2) * 2 + col % 2) * 3 + colour
                first_w[inner, colour, row % 2, col % 2] = 1.0
                pixel = (row * PATCH + col) * 3 + colour
                second_w[:LATENT, inner, row // 2, col // 2] = matrix[pixel]
    second_b[:LATENT] = offset


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, matrix: Tensor, offset: Tensor, big: float = 100.0) -> None:
    """Write z = patch @ matrix + offset into the autoencoder's encoder.

    Residual branches are zero. The last GroupNorm is made linear by constant channels of +-big
    that fix its variance, the last SiLU by carrying each value as a pair: silu(a) - silu(-a) = a.
    """
    encoder: Any = vae.encoder
    for parameter in encoder.parameters():
        parameter.zero_()
    for module in encoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(1.0)
    for colour in range(3):
        encoder.conv_in.weight[colour, colour, 1, 1] = 1.0
    blocks = encoder.down_blocks
    first, second = (blocks[i].downsamplers[0].conv for i in (0, 1))
    _space_to_depth(first, matrix, offset, second)
    for channel in range(PATCH * 3):
        blocks[1].resnets[0].conv_shortcut.weight[channel, channel, 0, 0] = 1.0
    spread, norm, out = blocks[2].resnets[0].conv_shortcut, encoder.conv_norm_out, encoder.conv_out
    half, size = LATENT // 2, norm.num_channels // 2
    for group in range(2):
        low = size * group
        for place in range(half):
            value, plus, minus = half * group + place, low + place, low + half + place
            for channel, sign in ((plus, 1.0), (minus, -1.0)):
                spread.weight[channel, value, 0, 0] = sign
                out.weight[value, channel, 1, 1] = sign
        spread.bias[low + LATENT : low + size : 2] = big
        spread.bias[low + LATENT + 1 : low + size : 2] = -big
    norm.weight.fill_(big * math.sqrt((size - LATENT) / size))
    out.bias[LATENT:] = -20.0  # log variance: practically without noise
    quant: Any = vae.quant_conv
    quant.weight.copy_(torch.eye(2 * LATENT)[:, :, None, None])
    quant.bias.zero_()


# ------------------------------------------------------- speed on processors
class _FullGroupNorm(nn.GroupNorm):
    """GroupNorm in float32: in bfloat16 it is several times slower on processors."""

    def forward(self, input: Tensor) -> Tensor:
        """(n, c, h, w) to the same, float32."""
        return functional.group_norm(
            input.float(), self.num_groups, self.weight, self.bias, self.eps
        )


def quicken(model: nn.Module) -> None:
    """Let a model's GroupNorms run in float32 under autocast; the parameters stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = _FullGroupNorm


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write the whole model in float16 as a StableDiffusionPipeline directory."""
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
