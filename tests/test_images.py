"""Image files of every kind that a folder of strangers' pictures holds: read right, or named in one sentence."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from config import Config, UserError
from data import batches, latents, sources

SIDE = 16
PICTURE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def read(file, resolution=SIDE) -> np.ndarray:
    """(H, W, 3); at its own size an image passes through the crop unchanged."""
    return sources.read_image(file, resolution).transpose(1, 2, 0).astype(int)


def encoded(array, format: str, mode=None, **options) -> bytes:
    stream, image = io.BytesIO(), Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, format, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(array, depth: int, colour: int, *chunks: bytes, size=None) -> bytes:
    """A PNG written by hand; colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    height, width = size or array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in array)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def over_white(colour, alpha):
    return alpha / 255 * colour + 255 - alpha


# ---------------------------------------------------------------------------------------------------------------------
# read right


@pytest.mark.parametrize("format, options", [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", dict(compression="lzma")),
                                             ("TIFF", dict(compression="tiff_lzw")), ("WEBP", dict(lossless=True))])
def test_lossless_formats_give_the_pixels_back(format, options):
    assert np.array_equal(read(io.BytesIO(encoded(PICTURE, format, **options))), PICTURE)


def test_sixteen_bits_keep_the_upper_eight():
    deep = np.random.default_rng(1).integers(0, 65536, (SIDE, SIDE, 4))
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        pixels = deep[:, :, :channels]
        shown = np.broadcast_to(pixels[:, :, : 3 if channels > 2 else 1] / 257, (SIDE, SIDE, 3))
        if channels in (2, 4):
            shown = over_white(shown, pixels[:, :, -1:] / 257)
        assert abs(read(io.BytesIO(png(pixels, 16, colour))) - shown).max() < 3, colour


def test_palettes_with_transparency_lie_on_white():
    colours = np.random.default_rng(2).integers(0, 256, (8, 3))
    alpha, index = np.array([0, 255, 128, 255, 255, 255, 255, 255]), np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 8
    raw = png(index, 8, 3, chunk(b"PLTE", colours.astype(np.uint8).tobytes()),
              chunk(b"tRNS", alpha.astype(np.uint8).tobytes()))
    assert abs(read(io.BytesIO(raw)) - over_white(colours[index], alpha[index][:, :, None])).max() <= 1


def test_alpha_lies_on_white():
    alpha = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 1)).astype(np.uint8)
    both = np.concatenate([PICTURE, alpha], axis=2)
    assert abs(read(io.BytesIO(encoded(both, "PNG"))) - over_white(PICTURE, alpha)).max() <= 1


def test_cmyk_jpegs_are_not_inverted():
    inks = np.repeat(np.array([[255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255], [0, 0, 0, 0]]), 16, 0)
    stream = io.BytesIO()
    Image.fromarray(np.repeat(inks[None], 80, axis=0).astype(np.uint8), "CMYK").save(stream, "JPEG", quality=100)
    pixels = read(stream, 80)[40, 8::16]                                        # in the middle of each ink
    assert abs(pixels - [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0], [255, 255, 255]]).max() < 8


SEEN = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90}                                                            # orientations of EXIF


@pytest.mark.parametrize("orientation", SEEN)
def test_images_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format, options in (("PNG", {}), ("WEBP", dict(lossless=True)), ("TIFF", {})):
        stored = encoded(PICTURE, format, exif=exif, **options)
        assert np.array_equal(read(io.BytesIO(stored)), SEEN[orientation](PICTURE)), format
    blocks = np.kron(PICTURE[:2, :2], np.ones((8, 8, 1), np.uint8))
    turned = read(io.BytesIO(encoded(blocks, "JPEG", exif=exif, quality=100, subsampling=0)))
    assert abs(turned - SEEN[orientation](blocks)).max() < 8


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        stream = io.BytesIO()
        options = dict(lossless=True) if format == "WEBP" else {}
        frames[0].save(stream, format, save_all=True, append_images=frames[1:], **options)
        assert (read(stream) == [255, 0, 0]).all(), format


def test_one_pixel_and_twenty_thousand():
    assert (read(io.BytesIO(encoded(PICTURE[:1, :1], "PNG"))) == PICTURE[0, 0]).all()
    wide = np.random.default_rng(4).integers(0, 256, (20, 20_000, 3)).astype(np.uint8)
    centre = read(io.BytesIO(encoded(wide[:, 9_980:10_020], "PNG")))
    assert abs(read(io.BytesIO(encoded(wide, "PNG"))) - centre).max() <= 1
    tall = read(io.BytesIO(encoded(wide.transpose(1, 0, 2), "PNG")))
    assert abs(tall - centre.transpose(1, 0, 2)).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# named


