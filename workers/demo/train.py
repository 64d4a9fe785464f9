"""Train the demo model from nothing on a processor.

    python -m workers.demo.train --out DIR                 all stages, about 80 minutes on one core
    python -m workers.demo.train --out DIR --stage decoder the stages one by one; the first two
    python -m workers.demo.train --out DIR --stage unet    may run side by side
    python -m workers.demo.train --out DIR --stage assemble

Every stage goes on from the work directory (DIR-work) if it was stopped. Budgets are minutes of
processor time, so a busy machine does not spoil a run; `--wall` is a second limit by the clock.
Seeds are fixed, but how many steps a budget holds depends on the machine.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional

from workers.demo import network, shapes

STAGES = ("decoder", "unet", "assemble")
MINUTES = {"decoder": 16.0, "unet": 61.0, "assemble": 0.0}
SAVE_EVERY = 180.0
"""Seconds between two checkpoints."""
LATENT_NOISE = 0.12
"""Largest standard deviation of the noise that the decoder learns to forgive."""


def log(*words: object) -> None:
    """Print with the time of day."""
    print(time.strftime("[%H:%M:%S]"), *words, flush=True)


@dataclass
class Budget:
    """How long a stage may take; `done` runs from 0 to 1 and survives restarts."""

    minutes: float
    wall: float
    cpu_before: float = 0.0
    wall_before: float = 0.0

    def __post_init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.monotonic()

    @property
    def cpu(self) -> float:
        """Seconds of processor time spent on the stage so far."""
        return self.cpu_before + time.process_time() - self._cpu

    @property
    def clock(self) -> float:
        """Seconds by the clock spent on the stage so far."""
        return self.wall_before + time.monotonic() - self._wall

    @property
    def done(self) -> float:
        """The part of the budget that is used up."""
        return max(self.cpu / (60 * self.minutes), self.clock / (60 * self.wall))


class Trainer:
    """Optimizer, averaged weights, schedule and checkpoints of one stage."""

    def __init__(self, name: str, model: nn.Module, args: argparse.Namespace, rate: float) -> None:
        self.file = Path(args.work) / f"{name}.pt"
        self.name, self.model, self.rate, self.step = name, model, rate, 0
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.params, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = [p.detach().clone() for p in self.params]
        minutes = args.minutes or MINUTES[name]
        self.budget = Budget(minutes, args.wall or math.inf)
        if self.file.exists():
            self._load(minutes, args.wall or math.inf)
        self._saved, self._shown = time.monotonic(), 0.0

    def _load(self, minutes: float, wall: float) -> None:
        saved = torch.load(self.file, weights_only=True)
        self.step = saved["step"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.budget = Budget(minutes, wall, saved["cpu"], saved["clock"])
        torch.set_rng_state(saved["random"])
        with torch.no_grad():
            for kind, own in (("params", self.params), ("average", self.average)):
                for mine, theirs in zip(own, saved[kind], strict=True):
                    mine.copy_(theirs)
        log(self.name, "goes on from step", self.step, f"at {self.budget.done:.2f}")

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "step": self.step,
            "cpu": self.budget.cpu,
            "clock": self.budget.clock,
            "params": [p.detach() for p in self.params],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)
        self._saved = time.monotonic()

    def steps(self) -> Iterator[int]:
        """Count steps until the budget is used up, with a cosine schedule of the rate."""
        self.model.train()
        while (done := self.budget.done) < 1:
            rise = min(1.0, (self.step + 1) / 100)
            fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * rise * fall
            yield self.step
            if time.monotonic() - self._saved > SAVE_EVERY:
                self.save()
        self.save()

    def learn(self, loss: Tensor) -> None:
        """One step of the optimizer and of the averaged weights."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - keep)
        value = loss.item()
        self._shown = value if self.step == 1 else 0.98 * self._shown + 0.02 * value
        if self.step % 200 == 0:
            pace = self.budget.cpu / self.step
            progress = f"{self.name} {self.step} at {self.budget.done:.3f}"
            log(progress, f"loss {self._shown:.5f} cpu s/step {pace:.3f}")

    def use_average(self) -> None:
        """Put the averaged weights into the model."""
        with torch.no_grad():
            for own, mean in zip(self.params, self.average, strict=True):
                own.copy_(mean)
        self.model.eval()


def to_tensor(pictures: shapes.Bytes) -> Tensor:
    """8-bit (n, h, w, 3) to float (n, 3, h, w) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def projection(seed: int) -> tuple[Tensor, Tensor]:
    """The encoder's matrix and offset; the same in every stage of a seed."""
    pictures, _ = shapes.training_set(4000, seed)
    return network.fit_projection(to_tensor(pictures))


def channels_last(x: Tensor) -> Tensor:
    """The same values in the memory order that is quickest on processors."""
    return x.contiguous(memory_format=torch.channels_last)


