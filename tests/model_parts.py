"""Parts of the tiny pipelines in tests.models: tokenizers of few tokens, small random networks."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

WORDS = ("a", "the", "of", "on", "photo", "red", "blue", "green", "cat", "dog")


# ------------------------------------------------------------------------ tokenizers
def _byte_characters() -> list[str]:
    """The 256 printable stand-ins for bytes of the GPT-2 and CLIP tokenizers."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """All bytes, and each of WORDS as one token."""
    characters = _byte_characters()
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # from the right end, so that no merge spoils another
            merges.append((parts[-2], parts[-1]))
            parts[-2:] = ["".join(parts[-2:])]
    merges = list(dict.fromkeys(merges))
    tokens = [*characters, *(c + "</w>" for c in characters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>", pad]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad
    )


def t5_tokenizer() -> Any:
    """One token a printable character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=64)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Any:
    """One token a byte, and the marks of a conversation."""
    tokens = [*_byte_characters(), "<|endoftext|>"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        model_max_length=4096,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"im_start_token": "<|im_start|>"},
    )
    tokenizer.chat_template = CHAT
    return tokenizer


# ------------------------------------------------------------------------ components
def clip_text(tokenizer: Any, name: str = "CLIPTextModel") -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, name)(config)


def t5_text(tokenizer: Any, width: int = 32) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return transformers.T5EncoderModel(config)


def qwen3_text(tokenizer: Any, layers: int = 2) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return transformers.Qwen3ForCausalLM(config)


def qwen_vl_text(tokenizer: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def vae(channels: int, **differences: Any) -> Any:
    """Eight pixels to one latent pixel, as in the published models."""
    return diffusers.AutoencoderKL(
        latent_channels=channels,
        sample_size=64,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **differences,
    )


def unet(**differences: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=16,
        **differences,
    )


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
