"""Colour crops of fifty photographs that come in ordinary packages, as an image folder of any size.

    pip install --no-deps mvtb-data==1.6.1      130 MB, MIT
    pip install scikit-image                    BSD; scikit-learn is there already
    python -m data.crops crops64 --res 64       then python train.py --dataset folder --data crops64

Every photograph is a class: 130 crops for training and 60 for tests, drawn alike, so that tests are of the same
distribution; two may overlap, and `novelty` of fid.py tells copies. A crop is a square of 64 to 320 pixels
(log-uniform), reduced with Lanczos; flat ones are left out. The same command writes the same files. Not in paper: a set
small enough for two cores, with the detail of photographs.
"""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import config
from config import UserError
from data.sources import read_photo

PHOTOS = {                                                  # package: folder in it, names; one photograph of a scene
    "mvtbdata": ("images", """58060.png building2-3.png butterfly.jpg campus/P1070493.png campus/P1070494.png
        campus/P1070496.png campus/P1070498.png campus/P1070499.png campus/P1070501.png campus/P1070503.png
        campus/P1070505.png campus/P1070507.png campus/P1070509.png campus/P1070512.png campus/P1070514.png
        campus/P1070515.png church.png eiffel-1.png flowers1.png flowers2.png flowers3.png flowers4.png flowers5.png
        flowers6.png flowers7.png flowers8.png flowers9.png image3.jpg lab-scene.png monalisa.png mosaic/aerial-08.png
        mosaic/aerialphoto.png notre-dame.png parks.png road.png rocks2-l.png roof.png tomato_124.png tomato_14.png
        walls-l.png"""),
    "skimage": ("data", """astronaut.png chelsea.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png
        retina.jpg rocket.jpg"""),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
COUNTS = {"train": 130, "test": 60}
LEAST_STD = 14                                              # of the 256 grey levels: sky and walls are flat


def photographs() -> dict[str, Path]:
    """Name -> file. Raises UserError when a package is not installed."""
    files = {}
    for package, (folder, names) in PHOTOS.items():
        found = importlib.util.find_spec(package)
        for name in names.split() if found else ():
            files[Path(name).stem] = Path(found.origin).parent / folder / name
        if not found or not all(file.exists() for file in files.values()):
            raise UserError(f"the photographs of {package} are not there: pip install --no-deps mvtb-data==1.6.1 and "
                            "pip install scikit-image")
    return files


def crops_of(photo: Image.Image, count: int, res: int, random: np.random.Generator) -> list[Image.Image]:
    """Random square crops that are not flat, res x res. Raises UserError when almost all of a photograph is flat."""
    crops = []
    for _ in range(100 * count):
        side = round(min(np.exp(random.uniform(np.log(64), np.log(320))), *photo.size))
        left, top = (int(random.integers(length - side + 1)) for length in photo.size)
        crop = photo.resize((res, res), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        if np.asarray(crop.convert("L"), np.float64).std() >= LEAST_STD:
            crops.append(crop)
        if len(crops) == count:
            return crops
    raise UserError(f"only {len(crops)} of {100 * count} crops of a photograph of {photo.size} pixels are not flat")


def write(folder: Path, res: int) -> int:
    """All crops, as folder/SPLIT/PHOTOGRAPH/NUMBER.png. Returns how many."""
    total = 0
    for number, (name, file) in enumerate(tqdm(sorted(photographs().items()), desc="cropping", unit="photo")):
        photo = read_photo(file)
        for split, count in COUNTS.items():
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            random = np.random.default_rng([number, split == "test"])
            for i, crop in enumerate(crops_of(photo, count, res, random)):
                crop.save(target / f"{i:03d}.png")
                total += 1
    return total


def main() -> None:
    parser = config.parser(__doc__, "python -m data.crops DIR [--res N]")
    parser.add_argument("folder", metavar="DIR", help="where the images go; made when it is not there")
    parser.add_argument("--res", type=int, default=64, help="height and width in pixels [64]")
    args = parser.parse_args()
    if not 8 <= args.res <= 320:
        raise UserError(f"--res must be from 8 to 320, the largest crop, not {args.res}")
    if Path(args.folder).exists() and any(Path(args.folder).iterdir()):
        raise UserError(f"{args.folder} is not empty: name another folder, or delete it")
    count = write(Path(args.folder), args.res)
    print(f"wrote      {count:,} images to {args.folder}\n"
          f"next       python train.py --dataset folder --data {args.folder} --res {args.res}")


if __name__ == "__main__":
    config.run(main)