def train_decoder(args: argparse.Namespace) -> None:
    """Teach the decoder to draw sharp pictures from latents that are a little wrong."""
    matrix, offset = projection(args.seed)
    pictures, _ = shapes.training_set(min(args.pictures, 20000), args.seed)
    vae = network.build_vae()
    network.quicken(vae)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer("decoder", decoder, args, rate=2e-3)
    rng = np.random.default_rng(trainer.step)
    for _ in trainer.steps():
        x = to_tensor(pictures[rng.integers(0, len(pictures), 8)])
        z = network.project(x, matrix, offset)
        z = z + torch.randn_like(z) * (torch.rand(len(z), 1, 1, 1) * LATENT_NOISE)
        with torch.autocast("cpu", torch.bfloat16):
            y: Any = vae.decode(channels_last(z)).sample
        y = y.float()
        trainer.learn(functional.l1_loss(y, x) + 2 * functional.mse_loss(y, x))


class Denoiser(nn.Module):
    """Text encoder and UNet as one module: noisy latents and tokens to the predicted v."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = network.build_tokenizer()
        self.text = network.build_text_encoder(self.tokenizer)
        self.unet = network.build_unet()

    def quicken(self) -> None:
        """Choose what is quickest on processors; changes no weight."""
        network.quicken(self.unet)
        self.text.set_attn_implementation("eager")
        self.unet.set_attn_processor(AttnProcessor())
        self.unet.to(memory_format=torch.channels_last)

    def forward(self, noisy: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
        """(n, 4, 16, 16), (n,), (n, 77) to (n, 4, 16, 16)."""
        words = self.text(tokens).last_hidden_state
        out: Any = self.unet(channels_last(noisy), times, encoder_hidden_states=words)
        v: Tensor = out.sample.float()
        return v


def latents(pictures: shapes.Bytes, matrix: Tensor, offset: Tensor) -> Tensor:
    """Latents of many pictures, (n, 4, 16, 16), a few hundred at a time."""
    parts = range(0, len(pictures), 500)
    chunks = (to_tensor(pictures[i : i + 500]) for i in parts)
    return torch.cat([network.project(chunk, matrix, offset) for chunk in chunks])


def train_unet(args: argparse.Namespace) -> None:
    """Teach the text encoder and the UNet; a tenth of the captions is empty, for guidance."""
    matrix, offset = projection(args.seed)
    pictures, captions = shapes.training_set(args.pictures, args.seed)
    clean = latents(pictures, matrix, offset)
    del pictures
    denoiser = Denoiser()
    tokens = network.tokenize(denoiser.tokenizer, captions)
    empty = network.tokenize(denoiser.tokenizer, [""])
    denoiser.quicken()
    alphas = network.build_scheduler().alphas_cumprod.float()
    log(len(clean), "latents, mean and deviation", clean.mean().item(), clean.std().item())
    trainer = Trainer("unet", denoiser, args, rate=1.2e-3)
    for _ in trainer.steps():
        rows = torch.randint(0, len(clean), (args.batch,))
        z, words = clean[rows], tokens[rows]
        words = torch.where(torch.rand(args.batch, 1) < 0.1, empty, words)
        even = (torch.arange(args.batch) + torch.rand(args.batch)) / args.batch
        times = (even * len(alphas)).long().clamp(max=len(alphas) - 1)
        alpha = alphas[times].view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * z
        with torch.autocast("cpu", torch.bfloat16):
            guess = denoiser(noisy, times, words)
        trainer.learn(functional.mse_loss(guess, target))


def assemble(args: argparse.Namespace) -> None:
    """Join the averaged weights of both stages into one model directory."""
    vae = network.build_vae()
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])
    Trainer("decoder", decoder, args, rate=0.0).use_average()
    network.set_encoder(vae, *projection(args.seed))
    denoiser = Denoiser()
    Trainer("unet", denoiser, args, rate=0.0).use_average()
    tokenizer, text = network.add_aliases(denoiser.tokenizer, denoiser.text)
    network.save_pipeline(Path(args.out), vae, text, denoiser.unet, tokenizer)
    log("saved", args.out)


def main() -> None:
    """Read the command line and run the stages."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", required=True, help="the model directory to write")
    parser.add_argument("--work", help="where checkpoints lie (default: OUT-work)")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--minutes", type=float, help="processor minutes of the stage")
    parser.add_argument("--wall", type=float, help="at most so many minutes by the clock")
    parser.add_argument("--pictures", type=int, default=60000, help="size of the training set")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work = args.work or args.out.rstrip("/") + "-work"
    Path(args.work).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stages = {"decoder": train_decoder, "unet": train_unet, "assemble": assemble}
    for stage in STAGES if args.stage == "all" else (args.stage,):
        log("stage", stage)
        stages[stage](args)


if __name__ == "__main__":
    main()
