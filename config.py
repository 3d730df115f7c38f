"""Every setting of a run in one frozen dataclass, the presets, and the command line made from them.

A run is a preset, then what the user passed. The result is printed, saved as config.json, stored in each checkpoint,
and read back from there by sample.py and fid.py, so nothing has to be said twice.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass

NOISES = ("pyramid", "independent")
STAGES = ("stratified", "batch")
PRECISIONS = ("float32", "bfloat16")
SOLVERS = ("dopri5", "euler", "midpoint", "heun", "rk4")


class UserError(ValueError):
    """Something the user can put right. Scripts print it as one sentence, without a traceback."""


def option(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Raises UserError when a value has the wrong type or is out of range."""

    # data
    dataset: str = option("digits", "digits, photos (both bundled with scikit-learn) or folder (see --data)")
    data: str = option("", "image folder of --dataset folder; its subfolders, if any, are the classes")
    res: int = option(8, "height and width of the images, in pixels")
    flip: bool = option(True, "mirror half of the training images (not the digits)")
    out: str = option("", "directory of the run (default: out/PRESET)")
    seed: int = option(0, "seed of everything random")
    # model
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
    steps: int = option(1000, "optimizer steps")
    batch: int = option(128, "images per optimizer step")
    lr: float = option(1e-2, "peak learning rate of AdamW")
    lr_end: float = option(1e-4, "learning rate at the last step; the way there is a cosine")
    warmup: int = option(100, "steps of linear warm-up")
    beta2: float = option(0.95, "second beta of AdamW")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    clip: float = option(1.0, "largest gradient norm (0: no clipping)")
    label_drop: float = option(0.1, "share of training labels replaced by the null label, for guidance")
    ema: float = option(0.995, "decay of the averaged weights that are sampled by default (0: keep none)")
    precision: str = option("float32", "of the network in training: float32 or bfloat16; weights and loss stay float32")
    # sampling
    solver: str = option("dopri5", "dopri5 (adaptive), euler, midpoint, heun or rk4")
    rtol: float = option(1e-3, "relative tolerance of dopri5 (the paper: 1e-5)")
    atol: float = option(1e-3, "absolute tolerance of dopri5 (the paper: 1e-5)")
    solver_steps: int = option(0, "steps of the other solvers, over all segments together")
    cfg_scale: float = option(1.0, "guidance w in v_null + w (v_cond - v_null); 1 is none")
    # records
    num_samples: int = option(500, "images drawn and scored at the end of training")
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    save_every: int = option(250, "steps between checkpoints")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind is tuple and isinstance(value, (tuple, list)) and all(_is(float, v) for v in value):
                object.__setattr__(self, field.name, tuple(float(v) for v in value))
            elif kind is float and _is(float, value):
                object.__setattr__(self, field.name, float(value))
            elif not _is(kind, value):
                raise UserError(f"{field.name} must be {_kind_name(kind)}, not {value!r}")
        for name in ("res", "num_scales", "batch", "num_samples", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_scales > 8:
            raise UserError(f"num_scales must be at most 8, not {self.num_scales}")
        for name in ("seed", "steps", "lr", "lr_end", "warmup", "weight_decay", "clip", "solver_steps", "cfg_scale"):
            if not 0 <= getattr(self, name) < 2**63:
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("label_drop", "ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("rtol", "atol"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")
        for name, choices in (("noise", NOISES), ("stages", STAGES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.stages == "stratified" and self.batch < self.num_scales:
            raise UserError(f"stratified stages need a batch of at least {self.num_scales} images, one for each stage, "
                            f"not {self.batch}")
        if not self.starts:
            object.__setattr__(self, "starts", tuple(i / self.num_scales for i in range(self.num_scales)))
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
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown settings in the configuration: {', '.join(unknown)}")
        return cls(**values)


def _is(kind, value) -> bool:
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _kind_name(kind) -> str:
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a list of numbers")


# The defaults above are those of the digits; a preset names what differs.
PRESETS = {
    "digits": dict(),                                       # two minutes on two CPU cores; the choices are in LOG.md
    "photos": dict(dataset="photos", res=64, size="192,6,3,4", num_scales=3, batch=32, steps=3000, lr=2e-3, lr_end=1e-5,
                   ema=0.998, num_samples=64),
    "folder": dict(dataset="folder", res=64, size="192,6,3,4", num_scales=3, batch=32, steps=20000, lr=1e-3,
                   lr_end=1e-5, ema=0.999, num_samples=64, save_every=1000),
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
    for field in dataclasses.fields(Config):
        kind, flag = type(field.default), "--" + field.name.replace("_", "-")
        shown = ",".join(map(str, field.default)) if kind is tuple else field.default
        text = field.metadata["help"] + ("" if shown == "" else f" [{shown}]")
        if kind is bool:
            to.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            read = numbers if kind is tuple else kind
            metavar = "T,T.." if kind is tuple else {str: "TEXT", int: "N", float: "X"}[kind]
            to.add_argument(flag, type=read, default=argparse.SUPPRESS, metavar=metavar, help=text)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that sample.py and fid.py share; what is not given comes from the run."""
    parser.add_argument("--run", help="directory of the run [the newest below out/]")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on this seed and on i [0]")
    parser.add_argument("--labels", default="balanced", help="balanced (classes in turn), or one label or class name")
    parser.add_argument("--cfg", type=float, help="guidance scale w; 1 is none")
    parser.add_argument("--solver", choices=SOLVERS, help="dopri5 is adaptive, the others take --steps")
    parser.add_argument("--rtol", type=float, help="relative tolerance of dopri5")
    parser.add_argument("--atol", type=float, help="absolute tolerance of dopri5")
    parser.add_argument("--steps", type=int, help="steps of a fixed-step solver, over all segments together")
    parser.add_argument("--norm", choices=("batch", "sample"), default="batch",
                        help="error norm of dopri5: over the whole batch (as the paper), or its worst image [batch]")
    parser.add_argument("--batch", type=int, default=250, help="images at a time [250]")
    parser.add_argument("--raw", action="store_true", help="use the raw weights, not their moving average")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")


def check_sampling_flags(args: argparse.Namespace, least: int) -> None:
    """Raises UserError for numbers of sample.py and fid.py that are out of range; `least` is the smallest --num."""
    if args.num < least or args.batch < 1 or not 0 <= args.seed < 2**63:
        raise UserError(f"--num must be at least {least}, --batch at least 1, and --seed at least 0 and below 2^63")


def resolve(given: dict) -> Config:
    """The preset of the data set, then what the user gave."""
    name = given.get("dataset", "digits")
    if name not in PRESETS:
        raise UserError(f"unknown dataset {name!r}; choose one of {', '.join(PRESETS)}")
    config = Config(**{**PRESETS[name], **given})
    if not config.out:
        standard = config.res == PRESETS[name].get("res", config.res)
        config = dataclasses.replace(config, out=f"out/{name}" if standard else f"out/{name}-{config.res}")
    return config


def show(config: Config) -> str:
    """The resolved configuration, as printed and saved in config.json."""
    return json.dumps(config.to_dict(), indent=2)
