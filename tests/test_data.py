"""Images and their conditions, batches, random numbers, Fashion-MNIST, held-out splits, vectors."""

import functools
import gzip
import io
import itertools
import os
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from config import Config, UserError
from data import batches, conditions, fashion, sources
from data.batches import BatchRandom, ImageRandom, order


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
    digits = batches.load(Config())
    assert digits.pixels.shape == (1797, 1, 8, 8) and digits.pixels.max() == 255 and len(digits.classes) == 10
    x, y = read(digits, [0, 5], np.zeros((2, 3)))
    assert x.shape == (2, 1, 8, 8) and x.min() == -1 and x.max() == 1 and y.tolist() == [0, 5]
    assert np.array_equal(batches.to_uint8(x).numpy(), digits.pixels[[0, 5]])      # never mirrored, and exact


def test_a_flat_folder_is_unconditional(tmp_path):
    for name in ("b10.png", "b9.jpg", "a.PNG"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    images = batches.load(config(data=str(tmp_path)))
    assert len(images) == 3 and images.classes == []
    assert read(images, np.arange(3), np.ones((3, 3)))[1] is None
    assert sources.open_source("folder", str(tmp_path)).names == ["a.PNG", "b9.jpg", "b10.png"]


def test_subfolders_are_classes_in_natural_order(tmp_path):
    for name, colour in (("10", (0, 0, 255)), ("9", (0, 255, 0)), ("1/deeper", (255, 0, 0))):
        save(tmp_path / name / "x.png", colour=colour)
    (tmp_path / "empty").mkdir()
    images = batches.load(config(data=str(tmp_path)))
    assert images.classes == ["1", "9", "10"] and images.labels.tolist() == [0, 1, 2]
    x, y = read(images, np.arange(3), np.ones((3, 3)))
    assert x[:, :, 0, 0].argmax(dim=1).tolist() == [0, 1, 2] and y.tolist() == [0, 1, 2]


def test_images_are_mirrored_half_of_the_time(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :8] = 255
    Image.fromarray(picture).save(tmp_path / "x.png")
    images = batches.load(config(data=str(tmp_path)))
    x, _ = read(images, [0, 0], [[0.4, 0, 0], [0.6, 0, 0]])
    assert torch.equal(x[0], x[1].flip(-1)) and x[1, 0, 0, 0] == 1
    assert torch.equal(images.reference(1)[0][0], x[1])                         # those of scores never are
    fixed = read(batches.load(config(data=str(tmp_path), flip=False)), [0], np.zeros((1, 3)))[0]
    assert fixed[0, 0, 0, 0] == 1


def test_the_name_of_a_folder_is_no_split_of_its_parquet_files(tmp_path):
    for folder in ("cats-train-test", "my-test-set"):
        (tmp_path / folder).mkdir()
    names = [tmp_path / "cats-train-test" / f"{split}-0.parquet" for split in ("test", "train")]
    for file in (*names, tmp_path / "my-test-set" / "0.parquet"):
        file.touch()
    assert sources.parquet_files(tmp_path / "cats-train-test", "train") == (names[1:], {"train", "test"})
    assert sources.parquet_files(tmp_path / "my-test-set", "train")[1] == set()


def test_parquet_files_of_a_split_by_any_of_its_names(tmp_path):
    def files(names, split):
        folder = tmp_path / "-".join(names)
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / f"{name}-0.parquet").touch()
        chosen, splits = sources.parquet_files(folder, split)
        return [file.name for file in chosen], splits

    for name in ("train", "training"):
        assert files([name, "test"], "train") == ([f"{name}-0.parquet"], {name, "test"})
        assert files([name, "test"], "test")[0] == ["test-0.parquet"]               # none is in both
    for name in ("val", "valid", "validation"):
        assert all(files(["train", name], split)[0] == [f"{name}-0.parquet"] for split in ("val", "validation"))
        with pytest.raises(UserError, match=f"has the splits train, {name}, but no 'test'"):
            files(["train", name], "test")
    assert files(["a", "b"], "test") == (["a-0.parquet", "b-0.parquet"], set())
    assert files(["train", "more"], "more")[0] == ["more-0.parquet"]


