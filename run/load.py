"""Trained models: from a run directory, or from an export that anybody can load.

    RUN/step-00001000.pt            checkpoints of train.py: everything needed to continue
    EXPORT/model.safetensors        one set of weights (the averaged ones unless --raw), no code in it
    EXPORT/config.json              the configuration, the classes, the latents, the step

An export comes from anybody: it holds plain data, and no path in it is followed, neither to images nor to a VAE.
`python sample.py X` takes either, or an export on the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION. In a script:

    from run.load import load_run
    images = load_run("OWNER/NAME").sample(labels=["7"] * 16, seed=0)           # uint8 (16, H, W, C)
"""

import argparse
import dataclasses
import hashlib
import json
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

import baselines
from config import Config, UserError, explain
from data import batches, conditions, latents, sources
from data.conditions import condition_of
from model import MoTBlock, MoTDiT
from run import checkpoint
from run.checkpoint import VERSION
from run.ranks import best_device, within_memory
from run.solver import solver_settings


def build_model(cfg: Config, facts: dict, examples: Tensor | None = None,
                device: torch.device | str = "cpu") -> torch.nn.Module:
    """The network of a configuration, freshly initialised on the device ("meta": shapes without numbers).

    facts: of its data, see data.batches.facts; examples: of its vectors, when it is conditioned on such."""
    baselines.SYSTEMS[cfg.method].schedule(cfg)             # refuses a path or a pyramid that this code does not have
    with within_memory(device), torch.device(device):       # a billion weights: 38 s on one thread of a CPU
        model = baselines.SYSTEMS[cfg.method].network(cfg, facts["channels"], condition_of(facts, examples),
                                                      facts["side"])
    for module in model.modules():
        if isinstance(module, MoTDiT):
            module.recompute = cfg.recompute
    return model


@dataclass
class Run:
    """A trained model with what is needed to sample it."""

    cfg: Config
    model: MoTDiT
    facts: dict                                             # of its data, see data.batches.facts
    folder: Path
    step: int
    weights: str                                            # "ema" or "raw"

    @property
    def system(self) -> ModuleType:
        """Of baselines: network, schedule, loss, sample."""
        return baselines.SYSTEMS[self.cfg.method]

    @cached_property
    def schedule(self) -> object:
        return dataclasses.replace(self.system.schedule(self.cfg), noise_scale=self.cfg.noise_scale)

    @property
    def classes(self) -> list[str]:
        return self.facts["classes"]

    @property
    def condition(self) -> torch.nn.Module | None:
        return self.model.condition

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of what the model generates."""
        return self.model.in_channels, self.model.resolution, self.model.resolution

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """H, W, C of the images."""
        return self.cfg.res, self.cfg.res, 3 if self.facts.get("latent") else self.model.in_channels

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights: those of the output layers, which every step changes."""
        tensors = [tensor.float().cpu().numpy().tobytes() for tensor in self.model.patch_out.parameters()]
        return hashlib.sha256(b"".join(tensors)).hexdigest()[:16]

    @cached_property
    def autoencoder(self) -> latents.Autoencoder:
        """That of the latents. Raises UserError when it is missing or has changed."""
        with within_memory(self.device):
            return latents.Autoencoder(self.cfg.vae, self.device, expect=self.facts["latent"])

    def ready(self) -> None:
        """Loads what decoding needs."""
        _ = self.facts.get("latent") and self.autoencoder

    def eager(self) -> AbstractContextManager:
        """A `with` block in which blocks that were compiled for training run as they are written."""
        return torch.compiler.set_stance("force_eager") if self.cfg.compile else nullcontext()

    def decode(self, x1: Tensor) -> np.ndarray:
        """What the model generates (B, C, H, W) as images uint8 (B, R, R, C)."""
        return batches.to_images(x1 if self.facts.get("latent") is None else self.autoencoder.decode(x1))

    def sample(self, num: int | None = None, *, labels: list[str | int] | str | int | None = None,
               vectors: np.ndarray | Tensor | None = None, seed: int = 0, preview: bool = False,
               cfg_scale: float | None = None, steps: int | None = None, batch: int = 250) -> np.ndarray:
        """Images 0, 1, ... of a seed, as sample.py draws them: uint8 (N, R, R, C).

        labels      class names or numbers, one for each image, or one for all; vectors (N, dim) of a run on vectors.
                    With `num` they are taken in turn; without either, all that the run has in turn
        num         how many images [as many as labels or vectors, or 40]
        preview     the coarsest band only: thumbnails (N, r, r, C) of the same images, in less time
        cfg_scale   guidance w; 1 is none [that of the run]
        steps       of the run's solver, or of heun where that is dopri5 [the run's solver and tolerances]
        batch       images at a time: less takes less memory

        Raises UserError for what the run does not have: classes, vectors, guidance, a coarse band of its own."""
        import sample  # upwards, here alone (tests/test_house.py)

        if batch < 1 or not 0 <= seed < 2**63:
            raise UserError(f"batch must be at least 1, and seed at least 0 and below 2^63; not {batch} and {seed}")
        y = conditions.choose(self.condition, num, labels, vectors)
        num = (num or 40) if y is None else len(y)
        solver = "heun" if steps and self.cfg.solver == "dopri5" else None
        settings = solver_settings(self.cfg, argparse.Namespace(cfg=cfg_scale, steps=steps, solver=solver))
        if preview:
            from extras import causal

            return causal.thumbnails(self, num, y, seed, batch, **settings)[0]
        return sample.generate(self, num, y, seed, batch, **settings)[0]


