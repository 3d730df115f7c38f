"""Trained models: from a run directory, or from an export that anybody can load.

    RUN/step-00001000.pt            checkpoints of train.py: everything needed to continue
    EXPORT/model.safetensors        one set of weights (the averaged ones unless --raw), no code in it
    EXPORT/config.json              the configuration, the classes, the latents, the step

An export comes from anybody: it holds plain data, and no path in it is followed, neither to images nor to a VAE.
`python sample.py X` takes either, or an export on the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import baselines
import checkpoint
import data
import latents
import sources
from config import Config, UserError, cache_folder, first_line
from model import MoTBlock, MoTDiT
from ranks import best_device


def build_model(cfg: Config, channels: int, num_classes: int, side: int | None = None) -> MoTDiT:
    """The network of a configuration, freshly initialised; side: of what it sees, pixels (cfg.res) or latents."""
    side = side or cfg.res
    if cfg.method == "lapflow":
        model = MoTDiT(cfg.size, channels, side, cfg.num_scales, num_classes, cfg.experts, cfg.mask,
                       cfg.condition_tokens)
    else:
        model = baselines.load(cfg.method).network(cfg, channels, num_classes, side)
    for module in model.modules():
        if isinstance(module, MoTDiT):
            module.recompute = cfg.recompute
    return model


@dataclass
class Run:
    """A trained model with what is needed to sample it."""

    cfg: Config
    model: MoTDiT
    facts: dict                                             # of its data, see data.facts
    folder: Path
    step: int
    weights: str                                            # "ema" or "raw"

    @property
    def classes(self) -> list[str]:
        return self.facts["classes"]

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
        """That of the latents, loaded when the first one is decoded. Raises UserError when it is another one now."""
        return latents.Autoencoder(self.cfg.vae, self.device, expect=self.facts["latent"])

    def ready(self) -> None:
        """Loads now what decoding needs. Raises UserError when it is not there."""
        _ = self.facts.get("latent") and self.autoencoder

    def decode(self, x1: torch.Tensor) -> np.ndarray:
        """What the model generates (B, C, H, W) as images uint8 (B, R, R, C)."""
        return data.to_images(x1 if self.facts.get("latent") is None else self.autoencoder.decode(x1))


def load_run(name: str | None = None, raw: bool = False, device: str | None = None, vae: str | None = None) -> Run:
    """A run directory (its newest whole checkpoint), an export, or an export on the hub; None: the newest run.

    vae: where its autoencoder is now. Raises UserError when there is no such run.
    """
    folder = Path(name) if name else checkpoint.newest_run()
    if not folder.exists() and HUB.fullmatch(str(name)) and name.count("/") == 1 and not folder.parent.is_dir():
        folder = sources.download(name, ["config.json", "model.safetensors"])
    if not folder.is_dir():
        raise UserError(f"there is no run directory {str(folder)!r}; train one with python train.py")
    if (folder / "model.safetensors").exists():
        state, weights = read_export(folder, vae)
        if raw and weights != "raw":
            raise UserError(f"the export {folder} holds the averaged weights only: leave out --raw")
    else:
        state = checkpoint.load_newest(folder)
        if state is None:
            raise UserError(f"{str(folder)!r} holds no checkpoint; train with python train.py --out {folder}")
        weights = "raw" if raw or state["ema"] is None else "ema"
    cfg, facts = Config.from_dict({**state["config"], **({"vae": vae} if vae else {})}), state["data"]
    if cfg.space == "latent" and not cfg.latents:           # an export does not say
        cfg = dataclasses.replace(cfg, latents=cache_folder(cfg.dataset, cfg.res, cfg.vae, "train"))
    wrong = data.what_is_wrong({"side": cfg.res, **facts}, facts.get("latent"))
    if facts.get("latent") is None and facts.get("side", cfg.res) != cfg.res:
        wrong.append("side")
    if wrong:
        raise UserError(f"{folder} is no run of train.py: the {', '.join(wrong)} of its data cannot be")
    like, tensors = (cfg, facts["channels"], len(facts["classes"]), facts.get("side")), state[WEIGHTS[weights]]
    with torch.device("meta"):                              # numbers in a file cannot ask for memory: its weights can
        check_weights(build_model(*like), tensors, folder)
    model = build_model(*like)
    load_weights(model, tensors, folder)
    model.eval().requires_grad_(False).to(best_device(device))
    return Run(cfg, model, facts, folder, state["step"], weights)


def load_weights(model: torch.nn.Module, weights: dict, where: Path | str) -> None:
    """Raises UserError, naming the first that is wrong, when the weights do not fit."""
    check_weights(model, weights, where)
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:                         # a kind of tensor that cannot be copied
        raise UserError(f"the weights in {where} cannot be used: {first_line(problem)}") from None


def check_weights(model: torch.nn.Module, weights: dict, where: Path | str) -> None:
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in own or not isinstance(weights.get(name), torch.Tensor) or own[name].shape != weights[name].shape:
            shapes = (f"{tuple(x.shape)}" if isinstance(x, torch.Tensor) else "nothing"
                      for x in (weights.get(name), own.get(name)))
            raise UserError(f"the weights in {where} do not fit the configuration: {name!r} has the shape "
                            f"{next(shapes)} there, and {next(shapes)} in the model")


def fine_tune(model: MoTDiT, name: str, classes: list[str], latent: dict | None) -> list[str]:
    """Starts `model` from the weights of another run, checkpoint file or export: --init. Returns what was said of them.

    Positions are computed and not stored, so any resolution fits. The label table starts anew when the classes differ.
    Raises UserError when anything else does.
    """
    if Path(name).is_file():
        state = checkpoint.read(Path(name))
        weights, facts = state["ema"] or state["model"], state["data"]
    else:
        run = load_run(name, device="cpu", vae=(latent or {}).get("name"))      # nothing is decoded with it
        weights, facts, state = run.model.state_dict(), run.facts, {"step": run.step}
    weights, said = dict(weights), [f"starting from the weights of {name} at step {state['step']}"]
    if facts["classes"] != classes and model.label is not None:
        weights["label.weight"] = model.label.weight.detach()
        said.append(f"its {len(facts['classes'])} classes are not the {len(classes)} of this run: "
                    "the label table starts anew")
    elif facts["classes"] and not classes:
        weights.pop("label.weight")
        said.append("this run has no classes: the label table is left out")
    if (facts.get("latent") or {}).get("sha256") != (latent or {}).get("sha256"):
        said.append("it was trained on other latents, or on pixels: another autoencoder than this run's")
    if (side := facts.get("side")) not in (None, model.resolution):
        said.append(f"it was trained on {side} x {side}, this run is {model.resolution} x {model.resolution}: "
                    "positions are recomputed")
    load_weights(model, weights, name)
    return said


# ---------------------------------------------------------------------------------------------------------------------
# what a run can be asked for


def check_guidance(cfg: Config, cfg_scale: float, classes: list[str]) -> None:
    """Raises UserError for guidance that the training of this run does not support."""
    if cfg_scale != 1 and not classes:
        raise UserError("guidance needs labels, but this run was trained without classes: leave out the guidance scale")
    if cfg_scale != 1 and cfg.label_drop == 0:
        raise UserError("guidance needs a null label, but this run has --label-drop 0: leave out the guidance scale")


def solver_settings(cfg: Config, args: argparse.Namespace | None = None) -> dict:
    """Solver, tolerances, steps and guidance: those of the run, unless the command line gives others."""
    given = {} if args is None else {k: v for k, v in vars(args).items() if v is not None}
    solver = given.get("solver", cfg.solver)
    for name in ("rtol", "atol", "cfg"):
        if name in given and not (math.isfinite(given[name]) and (name == "cfg" or given[name] > 0)):
            raise UserError(f"--{name} must be a {'' if name == 'cfg' else 'positive '}number, not {given[name]}")
    interval = given.get("cfg_interval", (0.0, 1.0))
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"--cfg-interval takes two increasing times in [0, 1], like 0.1,0.8; not {interval}")
    if cfg.method == "dfm" and interval != (0.0, 1.0):
        raise UserError("DFM has a time for each band, so an interval of guidance means nothing: leave out "
                        "--cfg-interval")
    settings = {"solver": solver, "norm": given.get("norm", "batch"), "cfg_scale": given.get("cfg", cfg.cfg_scale),
                "interval": interval, "precision": given.get("precision", "float32")}
    if solver == "dopri5":
        settings.update(rtol=given.get("rtol", cfg.rtol), atol=given.get("atol", cfg.atol), steps=given.get("steps"))
    else:
        settings["steps"] = given.get("steps", cfg.solver_steps)
        if "rtol" in given or "atol" in given:
            raise UserError(f"the solver {solver} has no tolerance: leave out --rtol and --atol, or use dopri5")
    return settings


def choose_labels(text: str, num: int, classes: list[str]) -> np.ndarray | None:
    """Labels (num,) for "balanced" (classes in turn), a label or a class name; None for an unconditional model."""
    if not classes:
        if text != "balanced":
            raise UserError(f"--labels {text} asks for a class, but this run was trained without classes")
        return None
    if text == "balanced":
        return np.arange(num) % len(classes)
    if text in classes:
        return np.full(num, classes.index(text))
    named = any(name.isdecimal() for name in classes)       # classes named by numbers are asked for by name only
    label = int(text) if text.isdecimal() and not named else -1
    if not 0 <= label < len(classes):
        known = f"the names {classes[0]!r} to {classes[-1]!r}" if named else f"0 to {len(classes) - 1}, or a name"
        raise UserError(f"there is no label {text!r}: use {known}")
    return np.full(num, label)


def full_float32() -> None:
    """Sampling and scoring in full float32: TF32 is noise to dopri5, which then takes more steps."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def compile_blocks(model: torch.nn.Module) -> None:
    """Compiles the transformer blocks in place: one graph for each stage, shared by all; names of weights stay."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.modules():
        if isinstance(block, MoTBlock):
            block.compile(dynamic=False, fullgraph=True)


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:                                     # Windows
        return math.nan
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e9 if sys.platform == "darwin" else 1e6)                        # bytes there, kilobytes on Linux


# ---------------------------------------------------------------------------------------------------------------------
# exports

WEIGHTS = {"ema": "ema", "raw": "model"}                    # which entry of a checkpoint holds them
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@\w[\w./-]*)?")     # OWNER/NAME or OWNER/NAME@REVISION, never a path
PLACES = {"data": "", "latents": "", "init": "", "out": ""}             # on the disk of whoever trained


def export(run: Run, folder: Path) -> None:
    """Writes model.safetensors and config.json. Raises UserError when the directory cannot be written."""
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in run.model.state_dict().items()},
                  folder / "model.safetensors", metadata={"format": "pt"})
        facts = {"lapflow": 1, "step": run.step, "weights": run.weights, "config": {**run.cfg.to_dict(), **PLACES},
                 "data": run.facts}
        (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as problem:
        raise UserError(f"the export cannot be written to {folder}: {problem}") from None


def read_export(folder: Path, vae: str | None = None) -> tuple[dict, str]:
    """An export as the state of a checkpoint, and which weights it holds. Raises UserError when it is damaged, and when
    its autoencoder is a folder that the user has not named (vae)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        facts = checkpoint.read_json(folder / "config.json", "configuration of an export") or {}
        kinds = {"lapflow": int, "step": int, "weights": str, "config": dict, "data": dict}
        if any(not isinstance(facts.get(name), kind) for name, kind in kinds.items()) or facts["lapflow"] != 1 or (
                facts["weights"] not in WEIGHTS):
            raise ValueError("its config.json is of another version, or of another program")
        state = {"step": facts["step"], "config": {**facts["config"], **PLACES}, "data": facts["data"],
                 WEIGHTS[facts["weights"]]: load_file(folder / "model.safetensors")}
    except (OSError, ValueError, SafetensorError) as problem:
        raise UserError(f"{folder} is no export of sample.py --export: {first_line(problem)}") from None
    named = facts["config"].get("vae")
    if named and not vae and (not HUB.fullmatch(str(named)) or Path(named.split("@")[0]).exists()):
        raise UserError(f"the export {folder} asks for an autoencoder in the folder {named!r}, but no file chooses "
                        "folders of this machine: name it yourself with --vae")
    return state, facts["weights"]