def test_an_image_is_mirrored_anew_at_each_step(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :8] = 255
    Image.fromarray(picture).save(tmp_path / "x.png")
    cfg = config(data=str(tmp_path), batch=8)
    first, second = (x1[:, 0, 0, 0] for ((x1, _, _),) in take(cfg, batches.load(cfg), 2, [slice(0, 8)]))
    assert not torch.equal(first, second)


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


def test_an_image_of_twice_the_size_is_averaged():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    averages = picture.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(sources.crop(Image.fromarray(picture), 16) - averages).max() <= 1                      # rounded twice


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
        batches.load(config(data=str(tmp_path / "missing")))
    with pytest.raises(UserError, match="needs its images: add --data"):
        batches.load(config())
    with pytest.raises(UserError, match="no images in"):
        batches.load(config(data=str(tmp_path)))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError, match=r"broken\.png"):
        batches.load(config(data=str(tmp_path)))
    (tmp_path / "broken.png").unlink()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:20000])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        batches.load(config(data=str(tmp_path)))
    (tmp_path / "cut.jpg").unlink()
    save(tmp_path / "class" / "x.png")
    with pytest.raises(UserError, match=r"both class folders and images.*whole\.jpg"):
        batches.load(config(data=str(tmp_path)))


def test_class_names_of_any_script_are_sorted(tmp_path):
    for name in ("5²", "①", "07", "7", "é"):
        save(tmp_path / name / "x.png")
    assert sources.open_source("folder", str(tmp_path)).classes[:3] == ["5²", "07", "7"]


def test_unknown_dataset_and_wrong_resolution():
    with pytest.raises(UserError, match="unknown dataset 'cats'"):
        Config(dataset="cats")
    with pytest.raises(UserError, match="add --dataset folder"):
        batches.load(Config(data="pictures"))
    with pytest.raises(UserError, match="8 x 8"):
        batches.load(Config(res=16))


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
    assert len({whole.choice([1] * 1000), *(p.choice([1] * 1000) for p in parts)}) == 1
    draws = {(seed, step): BatchRandom(seed, step, 4).randn(2) for seed in (0, 1) for step in (0, 1)}
    assert len({tuple(x.flatten().tolist()) for x in draws.values()}) == 4


def test_image_random_is_standard_normal():
    draws = ImageRandom(0, range(500)).randn(64)
    assert draws.mean().abs() < 0.02 and (draws.std() - 1).abs() < 0.02 and draws.dtype == torch.float32
    correlation = torch.corrcoef(draws[:20]) - torch.eye(20)
    assert correlation.abs().max() < 0.6                                        # neighbours are not alike


def test_uint8_rounds_and_clamps():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    assert batches.to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(batches.to_uint8(levels / 127.5 - 1).long(), levels)


# ---------------------------------------------------------------------------------------------------------------------
# the batches of training


def take(cfg, dataset, steps, parts, condition=None):
    """[[(x1, y, a number drawn after them) for each part] for each step]."""
    stream = batches.micro_batches(dataset, cfg, 0, lambda step: parts, "cpu", condition)
    result = [[(x1, y, rng.rand()) for x1, y, rng in step] for step in itertools.islice(stream, steps)]
    stream.close()
    return result


def test_micro_batches_draw_as_one_process_would():
    """The numbers of every step in the order in which training always drew them: mirroring, data, label drop, loss."""
    cfg, digits = Config(batch=12, seed=3, label_drop=0.5), batches.digits()
    condition = conditions.condition_of(batches.facts(digits), digits.examples())(16)
    (whole,), = take(cfg, digits, 1, [slice(0, 12)], condition)
    index = order(1797, 3, 0, 12)
    rng = BatchRandom(3, 0, 12)
    assert torch.equal(whole[0], digits.x1(torch.from_numpy(digits.pixels[index])))
    assert torch.equal(whole[1], torch.where(rng.rand() < 0.5, 10, torch.from_numpy(digits.labels[index])))
    assert torch.equal(whole[2], rng.rand()) and 2 < (whole[1] == 10).sum() < 10
    steps = take(cfg, digits, 3, [slice(0, 4), slice(4, 8), slice(8, 12)], condition)
    assert len(steps) == 3 and all(torch.equal(torch.cat(parts), all_rows) for parts, all_rows in
                                   zip(zip(*steps[0], strict=True), whole, strict=True))
    assert not torch.equal(steps[0][0][0], steps[1][0][0])
    later = batches.micro_batches(digits, cfg, 2, lambda step: [slice(4, 8)], "cpu", condition)     # resumed at step 2
    assert torch.equal(next(next(later))[0], steps[2][1][0])


