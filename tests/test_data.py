import numpy as np
import pytest
import torch
from PIL import Image

import data
import sources
from config import Config, UserError
from data import BatchRandom, ImageRandom, order


def config(**settings):
    return Config(**{**dict(dataset="folder", res=16), **settings})


def save(path, size=(20, 30), colour=(255, 0, 0), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def read(dataset, index, u):
    """x1 and y of examples, mirrored where u (B, 3) says so."""
    raw, y = dataset.read(np.asarray(index), np.asarray(u))
    return dataset.x1(raw), y


def test_digits_are_the_bundled_ones():
    digits = data.load(Config())
    assert digits.pixels.shape == (1797, 1, 8, 8) and digits.pixels.max() == 255 and len(digits.classes) == 10
    x, y = read(digits, [0, 5], np.zeros((2, 3)))
    assert x.shape == (2, 1, 8, 8) and x.min() == -1 and x.max() == 1 and y.tolist() == [0, 5]
    assert np.array_equal(data.to_uint8(x).numpy(), digits.pixels[[0, 5]])      # never mirrored, and exact


def test_photos_are_random_mirrored_crops_with_the_photo_as_class():
    photos = data.load(config(dataset="photos"))
    u = [[0.9, 0.0, 0.0], [0.1, 0.0, 0.0], [0.9, 0.999, 0.999]]
    x, y = read(photos, [0, 0, 1], u)
    assert x.shape == (3, 3, 16, 16) and y.tolist() == [0, 0, 1]
    assert torch.equal(x[1], x[0].flip(-1))
    corner = torch.from_numpy(photos.photos[0][:, :16, :16].copy()).float() / 127.5 - 1
    assert torch.equal(x[0], corner)
    assert torch.equal(data.to_uint8(x[2]), torch.from_numpy(photos.photos[1][:, -16:, -16:].copy()))
    with pytest.raises(UserError, match="427"):
        data.load(config(dataset="photos", res=512))


def test_a_flat_folder_is_unconditional(tmp_path):
    for name in ("b10.png", "b9.jpg", "a.PNG"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    images = data.load(config(data=str(tmp_path)))
    assert len(images) == 3 and images.classes == []
    assert read(images, np.arange(3), np.ones((3, 3)))[1] is None
    assert sources.open_source("folder", str(tmp_path)).names == ["a.PNG", "b9.jpg", "b10.png"]


def test_subfolders_are_classes_in_natural_order(tmp_path):
    for name, colour in (("10", (0, 0, 255)), ("9", (0, 255, 0)), ("1/deeper", (255, 0, 0))):
        save(tmp_path / name / "x.png", colour=colour)
    (tmp_path / "empty").mkdir()
    images = data.load(config(data=str(tmp_path)))
    assert images.classes == ["1", "9", "10"] and images.labels.tolist() == [0, 1, 2]
    x, y = read(images, np.arange(3), np.ones((3, 3)))
    assert x[:, :, 0, 0].argmax(dim=1).tolist() == [0, 1, 2] and y.tolist() == [0, 1, 2]


def test_images_are_mirrored_half_of_the_time(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :8] = 255
    Image.fromarray(picture).save(tmp_path / "x.png")
    images = data.load(config(data=str(tmp_path)))
    x, _ = read(images, [0, 0], [[0.4, 0, 0], [0.6, 0, 0]])
    assert torch.equal(x[0], x[1].flip(-1)) and x[1, 0, 0, 0] == 1
    fixed = read(data.load(config(data=str(tmp_path), flip=False)), [0], np.zeros((1, 3)))[0]
    assert fixed[0, 0, 0, 0] == 1


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (16, 16), (9, 30), (33, 1000), (1, 1)])
def test_any_image_becomes_a_square(tmp_path, size):
    save(tmp_path / "x.png", size=size)
    assert sources.read_image(tmp_path / "x.png", 16).shape == (3, 16, 16)