def refused(raw: bytes, words: str, resolution=SIDE) -> None:
    with pytest.raises(UserError, match=words) as problem:
        sources.read_image(io.BytesIO(raw), resolution, "x.png")
    assert "'x.png'" in str(problem.value) and "\n" not in str(problem.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_file_that_is_cut_off_is_named(format):
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    raw = encoded(noise, format)
    for length in (10, len(raw) // 3, 9 * len(raw) // 10):
        refused(raw[:length], "cannot read the image")


def test_decompression_bombs_and_strips_are_named():
    line = np.zeros((1, 8))
    refused(png(line, 8, 0, size=(2**31 - 1, 2**31 - 1)), "bomb|exceeds")
    refused(png(np.zeros((20_000, 2_500)), 1, 0, size=(20_000, 20_000)), "decompression bomb")
    refused(png(np.zeros((60_000, 1)), 8, 0), "strip of 1 x 60000 pixels", resolution=256)


def test_bombs_in_archives_are_named_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST", 10**6)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", encoded(PICTURE, "PNG"))
        archive.writestr("b.png", bytes(10**6 + 1))
    source = sources.open_source("folder", str(tmp_path / "x.zip"))
    assert source.image(0, SIDE).shape == (3, SIDE, SIDE)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *a: pytest.fail("it was unpacked"))
    for look in (lambda: source.image(1, SIDE), lambda: source.size(1)):
        with pytest.raises(UserError, match=r"'b\.png'.*1,000,001 bytes unpacked"):
            look()


