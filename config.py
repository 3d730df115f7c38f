"""Every setting of a run in one frozen dataclass, the presets, and the command line made from them.

A run is a preset, then what the user passed. The result is printed, saved as config.json, stored in each checkpoint,
and read back from there by sample.py and fid.py, so nothing has to be said twice.
"""

import argparse
import dataclasses
import json
import math
import re
import time
from dataclasses import dataclass

DATASETS = ("digits", "photos", "folder", "celebahq", "imagenet")
SPACES = ("pixel", "latent")
METHODS = ("lapflow", "lfm", "pyramidal", "pyramidal-zero-overlap", "pixelflow", "edify", "edify-plain", "dfm",
           "separate")
ABLATIONS = ("mask", "starts", "path", "scales", "noise", "experts", "separate", "space", "stages",
             "times", "sharing", "condition-tokens")
NOISES = ("pyramid", "independent")
STAGES = ("stratified", "batch")
PRECISIONS = ("float32", "bfloat16")
LOGGERS = ("", "tensorboard", "wandb")
SOLVERS = ("dopri5", "euler", "midpoint", "heun", "rk4")


class UserError(ValueError):
    """Something the user can put right. Scripts print it as one sentence, without a traceback."""


def first_line(problem: Exception) -> str:
    """What an exception says, for one sentence: its first line, or its kind when it says nothing."""
    said, kind = next(iter(str(problem).splitlines()), ""), type(problem).__name__
    return f"{kind}: {said}" if said and isinstance(problem, KeyError) else said or kind


