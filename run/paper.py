"""The presets: every row of the paper with its numbers, the small runs, and how a command line becomes a configuration.

A run is a preset, then what the user gave. `python -m studies.plan` prints all rows.
"""

import dataclasses
from dataclasses import dataclass

from config import DATASETS, LAPFLOW, Config, UserError, check_choice, differences


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

BY_BAND = ("starts", "stage_weights", "patches")            # a number for each band
# Not in paper: what made images better at equal FLOPs (docs/results.md).
_OURS = dict(block="modern", times="logit-normal", full_range=False, concat_coarse=True, num_scales=3,
             starts=(0, 0.5, 0.8), stage_weights=(2, 2, 1))
_SMALL = dict(_OURS, dataset="folder", size="96,4,3,4", steps=3360, lr=2e-2, num_samples=1500)     # for two CPU cores

_256 = Preset(
    dict(_CELEBAHQ, res=256, vae=EQ_VAE, steps=500 * CELEBAHQ // 256),
    dict(fid=3.53, recall=0.53, nfe=80, seconds=1.51, parameters=612, days=1.2, memory=42.2))
_512 = Preset(
    dict(_CELEBAHQ, res=512, vae=SD_VAE, num_scales=3, steps=1000 * CELEBAHQ // 256),
    dict(fid=4.04, recall=0.47, nfe=85, seconds=2.60, parameters=680, days=3.1, memory=82.8))
_1024 = Preset(
    dict(_CELEBAHQ, res=1024, vae=SD_VAE, num_scales=3, batch=128, steps=2000 * CELEBAHQ // 128),
    dict(fid=5.51, recall=0.39, nfe=94, seconds=3.30, parameters=680, days=8.3, memory=120.5))

# The digits are the defaults of Config. The first preset that fits --dataset, --res and --size is taken.
PRESETS = {
    "digits": Preset({}),                                   # two minutes on two CPU cores; the choices are in LOG.md
    "fashion": Preset(dict(_SMALL, dataset="fashion", res=32, steps=4700, num_samples=2000)),
    "fashion-gpu": Preset(dict(_OURS, dataset="fashion", res=32, size="128,6,4,2", steps=20000, batch=256, lr=2e-3,
                               precision="bfloat16", compile=True, num_samples=2000)),
    "folder": Preset(dict(_OURS, dataset="folder", res=64, size="192,6,3,4", batch=32, steps=20000, lr=1e-3,
                          lr_end=1e-5, ema=0.999, num_samples=64, save_every=1000)),
    "folder-32": Preset(dict(_SMALL, res=32, patches=(2, 4, 4))),  # 16 tokens in the coarsest band
    "folder-64": Preset(dict(_SMALL, res=64)),              # as many, with patches of 4; also --res 64 --size 96,4,3,4
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


def find_row(cfg: Config) -> str:
    """The preset that trains, with any seed, what this configuration trains; "" when none does."""
    for name, preset in PRESETS.items():
        row = Config(**preset.settings)
        if set(differences(cfg, row)) <= {"seed"} and (cfg.steps, cfg.cfg_scale) == (row.steps, row.cfg_scale):
            return name
    return ""


def nearest_preset(given: dict) -> str:
    """The first preset that has the dataset of these settings, and as much as possible of res, space, size, method."""
    presets = {name: Config(**preset.settings) for name, preset in PRESETS.items()}
    for names in (("res", "size", "space"), ("res", "space"), ("res",), ()):
        asked = {name: given[name] for name in names if name in given} | {"dataset": given.get("dataset", "digits")}
        for method in (given.get("method"), "lapflow"):
            for name, row in presets.items():
                if all(getattr(row, key) == value for key, value in {**asked, "method": method}.items()):
                    return name
    raise AssertionError("every dataset has a preset")


def resolve(given: dict) -> Config:
    """The preset, then what the user gave. Raises UserError for an unknown preset or setting."""
    given = dict(given)
    name = given.pop("preset", "")
    if name and name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; python -m studies.plan lists them")
    check_choice("dataset", given.get("dataset", "digits"), DATASETS)
    name = name or nearest_preset(given)
    settings = {**PRESETS[name].settings, **given}
    if settings.get("method", "lapflow") != "lapflow":      # those of the preset are LapFlow's
        ours = (*LAPFLOW, *BY_BAND)
        settings = {key: value for key, value in settings.items() if key in given or key not in ours}
    if settings.get("method") == "lfm":
        settings["num_scales"] = given.get("num_scales", 1)
    if settings.get("num_scales") != PRESETS[name].settings.get("num_scales"):
        settings |= {key: given.get(key, ()) for key in BY_BAND}                # the preset's are for its K
    if "size" in given:                                     # it names one patch for all bands
        settings["patches"] = given.get("patches", ())
    if settings.get("space") == "pixel":
        settings["vae"] = given.get("vae", "")
    elif settings.get("space") == "latent" and ("res" in given or not settings.get("vae")):
        settings["vae"] = given.get("vae") or standard_vae(settings.get("res", Config.res))
    cfg = Config(**settings)
    if not cfg.out:
        row = find_row(cfg) or name
        preset = Config(**PRESETS[row].settings)
        method = "" if cfg.method == preset.method else f"-{cfg.method}"
        res = "" if cfg.res == preset.res else f"-{cfg.res}"
        cfg = dataclasses.replace(cfg, out=f"out/{row}{method}{res}")
    return cfg


def standard_vae(res: int) -> str:
    """The autoencoder of the paper for this resolution."""
    return EQ_VAE if res <= 256 else SD_VAE