def test_an_unconditional_set_draws_no_label_drop(tmp_path):
    save(tmp_path / "x.png")
    cfg = config(batch=4, data=str(tmp_path))
    dataset = batches.load(cfg)
    assert conditions.condition_of(batches.facts(dataset)) is None
    (whole,), = take(cfg, dataset, 1, [slice(0, 4)])
    assert whole[1] is None and torch.equal(whole[2], BatchRandom(cfg.seed, 0, 4).rand())


# ---------------------------------------------------------------------------------------------------------------------
# vectors


@pytest.fixture
def with_vectors(tmp_path):
    """Five images in two classes, and for each a vector of two numbers."""
    for i, name in enumerate(("a/0", "a/1", "b/2", "b/3", "b/4")):
        save(tmp_path / f"{name}.png", colour=(10 * i, 0, 0))
    vectors = np.arange(10, dtype=np.float64).reshape(5, 2)
    np.save(tmp_path / "vectors.npy", vectors)
    return tmp_path, vectors


def test_vectors_beside_the_images_take_the_place_of_labels(with_vectors):
    folder, vectors = with_vectors
    cfg = config(data=str(folder), condition="vectors", flip=False, batch=10, label_drop=0.5)
    dataset = batches.load(cfg)
    assert dataset.vectors.dtype == np.float32 and np.array_equal(dataset.vectors, vectors) and dataset.classes == []
    x, y = read(dataset, [3, 0], np.ones((2, 3)))
    assert y.dtype == torch.float32 and y.tolist() == vectors[[3, 0]].tolist()
    assert (127.5 * (x[:, 0, 0, 0] + 1)).round().tolist() == [30, 0]
    x1, y = dataset.reference(4)
    assert np.array_equal(y[:, 0] / 2, np.rint((127.5 * (x1[:, 0, 0, 0].numpy() + 1)) / 10)) and y.shape == (4, 2)
    facts = batches.facts(dataset)
    assert facts["vectors"] == [5, 2] and facts["classes"] == []
    condition = conditions.condition_of(facts, dataset.examples())(16)
    assert torch.equal(condition.draw(5), torch.from_numpy(dataset.vectors))
    assert {n: t.shape for n, t in conditions.condition_of(facts)(16).state_dict().items()} == {
        n: t.shape for n, t in condition.state_dict().items()}                      # room for what a file brings
    (whole,), = take(cfg, dataset, 1, [slice(0, 10)], condition)
    rng = BatchRandom(cfg.seed, 0, 10)
    dropped = rng.rand() < 0.5
    assert torch.equal(whole[1].isnan().all(dim=1), dropped) and torch.equal(whole[2], rng.rand())
    labels = batches.load(config(data=str(folder)))
    assert labels.vectors is None and labels.classes == ["a", "b"] and labels.fingerprint != dataset.fingerprint
    np.save(folder / "vectors.npy", vectors + 1)
    assert batches.load(cfg).fingerprint != dataset.fingerprint                     # another run's


def test_examples_are_spread_over_the_set():
    images = batches.Images(np.zeros((1000, 1, 4, 4), np.uint8), np.zeros(1000, np.int64))
    assert images.examples() is None
    images.use_vectors(np.arange(1000, dtype=np.float32)[:, None])
    examples = images.examples()[:, 0]
    assert len(examples) == 256 and examples[0] == 0 and examples[-1] == 999 and 3 <= examples.diff().min() <= 4


