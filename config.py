"""Every setting of a run in one frozen dataclass, and the command line made from it.

A run is a preset (run/paper.py), then what the user gave. The result is saved as config.json and in each checkpoint;
sample.py and fid.py read it from there.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

DATASETS = ("digits", "fashion", "folder", "celebahq", "imagenet")
METHODS = ("lapflow", "lfm", "pyramidal", "pyramidal-zero-overlap", "pixelflow", "edify", "edify-plain", "dfm",
           "separate")
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # hidden_size, depth, heads
PRECISIONS = ("float32", "bfloat16")
SOLVERS = ("dopri5", "euler", "midpoint", "heun", "rk2", "rk4")                  # rk2 is heun
LAPFLOW = ("experts", "noise", "full_range", "concat_coarse")                   # settings that no other system has
BANDS = ("pyramid", "mask", "path")                         # those that only `separate` has, too
CHOICES = {"dataset": DATASETS, "space": ("pixel", "latent"), "noise": ("pyramid", "independent"),
           "stages": ("stratified", "batch"), "precision": PRECISIONS, "logger": ("", "tensorboard"),
           "method": METHODS, "block": ("dit", "modern"), "times": ("uniform", "logit-normal"),
           "condition": ("labels", "vectors")}


class UserError(ValueError):
    """Something the user can put right. Scripts print it as one sentence, without a traceback."""


def first_line(problem: Exception) -> str:
    """The first line of an exception, for one sentence; its kind when it has no text."""
    text, kind = next(iter(str(problem).splitlines()), ""), type(problem).__name__
    return f"{kind}: {text}" if text and isinstance(problem, KeyError) else text or kind


@contextmanager
def explain(failure: str, advice: str = "",
            kinds: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """Turns an exception into one sentence: decoders, archives and numpy raise many kinds for a damaged file."""
    try:
        yield
    except UserError:
        raise
    except kinds as problem:
        raise UserError(f"{failure}: {first_line(problem)}{advice}") from None


def run(main: Callable[[], None]) -> None:
    """Runs a program. A UserError, and Ctrl-C, become one sentence and exit code 1."""
    try:
        main()
    except UserError as problem:
        sys.exit(f"error{' in process ' + os.environ['RANK'] if 'RANK' in os.environ else ''}: {problem}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    except BrokenPipeError:                                 # python -m studies.plan | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def parse_size(size: str | tuple) -> tuple[int, int, int, int]:
    """(hidden_size, depth, num_heads, patch_size) of a table name like "B/2", of "128,4,4,2", or of such a tuple."""
    try:
        if isinstance(size, str) and "/" in size:
            name, patch = size.split("/")
            size = (*SIZES[name], patch)
        hidden_size, depth, num_heads, patch = (int(n) for n in (size.split(",") if isinstance(size, str) else size))
        if min(hidden_size, depth, num_heads, patch) < 1 or hidden_size % (4 * num_heads) or (
                max(hidden_size, patch) > 2**14 or depth > 512):
            raise ValueError
    except (KeyError, ValueError):
        raise UserError(f"unknown model size {size!r}; use one of {', '.join(SIZES)} with a patch size, like B/2, or "
                        "four numbers hidden_size,depth,num_heads,patch_size with hidden_size divisible by 4 * "
                        "num_heads, depth at most 512, like 128,4,4,2") from None
    return hidden_size, depth, num_heads, patch


def option(default: str | int | float | tuple, help: str, free: bool = False) -> dataclasses.Field:
    """A setting. A free one may differ when a run is continued: places, speed, records, sampling, length."""
    return dataclasses.field(default=default, metadata={"help": help, "free": free})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Raises UserError when a value has the wrong type or is out of range."""

    # data
    dataset: str = option("digits", "digits (bundled with scikit-learn), fashion, celebahq, imagenet, or folder")
    data: str = option("", "the images: a folder, zip, parquet file, or hf:OWNER/NAME@REVISION", free=True)
    res: int = option(8, "height and width of the images, in pixels")
    condition: str = option("labels", "labels, or vectors: one for each image, from vectors.npy beside the images or "
                            "a column of a hub data set")
    space: str = option("pixel", "train on pixel, or on latent: those of --vae, encoded before by data.latents")
    vae: str = option("", "AutoencoderKL of diffusers: a folder, or OWNER/NAME, OWNER/NAME@REVISION on the hub")
    latents: str = option("", "directory of the latent cache [latents/DATASET-RES-VAE/train]", free=True)
    flip: bool = option(True, "mirror half of the training images (never digits or garments)")
    skip_bad: bool = option(False, "leave out images that cannot be read; they are named and counted")
    init: str = option("", "start from the weights of this run, checkpoint or export (fine-tuning)")
    out: str = option("", "directory of the run [out/PRESET]", free=True)
    seed: int = option(0, "seed of everything random")
    # model
    method: str = option("lapflow", "lapflow, or a system to compare it with: lfm, pyramidal, pyramidal-zero-overlap, "
                         "pixelflow, edify, edify-plain, dfm, separate")
    size: str = option("96,6,3,2", "S/2, B/2, L/2, XL/2, or hidden_size,depth,num_heads,patch_size")
    patches: tuple[float, ...] = option((), "patch size of each band, like 2,4,4 (default: that of --size)")
    num_scales: int = option(2, "bands of the pyramid, K; 1 is a plain DiT")
    experts: str = option("full", "what is per band: full, qkv or none")
    mask: str = option("causal", "bands a band reads: causal (itself and coarser), none (all) or self")
    condition_tokens: bool = option(True, "time and label also as tokens in front of the sequence")
    block: str = option("dit", "dit, as the paper, or modern: QK-norm, rotary positions, SwiGLU")
    concat_coarse: bool = option(False, "finer bands also take in the coarser image at their place")
    # schedule
    pyramid: str = option("haar", "how images are split into bands: haar, or bilinear as DFM")
    starts: tuple[float, ...] = option((), "start time of each band, like 0,0.5 (default: i/K)")
    path: str = option("linear", "linear, quadratic, cubic or gvp")
    noise: str = option("pyramid", "pyramid (bands of one white image) or independent")
    stages: str = option("stratified", "stratified (each stage a share of each batch) or batch (one, as the paper)")
    full_range: bool = option(True, "train stage s on [T_s, 1], as the paper; otherwise on [T_s, T_(s+1)]")
    times: str = option("uniform", "of training: uniform, as the paper, or logit-normal (DFM has its own)")
    stage_weights: tuple[float, ...] = option((), "how often each stage is trained, like 2,2,1 (default: equally)")
    # training
    steps: int = option(1000, "optimizer steps", free=True)
    batch: int = option(128, "images per optimizer step, over all processes")
    micro_batch: int = option(0, "most images a process takes at once [what fits the GPU's memory]", free=True)
    lr: float = option(1e-2, "peak learning rate of AdamW")
    lr_end: float = option(1e-4, "where the learning rate ends; the way there is a cosine")
    warmup: int = option(100, "steps of linear warm-up")
    beta2: float = option(0.95, "second beta of AdamW")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    clip: float = option(1.0, "largest gradient norm (0: no clipping)")
    label_drop: float = option(0.1, "share of training labels replaced by the null label, for guidance")
    ema: float = option(0.995, "decay of the averaged weights that are sampled by default (0: keep none)")
    precision: str = option("float32", "of the network in training: float32 or bfloat16; weights and loss stay float32")
    compile: bool = option(False, "compile the transformer blocks, one graph for each stage", free=True)
    shard: bool = option(False, "several processes share the optimizer's state: less memory, more traffic", free=True)
    recompute: bool = option(False, "activation checkpointing: less memory, a third more time", free=True)
    # sampling
    solver: str = option("dopri5", "dopri5 (adaptive), euler, midpoint, heun or rk4", free=True)
    rtol: float = option(1e-3, "relative tolerance of dopri5 (the paper: 1e-5)", free=True)
    atol: float = option(1e-3, "absolute tolerance of dopri5 (the paper: 1e-5)", free=True)
    solver_steps: int = option(0, "steps of the other solvers, over all segments together", free=True)
    cfg_scale: float = option(1.0, "guidance w in v_null + w (v_cond - v_null); 1 is none", free=True)
    noise_scale: tuple[float, ...] = option((), "of each band while sampling, like 1,0.85,0.85 (default: 1)", free=True)
    # records
    num_samples: int = option(500, "images drawn and scored at the end of training", free=True)
    sample_every: int = option(0, "steps between grids of 16 samples (0: only at the end)", free=True)
    eval_every: int = option(0, "steps between scores of --num-samples images (0: only at the end)", free=True)
    log_every: int = option(20, "steps between lines of metrics.jsonl", free=True)
    logger: str = option("", "also log to tensorboard", free=True)
    save_every: int = option(250, "steps between checkpoints", free=True)
    keep: int = option(2, "checkpoints kept, newest first", free=True)
    keep_every: int = option(0, "checkpoints at multiples of this step stay for good (0: none)", free=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        for names, least, below in RANGES:
            for name in names.split():
                if not least <= getattr(self, name) < below:
                    text = f"at least {least}" + (f" and below {below}" if below < 2**63 else "")
                    raise UserError(f"{name} must be {text}, not {getattr(self, name)}")
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        self.check_combinations()
        if not self.starts:                                 # dfm: see baselines/dfm.py
            starts = [(0.9 if i else 0.0) if self.method == "dfm" else i / self.num_scales
                      for i in range(self.num_scales)]
            object.__setattr__(self, "starts", tuple(starts))
        if self.space == "latent" and not self.latents:
            object.__setattr__(self, "latents", cache_folder(self.dataset, self.res, self.vae, "train"))

    def check_combinations(self) -> None:
        """Raises UserError for settings that do not go together."""
        if not (0 < self.rtol < math.inf and 0 < self.atol < math.inf):
            raise UserError(f"rtol and atol must be numbers above 0, not {self.rtol} and {self.atol}")
        check_solver(self.solver, self.solver_steps, "--solver-steps")
        if self.space == "latent" and not self.vae:
            raise UserError("latents need the autoencoder they come from: add --vae, a folder or OWNER/NAME on the hub")
        if self.space == "latent" and self.dataset in ("digits", "fashion"):
            raise UserError(f"the dataset {self.dataset} is trained in pixels: leave out --space")
        for values, what, fits in (
                (self.patches, "patch sizes, whole numbers", lambda patch: patch >= 1 and patch % 1 == 0),
                (self.starts, "starts", lambda start: True),
                (self.stage_weights, "stage weights, each above 0", lambda weight: 0 < weight < math.inf),
                (self.noise_scale, "noise scales, none below 0", lambda scale: 0 <= scale < math.inf)):
            if values and (len(values) != self.num_scales or not all(map(fits, values))):
                raise UserError(f"{self.num_scales} scales need {self.num_scales} {what}, not "
                                f"{','.join(map(str, values))}")
        weights = self.stage_weights or (1.0,) * self.num_scales
        least = math.ceil(sum(weights) / min(weights) - 1e-9)               # 0.1, 0.2: 3, whatever floats say
        if self.stages == "stratified" and self.batch < least:
            raise UserError(f"stratified stages need a batch of at least {least} images, one for each stage, not "
                            f"{self.batch}")
        if self.method != "lapflow":
            for name in LAPFLOW + (() if self.method == "separate" else BANDS):
                if getattr(self, name) != getattr(Config, name):
                    raise UserError(f"{name} belongs to LapFlow: leave it out with --method {self.method}")
        if self.method == "lfm" and self.num_scales != 1:
            raise UserError(f"LFM has one scale, not {self.num_scales}: leave out --num-scales and --starts")
        if self.patches and self.method in ("lfm", "dfm", "separate"):
            raise UserError(f"the patches of {self.method} are those of --size: leave out --patches")
        if self.method == "dfm" and self.stage_weights:
            raise UserError("DFM has its own weights of stages: leave out --stage-weights")
        if self.method == "dfm" and self.stages == "stratified" and self.batch < 2 * (self.num_scales - 1):
            raise UserError("DFM trains its finer stages on half of each batch: stratified stages need a batch of at "
                            f"least {2 * (self.num_scales - 1)} images, not {self.batch}")

    def to_dict(self) -> dict:
        """Plain values only, for JSON and checkpoints."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of to_dict. Raises UserError for a key that is no setting."""
        if not isinstance(values, dict):
            raise UserError("a configuration must be a JSON object of settings")
        if unknown := sorted(map(repr, set(values) - {f.name for f in dataclasses.fields(cls)})):
            raise UserError(f"unknown settings in the configuration: {', '.join(unknown)}")
        return cls(**values)


def cache_folder(dataset: str, res: int, vae: str, split: str) -> str:
    """Where data.latents writes and train.py reads by default."""
    return f"latents/{dataset}-{res}-{vae.rstrip('/').split('/')[-1].split('@')[0]}/{split}"


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises UserError for a value that is not one of the choices."""
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}; choose one of {', '.join(filter(None, choices))}")


def check_solver(solver: str, steps: int | None, flag: str = "--steps") -> None:
    """Raises UserError for an unknown solver, for steps of an adaptive one, and for a fixed-step one without."""
    check_choice("solver", solver, SOLVERS)
    if steps is not None and steps < 0:
        raise UserError(f"a solver cannot take {steps} steps")
    if solver == "dopri5" and steps:
        raise UserError(f"dopri5 chooses its own steps: leave out {flag}, or set its tolerances with --rtol and --atol")
    if solver != "dopri5" and not steps:
        raise UserError(f"the solver {solver} needs a number of steps: add {flag}, for example {flag} 40")


# the numbers of each setting: at least, below
RANGES = (("res", 1, 2**14 + 1), ("num_scales", 1, 9), ("batch num_samples log_every save_every keep", 1, 2**63),
          ("seed steps lr lr_end warmup weight_decay clip solver_steps cfg_scale micro_batch sample_every eval_every "
           "keep_every", 0, 2**63), ("label_drop ema beta2", 0, 1))


def checked(field: dataclasses.Field, value: object) -> object:
    """The value of a setting as its type has it: 1 is a number, [0, 0.5] a list of numbers. Raises UserError."""
    kind, parts = type(field.default), value if isinstance(value, (tuple, list)) else [value]
    if any(isinstance(part, int) and abs(part) > 2**63 for part in parts):          # no float holds 10^400
        raise UserError(f"{field.name} must be at most 2^63 in size")

    def is_number(part):
        return isinstance(part, (int, float)) and not isinstance(part, bool)

    if kind is tuple and isinstance(value, (tuple, list)) and all(map(is_number, value)):
        return tuple(map(float, value))
    if kind is float and is_number(value):
        return float(value)
    if kind is tuple or type(value) is not kind:            # True is not a whole number
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise UserError(f"{field.name} must be {names.get(kind, 'a list of numbers')}, not {value!r}")
    return value


def parser(description: str, usage: str) -> argparse.ArgumentParser:
    """A parser whose errors are short: the usage line and one sentence."""
    return argparse.ArgumentParser(description=description, usage=usage, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def numbers(text: str) -> tuple[float, ...]:
    """"0,0.5" -> (0.0, 0.5), "" -> ()."""
    return tuple(float(n) for n in text.split(",")) if text else ()


def add_config_flags(to: argparse.ArgumentParser) -> None:
    """One flag for each setting: --num-scales for num_scales. A flag that was not given leaves no trace."""
    to.add_argument("--preset", default=argparse.SUPPRESS, metavar="NAME",
                    help="a row of python -m studies.plan [what fits --dataset, --res and --size]")
    for field in dataclasses.fields(Config):
        kind, flag = type(field.default), "--" + field.name.replace("_", "-")
        default = ",".join(map(str, field.default)) if kind is tuple else field.default
        text = field.metadata["help"] + ("" if default == "" else f" [{default}]")
        if kind is bool:
            to.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            read = numbers if kind is tuple else kind
            metavar = "X,X.." if kind is tuple else {str: "TEXT", int: "N", float: "X"}[kind]
            to.add_argument(flag, type=read, default=argparse.SUPPRESS, metavar=metavar, help=text)


def flags(settings: dict) -> list[str]:
    """The words of a command line that gives these settings."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)]
    return words


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that sample.py and fid.py share; what is not given comes from the run.

    torchrun completes shortened flags, of the script's too: no flag may begin one of its own (a test looks). -n is
    there because --num is the beginning of torchrun's --numa-binding.
    """
    parser.add_argument("--seed", type=int, default=0, help="image i depends on this seed and on i [0]")
    parser.add_argument("--labels", default="balanced", help="balanced (classes in turn), or one label or class name")
    parser.add_argument("--vectors", metavar="FILE", help="conditions of a run on vectors, .npy (n, dim), in turn")
    parser.add_argument("--cfg", type=float, help="guidance scale w; 1 is none")
    parser.add_argument("--cfg-interval", type=numbers, metavar="T,T", help="times with guidance [0,1]")
    parser.add_argument("--noise-scale", type=numbers, metavar="X,X..", help="of each band, coarse to fine")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the network; the solver is float32 [float32]")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs: faster for small batches")
    parser.add_argument("--solver", choices=SOLVERS, help="dopri5 is adaptive, the others take --steps")
    parser.add_argument("--rtol", type=float, help="relative tolerance of dopri5")
    parser.add_argument("--atol", type=float, help="absolute tolerance of dopri5")
    parser.add_argument("--steps", type=int, help="steps of a fixed-step solver, over all segments together")
    parser.add_argument("--norm", choices=("batch", "sample"), default="batch",
                        help="error norm of dopri5: over the whole batch (as torchdiffeq), or its worst image [batch]")
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