def load_run(name: str | None = None, raw: bool = False, device: str | None = None, vae: str | None = None,
             noise_scale: tuple | None = None) -> Run:
    """A run directory (its newest whole checkpoint), one of its checkpoints, an export, or an export on the hub; None:
    the newest run. vae: where its autoencoder is now; noise_scale: in place of the run's own. Turns TF32 off."""
    folder, state, weights = read_state(name, raw)
    named = state["config"].get("vae")
    if checkpoint.is_export(folder) and named and not vae and (
            not HUB.fullmatch(str(named)) or Path(named.split("@")[0]).exists()):
        raise UserError(f"the export {folder} asks for an autoencoder in the folder {named!r}, but no file chooses "
                        "folders of this machine: name it yourself with --vae")
    changes = {key: x for key, x in (("vae", vae or None), ("noise_scale", noise_scale)) if x is not None}
    cfg, facts = Config.from_dict({**state["config"], **changes}), state["data"]
    model = restore_model(cfg, facts, state[WEIGHTS[weights]], folder, best_device(device))
    full_float32()
    return Run(cfg, model.eval().requires_grad_(False), facts, folder, state["step"], weights)


def read_state(name: str | None, raw: bool = False) -> tuple[Path, dict, str]:
    """What `load_run` takes: the folder, the state of its checkpoint or export, and which weights to use."""
    folder = Path(name) if name else checkpoint.newest_run()
    if not folder.exists() and HUB.fullmatch(str(name)) and name.count("/") == 1 and not folder.parent.is_dir():
        folder = sources.download(name, ["config.json", "model.safetensors"])
    if not folder.exists():
        raise UserError(f"there is no run directory {str(folder)!r}; train one with python train.py")
    if checkpoint.is_export(folder):
        state, weights = read_export(folder)
        if raw and weights != "raw":
            raise UserError(f"the export {folder} holds the averaged weights only: leave out --raw")
        return folder, state, weights
    if folder.is_file():
        folder, state = folder.parent, checkpoint.read(folder, mapped=True)
    elif (state := checkpoint.load_newest(folder, mapped=True)) is None:
        raise UserError(f"{str(folder)!r} holds no checkpoint; train with python train.py --out {folder}")
    return folder, state, "raw" if raw or state["ema"] is None else "ema"


def restore_model(cfg: Config, facts: dict, weights: dict, folder: Path, device: torch.device) -> torch.nn.Module:
    """The network with these weights. Raises UserError when they, or the facts of the data, do not fit."""
    wrong = latents.what_is_wrong(facts, facts.get("latent"))
    if not wrong and facts.get("latent") is None and facts["side"] != cfg.res:
        wrong = ["side"]
    if not wrong and facts["classes"] and facts.get("vectors"):
        wrong = ["classes", "vectors"]
    if wrong:
        raise UserError(f"{folder} is not a run of train.py: its data facts {', '.join(wrong)} are impossible")
    model = build_model(cfg, facts, device="meta")          # no numbers in a file ask for memory: its weights do
    load_weights(model, {name: x.float() for name, x in weights.items() if isinstance(x, Tensor)}, folder, assign=True)
    for module in model.modules():
        if isinstance(module, MoTDiT):
            module.compute_positions()                      # of numbers now, and not of shapes alone
    with within_memory(device):
        return model.to(device)


