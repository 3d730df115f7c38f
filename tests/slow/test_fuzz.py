"""Damaged and hostile input: thousands of broken files and settings, which may only raise a UserError of one sentence;
and files from strangers, which run no code and lead to no other place. The cases are the same in every run."""

import ast
import contextlib
import gzip
import io
import json
import pickle
import resource
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import baselines
import config
from config import Config, UserError
from conftest import ROOT
from data import batches, fashion, latents, sources
from data.conditions import Vectors, choose
from run import checkpoint, gallery, load, paper
from scores import features, reference

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]           # decoders may warn


def cases(count: int):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


def outcome(call, lines: int = 1):
    """What a call returns, or None after one of our own errors, which has so many lines."""
    try:
        return call()
    except UserError as problem:
        assert 0 < len(str(problem).splitlines()) <= lines, str(problem)
        return None


EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.sampled_from(["set", "set", "set", "insert", "cut", "end"]),
                           st.binary(min_size=1, max_size=8)), max_size=6)


def damaged(raw: bytes, edits: list) -> bytes:
    raw = bytearray(raw)
    for place, how, new in edits:
        at = place % (len(raw) + 1)
        if how == "set":
            raw[at : at + len(new)] = new
        elif how == "insert":
            raw[at:at] = new
        else:
            del raw[at : at + new[0] if how == "cut" else None]
    return bytes(raw)