def test_labels_and_vectors_stay_with_their_images_when_bad_ones_are_left_out(with_vectors):
    folder, vectors = with_vectors
    (folder / "a" / "1.png").write_bytes(b"broken")
    assert batches.load(config(data=str(folder), skip_bad=True)).labels.tolist() == [0, 1, 1, 1]
    dataset = batches.load(config(data=str(folder), condition="vectors", skip_bad=True))
    assert np.array_equal(dataset.vectors, vectors[[0, 2, 3, 4]])


@pytest.mark.parametrize("array, words", [
    (np.zeros((4, 2)), "holds 4 vectors, but there are 5 images"), (np.zeros(5), r"shape \(N, dim\).*\(5,\)"),
    (np.zeros((5, 0)), r"shape \(N, dim\)"), (np.full((5, 2), np.nan), "not finite in float32: see row 0"),
    (np.array([[1.0]] * 4 + [[1e300]]), "not finite in float32: see row 4"),
    (np.array([["a"]] * 5), r"must hold numbers"), (np.zeros((5, 2), complex), "must hold numbers"),
    (np.array([[None]] * 5), "cannot be read as a .npy"), (b"PK\x03\x04", "cannot be read as a .npy"),
    (b"", "cannot be read as a .npy"), (None, r"needs .*vectors\.npy")])
def test_vectors_that_do_not_fit_are_named(with_vectors, array, words):
    folder, _ = with_vectors
    (folder / "vectors.npy").unlink()
    if isinstance(array, bytes):
        (folder / "vectors.npy").write_bytes(array)
    elif array is not None:
        np.save(folder / "vectors.npy", array)
    with pytest.raises(UserError, match=words) as problem:
        batches.load(config(data=str(folder), condition="vectors"))
    assert "\n" not in str(problem.value) and "vectors.npy" in str(problem.value)


@pytest.mark.parametrize("settings", [dict(), dict(dataset="fashion", res=32)])
def test_bundled_sets_have_no_vectors(settings):
    with pytest.raises(UserError, match="has labels and no vectors: leave out --condition vectors"):
        batches.load(Config(condition="vectors", **settings))


# ---------------------------------------------------------------------------------------------------------------------
# held-out splits


