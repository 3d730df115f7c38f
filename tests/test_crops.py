"""data.crops: colour crops of photographs from packages, drawn alike for training and for tests."""

import numpy as np
import pytest
from PIL import Image

from config import UserError
from data import crops, sources


@pytest.fixture
def two_photographs(tmp_path, monkeypatch):
    """Red noise on the left, green noise on the right; a second one grey, turned by its EXIF."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 40)).repeat(10, axis=0).repeat(10, axis=1).astype(np.uint8)
    pixels = np.zeros((120, 400, 3), np.uint8)
    pixels[:, :200, 0], pixels[:, 200:, 1] = noise[:, :200], noise[:, 200:]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    turned, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = 6                                        # 120 pixels wide
    turned.save(tmp_path / "b.png", exif=exif)
    files = {"a": tmp_path / "a.png", "b": tmp_path / "b.png"}
    monkeypatch.setattr(crops, "photographs", lambda: files)
    monkeypatch.setattr(crops, "COUNTS", {"train": 6, "test": 3})
    return files


def test_both_splits_show_the_whole_photograph_and_the_same_command_writes_the_same_files(two_photographs, tmp_path):
    for name in ("one", "two"):
        assert crops.write(tmp_path / name, 16) == 18
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 18 and all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
                                    for file in files)
    drawn = []
    for split in ("train", "test"):
        source = sources.open_source("folder", str(tmp_path / "one"), split)
        assert source.classes == ["a", "b"] and source.labels == sorted(source.labels)
        images = np.stack([source.image(i, 16) for i in range(len(source)) if source.labels[i] == 0])
        assert images[:, 0].std() > 5 and images[:, 1].std() > 5 and not images[:, 2].any()
        drawn += [image.tobytes() for image in images]
    assert len(set(drawn)) == len(drawn) == 9               # no crop twice
    assert Image.open(tmp_path / "one" / files[0]).size == (16, 16)


def test_flat_crops_are_left_out():
    half = np.zeros((100, 400, 3), np.uint8)
    half[:, 200:] = np.random.default_rng(0).integers(0, 256, (100, 200, 3))
    drawn = crops.crops_of(Image.fromarray(half), 20, 32, np.random.default_rng(0))
    assert len(drawn) == 20 and all(np.asarray(crop.convert("L"), float).std() >= crops.LEAST_STD for crop in drawn)
    blue = Image.new("RGB", (100, 100), (0, 90, 255))       # its channels differ, its pixels do not
    with pytest.raises(UserError, match="only 0 of 200 crops"):
        crops.crops_of(blue, 2, 16, np.random.default_rng(0))


def test_a_package_that_is_not_installed_is_named_with_the_command(monkeypatch, give_up, tmp_path):
    monkeypatch.setattr(crops, "PHOTOS", {"no_such_package": ("images", "a.png")})
    with pytest.raises(UserError, match="photographs of no_such_package are not there: pip install "):
        crops.photographs()
    monkeypatch.setattr(crops, "PHOTOS", {"sklearn": ("datasets/images", "china.jpg")})
    assert crops.photographs()["china"].exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in give_up("data.crops", "full")
    assert "--res must be from 8 to 320" in give_up("data.crops", "new", "--res", "4")