def repacked(raw: bytes, edits: list, member: str) -> bytes:
    """A zip archive whose checksums are right although a member is damaged."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            new.writestr(name, damaged(old.read(name), edits) if name.endswith(member) else old.read(name))
    return stream.getvalue()


@contextlib.contextmanager
def at_most(gigabytes: float):
    """More memory than this is refused to the process, so that a test that fails does not take the machine with it."""
    if not (memory := Path("/proc/self/statm")).exists():
        pytest.skip("needs Linux")
    used = int(memory.read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 1e9), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# ---------------------------------------------------------------------------------------------------------------------
# images


def images_to_damage() -> list[bytes]:
    rng, exif, files = np.random.default_rng(0), Image.Exif(), []
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "text", (1, 2)
    for mode, format, options in (
            ("RGB", "PNG", dict(exif=exif)), ("P", "PNG", {}), ("RGBA", "PNG", {}), ("LA", "PNG", {}),
            ("I;16", "PNG", {}), ("RGB", "JPEG", dict(exif=exif)), ("CMYK", "JPEG", {}),
            ("L", "JPEG", dict(progressive=True)), ("P", "GIF", {}), ("RGB", "BMP", {}), ("P", "BMP", {}),
            ("RGB", "TIFF", dict(exif=exif)), ("RGB", "TIFF", dict(compression="tiff_lzw")),
            ("L", "TIFF", dict(compression="jpeg")), ("RGB", "WEBP", dict(exif=exif)),
            ("RGBA", "WEBP", dict(lossless=True))):
        deep = mode == "I;16"
        pixels = rng.integers(0, 65536 if deep else 256, (12, 14) if deep else (12, 14, 3))
        image, stream = Image.fromarray(pixels.astype(np.uint16 if deep else np.uint8)), io.BytesIO()
        (image if deep else image.convert(mode)).save(stream, format, **options)
        files.append(stream.getvalue())
    return files


IMAGES = images_to_damage()


def with_checksums(raw: bytes) -> bytes:
    """A damaged PNG with the checksums of its chunks put right, so that the decoder gets to see the damage."""
    out, at = raw[:8], 8
    while at + 12 <= len(raw):
        length = int.from_bytes(raw[at : at + 4], "big")
        body = raw[at + 4 : at + 8 + length]
        out += raw[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + length
    return out


def check_image(raw: bytes) -> bool:
    source = sources.Source("strangers", ["x.png"], [0], [], "", lambda i: io.BytesIO(raw))
    outcome(lambda: source.size(0))
    pixels = outcome(lambda: source.image(0, 8))
    assert pixels is None or (pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8)
    return pixels is not None


def test_whole_images_are_read():                           # or the next two would test nothing
    assert all(check_image(raw) and (raw[:4] != b"\x89PNG" or with_checksums(raw) == raw) for raw in IMAGES)


@cases(3000)
@given(st.sampled_from(IMAGES), EDITS, st.booleans())
def test_damaged_images(raw, edits, checksums):
    raw = damaged(raw, edits)
    check_image(with_checksums(raw) if checksums and raw[:4] == b"\x89PNG" else raw)


@cases(2000)
@given(st.sampled_from([raw[:12] for raw in IMAGES] + [b""]), st.binary(max_size=300))
def test_random_bytes_as_images(start, rest):
    assert not check_image(start + rest) or len(start + rest) > 20


def test_an_error_that_no_decoder_should_raise_is_one_sentence_too():
    """The kinds found here and elsewhere; a version of PIL may bring others."""
    for kind in (TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, OverflowError, MemoryError,
                 EOFError, AssertionError, NotImplementedError, zlib.error, RecursionError):
        def fail(i, kind=kind):
            raise kind("two\nlines")

        for look in (lambda s: s.size(0), lambda s: s.image(0, 8)):
            with pytest.raises(UserError, match="cannot read 'x.png' of strangers: .*two"):
                look(sources.Source("strangers", ["x.png"], [0], [], "", fail))


@cases(300)
@given(EDITS)
def test_damaged_zip_archives(tmp_path_factory, edits):
    raw, file = io.BytesIO(), Path(tmp_path_factory.getbasetemp()) / "damaged.zip"
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", IMAGES[0])
        archive.writestr("b/1.bmp", IMAGES[9])
    file.write_bytes(damaged(raw.getvalue(), edits))
    source = outcome(lambda: sources.open_source("folder", str(file)))
    for i in range(len(source) if source else 0):
        outcome(lambda i=i: source.image(i, 8))


# ---------------------------------------------------------------------------------------------------------------------
# vectors and idx files


def as_bytes(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


VECTORS = [as_bytes(np.arange(6, dtype=kind).reshape(3, 2)) for kind in (np.float32, np.float64, np.int64)]


def check_vectors(file: Path) -> bool:
    """Beside three images, and behind --vectors of a run on two numbers."""
    array = outcome(lambda: sources.read_vectors(file, 3))
    assert array is None or (array.shape[0] == 3 and array.dtype == np.float32 and np.isfinite(array).all())
    y = outcome(lambda: choose(Vectors(2, 8, torch.zeros(1, 2)), 4, vectors=str(file)))
    assert y is None or (y.shape == (4, 2) and y.isfinite().all())
    return array is not None and y is not None


def test_whole_vectors_are_read(tmp_path):
    for raw in VECTORS:
        (tmp_path / "vectors.npy").write_bytes(raw)
        assert check_vectors(tmp_path / "vectors.npy")


@cases(1500)
@given(st.sampled_from(VECTORS), EDITS)
def test_damaged_vectors(tmp_path_factory, raw, edits):
    file = Path(tmp_path_factory.getbasetemp()) / "vectors.npy"
    file.unlink(missing_ok=True)                            # an old one may be mapped into memory
    file.write_bytes(damaged(raw, edits))
    check_vectors(file)


@cases(500)
@given(st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x80\x04"]), st.binary(max_size=100))
def test_random_bytes_as_vectors(tmp_path_factory, start, rest):
    file = Path(tmp_path_factory.getbasetemp()) / "random.npy"
    file.unlink(missing_ok=True)
    file.write_bytes(start + rest)
    assert not check_vectors(file)


def idx(*sizes: int, kind: int = 8) -> bytes:
    header = bytes([0, 0, kind, len(sizes)]) + b"".join(size.to_bytes(4, "big", signed=True) for size in sizes)
    return header + bytes(i % 10 for i in range(min(10**5, abs(int(np.prod(sizes))))))


@pytest.fixture(scope="module")
def clothes(tmp_path_factory) -> Path:
    """Fashion-MNIST of ten images."""
    folder = tmp_path_factory.mktemp("fashion")
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(10, 28, 28)))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(10)))
    return folder


def check_fashion(folder: Path, name: str, raw: bytes) -> bool:
    file, whole = folder / name, (folder / name).read_bytes()
    file.write_bytes(raw)
    dataset = outcome(lambda: fashion.read(str(folder)))
    file.write_bytes(whole)
    if dataset is None:
        return False
    pixels, labels, fingerprint = dataset
    assert pixels.shape == (10, 1, 32, 32) and pixels.dtype == np.uint8 and sorted(labels.tolist()) == list(range(10))
    return len(fingerprint) == 64


IMAGES_IDX, LABELS_IDX = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@cases(600)
@given(st.sampled_from([IMAGES_IDX, LABELS_IDX]), EDITS, st.booleans())
def test_damaged_idx_files(clothes, name, edits, inside):
    """inside: the archive is whole, what it holds is not."""
    raw = (clothes / name).read_bytes()
    raw = gzip.compress(damaged(gzip.decompress(raw), edits), 1) if inside else damaged(raw, edits)
    assert check_fashion(clothes, name, raw) or edits


@pytest.mark.parametrize("name, content", [
    (IMAGES_IDX, idx(10, 28)), (IMAGES_IDX, idx(10, 32, 32)), (IMAGES_IDX, idx(9, 28, 28)), (LABELS_IDX, idx(11)),
    (IMAGES_IDX, idx(2**31 - 1, 28, 28)), (LABELS_IDX, idx(2**31 - 1)), (LABELS_IDX, idx(-1)), (LABELS_IDX, idx(0)),
    (LABELS_IDX, idx(10, kind=13)), (LABELS_IDX, idx(10)[:-1] + b"\xff"), (LABELS_IDX, idx(10)[:8] + bytes(10)),
    (LABELS_IDX, b"")])
def test_idx_files_of_other_data(clothes, name, content):
    assert not check_fashion(clothes, name, gzip.compress(content))


def test_an_idx_file_that_unpacks_to_gigabytes_is_refused(clothes):
    """A bomb: its header promises ten labels; no more than these are unpacked."""
    stream = io.BytesIO()
    with gzip.open(stream, "wb", 1) as file:
        file.write(idx(10))
        for _ in range(300):
            file.write(bytes(2**20))
    with at_most(0.5):
        assert not check_fashion(clothes, LABELS_IDX, stream.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# settings

NUMBERS = [0, -1, 1, 2, 3, 8, 2**14, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e400, -1e400, float("nan"), 1e-9]
TEXTS = ["", "8,1,1,2", "8,512,1,2", "4,1,1,1", "9" * 300, "99999999,9,9,9", "B/2", "XL/1", "B/0", "٣", "\ud800",
         "a\nb", "../..", "/", "\0", "latent", "pixel", "lfm", "dfm", "edify", "separate", "heun", "folder", "imagenet",
         "gvp", "celebahq", "someone/vae", "none", "qkv", "batch", "bfloat16", "vectors", "haar", "fashion"]
OTHERS = [None, True, False, [], [[]], [0, 0.5], [0.0, 10**400], [0, float("nan")], ["a"], ["a", 1], {}]
VALUES = st.sampled_from(NUMBERS + OTHERS) | st.sampled_from(TEXTS) | st.integers() | st.text(max_size=8)
SETTINGS = [field.name for field in fields(Config)]


def changes(names, most=3):
    """A few entries of a JSON object and what they become; Ellipsis takes an entry away."""
    return st.lists(st.tuples(st.sampled_from([*names, "other"]), VALUES | st.just(...)), max_size=most).map(dict)


def changed(entries: dict, by: dict) -> dict:
    return {name: value for name, value in {**entries, **by}.items() if value is not ...}


@cases(2000)
@given(changes(SETTINGS, 5) | VALUES)
def test_configurations_from_anywhere(values):
    cfg = outcome(lambda: Config.from_dict(changed({}, values) if isinstance(values, dict) else values))
    if cfg is not None:
        assert Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
        outcome(lambda: baselines.SYSTEMS[cfg.method].schedule(cfg))


FLAGS = ["--" + name.replace("_", "-") for name in SETTINGS] + ["--preset", "--no-flip", "--x"]
WORDS = st.sampled_from([str(n) for n in NUMBERS[:-1]] + TEXTS + [
    "0,0.5", "0,nan", ",", "1e-3", "0x10", "1_0", "9" * 5000, "digits", "imagenet-256-XL", "celebahq-256-lfm"])
PARSER = config.parser("", "python train.py")
config.add_config_flags(PARSER)


@cases(2000)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), st.none() | WORDS | WORDS | st.text(max_size=8)), max_size=5))
def test_command_lines(pairs):
    line = [word for pair in pairs for word in pair if word is not None]
    with contextlib.redirect_stderr(io.StringIO()) as text:
        try:
            cfg = outcome(lambda: paper.resolve(vars(PARSER.parse_args(line))))
        except SystemExit as stop:                          # argparse's way
            assert stop.code == 2 and "error: " in text.getvalue() and "Traceback" not in text.getvalue()
            return
    if cfg is not None:
        outcome(lambda: baselines.SYSTEMS[cfg.method].schedule(cfg))


@pytest.mark.parametrize("line", [[], ["--space", "latent", "--dataset", "folder"], ["--preset", "imagenet-256-XL"]])
def test_good_command_lines_are_taken(line):                # or the one above would test nothing
    assert isinstance(paper.resolve(vars(PARSER.parse_args(line))), Config)


# ---------------------------------------------------------------------------------------------------------------------
# the latent cache


HEADER = {"complete": True, "dataset": "folder", "split": "train", "where": "", "res": 8, "count": 3, "channels": 2,
          "side": 4, "batch": 16, "classes": ["a", "b"], "fingerprint": "f" * 64,
          "vae": {"name": "someone/vae", "sha256": "0" * 64, "shift": [0.0, 0.5], "scale": [1.0, 2.0]}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    np.zeros((3, 2, 4, 4, 4), np.float16).tofile(folder / "moments.f16")
    return folder


LABELS = np.array([0, 1, -1])


def cached(folder: Path, header: bytes, labels=LABELS):
    (folder / "header.json").write_bytes(header)
    (folder / "labels.npy").write_bytes(labels if isinstance(labels, bytes) else as_bytes(labels))
    cfg = Config(dataset="folder", space="latent", vae="someone/vae", res=8, latents=str(folder))
    dataset = outcome(lambda: batches.open_latents(cfg), lines=3)               # a command to copy has its own line
    if dataset is not None:
        count = len(dataset)
        raw, y = dataset.read(np.arange(count), np.zeros((count, 3)))
        x1 = dataset.x1(raw, batches.BatchRandom(0, 0, count))
        assert x1.shape == (count, 2, 4, 4) and x1.isfinite().all()
        assert y is None or 0 <= y.min() <= y.max() < len(dataset.classes)
    return dataset


def test_a_whole_cache_is_read(cache):
    assert len(cached(cache, json.dumps(HEADER).encode())) == 2


@cases(2000)
@given(changes(list(HEADER)), changes(list(HEADER["vae"])))
def test_headers_of_anything(cache, header, vae):
    vae = {"vae": changed(HEADER["vae"], vae)} if vae else {}
    cached(cache, json.dumps(changed({**HEADER, **vae}, header)).encode())


@cases(500)
@given(EDITS)
def test_damaged_headers(cache, edits):
    cached(cache, damaged(json.dumps(HEADER).encode(), edits))


@cases(300)
@given(EDITS)
def test_damaged_labels(cache, edits):
    cached(cache, json.dumps(HEADER).encode(), damaged(as_bytes(LABELS), edits))


@pytest.mark.parametrize("labels", [
    np.array([0, 1]), np.array([0, 1, 2]), np.array([-1, -1, -1]), np.array([0.0, 1, 0]), np.array([[0], [1], [0]]),
    np.array([0, 1, "x"]), b"PK\x03\x04", b""])
def test_labels_that_do_not_fit_their_header(cache, labels):
    assert cached(cache, json.dumps(HEADER).encode(), labels) is None


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"9" * 5000, b""])
def test_json_that_no_parser_takes(tmp_path, text):
    for name in ("header.json", "config.json", "job.json", "report.json"):
        (tmp_path / name).write_bytes(text)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "notes-0.jsonl").write_bytes(text + b'\n{"first": 0, "count": 4}\n')
    assert checkpoint.read_lines([tmp_path / "notes-0.jsonl"])[-1] == {"first": 0, "count": 4}
    for read in (latents.read_header, load.load_run, gallery.open_samples, gallery.read_report):
        with pytest.raises(UserError):
            read(tmp_path if read is not load.load_run else str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# exports and checkpoints


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    cfg = Config(size="8,1,1,2", res=4)
    facts = {"channels": 1, "side": 4, "classes": ["a", "b"], "vectors": None, "count": 9, "fingerprint": "",
             "latent": None}
    load.export(load.Run(cfg, load.build_model(cfg, facts), facts, folder, 5, "ema"), folder)
    return folder


@pytest.fixture(scope="module")
def vector_export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vector-export")
    cfg = Config(size="8,1,1,2", res=4, dataset="folder", condition="vectors")
    facts = {"channels": 3, "side": 4, "classes": [], "vectors": [5, 2], "count": 9, "fingerprint": "", "latent": None}
    load.export(load.Run(cfg, load.build_model(cfg, facts, torch.rand(5, 2)), facts, folder, 5, "ema"), folder)
    return folder


def test_a_whole_export_is_read(export, vector_export):
    assert load.load_run(str(export), device="cpu").step == 5
    assert load.load_run(str(vector_export), device="cpu").condition.draw(7).shape == (7, 2)


@cases(2000)
@example({}, {}, {"classes": ["a"]}, True)                  # conditions of two kinds
@given(changes(["lapflow", "step", "weights", "config", "data"], 1), changes(SETTINGS, 2),
       changes(["channels", "side", "classes", "vectors", "latent"], 2), st.booleans())
def test_configurations_of_exports(export, vector_export, tmp_path_factory, facts, given_settings, given_data, vectors):
    source, folder = vector_export if vectors else export, Path(tmp_path_factory.getbasetemp()) / f"changed-{vectors}"
    folder.mkdir(exist_ok=True)
    if not (folder / "model.safetensors").exists():
        (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    whole = json.loads((source / "config.json").read_text())
    whole["config"], whole["data"] = changed(whole["config"], given_settings), changed(whole["data"], given_data)
    (folder / "config.json").write_text(json.dumps(changed(whole, facts)))
    run = outcome(lambda: load.load_run(str(folder), device="cpu"))
    if run is not None:                                     # what the weights are for
        assert run.model.in_channels == (3 if vectors else 1) and len(run.classes) == (0 if vectors else 2)
        assert run.facts.get("latent") or run.image_shape[:2] == run.shape[1:]
        assert run.condition.draw(3).shape == ((3, 2) if vectors else (3,))


@cases(400)
@given(EDITS, st.sampled_from(["config.json", "model.safetensors"]))
def test_damaged_exports(export, tmp_path_factory, edits, which):
    folder = Path(tmp_path_factory.getbasetemp()) / "damaged"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        raw = (export / name).read_bytes()
        (folder / name).write_bytes(damaged(raw, edits) if name == which else raw)
    outcome(lambda: load.load_run(str(folder), device="cpu"))


def test_numbers_in_a_file_ask_for_no_memory(export, tmp_path):
    """16,384 wide, 512 deep: a network of terabytes, refused for its weights before it is built."""
    (tmp_path / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes())
    whole = json.loads((export / "config.json").read_text())
    for settings_, words in (({"size": "16384,3,1,2"}, "do not fit"), ({"size": "8,513,1,2"}, "depth at most 512"),
                             ({"size": "8,1,1,1", "res": 16384, "num_scales": 1, "starts": [0]}, "tokens"),
                             ({"size": "16384,1,1,1", "res": 1024, "num_scales": 1, "starts": [0]}, "")):
        whole["data"]["side"] = settings_.get("res", 4)
        (tmp_path / "config.json").write_text(json.dumps({**whole, "config": {**whole["config"], **settings_}}))
        with pytest.raises(UserError, match=words), at_most(4):
            load.load_run(str(tmp_path), device="cpu")
    whole["data"] |= {"side": 4, "classes": [], "vectors": [65536, 65536]}      # 16 GB of examples
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="do not fit"), at_most(4):
        load.load_run(str(tmp_path), device="cpu")


STATE = {"step": 1, "config": {"res": 4}, "data": {"channels": 1}, "model": {"w": torch.arange(6.0).view(2, 3)},
         "ema": None, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("run"), STATE)


def test_a_whole_checkpoint_is_read(saved):
    assert torch.equal(checkpoint.read(saved)["model"]["w"], STATE["model"]["w"])


@cases(400)
@given(EDITS, st.booleans())
def test_damaged_checkpoints(saved, edits, checksums):
    file, raw = saved.with_name("damaged.pt"), saved.read_bytes()
    file.write_bytes(repacked(raw, edits, "data.pkl") if checksums else damaged(raw, edits))
    state = outcome(lambda: checkpoint.read(file))
    assert state is None or isinstance(state["model"], dict)


@pytest.mark.parametrize("name", STATE)
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path, name):
    state = {"version": checkpoint.VERSION, **{k: v for k, v in STATE.items() if k != name}}
    torch.save(state, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match=f"is not a train.py checkpoint: it lacks {name}"):
        checkpoint.read(tmp_path / "step-00000001.pt")
    with pytest.raises(UserError):
        load.load_run(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# results


def npz(**arrays) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


SAMPLES = npz(images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([0, 1]))
REFERENCE = npz(mu=np.zeros(3), sigma=np.eye(3), features=np.ones((4, 3), np.float32), how=np.array('{"n": 4}'))


@cases(500)
@given(EDITS, st.sampled_from(["images.npy", "labels.npy", ""]))
def test_damaged_samples(tmp_path_factory, edits, member):
    file = Path(tmp_path_factory.getbasetemp()) / "samples.npz"
    file.write_bytes(repacked(SAMPLES, edits, member) if member else damaged(SAMPLES, edits))
    samples = outcome(lambda: gallery.read_npz(file))
    assert edits or samples is not None
    assert samples is None or (samples[0].dtype == np.uint8 and len(samples[0]) == len(samples[1]))


@cases(500)
@given(EDITS, st.sampled_from(["mu.npy", "sigma.npy", "features.npy", "how.npy", ""]))
def test_damaged_references(tmp_path_factory, edits, member):
    file = Path(tmp_path_factory.getbasetemp()) / "reference.npz"
    file.write_bytes(repacked(REFERENCE, edits, member) if member else damaged(REFERENCE, edits))
    read = outcome(lambda: reference.load_reference(str(file)))
    assert edits or read is not None
    assert read is None or read.cov.shape == 2 * read.mean.shape


JOB = {"num": 4, "seed": 0, "format": "shards"}
REPORT = {"num": 2, "seed": 0, "batch": 2, "solver": "heun", "steps": 4, "cfg_scale": 1.0, "nfe_segments": [4.0, 4.0],
          "nfe": 8.0, "forwards": 8.0, "seconds_per_image": 0.1, "weights": "ema", "step": 5, "run": "x",
          "device": "cpu"}


@cases(500)
@given(changes(list(JOB)), changes(list(REPORT)), changes(["first", "count"]))
def test_jobs_and_reports_of_anything(tmp_path_factory, job, report, note):
    folder = Path(tmp_path_factory.getbasetemp()) / "gallery"
    folder.mkdir(exist_ok=True)
    gallery.save_npz(folder / "shard-00000000.npz", np.zeros((4, 4, 4, 3), np.uint8), None)
    (folder / "job.json").write_text(json.dumps(changed(JOB, job)))
    (folder / "report.json").write_text(json.dumps(changed(REPORT, report)))
    (folder / "notes-0.jsonl").write_text(json.dumps(changed({"first": 0, "count": 4}, note)))
    outcome(lambda: gallery.open_samples(folder))
    read = outcome(lambda: gallery.read_report(folder))
    if read and "nfe_segments" in read:
        assert gallery.describe(read)


def test_good_reports_are_read(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert gallery.read_report(tmp_path) == REPORT


# ---------------------------------------------------------------------------------------------------------------------
# files from strangers


class Evil:
    """Runs when it is unpickled: makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def evil(tmp_path):
    """The object; after the test, its code must not have run. That it would run is shown first."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()
    marker.unlink()
    yield Evil(marker)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["archive", "old torch.save", "raw pickle"])
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(tmp_path, evil, kind):
    file = tmp_path / "run" / "step-00000001.pt"
    file.parent.mkdir()
    if kind == "raw pickle":
        file.write_bytes(pickle.dumps({"version": checkpoint.VERSION, **STATE, "model": evil}))
    else:
        torch.save({"version": checkpoint.VERSION, **STATE, "model": evil}, file,
                   _use_new_zipfile_serialization=kind == "archive")
    words = "is refused: it holds more than tensors" if kind == "archive" else "cannot be read: File is not a zip"
    for checked in (False, True):
        with pytest.raises(UserError, match=words if not checked else "is refused|cannot be read") as problem:
            checkpoint.read(file, checked=checked)
        assert len(str(problem.value).splitlines()) == 1
    with pytest.raises(UserError, match="no checkpoint of .* can be used"):
        load.load_run(str(file.parent))
    facts = {"channels": 1, "side": 8, "classes": list("0123456789"), "vectors": None, "latent": None}
    with pytest.raises(UserError, match=words):             # --init FILE
        load.fine_tune(load.build_model(Config(), facts), str(file), facts)


def test_arrays_with_code_are_refused(tmp_path, evil, cache):
    objects = np.array([evil, evil, evil], dtype=object)
    file = tmp_path / "x.npz"
    for arrays, read in ((dict(images=objects), gallery.read_npz), (dict(arr_0=objects), gallery.read_npz),
                         (dict(images=np.zeros((3, 4, 4, 3), np.uint8), labels=objects), gallery.read_npz),
                         (dict(mu=objects, sigma=objects), reference.load_reference),
                         (dict(mu=np.zeros(3), sigma=np.eye(3), how=objects), reference.load_reference)):
        file.write_bytes(npz(**arrays))
        with pytest.raises(UserError, match="Object arrays cannot be loaded"):
            read(str(file))
    file.write_bytes(pickle.dumps(evil))
    for read in (gallery.read_npz, reference.load_reference):
        with pytest.raises(UserError):
            read(str(file))
    for labels in (objects, pickle.dumps(evil)):
        assert cached(cache, json.dumps(HEADER).encode(), labels) is None


def test_weights_with_code_are_refused(tmp_path, evil, export):
    (tmp_path / "config.json").write_bytes((export / "config.json").read_bytes())
    for raw in (pickle.dumps(evil), torch_bytes({"w": evil})):
        (tmp_path / "model.safetensors").write_bytes(raw)
        with pytest.raises(UserError, match="is not an export"):
            load.load_run(str(tmp_path))


def torch_bytes(what) -> bytes:
    stream = io.BytesIO()
    torch.save(what, stream)
    return stream.getvalue()


def test_an_autoencoder_with_code_is_refused(tmp_path, evil):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1).save_config(tmp_path / "vae")
    for raw in (pickle.dumps(evil), torch_bytes({"encoder.conv_in.weight": evil})):
        (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(raw)
        with pytest.raises(UserError, match="AutoencoderKL"):
            latents.Autoencoder(str(tmp_path / "vae"), "cpu")


def test_names_in_an_archive_lead_nowhere(tmp_path):
    """Members are read, never unpacked: nothing is written, whatever they are called."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (tmp_path / "a" / "outside.png").write_bytes(b"not to be read")
    with zipfile.ZipFile(inside / "x.zip", "w") as archive:
        for name in ("../outside.png", str(tmp_path / "a" / "outside.png"), "cat/../../outside.png", "cat/1.png"):
            archive.writestr(name, IMAGES[2])
    before = sorted(tmp_path.rglob("*"))
    source = sources.open_source("folder", str(inside / "x.zip"))
    assert not any(".." in name for name in source.names) and len(source) == 2
    assert all(np.array_equal(source.image(i, 8), sources.read_image(io.BytesIO(IMAGES[2]), 8)) for i in range(2))
    assert sorted(tmp_path.rglob("*")) == before