def test_the_split_test_of_a_folder_is_held_out_and_read_when_asked_for(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in "ab":
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", colour=(0, 200 * (split == "test"), 0))
        np.save(tmp_path / split / "vectors.npy", np.full((2 * count, 3), count))
    cfg = config(data=str(tmp_path))
    images = batches.load(cfg)
    assert len(images) == 6 and images.classes == ["a", "b"]
    x1, y = images.real().reference(100)
    assert x1.shape == (4, 3, 16, 16) and sorted(y) == [0, 0, 1, 1] and (x1[:, 1] > 0.5).all()
    test = images.real()
    assert test.reference(3)[0].shape == (3, 3, 16, 16)
    assert not np.array_equal(test.reference(4)[1], test.reference(4, 1)[1])
    assert (batches.load(config(data=str(tmp_path), condition="vectors")).real().reference(4)[1] == 2).all()
    (tmp_path / "test" / "a" / "0.png").write_bytes(b"broken")
    assert images.real().reference(100)[0].shape[0] == 4                                        # it was read already
    again = batches.load(cfg)                                                       # and here it was not
    with pytest.raises(UserError, match=r"test/a/0\.png"):
        again.real()


def test_the_only_split_of_a_zip_is_no_top_directory(tmp_path):
    save(tmp_path / "x.png")
    for top in ("train", "training", "cats/train"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for name in ("x", "y"):
                archive.write(tmp_path / "x.png", f"{top}/{name}/1.png")
        source = sources.open_source("folder", str(tmp_path / "x.zip"))
        assert source.classes == ["x", "y"] and len(source) == 2
        with pytest.raises(UserError, match="has the splits train.*, but no 'test'"):
            sources.open_source("folder", str(tmp_path / "x.zip"), "test")


def test_a_split_of_a_folder_has_any_of_its_names(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path / split / "x.png")
        np.save(tmp_path / split / "vectors.npy", np.full((1, 2), len(split)))
    assert sources.open_source("folder", str(tmp_path)).vectors().tolist() == [[8, 8]]
    assert sources.open_source("folder", str(tmp_path), "val").vectors().tolist() == [[10, 10]]


def test_other_splits_are_not_held_out(tmp_path, capsys):
    save(tmp_path / "train" / "a" / "x.png")
    save(tmp_path / "val" / "a" / "x.png")
    assert batches.load(config(data=str(tmp_path))).held_out is None
    save(tmp_path / "test" / "b" / "x.png")
    assert batches.load(config(data=str(tmp_path))).held_out is None
    assert "the split test" in capsys.readouterr().out
    save(tmp_path / "test" / "stray.png")
    assert batches.load(config(data=str(tmp_path))).held_out is None
    assert "warning: " in (out := capsys.readouterr().out) and "both class folders and images" in out
    digits = batches.digits()
    assert digits.held_out is None and digits.real() is digits
    (tmp_path / "test" / "stray.png").unlink()
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "a")
    np.save(tmp_path / "train" / "vectors.npy", np.ones((1, 2)))
    assert batches.load(config(data=str(tmp_path), condition="vectors")).held_out is None
    assert "warning: " in (out := capsys.readouterr().out) and "test/vectors.npy" in out   # not after the training


def test_archives_of_other_systems(tmp_path):
    save(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "x.ZIP", "w") as archive:
        for name in ("a\\1.png", "b\\1.png"):
            info = zipfile.ZipInfo("x")
            info.filename = name                            # ZipInfo itself would write a slash
            archive.writestr(info, (tmp_path / "x.png").read_bytes())
    source = sources.open_source("folder", str(tmp_path / "x.ZIP"))
    assert source.classes == ["a", "b"] and source.image(1, 8).shape == (3, 8, 8)


def test_links_are_followed_but_for_loops(tmp_path):
    for name in ("1.png", "2.png"):
        save(tmp_path / "real" / name)
    (tmp_path / "set" / "c").mkdir(parents=True)
    save(tmp_path / "set" / "c" / "x.png")
    for name in ("a", "b"):                                 # the same images twice
        (tmp_path / "set" / name).symlink_to(tmp_path / "real")
    (tmp_path / "set" / "c" / "loop").symlink_to(tmp_path / "set")
    source = sources.open_source("folder", str(tmp_path / "set"))
    assert source.classes == ["a", "b", "c"] and source.labels == [0, 0, 1, 1, 2]


def test_images_that_do_not_fit_in_memory_are_a_sentence(tmp_path, monkeypatch):
    save(tmp_path / "x.png")

    def full(*shape):
        raise MemoryError("Unable to allocate 225. GiB")

    monkeypatch.setattr(batches.np, "empty", full)
    with pytest.raises(UserError, match="1 images of 16 x 16 are too many for the memory: Unable .* or on latents"):
        batches.load(config(data=str(tmp_path)))


def test_a_class_whose_name_is_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    save(tmp_path / os.fsdecode(b"caf\xe9") / "x.png")
    assert sources.open_source("folder", str(tmp_path)).classes == ["caf?"]


# ---------------------------------------------------------------------------------------------------------------------
# Fashion-MNIST


compress = functools.partial(gzip.compress, mtime=0)     # names of tests must not hold the time


def idx(array, kind=8) -> bytes:
    return compress(struct.pack(f">{1 + array.ndim}i", kind << 8 | array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def clothes(tmp_path):
    """The four files with 20 and 10 images: (folder, images, labels by split)."""
    rng, contents = np.random.default_rng(0), {}
    for name, count in (("train", 20), ("t10k", 10)):
        images, labels = rng.integers(1, 256, (count, 28, 28)), np.arange(count) % 10
        contents[name] = images.astype(np.uint8), labels.astype(np.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(contents[name][0]))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(contents[name][1]))
    return tmp_path, contents


def test_fashion_is_padded_and_has_a_test_split(clothes, monkeypatch):
    folder, contents = clothes
    dataset = batches.load(config(dataset="fashion", res=32, data=str(folder)))
    assert (len(dataset), dataset.channels, dataset.side, len(dataset.classes)) == (20, 1, 32, 10)
    x, y = read(dataset, np.arange(20), np.zeros((20, 3)))                          # never mirrored
    assert y.tolist() == contents["train"][1].tolist() and y.dtype == torch.int64
    pixels = batches.to_uint8(x).numpy()[:, 0]
    assert np.array_equal(pixels[:, 2:-2, 2:-2], contents["train"][0])
    assert pixels.astype(int).sum() == contents["train"][0].astype(int).sum()       # the border is black
    x1, y = dataset.real().reference(50)
    assert x1.shape == (10, 1, 32, 32) and sorted(y) == list(range(10))
    place = int(np.flatnonzero(y == 3)[0])
    assert np.array_equal(batches.to_uint8(x1).numpy()[place, 0, 2:-2, 2:-2], contents["t10k"][0][3])
    monkeypatch.setattr(fashion, "DEBIAN", folder)
    assert batches.load(config(dataset="fashion", res=32)).fingerprint == dataset.fingerprint


def test_fashion_from_the_hub_is_the_same(clothes, monkeypatch):
    folder, contents = clothes

    def open_source(dataset, where, split):
        images, labels = contents["train" if split == "train" else "t10k"]
        source = sources.Source(where, [str(i) for i in range(len(images))], labels.tolist(), list("0123456789"), "",
                                lambda i: io.BytesIO(png(images[i])))
        return source

    monkeypatch.setattr(fashion, "open_source", open_source)
    files, hub = (batches.load(config(dataset="fashion", res=32, data=where)) for where in (str(folder), "hf:x/y"))
    assert np.array_equal(files.pixels, hub.pixels) and files.fingerprint == hub.fingerprint
    assert torch.equal(*(data.real().reference(10)[0] for data in (files, hub)))


def png(array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


IMAGES, LABELS = np.zeros((20, 28, 28), np.uint8), (np.arange(20) % 10).astype(np.uint8)


@pytest.mark.parametrize("name, raw, words", [
    ("images-idx3", idx(IMAGES)[:40], "cannot be read as an idx file"),
    ("images-idx3", b"hello", "cannot be read as an idx file"),
    ("images-idx3", b"", "cannot be read as an idx file"),
    ("images-idx3", compress(b""), "cannot be read as an idx file"),
    ("images-idx3", compress(gzip.decompress(idx(IMAGES))[:-5]), "is cut off: its header promises 15,680 bytes"),
    ("images-idx3", compress(gzip.decompress(idx(IMAGES)) + b"x"), "is too long"),
    ("images-idx3", idx(IMAGES, kind=13), "its header is not"), ("images-idx3", idx(LABELS), "its header is not"),
    ("images-idx3", idx(np.zeros((20, 32, 32), np.uint8)), "its header is not"),
    ("images-idx3", compress(struct.pack(">4i", 0x803, 2**30, 28, 28)), "it claims 841,813,590,016 bytes"),
    ("images-idx3", idx(IMAGES)[:-8] + b"12345678", "cannot be read as an idx file: .*CRC"),
    ("images-idx3", idx(IMAGES[:19]), "do not belong together: 19 images, 20 labels"),
    ("labels-idx1", idx(np.minimum(LABELS, 8)), "must be 0 to 9, each at least once, but are 0, 1.* 8$"),
    ("labels-idx1", idx(LABELS + 1), "must be 0 to 9.*but are 1, 2.* 10$"),
    ("labels-idx1", None, "there is no train-labels-idx1-ubyte.gz in .*\n.*apt-get install dataset-fashion-mnist")])
def test_bad_files_of_fashion_are_named(clothes, name, raw, words):
    folder, _ = clothes
    file = folder / f"train-{name}-ubyte.gz"
    file.unlink() if raw is None else file.write_bytes(raw)
    with pytest.raises(UserError, match=words) as problem:
        batches.load(config(dataset="fashion", res=32, data=str(folder)))
    assert raw is None or "\n" not in str(problem.value)


def test_fashion_without_files_or_at_another_resolution(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "nowhere")
    with pytest.raises(UserError, match="(?s)apt-get install dataset-fashion-mnist.*zalandoresearch.*--data hf:"):
        batches.load(config(dataset="fashion", res=32))
    with pytest.raises(UserError, match="32 x 32: leave --res at 32, not 28"):
        batches.load(config(dataset="fashion", res=28))