def test_only_the_formats_of_the_extensions_are_decoded(monkeypatch):
    """PIL would hand PostScript, whatever its file is called, to Ghostscript, which runs programs."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was called"))
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n", "cannot identify")
    refused(b"P6 16 16 255\n" + PICTURE.tobytes(), "cannot identify")
    refused(b"only words\n" * 50, "cannot identify")
    refused(b"", "cannot identify")


def test_pixels_without_a_known_white_are_named():
    refused(encoded(PICTURE[:, :, 0].astype(np.float32) / 255, "TIFF"), "float images are not supported")


# ---------------------------------------------------------------------------------------------------------------------
# folders


def folder_of(path, *names):
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        with open(os.path.join(os.fsencode(path), os.fsencode(name)), "wb") as file:
            file.write(encoded(PICTURE, "PNG"))
    return path


@pytest.fixture
def bad_folder(tmp_path):
    """Three good images, and seven names behind which there is none."""
    folder = folder_of(tmp_path / "images", "a.png", "b.png", "c.png", "gone.png")
    whole = encoded(np.random.default_rng(6).integers(0, 256, (64, 64, 3)).astype(np.uint8), "JPEG")
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "words.png").write_text("a text file\n")
    (folder / "empty.webp").touch()
    (folder / "broken link.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "directory.png").symlink_to(tmp_path / "nowhere" / "x.png")
    source = sources.open_source("folder", str(folder))
    (folder / "gone.png").unlink()                          # between listing and reading
    return source


BAD = {"gone.png", "cut.jpg", "words.png", "empty.webp", "broken link.png", "loop.png", "directory.png"}


def test_bad_files_are_fatal_or_left_out_with_a_count(bad_folder, capsys):
    assert len(bad_folder) == 10
    for i, name in enumerate(bad_folder.names):
        if name in BAD:
            with pytest.raises(UserError, match=name):
                bad_folder.image(i, SIDE)
        if name in BAD - {"cut.jpg"}:                       # whose size is known
            with pytest.raises(UserError, match=name):
                bad_folder.size(i)
    with pytest.raises(UserError, match=r"broken link\.png.*leave out such images with --skip-bad"):
        batches.read_all(bad_folder, Config(dataset="folder", res=SIDE))
    images = batches.read_all(bad_folder, Config(dataset="folder", res=SIDE, skip_bad=True))
    assert len(images) == 3 and np.array_equal(images.pixels[0].transpose(1, 2, 0), PICTURE)
    assert "left out 7 of 10 images" in capsys.readouterr().out


class AverageVAE:
    """Stands for latents.Autoencoder: the mean of 2 x 2 pixels, and no spread."""

    channels, factor = 3, 2
    facts = {"name": "average", "sha256": "", "shift": [0.0] * 3, "scale": [1.0] * 3}

    def __init__(self, *_):
        pass

    def moments(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 2)
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)


def test_bad_files_are_left_out_of_a_latent_cache_with_a_count(bad_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "Autoencoder", AverageVAE)
    monkeypatch.setattr(sources, "open_source", lambda *_: bad_folder)

    def encode(skip_bad):
        return latents.encode("folder", SIDE, "images", "average", tmp_path / "cache", batch=3, skip_bad=skip_bad,
                              device="cpu")

    with pytest.raises(UserError, match=r"broken link\.png.*leave out such images with --skip-bad"):
        encode(skip_bad=False)
    header = encode(skip_bad=True)
    assert len(header["left_out"]) == 7 and all(any(name in line for line in header["left_out"]) for name in BAD)
    cache = batches.Latents(tmp_path / "cache", header, flip=False)
    assert [bad_folder.names[i] for i in cache.valid] == ["a.png", "b.png", "c.png"]


def test_a_cache_without_any_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "Autoencoder", AverageVAE)
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_text("words")
    with pytest.raises(UserError, match=r"none of the 2 images of .* can be read: .*'a\.png'"):
        latents.encode("folder", SIDE, str(tmp_path / "images"), "average", tmp_path / "cache", skip_bad=True,
                       device="cpu")
    assert not json.loads((tmp_path / "cache" / "header.json").read_text())["complete"]
    with pytest.raises(UserError, match="none of the 2 images"):
        batches.load(Config(dataset="folder", data=str(tmp_path / "images"), res=16, skip_bad=True))


NAMES = ["数字.png", "a b\tc\nd.png", "e\u0301.png", "😀" * 60 + ".png", "9" * 251 + ".png", "-rf.png", "%s{}.png",
         os.fsdecode(b"\xff\xfe.png")]                      # the last one is not UTF-8


def test_names_of_any_script_and_length_are_read_and_noted(tmp_path, monkeypatch):
    try:
        folder_of(tmp_path / "images", *NAMES)
    except OSError:
        pytest.skip("this file system refuses such names")
    source = sources.open_source("folder", str(tmp_path / "images"))
    assert set(source.names) == set(NAMES) and len(source.fingerprint) == 64
    assert all(np.array_equal(source.image(i, SIDE).transpose(1, 2, 0), PICTURE) for i in range(len(NAMES)))
    monkeypatch.setattr(latents, "Autoencoder", AverageVAE)
    header = latents.encode("folder", SIDE, str(tmp_path / "images"), "average", tmp_path / "cache", device="cpu")
    assert header["count"] == len(NAMES) and header["left_out"] == []
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in (*NAMES[:-1], "8" * 5000 + ".png"):
            archive.writestr(name, encoded(PICTURE, "PNG"))
    assert len(sources.open_source("folder", str(tmp_path / "x.zip"))) == len(NAMES)


def test_names_that_no_system_takes_are_said():
    for name in ("x" * 5000, "a/" * 3000):
        with pytest.raises(UserError, match="cannot read 'x|cannot read 'a"):
            sources.open_source("folder", name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_files_without_permission_are_named(tmp_path, capsys):
    folder = folder_of(tmp_path / "images", "a.png", "b.png")
    (folder / "a.png").chmod(0)
    source = sources.open_source("folder", str(folder))
    with pytest.raises(UserError, match=r"'a\.png'.*Permission denied"):
        source.image(0, SIDE)
    assert len(batches.read_all(source, Config(dataset="folder", res=SIDE, skip_bad=True))) == 1
    folder.chmod(0)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            sources.open_source("folder", str(folder))
    finally:
        folder.chmod(0o700)


def test_images_that_are_enlarged_are_counted(tmp_path, capsys):
    for i in range(100):
        Image.new("RGB", (8, 40) if i < 25 else (32, 40)).save(tmp_path / f"{i}.png")
    images = batches.load(Config(dataset="folder", data=str(tmp_path), res=32))
    assert len(images) == 100 and "warning: 16 of 64 images of" in (out := capsys.readouterr().out)
    assert "smaller than 32 x 32, and are enlarged" in out
    batches.load(Config(dataset="folder", data=str(tmp_path), res=8))
    assert "warning" not in capsys.readouterr().out


def test_what_the_system_refuses_is_said(tmp_path, monkeypatch):
    """Permissions again, for those who are root: a class folder that cannot be listed is not silently empty."""
    folder_of(tmp_path / "images" / "cat", "a.png")
    folder_of(tmp_path / "images" / "dog", "b.png")
    scandir, open_file = os.scandir, Image.open

    def refuse(path=".", *rest, real=scandir, **options):
        if "dog" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *rest, **options)

    source = sources.open_source("folder", str(tmp_path / "images"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(UserError, match="Permission denied.*dog"):
            sources.open_source("folder", str(tmp_path / "images"))
    monkeypatch.setattr(Image, "open", lambda file, **options: refuse(file, real=open_file, **options))
    with pytest.raises(UserError, match=r"dog/b\.png.*Permission denied"):
        source.image(1, SIDE)
    assert len(batches.read_all(source, Config(dataset="folder", res=SIDE, skip_bad=True))) == 1