def test_paths_in_an_export_are_not_followed(tmp_path, export, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes())
    whole = json.loads((export / "config.json").read_text())
    paths = {name: str(elsewhere) for name in ("data", "latents", "out", "init")}
    (tmp_path / "x" / "config.json").write_text(json.dumps({**whole, "config": {
        **whole["config"], **paths, "dataset": "folder"}}))
    run = load.load_run(str(tmp_path / "x"), device="cpu")
    assert str(elsewhere) not in str(run.cfg)
    monkeypatch.chdir(tmp_path)
    latent = {"name": "x", "sha256": "", "shift": [0.0], "scale": [1.0]}
    whole["data"] = {**whole["data"], "latent": latent}
    for vae in (str(elsewhere), "elsewhere", "../elsewhere", "./elsewhere", "a/../elsewhere", "~/elsewhere"):
        whole["config"] = {**whole["config"], "dataset": "folder", "space": "latent", "vae": vae}
        (tmp_path / "x" / "config.json").write_text(json.dumps(whole))
        with pytest.raises(UserError, match="name it yourself with --vae"):
            load.load_run(str(tmp_path / "x"), device="cpu")
        assert load.load_run(str(tmp_path / "x"), device="cpu", vae="mine").cfg.vae == "mine"
    whole["config"]["vae"] = "someone/vae"                  # a name on the hub
    (tmp_path / "x" / "config.json").write_text(json.dumps(whole))
    assert load.load_run(str(tmp_path / "x"), device="cpu").cfg.vae == "someone/vae"


