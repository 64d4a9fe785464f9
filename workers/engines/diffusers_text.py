"""Prompts, read whole or refused: the text encoders of diffusers cut what is too long for them.

CLIP reads 77 tokens, a beginning, 75 of text and an end. Models that have only CLIP get a longer
prompt in pieces of 75 tokens, each encoded alone and all joined, as the web UIs do
(https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#infinite-prompt-length);
the pooled embedding of SDXL is that of the first piece. There is no weighting syntax: a prompt is
plain text. Other models read `max_sequence_length` tokens of a T5 or language model.

A picture may not depend on its neighbours, so jobs share a micro-batch only if their texts have
one `size`; to this all texts of the micro-batch are padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import transformers
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin

from farm.errors import InvalidParameter, InvalidPrompt
from farm.spec import JobSpec
from workers.engines.diffusers_kinds import Pipeline

Size = tuple[int, ...]
LARGEST = {"StableDiffusion3Pipeline": 512, "QwenImagePipeline": 1024}
"""The most of max_sequence_length (see their check_inputs), where that is not the default."""


class Texts(Protocol):
    """How a pipeline reads the prompts of jobs."""

    def size(self, job: JobSpec) -> Size:
        """What jobs of one micro-batch must have in common. Raises Invalid."""

    def arguments(self, jobs: Sequence[JobSpec], size: Size) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call for jobs of this size."""


def texts(base: Pipeline, strict: bool) -> Texts:
    """How the pipeline reads prompts. `strict`: equal bytes in every company."""
    pairs = _encoders(base.pipe)
    only_clip = pairs and all(_is_clip(encoder) for _, encoder in pairs)
    if only_clip and isinstance(base.pipe, StableDiffusionMixin):
        return ClipTexts(base, pairs)
    return LongTexts(base, pairs, strict)


def _encoders(pipe: Any) -> list[tuple[Any, Any]]:
    """The pairs of tokenizer and text encoder that are there, the longest reader last."""
    names = ("", "_2", "_3")
    found = [
        [getattr(pipe, f"{part}{n}", None) for part in ("tokenizer", "text_encoder")] for n in names
    ]
    return [(tokenizer, encoder) for tokenizer, encoder in found if tokenizer and encoder]


def _is_clip(encoder: Any) -> bool:
    return isinstance(
        encoder, transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection
    )


def _check_clip_skip(job: JobSpec, base: Pipeline, pairs: Iterable[tuple[Any, Any]]) -> None:
    if job.clip_skip is None:
        return
    layers = [e.config.num_hidden_layers for _, e in pairs if _is_clip(e)]
    if "clip_skip" not in base.accepts or not layers:
        raise InvalidParameter(f"clip_skip: {type(base.pipe).__name__} has none")
    if job.clip_skip >= min(layers):
        most = min(layers) - 1
        raise InvalidParameter(f"clip_skip: at most {most} for this model, got {job.clip_skip}")


