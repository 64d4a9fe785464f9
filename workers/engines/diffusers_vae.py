"""Decoding latents to pictures, once more in float32 where half precision was not enough.

Some VAEs overflow in float16 (SDXL's is known for it), and the picture is then NaN. The pipelines
call `vae.decode`, so that is where the second attempt is made: nothing is rendered again, and the
safety checker sees the good picture.
"""

from __future__ import annotations

from typing import Any

import torch


def retry_in_float32(vae: Any) -> None:
    """Make `vae.decode` decode pictures with NaN or infinite values a second time.

    Only these are replaced, so the others do not depend on their neighbours. The VAE has its
    dtype back afterwards, exactly: float32 holds every value of the smaller types.
    """
    decode = vae.decode

    def decode_again(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = decode(latents, *args, **kwargs)
        dtype = vae.dtype
        spoilt = ~output[0].isfinite().flatten(1).all(1)
        if dtype == torch.float32 or not bool(spoilt.any()) or _is_elsewhere(vae):
            return output
        try:
            vae.to(torch.float32)
            again = decode(latents.float(), *args, **kwargs)
        finally:
            vae.to(dtype)
        output[0][spoilt] = again[0][spoilt].to(output[0].dtype)
        return output

    vae.decode = decode_again


def restore_dtype(vae: Any, dtype: torch.dtype | None) -> None:
    """The dtype that the VAE was loaded in, which a call that failed may not have given back.

    SDXL's pipelines decode and encode in float32, and an error in between leaves the VAE there:
    each later text-to-image would fail on it.
    """
    if vae is not None and vae.dtype != dtype:
        vae.to(dtype)


def _is_elsewhere(vae: Any) -> bool:
    """Offloaded layer by layer: its weights come from a copy that keeps its dtype."""
    return any(parameter.is_meta for parameter in vae.parameters())