def test_an_export_does_not_contain_the_places_of_its_run(tmp_path):
    cfg = Config(size="8,1,1,2", res=4, dataset="folder", data="/home/me/photos", out="/home/me/out", init="/home/me/i")
    facts = {"channels": 3, "side": 4, "classes": [], "vectors": None, "count": 9, "fingerprint": "", "latent": None}
    load.export(load.Run(cfg, load.build_model(cfg, facts), facts, tmp_path, 5, "ema"), tmp_path)
    assert b"/home/me" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_paths_in_headers_and_jobs_are_not_followed(tmp_path, cache, monkeypatch):
    opened = []
    monkeypatch.setattr(sources, "open_source", lambda *a: opened.append(a) or (_ for _ in ()).throw(UserError("x")))
    assert cached(cache, json.dumps({**HEADER, "where": str(tmp_path)}).encode()) is not None and not opened
    for format in ("../..", str(tmp_path), "shards/../.."):
        (tmp_path / "job.json").write_text(json.dumps({**JOB, "format": format}))
        (tmp_path / "notes-0.jsonl").write_text('{"first": 0, "count": 4}')
        outcome(lambda: gallery.open_samples(tmp_path))
    assert all(Path(where).resolve().is_relative_to(tmp_path) for _, where in opened)
    assert not gallery.Gallery(tmp_path, {}, "shards", None).file({"first": 0}).exists()
    (tmp_path / "notes-0.jsonl").write_text('{"first": "../../x", "count": 1}')
    assert gallery.Gallery(tmp_path, {}, "shards", None).notes() == []