def option(default: str | int | float | tuple, help: str, free: bool = False) -> dataclasses.Field:
    """A setting. A free one does not change what is trained: it may differ when a run is continued."""
    return dataclasses.field(default=default, metadata={"help": help, "free": free})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Raises UserError when a value has the wrong type or is out of range."""

    # data
    dataset: str = option("digits", "digits, photos (both bundled with scikit-learn), celebahq, imagenet, or folder")
    data: str = option("", "the images: a folder, zip, parquet file, LMDB, or hf:OWNER/NAME@REVISION", free=True)
    res: int = option(8, "height and width of the images, in pixels")
    space: str = option("pixel", "train on the pixels, or on the latents of --vae, encoded before by latents.py")
    vae: str = option("", "AutoencoderKL of diffusers: a folder, or OWNER/NAME, OWNER/NAME@REVISION on the hub")
    latents: str = option("", "directory of the latent cache [latents/DATASET-RES-VAE/train]", free=True)
    flip: bool = option(True, "mirror half of the training images (not the digits)")
    skip_bad: bool = option(False, "leave out images that cannot be read: they are named and counted")
    init: str = option("", "start from the weights of this run, checkpoint or export (fine-tuning)")
    out: str = option("", "directory of the run [out/PRESET]", free=True)
    seed: int = option(0, "seed of everything random")
    # model
    method: str = option("lapflow", "lapflow, or a system to compare it with: lfm, pyramidal, pyramidal-zero-overlap, "
                         "pixelflow, edify, edify-plain, dfm, separate")
    size: str = option("96,6,3,2", "S/2, B/2, L/2, XL/2, or hidden_size,depth,num_heads,patch_size")
    num_scales: int = option(2, "bands of the pyramid, K; 1 is a plain DiT")
    experts: str = option("full", "what is per band: full, qkv or none")
    mask: str = option("causal", "bands a band reads: causal (itself and coarser), none (all) or self")
    condition_tokens: bool = option(True, "time and label also as tokens in front of the sequence")
    # schedule
    starts: tuple[float, ...] = option((), "start time of each band, like 0,0.5 (default: i/K)")
    path: str = option("linear", "linear, quadratic, cubic or gvp")
    noise: str = option("pyramid", "pyramid (bands of one white image) or independent")
    stages: str = option("stratified", "stratified (each stage a share of each batch) or batch (one, as the paper)")
    full_range: bool = option(True, "train stage s on [T_s, 1], as the paper; otherwise on [T_s, T_(s+1)]")
    # training
    steps: int = option(1000, "optimizer steps", free=True)
    batch: int = option(128, "images per optimizer step, over all processes")
    micro_batch: int = option(0, "most images a process takes at once [what fits the GPU's memory]", free=True)
    lr: float = option(1e-2, "peak learning rate of AdamW")
    lr_end: float = option(1e-4, "learning rate at the last step; the way there is a cosine")
    warmup: int = option(100, "steps of linear warm-up")
    beta2: float = option(0.95, "second beta of AdamW")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    clip: float = option(1.0, "largest gradient norm (0: no clipping)")
    label_drop: float = option(0.1, "share of training labels replaced by the null label, for guidance")
    ema: float = option(0.995, "decay of the averaged weights that are sampled by default (0: keep none)")
    precision: str = option("float32", "of the network in training: float32 or bfloat16; weights and loss stay float32")
    compile: bool = option(False, "compile the transformer blocks, one graph for each stage", free=True)
    recompute: bool = option(False, "activation checkpointing: less memory, a third more time", free=True)
    # sampling
    solver: str = option("dopri5", "dopri5 (adaptive), euler, midpoint, heun or rk4", free=True)
    rtol: float = option(1e-3, "relative tolerance of dopri5 (the paper: 1e-5)", free=True)
    atol: float = option(1e-3, "absolute tolerance of dopri5 (the paper: 1e-5)", free=True)
    solver_steps: int = option(0, "steps of the other solvers, over all segments together", free=True)
    cfg_scale: float = option(1.0, "guidance w in v_null + w (v_cond - v_null); 1 is none", free=True)
    # records
    num_samples: int = option(500, "images drawn and scored at the end of training", free=True)
    sample_every: int = option(0, "steps between grids of 16 samples (0: only at the end)", free=True)
    eval_every: int = option(0, "steps between scores of --num-samples images (0: only at the end)", free=True)
    log_every: int = option(20, "steps between lines of metrics.jsonl", free=True)
    logger: str = option("", "also log to tensorboard or wandb", free=True)
    save_every: int = option(250, "steps between checkpoints", free=True)
    keep: int = option(2, "checkpoints kept, newest first", free=True)
    keep_every: int = option(0, "checkpoints at multiples of this step stay for good (0: none)", free=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            parts = value if isinstance(value, (tuple, list)) else [value]
            if any(isinstance(part, int) and abs(part) > 2**63 for part in parts):      # no float holds 10^400
                raise UserError(f"{field.name} must be at most 2^63 in size")
            if kind is tuple and isinstance(value, (tuple, list)) and all(_is(float, v) for v in value):
                object.__setattr__(self, field.name, tuple(float(v) for v in value))
            elif kind is float and _is(float, value):
                object.__setattr__(self, field.name, float(value))
            elif not _is(kind, value):
                raise UserError(f"{field.name} must be {_kind_name(kind)}, not {value!r}")
        for name in ("res", "num_scales", "batch", "num_samples", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, most in (("num_scales", 8), ("res", 2**14)):
            if getattr(self, name) > most:
                raise UserError(f"{name} must be at most {most}, not {getattr(self, name)}")
        for name in ("seed", "steps", "lr", "lr_end", "warmup", "weight_decay", "clip", "solver_steps", "cfg_scale",
                     "micro_batch", "sample_every", "eval_every", "keep_every"):
            if not 0 <= getattr(self, name) < 2**63:
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("label_drop", "ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("rtol", "atol"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number above 0, not {getattr(self, name)}")
        for name, choices in (("dataset", DATASETS), ("space", SPACES), ("noise", NOISES), ("stages", STAGES),
                              ("precision", PRECISIONS), ("logger", LOGGERS), ("method", METHODS)):
            if getattr(self, name) not in choices:
                known = ", ".join(choice for choice in choices if choice)
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose one of {known}")
        if self.space == "latent" and not self.vae:
            raise UserError("latents need the autoencoder they come from: add --vae, a folder or OWNER/NAME on the hub")
        if self.space == "latent" and self.dataset in ("digits", "photos"):
            raise UserError(f"the {self.dataset} are trained in pixels: leave out --latent")
        if self.stages == "stratified" and self.batch < self.num_scales:
            raise UserError(f"stratified stages need a batch of at least {self.num_scales} images, one for each stage, "
                            f"not {self.batch}")
        if self.method != "lapflow":
            for name in ("experts", "noise", "full_range", "mask", "path")[: 3 if self.method == "separate" else 5]:
                if getattr(self, name) != getattr(Config, name):
                    raise UserError(f"{name} belongs to LapFlow: leave it out with --method {self.method}")
        if self.method == "lfm" and self.num_scales != 1:
            raise UserError(f"LFM has one scale, not {self.num_scales}: leave out --num-scales and --starts")
        if self.method == "dfm" and self.stages == "stratified" and self.batch < 10 * (self.num_scales - 1):
            raise UserError("DFM trains its finer stages on a tenth of each batch: stratified stages need a batch of "
                            f"at least {10 * (self.num_scales - 1)} images, not {self.batch}")
        if not self.starts:                                 # dfm: see baselines/dfm.py
            object.__setattr__(self, "starts", tuple(
                (0.9 if i else 0.0) if self.method == "dfm" else i / self.num_scales for i in range(self.num_scales)))
        if len(self.starts) != self.num_scales:
            raise UserError(f"{self.num_scales} scales need {self.num_scales} starts, but there are "
                            f"{len(self.starts)}: {','.join(map(str, self.starts))}")

    def to_dict(self) -> dict:
        """Plain values only, for JSON and checkpoints."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of to_dict. Raises UserError for a key that is no setting."""
        if not isinstance(values, dict):
            raise UserError("a configuration must be a JSON object of settings")
        unknown = sorted(map(repr, set(values) - {f.name for f in dataclasses.fields(cls)}))
        if unknown:
            raise UserError(f"unknown settings in the configuration: {', '.join(unknown)}")
        return cls(**values)