def test_the_crop_is_the_centre_of_the_shrunk_image(tmp_path):
    """A 64 x 32 picture with a white right third: at 16 pixels the centre crop shows the middle half."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, 40:] = 255
    Image.fromarray(picture).save(tmp_path / "x.png")
    row = sources.read_image(tmp_path / "x.png", 16)[0, 8]
    assert row[:11].max() < 40 and row[13:].min() > 215                         # the edge is at (40 - 16) / 2 = 12


def test_kinds_of_images(tmp_path):
    save(tmp_path / "grey.png", mode="L", colour=100)
    save(tmp_path / "alpha.png", mode="RGBA", colour=(1, 2, 3, 0))
    save(tmp_path / "palette.png", mode="P", colour=0)
    save(tmp_path / "cmyk.jpg", mode="CMYK", colour=(0, 0, 0, 0))
    upright = Image.Exif()
    upright[0x0112] = 6                                                         # "turn a quarter clockwise to view"
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8] = 255
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=upright)
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "deep.png")
    for name, value in (("grey.png", 100), ("alpha.png", 255), ("palette.png", None), ("cmyk.jpg", 255),
                        ("deep.png", 127)):
        pixels = sources.read_image(tmp_path / name, 16)
        assert pixels.shape == (3, 16, 16) and (value is None or abs(int(pixels[0, 8, 8]) - value) <= 1), name
    turned = sources.read_image(tmp_path / "turned.png", 16)
    assert turned[0, :, -1].min() == 255 and turned[0, :, 0].max() == 0         # its top is now on the right


def test_bad_folders_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no image folder.*missing.*--data"):
        data.load(config(data=str(tmp_path / "missing")))
    with pytest.raises(UserError, match="needs its images: add --data"):
        data.load(config())
    with pytest.raises(UserError, match="no images in"):
        data.load(config(data=str(tmp_path)))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError, match=r"broken\.png"):
        data.load(config(data=str(tmp_path)))
    (tmp_path / "broken.png").unlink()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:20000])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        data.load(config(data=str(tmp_path)))
    (tmp_path / "cut.jpg").unlink()
    save(tmp_path / "class" / "x.png")
    with pytest.raises(UserError, match=r"both class folders and images.*whole\.jpg"):
        data.load(config(data=str(tmp_path)))


def test_class_names_of_any_script_are_sorted(tmp_path):
    for name in ("5²", "①", "07", "7", "é"):
        save(tmp_path / name / "x.png")
    assert sources.open_source("folder", str(tmp_path)).classes[:3] == ["5²", "07", "7"]


def test_unknown_dataset_and_wrong_resolution():
    with pytest.raises(UserError, match="unknown dataset 'cats'"):
        Config(dataset="cats")
    with pytest.raises(UserError, match="add --dataset folder"):
        data.load(Config(data="pictures"))
    with pytest.raises(UserError, match="8 x 8"):
        data.load(Config(res=16))


def test_order_is_shuffled_epochs():
    whole = order(10, seed=1, start=0, length=40)
    for epoch in range(4):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert not np.array_equal(whole[:10], whole[10:20])
    assert np.array_equal(np.concatenate([order(10, 1, s, 7) for s in range(0, 35, 7)]), whole[:35])
    assert not np.array_equal(order(10, 2, 0, 40), whole)


def test_batch_random_is_the_same_however_the_batch_is_shared():
    whole = BatchRandom(5, 11, 8)
    parts = [BatchRandom(5, 11, 8, slice(r, r + 2)) for r in range(0, 8, 2)]
    for method, shape in (("rand", ()), ("randn", (2, 3)), ("rand", (3,))):
        assert torch.equal(getattr(whole, method)(*shape), torch.cat([getattr(p, method)(*shape) for p in parts]))
    assert len({whole.randint(1000), *(p.randint(1000) for p in parts)}) == 1
    draws = {(seed, step): BatchRandom(seed, step, 4).randn(2) for seed in (0, 1) for step in (0, 1)}
    assert len({tuple(x.flatten().tolist()) for x in draws.values()}) == 4


def test_image_random_is_standard_normal():
    draws = ImageRandom(0, range(500)).randn(64)
    assert draws.mean().abs() < 0.02 and (draws.std() - 1).abs() < 0.02 and draws.dtype == torch.float32
    correlation = torch.corrcoef(draws[:20]) - torch.eye(20)
    assert correlation.abs().max() < 0.6                                        # neighbours are not alike


def test_uint8_rounds_and_clamps():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    assert data.to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(data.to_uint8(levels / 127.5 - 1).long(), levels)