def test_torchscript_needs_a_known_hash_or_trust(tmp_path, monkeypatch):
    file = tmp_path / "network.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(file))
    loaded = []
    monkeypatch.setattr(torch.jit, "load", lambda path, **k: loaded.append(path) or torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="can run any code.*--trust"):
        features.Inception(str(file))
    assert not loaded
    features.Inception(str(file), trust=True)
    assert loaded.pop() == file
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(features, "INCEPTION_URL", file.as_uri())
    with pytest.raises(UserError, match="invalid hash value"):
        features.Inception()
    assert not loaded and not list((tmp_path / "hub" / "checkpoints").iterdir())


def calls_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno


def problems_of(source: str) -> list[str]:
    """Lines that would run what a file says."""
    tree, problems = ast.parse(source), []
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
            and n.value.id == "pickle"}
    for name, given_, line in calls_of(tree):
        if (name == "torch.load" and given_.get("weights_only") != "True") or (
                name in ("np.load", "numpy.load") and given_.get("allow_pickle") != "False") or (
                name in ("eval", "exec", "compile", "__import__", "os.system", "marshal.loads", "yaml.load")) or (
                name.startswith("pickle.") or name.endswith((".extractall", ".extract"))) or (
                given_.get("shell") == "True"):
            problems.append(f"{name} in line {line}")
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            if name in ("dill", "joblib", "cloudpickle", "shelve", "marshal") or (
                    name == "pickle" and (isinstance(node, ast.ImportFrom) or used != {"UnpicklingError"})):
                problems.append(f"import {name} in line {node.lineno}")
    return problems


def test_no_source_file_runs_what_a_file_says():
    files = [file for file in ROOT.rglob("*.py") if "tests" not in file.relative_to(ROOT).parts
             and not any(part.startswith(".") or part in ("venv", "build") for part in file.relative_to(ROOT).parts)]
    assert {"train.py", "checkpoint.py", "tables.py"} <= {file.name for file in files}
    problems = {str(file.relative_to(ROOT)): problems_of(file.read_text()) for file in files}
    assert {name for name, lines in problems.items() if lines} == {"docs/notebook.py"}         # it runs its own cells


@pytest.mark.parametrize("line", [
    "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "np.load(f, allow_pickle=True)", "eval(s)",
    "exec(s)", "import pickle", "import pickle\npickle.load(f)", "from pickle import load", "import joblib",
    "archive.extractall()", "subprocess.run(s, shell=True)"])
def test_the_scan_sees_each_of_them(line):
    assert problems_of(line)