class ClipTexts:
    """Stable Diffusion 1, 2 and XL. The size is the number of pieces."""

    def __init__(self, base: Pipeline, pairs: list[tuple[Any, Any]]) -> None:
        self._base, self._pairs = base, pairs
        self._is_xl = "pooled_prompt_embeds" in base.accepts

    def size(self, job: JobSpec) -> Size:
        _check_clip_skip(job, self._base, self._pairs)
        given = (job.prompt, job.negative_prompt)
        return (max(len(_pieces(t, text)) for t, _ in self._pairs for text in given),)

    def arguments(self, jobs: Sequence[JobSpec], size: Size) -> dict[str, Any]:
        """The texts themselves while they fit, else their embeddings.

        So too for clip skip on Stable Diffusion 1: diffusers 0.42 looks for a layer there that
        transformers 5 has moved.
        """
        prompts = [job.prompt for job in jobs]
        negatives = [job.negative_prompt for job in jobs]
        skip = jobs[0].clip_skip
        if size == (1,) and (self._is_xl or skip is None):
            return {"prompt": prompts, "negative_prompt": negatives, "clip_skip": skip}
        embeds, pooled = self.encode(prompts, size[0], skip)
        negative_embeds, negative_pooled = self.encode(negatives, size[0], None)
        return {
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative_embeds,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], pieces: int, skip: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `encode_prompt` of the pipelines, which SDXL's skip one layer more.

        Embeddings of shape (texts, pieces x 77, width) and, for SDXL, the pooled (texts, width).
        """
        device = self._base.pipe._execution_device
        parts, pooled = [], None
        for tokenizer, encoder in self._pairs:
            split = [_pieces(tokenizer, text) for text in texts]
            rows = [_row(tokenizer, piece) for of in split for piece in _filled(of, pieces)]
            ids = torch.tensor(rows, device=device)
            output = encoder(ids, output_hidden_states=True)
            if self._is_xl:
                layer = output.hidden_states[-(skip or 0) - 2]
            else:  # the last layer's norm, whichever is the last to be read
                norm = getattr(encoder, "text_model", encoder).final_layer_norm
                layer = norm(output.hidden_states[-(skip or 0) - 1])
            parts.append(layer.reshape(len(texts), -1, layer.shape[-1]))
            if output[0].ndim == 2:
                pooled = output[0].reshape(len(texts), pieces, -1)[:, 0]
        return torch.cat(parts, -1).to(self._pairs[-1][1].dtype), pooled


def _pieces(tokenizer: Any, text: str) -> list[list[int]]:
    """The tokens of a text by 75, as many as there is room for; one empty piece for no text."""
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    room = tokenizer.model_max_length - 2
    return [ids[at : at + room] for at in range(0, max(1, len(ids)), room)]


def _filled(pieces: list[list[int]], count: int) -> list[list[int]]:
    return pieces + [[]] * (count - len(pieces))


def _row(tokenizer: Any, piece: list[int]) -> list[int]:
    row = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row))


class LongTexts:
    """All other pipelines. The size is the max_sequence_length to call them with.

    Longer prompts than the default are read with the largest. Those that fit are not, for it
    changes the picture. A tokenizer that is no text tokenizer (of a processor) is not checked.
    """

    def __init__(self, base: Pipeline, pairs: list[tuple[Any, Any]], strict: bool) -> None:
        self._base, self._pairs, self._strict = base, pairs, strict
        tokenizer, encoder = pairs[-1] if pairs else (None, None)
        is_text = isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
        self._tokenizer: Any = tokenizer if is_text else None
        told = base.accepts.get("max_sequence_length")
        self._default = self._largest = getattr(tokenizer, "model_max_length", None) or math.inf
        if told and told.default and not _is_clip(encoder):
            self._default = told.default
            self._largest = LARGEST.get(type(base.pipe).__name__, told.default)

    def size(self, job: JobSpec) -> Size:
        _check_clip_skip(job, self._base, self._pairs)
        counts = [self._count(job.prompt)]
        if "negative_prompt" in self._base.accepts:
            counts.append(self._count(job.negative_prompt))
        for name, count in zip(("prompt", "negative_prompt"), counts, strict=False):
            if count > self._largest:
                raise InvalidPrompt(
                    f"{name}: it has {count} tokens, and this model reads at most {self._largest}"
                )
        limit = self._default if max(counts) <= self._default else self._largest
        # Qwen-Image pads to the longest of the micro-batch, which the last bits show
        by_length = self._strict and hasattr(self._base.pipe, "prompt_template_encode")
        return (int(min(limit, 2**31)), *(counts if by_length else ()))

    def arguments(self, jobs: Sequence[JobSpec], size: Size) -> dict[str, Any]:
        found: dict[str, Any] = {
            "prompt": [job.prompt for job in jobs],
            "negative_prompt": [job.negative_prompt for job in jobs],
            "clip_skip": jobs[0].clip_skip,
        }
        if size[0] > self._default:
            found["max_sequence_length"] = size[0]
        return found

    def _count(self, text: str) -> int:
        """The tokens of a text as the pipeline would encode it, with what it puts around."""
        if self._tokenizer is None:
            return 0
        pipe, around = self._base.pipe, 0
        if template := getattr(pipe, "prompt_template_encode", None):  # Qwen-Image
            text, around = template.format(text), pipe.prompt_template_encode_start_idx
        elif self._tokenizer.chat_template:  # FLUX.2-klein and Z-Image
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=type(pipe).__name__.startswith("ZImage"),
            )
        return len(self._tokenizer(text, truncation=False, verbose=False).input_ids) - around