def _is(kind: type, value: object) -> bool:
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _kind_name(kind: type) -> str:
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a list of numbers")


@dataclass(frozen=True)
class Preset:
    """Settings that differ from the defaults, and what the paper reports for them.

    paper: fid (50,000 images), recall, nfe, seconds (an image at batch 1, decoding included), parameters (in millions,
    with the 83.65 of the VAE), days (of eight H200), memory (peak GB of one of them)
    """

    settings: dict
    paper: dict = dataclasses.field(default_factory=dict)

    def but(self, fid: float, **settings) -> "Preset":
        """A row of an ablation table: this preset with a few settings changed, of which only the FID is reported."""
        return Preset({**self.settings, **settings}, dict(fid=fid))


EQ_VAE, SD_VAE = "zelaki/eq-vae", "stabilityai/sd-vae-ft-mse"
CELEBAHQ, IMAGENET = 30_000, 1_281_167                      # images

# Appendix G. Not in paper: bfloat16, clipping, and beta2, which is AdamW's default.
_PAPER = dict(space="latent", stages="batch", batch=256, warmup=0, beta2=0.999, precision="bfloat16", compile=True,
              rtol=1e-5, atol=1e-5, num_samples=64, log_every=100, save_every=2500, sample_every=10_000)
_CELEBAHQ = dict(_PAPER, dataset="celebahq", size="L/2", lr=2e-4, lr_end=1e-6, ema=0.0)
_IMAGENET = dict(_PAPER, dataset="imagenet", res=256, vae=EQ_VAE, lr=1e-4, lr_end=1e-4, ema=0.9999, keep_every=100_000)

