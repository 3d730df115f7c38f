"""Trained models: from a run directory, or from an export that anybody can load.

    RUN/step-00001000.pt            checkpoints of train.py: everything needed to continue
    EXPORT/model.safetensors        one set of weights (the averaged ones unless --raw), no code in it
    EXPORT/config.json              the configuration, the classes, the latents, the step

`python sample.py --run X` takes either, or an export on the Hugging Face hub: OWNER/NAME or OWNER/NAME@REVISION.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
import latents
import sources
from config import Config, UserError
from model import MoTDiT
from ranks import best_device


def build_model(cfg: Config, channels: int, num_classes: int, side: int | None = None) -> MoTDiT:
    """The network of a configuration, freshly initialised; side: of what it sees, pixels (cfg.res) or latents."""
    model = MoTDiT(cfg.size, channels, side or cfg.res, cfg.num_scales, num_classes, cfg.experts, cfg.mask,
                   cfg.condition_tokens)
    model.recompute = cfg.recompute
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

    @cached_property
    def autoencoder(self):
        """That of the latents, loaded when the first one is decoded. Raises UserError when it is another one now."""
        return latents.Autoencoder(self.cfg.vae, self.device, expect=self.facts["latent"])

    def decode(self, x1: torch.Tensor) -> np.ndarray:
        """What the model generates (B, C, H, W) as images uint8 (B, R, R, C)."""
        return data.to_images(x1 if self.facts.get("latent") is None else self.autoencoder.decode(x1))


def load_run(name: str | None = None, raw: bool = False, device: str | None = None, vae: str | None = None) -> Run:
    """A run directory (its newest whole checkpoint), an export, or an export on the hub; None: the newest run.

    vae: where its autoencoder is now. Raises UserError when there is no such run.
    """
    folder = Path(name) if name else checkpoint.newest_run()
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name)) and name.count("/") == 1 \
            and not folder.parent.is_dir():
        folder = sources.download(name, ["config.json", "model.safetensors"])
    if not folder.is_dir():
        raise UserError(f"there is no run directory {str(folder)!r}; train one with python train.py")
    if (folder / "model.safetensors").exists():
        state, weights = read_export(folder)
        if raw and weights != "raw":
            raise UserError(f"the export {folder} holds the averaged weights only: leave out --raw")
    else:
        state = checkpoint.load_newest(folder)
        if state is None:
            raise UserError(f"{str(folder)!r} holds no checkpoint; train with python train.py --out {folder}")
        weights = "raw" if raw or state["ema"] is None else "ema"
    cfg, facts = Config.from_dict({**state["config"], **({"vae": vae} if vae else {})}), state["data"]
    model = build_model(cfg, facts["channels"], len(facts["classes"]), facts.get("side"))
    load_weights(model, state["ema" if weights == "ema" else "model"], folder)
    model.eval().requires_grad_(False).to(best_device(device))
    return Run(cfg, model, facts, folder, state["step"], weights)


def load_weights(model: torch.nn.Module, weights: dict, where) -> None:
    """Raises UserError, naming the first that is wrong, when the weights do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        raise UserError(f"the weights in {where} do not fit the configuration: "
                        f"{str(problem).splitlines()[-1].strip()}") from None


def fine_tune(model: MoTDiT, name: str, classes: list[str], latent: dict | None) -> list[str]:
    """Starts `model` from the weights of another run, checkpoint file or export: --init. Returns what was said of them.

    Positions are computed and not stored, so any resolution fits. The label table starts anew when the classes differ.
    Raises UserError when anything else does.
    """
    if Path(name).is_file():
        state = checkpoint.read(Path(name))
        weights, facts = state["ema"] or state["model"], state["data"]
    else:
        run = load_run(name, device="cpu")
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
# exports


def export(run: Run, folder: Path) -> None:
    """Writes model.safetensors and config.json. Raises UserError when the directory cannot be written."""
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in run.model.state_dict().items()},
                  folder / "model.safetensors", metadata={"format": "pt"})
        facts = {"lapflow": 1, "step": run.step, "weights": run.weights, "config": run.cfg.to_dict(), "data": run.facts}
        (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as problem:
        raise UserError(f"the export cannot be written to {folder}: {problem}") from None


def read_export(folder: Path) -> tuple[dict, str]:
    """An export as the state of a checkpoint, and which weights it holds. Raises UserError when it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        facts = json.loads((folder / "config.json").read_text())
        weights = {"ema": "ema", "raw": "model"}[facts["weights"]]
        state = {"step": int(facts["step"]), "config": dict(facts["config"]), "data": dict(facts["data"]),
                 weights: load_file(folder / "model.safetensors")}
        if facts["lapflow"] != 1 or not {"channels", "classes"} <= set(state["data"]):
            raise ValueError("it is of another version")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        raise UserError(f"{folder} is no export of sample.py --export: {problem}") from None
    return state, facts["weights"]
