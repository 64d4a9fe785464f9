"""Tiny random pipelines of the real families, built offline: 1 to 4 MB, 64x64 in 0.1 s.

Nothing is downloaded: tokenizers are byte-level vocabularies, weights come from a fixed seed, and
save_pretrained writes the directory that DiffusionPipeline.from_pretrained loads.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.model_parts import (
    NOISE,
    clip_text,
    clip_tokenizer,
    qwen3_text,
    qwen_tokenizer,
    qwen_vl_text,
    t5_text,
    t5_tokenizer,
    unet,
    vae,
)


def build(family: str, out: Path) -> Path:
    """Write the pipeline of a family (a key of FAMILIES) to the directory `out`, and return it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FAMILIES[family]().save_pretrained(out, safe_serialization=True)
    return out


@functools.cache
def tiny(family: str) -> Path:
    """The pipeline of a family, built once a process; to be read, not changed."""
    return build(family, _home() / family)


@functools.cache
def _home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


# -------------------------------------------------------------------------- families
def sd15(**extra: Any) -> Any:
    """The layout of Stable Diffusion 1.5, without its safety checker."""
    tokenizer = clip_tokenizer()
    parts = {"safety_checker": None, "feature_extractor": None, **extra}
    return diffusers.StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=unet(
            cross_attention_dim=32,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=diffusers.DDIMScheduler(
            **NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        requires_safety_checker=parts["safety_checker"] is not None,
        **parts,
    )


def sd15_refusing() -> Any:
    """sd15 with a safety checker that refuses every picture."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    layers = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "projection_dim": 32,
    }
    config = transformers.CLIPConfig(
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        text_config={**layers, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1},
        projection_dim=32,
    )
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return sd15(safety_checker=checker, feature_extractor=transformers.CLIPImageProcessor(**sizes))


def sdxl() -> Any:
    """The layout of Stable Diffusion XL: two text encoders, size conditioning."""
    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025),
        text_encoder=clip_text(first),
        text_encoder_2=clip_text(second, "CLIPTextModelWithProjection"),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet(
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            **NOISE, steps_offset=1, timestep_spacing="leading"
        ),
        add_watermarker=False,
    )


def flux() -> Any:
    """The layout of FLUX.1-schnell: a transformer, CLIP and T5, flow matching."""
    first, second = clip_tokenizer(), t5_tokenizer()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae(
            16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip_text(first),
        tokenizer=first,
        text_encoder_2=t5_text(second),
        tokenizer_2=second,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def sd3() -> Any:
    """The layout of Stable Diffusion 3: two CLIP encoders and T5, flow matching."""
    first, second, third = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=96,
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_text(first, "CLIPTextModelWithProjection"),
        tokenizer=first,
        text_encoder_2=clip_text(second, "CLIPTextModelWithProjection"),
        tokenizer_2=second,
        text_encoder_3=t5_text(third, 64),
        tokenizer_3=third,
        vae=vae(
            16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    )


def klein() -> Any:
    """The layout of FLUX.2-klein: a transformer and a language model, distilled."""
    tokenizer = qwen_tokenizer()
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(16, 16, 32, 32),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
            sample_size=64,
        ),
        text_encoder=qwen3_text(tokenizer, layers=28),  # the pipeline reads layers 9, 18 and 27
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=96,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=True,
    )


def qwen_image() -> Any:
    """The layout of Qwen-Image: a transformer and a vision-language model."""
    tokenizer = qwen_tokenizer()
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
        text_encoder=qwen_vl_text(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=64,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def z_image() -> Any:
    """The layout of Z-Image: one stream of text and picture."""
    tokenizer = qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 512, 512],
    )
    with torch.no_grad():  # its pad tokens come uninitialised
        transformer.x_pad_token.normal_(std=0.02)
        transformer.cap_pad_token.normal_(std=0.02)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(
            16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=qwen3_text(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd15": sd15,
    "sd15_refusing": sd15_refusing,
    "sdxl": sdxl,
    "flux": flux,
    "sd3": sd3,
    "klein": klein,
    "qwen_image": qwen_image,
    "z_image": z_image,
}