def load_weights(model: torch.nn.Module, weights: dict, where: Path | str, assign: bool = False) -> None:
    """Raises UserError when the weights do not fit. assign: they become the model's own, which can be on meta."""
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as problem:
        raise UserError(f"the weights in {where} do not fit the configuration: "
                        f"{str(problem).splitlines()[-1].strip()}") from None


def fine_tune(model: MoTDiT, name: str, facts: dict) -> str:
    """Starts `model` from the weights of another run, checkpoint file or export: --init. Returns what to report.

    facts: of the new data. Positions are computed and not stored, so any resolution fits. Of vectors the new examples
    stay, which set the scale of the input."""
    _, state, which = read_state(name)
    weights, old = {key: x.float() for key, x in state[WEIGHTS[which]].items()}, state["data"]
    there, here = (f"vectors of {of['vectors'][1]}" if of.get("vectors") else f"{len(of.get('classes', ()))} classes"
                   for of in (old, facts))
    text, new = f"starting from the weights of {name} at step {state['step']}", "condition.examples"
    if there != here or old.get("classes") != facts["classes"]:
        weights = {key: value for key, value in weights.items() if not key.startswith("condition.")}
        text += f"\nits condition ({there}) differs from this run's ({here}): the embedding starts anew"
        new = "condition."
    load_weights(model, weights | {key: x for key, x in model.state_dict().items() if key.startswith(new)}, name)
    return text


def full_float32() -> None:
    """Sampling and scoring in full float32: TF32 is noise to dopri5, which then takes more steps."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def compile_blocks(model: torch.nn.Module) -> None:
    """Compiles the transformer blocks in place: one graph for each stage, shared by all; names of weights stay."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False               # it cuts a graph at each 25 MB of weights
    for block in model.modules():
        if isinstance(block, MoTBlock):
            block.compile(dynamic=False, fullgraph=True)


# ---------------------------------------------------------------------------------------------------------------------
# exports

WEIGHTS = {"ema": "ema", "raw": "model"}                    # which entry of a checkpoint holds them
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@\w[\w./-]*)?")     # OWNER/NAME or OWNER/NAME@REVISION, never a path
PLACES = {"data": "", "latents": "", "init": "", "out": ""}             # on the disk of whoever trained


def export(run: Run, folder: Path) -> None:
    """Writes model.safetensors and config.json."""
    from safetensors.torch import save_file

    if checkpoint.steps(folder):
        raise UserError(f"{folder} is the directory of a run, and an export cannot be in it too: choose another")
    with explain(f"the export cannot be written to {folder}", kinds=OSError):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in run.model.state_dict().items()},
                  folder / "model.safetensors", metadata={"format": "pt"})
        facts = {"lapflow": VERSION, "step": run.step, "weights": run.weights,
                 "config": {**run.cfg.to_dict(), **PLACES}, "data": run.facts}
        (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")


def read_export(folder: Path) -> tuple[dict, str]:
    """An export as the state of a checkpoint, and which weights it holds."""
    from safetensors.torch import load_file

    with explain(f"{folder} is not an export of sample.py --export"):
        facts = checkpoint.read_json(folder / "config.json", "configuration of an export") or {}
        kinds = {"lapflow": int, "step": int, "weights": str, "config": dict, "data": dict}
        if any(not isinstance(facts.get(name), kind) for name, kind in kinds.items()) or (
                facts["lapflow"] != VERSION or facts["weights"] not in WEIGHTS):
            raise ValueError("its config.json is of another version, or of another program")
        state = {"step": facts["step"], "config": {**facts["config"], **PLACES}, "data": facts["data"],
                 WEIGHTS[facts["weights"]]: load_file(folder / "model.safetensors")}
    return state, facts["weights"]