_256 = Preset(
    dict(_CELEBAHQ, res=256, vae=EQ_VAE, steps=500 * CELEBAHQ // 256),
    dict(fid=3.53, recall=0.53, nfe=80, seconds=1.51, parameters=612, days=1.2, memory=42.2))
_512 = Preset(
    dict(_CELEBAHQ, res=512, vae=SD_VAE, num_scales=3, steps=1000 * CELEBAHQ // 256),
    dict(fid=4.04, recall=0.47, nfe=85, seconds=2.60, parameters=680, days=3.1, memory=82.8))
_1024 = Preset(
    dict(_CELEBAHQ, res=1024, vae=SD_VAE, num_scales=3, batch=128, steps=2000 * CELEBAHQ // 128),
    dict(fid=5.51, recall=0.39, nfe=94, seconds=3.30, parameters=680, days=8.3, memory=120.5))

# The digits are the defaults above. The first preset that fits --dataset, --res and --size is taken.
PRESETS = {
    "digits": Preset({}),                                   # two minutes on two CPU cores; the choices are in LOG.md
    "photos": Preset(dict(dataset="photos", res=64, size="192,6,3,4", num_scales=3, batch=32, steps=3000, lr=2e-3,
                          lr_end=1e-5, ema=0.998, num_samples=64)),
    "folder": Preset(dict(dataset="folder", res=64, size="192,6,3,4", num_scales=3, batch=32, steps=20000, lr=1e-3,
                          lr_end=1e-5, ema=0.999, num_samples=64, save_every=1000)),
    # Table 1 and appendix G
    "celebahq-256": _256,
    "celebahq-512": _512,
    "celebahq-1024": _1024,
    "imagenet-256-B": Preset(dict(_IMAGENET, size="B/2", steps=7_000_000),
                             dict(fid=18.55, seconds=1.25, days=8.5, memory=24.9)),
    "imagenet-256-B-600k": Preset(dict(_IMAGENET, size="B/2", steps=600_000), dict(fid=36.50)),
    "imagenet-256-B-guided": Preset(dict(_IMAGENET, size="B/2", steps=7_000_000, cfg_scale=1.5), dict(fid=4.12)),
    "imagenet-256-XL": Preset(dict(_IMAGENET, size="XL/2", steps=600_000),
                              dict(fid=14.38, seconds=2.85, days=9.4, memory=68.3)),
    # ablations
    "celebahq-256-start-0.1": _256.but(5.12, starts=(0, 0.1)),
    "celebahq-256-start-0.2": _256.but(4.37, starts=(0, 0.2)),
    "celebahq-256-start-0.9": _256.but(4.92, starts=(0, 0.9)),
    "celebahq-256-scales-1": _256.but(5.26, num_scales=1),
    "celebahq-256-scales-3": _256.but(3.59, num_scales=3),
    "celebahq-256-scales-4": _256.but(5.12, num_scales=4),
    "celebahq-256-path-quadratic": _256.but(3.78, path="quadratic"),
    "celebahq-256-path-cubic": _256.but(4.25, path="cubic"),
    "celebahq-256-path-gvp": _256.but(4.10, path="gvp"),
    "celebahq-256-mask-none": _256.but(3.91, mask="none"),
    "celebahq-256-mask-self": _256.but(5.19, mask="self"),
    "celebahq-256-lfm": Preset(dict(_256.settings, method="lfm", num_scales=1, vae=SD_VAE),
                               dict(fid=5.26, recall=0.46, nfe=89, seconds=1.70, parameters=541)),
    "celebahq-256-lfm-eq-vae": _256.but(7.77, method="lfm", num_scales=1),
    "celebahq-256-pyramidal": Preset(dict(_256.settings, method="pyramidal"),
                                     dict(fid=11.20, recall=0.48, nfe=90, seconds=1.85, parameters=544)),
    "celebahq-256-edify": Preset(dict(_256.settings, method="edify", space="pixel", vae="", size="L/16"),
                                 dict(fid=7.62, recall=0.47, nfe=95, seconds=2.10, parameters=602)),
    "celebahq-256-separate": _256.but(3.60, method="separate"),
    "celebahq-256-sd-vae": _256.but(4.37, vae=SD_VAE),
    "celebahq-256-pixel": _256.but(8.63, space="pixel", vae="", size="L/16"),   # the paper does not say which patches
    "celebahq-512-scales-2": _512.but(5.45, num_scales=2),
    "celebahq-512-scales-4": _512.but(4.12, num_scales=4),
    "celebahq-1024-scales-2": _1024.but(6.62, num_scales=2),
    "celebahq-1024-scales-4": _1024.but(5.45, num_scales=4),
    "celebahq-1024-starts-0.33-0.9": _1024.but(6.72, starts=(0, 1 / 3, 0.9)),
    "celebahq-1024-starts-0.1-0.67": _1024.but(8.12, starts=(0, 0.1, 2 / 3)),
}


def parser(description: str, usage: str) -> argparse.ArgumentParser:
    """A parser whose errors are short: the usage line and one sentence."""
    return argparse.ArgumentParser(description=description, usage=usage, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def numbers(text: str) -> tuple[float, ...]:
    """"0,0.5" -> (0.0, 0.5)."""
    return tuple(float(n) for n in text.split(","))


def add_config_flags(to: argparse.ArgumentParser) -> None:
    """One flag for each setting: --num-scales for num_scales. A flag that was not given leaves no trace."""
    to.add_argument("--preset", default=argparse.SUPPRESS, metavar="NAME",
                    help="a row of the paper (python plan.py lists them) [what fits --dataset, --res and --size]")
    for field in dataclasses.fields(Config):
        kind, flag = type(field.default), "--" + field.name.replace("_", "-")
        shown = ",".join(map(str, field.default)) if kind is tuple else field.default
        text = field.metadata["help"] + ("" if shown == "" else f" [{shown}]")
        if field.name == "space":
            to.add_argument("--pixel", dest="space", action="store_const", const="pixel", default=argparse.SUPPRESS,
                            help="train on the pixels themselves")
            to.add_argument("--latent", dest="space", action="store_const", const="latent", default=argparse.SUPPRESS,
                            help="train on the latents of --vae, which latents.py has encoded")
        elif kind is bool:
            to.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            read = numbers if kind is tuple else kind
            metavar = "T,T.." if kind is tuple else {str: "TEXT", int: "N", float: "X"}[kind]
            to.add_argument(flag, type=read, default=argparse.SUPPRESS, metavar=metavar, help=text)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that sample.py and fid.py share; what is not given comes from the run.

    torchrun completes shortened flags, of the script's too: no flag may begin one of its own (a test looks). -n is
    there because --num is the beginning of torchrun's --numa-binding.
    """
    parser.add_argument("--seed", type=int, default=0, help="image i depends on this seed and on i [0]")
    parser.add_argument("--labels", default="balanced", help="balanced (classes in turn), or one label or class name")
    parser.add_argument("--cfg", type=float, help="guidance scale w; 1 is none")
    parser.add_argument("--cfg-interval", type=numbers, metavar="T,T", help="times with guidance [0,1]")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the network; the solver is float32 [float32]")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--solver", choices=SOLVERS, help="dopri5 is adaptive, the others take --steps")
    parser.add_argument("--rtol", type=float, help="relative tolerance of dopri5")
    parser.add_argument("--atol", type=float, help="absolute tolerance of dopri5")
    parser.add_argument("--steps", type=int, help="steps of a fixed-step solver, over all segments together")
    parser.add_argument("--norm", choices=("batch", "sample"), default="batch",
                        help="error norm of dopri5: over the whole batch (as the paper), or its worst image [batch]")
    parser.add_argument("--batch", type=int, default=250, help="images at a time [250]")
    parser.add_argument("--vae", help="where the run's autoencoder is now, when it has moved")
    parser.add_argument("--raw", action="store_true", help="use the raw weights, not their moving average")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")


def check_sampling_flags(args: argparse.Namespace, least: int) -> None:
    """Raises UserError for numbers of sample.py and fid.py that are out of range; `least` is the smallest --num."""
    if args.num < least or args.batch < 1 or not 0 <= args.seed < 2**63:
        raise UserError(f"--num must be at least {least}, --batch at least 1, and --seed at least 0 and below 2^63")


def differences(cfg: Config, other: Config) -> list[str]:
    """Names of the settings in which two runs train differently."""
    return [field.name for field in dataclasses.fields(Config)
            if not field.metadata["free"] and getattr(cfg, field.name) != getattr(other, field.name)]


def find_row(cfg: Config) -> str:
    """The preset that trains, with any seed, what this configuration trains; "" when none does."""
    for name, preset in PRESETS.items():
        row = Config(**preset.settings)
        same = not set(differences(cfg, row)) - {"seed"}
        if same and (cfg.steps, cfg.cfg_scale) == (row.steps, row.cfg_scale):
            return name
    return ""


def resolve(given: dict) -> Config:
    """The preset, then what the user gave. Raises UserError for an unknown preset or setting."""
    given = dict(given)
    name, dataset = given.pop("preset", ""), given.get("dataset", "digits")
    if name and name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; python plan.py lists them")
    if dataset not in DATASETS:
        raise UserError(f"unknown dataset {dataset!r}; choose one of {', '.join(DATASETS)}")
    if not name:                                            # the first that fits most of what was asked for
        for wanted in ({"res", "size", "space"}, {"res", "space"}, {"res"}, set()):
            asked = {"dataset": dataset, **{k: v for k, v in given.items() if k in wanted}}
            fits = [n for method in (given.get("method"), "lapflow") for n, p in PRESETS.items() if all(
                getattr(Config(**p.settings), k) == v for k, v in {**asked, "method": method}.items())]
            if fits:
                name = fits[0]
                break
    settings = {**PRESETS[name].settings, **given}
    if settings.get("method") == "lfm":
        settings["num_scales"] = given.get("num_scales", 1)
    if settings.get("space") == "pixel":
        settings["vae"] = given.get("vae", "")
    elif settings.get("space") == "latent" and ("res" in given or not settings.get("vae")):
        settings["vae"] = given.get("vae") or standard_vae(settings.get("res", Config.res))
    config = Config(**settings)
    if not config.out:
        row = find_row(config) or name
        standard = config.res == Config(**PRESETS[row].settings).res
        other = "" if config.method == Config(**PRESETS[row].settings).method else f"-{config.method}"
        config = dataclasses.replace(config, out=f"out/{row}{other}" if standard else f"out/{row}{other}-{config.res}")
    if config.space == "latent" and not config.latents:
        config = dataclasses.replace(config, latents=cache_folder(config.dataset, config.res, config.vae, "train"))
    return config


def standard_vae(res: int) -> str:
    """The autoencoder of the paper for this resolution."""
    return EQ_VAE if res <= 256 else SD_VAE


def seconds(text: str) -> float:
    """How long from now: "90s", "50m", "23.5h", plain seconds, or @ and a time in seconds since 1970; "": for ever.

    Raises UserError for anything else.
    """
    found = re.fullmatch(r"(@?)(\d+(?:\.\d+)?)([smh]?)", text)
    if not text:
        return math.inf
    if not found or (found[1] and found[3]):
        raise UserError(f"--stop-after takes a time like 90s, 50m or 23.5h, not {text!r}")
    number = float(found[2]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[3]]
    return number - time.time() if found[1] else number


def cache_folder(dataset: str, res: int, vae: str, split: str) -> str:
    """Where latents.py writes and train.py looks unless told otherwise."""
    return f"latents/{dataset}-{res}-{vae.rstrip('/').split('/')[-1].split('@')[0]}/{split}"


def show(config: Config) -> str:
    """The resolved configuration, as printed and saved in config.json."""
    return json.dumps(config.to_dict(), indent=2)
