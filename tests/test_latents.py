"""Latents with a tiny AutoencoderKL that diffusers saved: encode, kill, go on, train, sample, decode; and sources."""

import dataclasses
import io
import json
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from config import Config, UserError
from conftest import finished, fork, needs_fork, start
from data import batches, latents, sources
from run import load
from run.paper import resolve


def save_vae(folder: Path, seed=0, **settings) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                  block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=32,
                  **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny-vae")


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 36, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twenty images in the classes 9 and 10."""
    folder = tmp_path_factory.mktemp("data") / "images"
    for i in range(20):
        (folder / ("9", "10")[i % 2]).mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / ("9", "10")[i % 2] / f"{i}.png")
    return folder


def encode(out, images, vae, **settings) -> dict:
    return latents.encode("folder", 32, str(images), str(vae), Path(out), batch=4, device="cpu", **settings)


def run_of(out, cache, vae, **settings) -> Config:
    given = dict(dataset="folder", space="latent", vae=str(vae), latents=str(cache), res=32, size="32,2,2,2", batch=8,
                 steps=20, out=str(out), solver="midpoint", solver_steps=4, num_samples=6, log_every=10, warmup=0,
                 save_every=250)
    return resolve({**given, **settings})


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def test_the_cache_holds_the_posterior_of_every_image_and_of_its_mirror_image(tmp_path, images, vae):
    from diffusers import AutoencoderKL

    header = encode(tmp_path / "cache", images, vae)
    assert header["complete"] and header["count"] == 20 and header["classes"] == ["9", "10"] and header["side"] == 16
    assert header["vae"]["scale"] == [0.18215] * 4 and header["vae"]["shift"] == [0.0] * 4     # from its own config
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["header.json", "labels.npy", "moments.f16"]
    moments = np.fromfile(tmp_path / "cache" / "moments.f16", np.float16).reshape(20, 2, 8, 16, 16)
    reference, names = AutoencoderKL.from_pretrained(vae), sources.open_source("folder", str(images)).names
    assert names[0] == "9/0.png" and names[10] == "10/1.png"
    for i in (0, 13):
        x = torch.tensor(sources.read_image(images / names[i], 32)).float()[None] / 127.5 - 1
        for side, image in enumerate((x, x.flip(-1))):
            with torch.no_grad():
                posterior = reference.encode(image).latent_dist
            expected = torch.cat([posterior.mean, posterior.std], dim=1)[0].numpy()
            assert np.allclose(moments[i, side].astype(np.float32), expected, atol=2e-3)
    assert encode(tmp_path / "cache", images, vae) == header                    # complete: nothing to do


@pytest.fixture
def one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@needs_fork
@pytest.mark.slow
def test_killed_and_resumed_by_other_processes_it_has_the_same_bytes(tmp_path, images, vae, one_thread):
    """kill -9 after the first chunks of a single process; two processes finish. All with one thread: convolutions by
    more threads sum in another order, which changed 5 of these 81,920 numbers in their last place."""
    def slowly():
        write = latents.Cache.write
        latents.Cache.write = lambda *arguments: (write(*arguments), time.sleep(0.5))
        encode(tmp_path / "killed", images, vae)

    encode(tmp_path / "whole", images, vae)
    child = fork(slowly, tmp_path / "output.txt")
    until, note = time.time() + 60, tmp_path / "killed" / "progress-0.jsonl"
    while not note.exists() or len(note.read_text().splitlines()) < 2:
        assert time.time() < until
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(note, "a") as file:
        file.write('{"chunk": 4, "bad"')                                        # as if it was cut off within a line
    with pytest.raises(UserError, match="not finished; the same command goes on"):
        batches.load(run_of(tmp_path / "run", tmp_path / "killed", vae))
    out = finished(start(tmp_path, "--dataset", "folder", "--res", 32, "--data", images, "--vae", vae, "--batch", 4,
                         "--out", "killed", "--device", "cpu", program="data.latents"))
    assert "of 5 chunks were there" in out and "20 images of 32 pixels, 2 classes, 0 left out" in out
    for name in ("moments.f16", "labels.npy"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, killed = (json.loads((tmp_path / n / "header.json").read_text()) for n in ("whole", "killed"))
    assert whole == killed


def test_one_corrupt_image_is_named_or_left_out_and_counted(tmp_path, images, vae, capsys):
    folder = tmp_path / "images"
    for i in range(6):
        folder.mkdir(exist_ok=True)
        picture(i).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes()[:500])
    with pytest.raises(UserError, match=r"3\.png.*--skip-bad"):
        encode(tmp_path / "cache", folder, vae)
    header = encode(tmp_path / "cache", folder, vae, skip_bad=True)             # goes on where it stopped
    assert len(header["left_out"]) == 1 and "3.png" in header["left_out"][0]
    dataset = batches.load(run_of(tmp_path / "run", tmp_path / "cache", vae))
    assert len(dataset) == 5 and dataset.valid.tolist() == [0, 1, 2, 4, 5]
    with pytest.raises(UserError, match="--skip-bad"):
        batches.load(Config(dataset="folder", data=str(folder), res=16))
    assert len(batches.load(Config(dataset="folder", data=str(folder), res=16, skip_bad=True))) == 5
    assert "left out 1 of 6 images" in capsys.readouterr().out


def test_too_little_disk_is_reported_before_anything_is_written(tmp_path, images, vae, monkeypatch):
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**4})())
    with pytest.raises(UserError, match=r"needs 0\.0 GiB, but there are 0\.0 GiB free"):
        encode(tmp_path / "cache", images, vae)
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_does_not_match_is_refused_by_name(tmp_path, images, vae):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"(?s)no latent cache.*python -m data\.latents --dataset folder --res 32"):
        batches.load(run_of(tmp_path / "run", cache, vae))
    encode(cache, images, vae)
    with pytest.raises(UserError, match="its vae is .*tiny-vae', the run asks for 'other-vae'"):
        batches.load(run_of(tmp_path / "run", cache, "other-vae"))
    with pytest.raises(UserError, match="its resolution is 32, the run asks for 64"):
        batches.load(run_of(tmp_path / "run", cache, vae, res=64))
    other = save_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="holds another cache: vae differ"):
        encode(cache, images, other)
    with open(cache / "moments.f16", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="is damaged: moments.f16 has 1,000 bytes and should have 163,840"):
        batches.load(run_of(tmp_path / "run", cache, vae))
    for text in ("{", "[]", '{"complete": true}', "null"):
        (cache / "header.json").write_text(text)
        with pytest.raises(UserError, match="header"):
            batches.load(run_of(tmp_path / "run", cache, vae))


def test_a_cache_of_other_images_than_those_named_is_refused(tmp_path, images, vae):
    encode(tmp_path / "cache", images, vae)
    assert len(batches.load(run_of(tmp_path / "run", tmp_path / "cache", vae, data=str(images)))) == 20
    (tmp_path / "other").mkdir()
    picture(0).save(tmp_path / "other" / "0.png")
    with pytest.raises(UserError, match="was made of other images than"):
        batches.load(run_of(tmp_path / "run", tmp_path / "cache", vae, data=str(tmp_path / "other")))


def test_a_kill_while_completing_costs_nothing(tmp_path, images, vae, monkeypatch):
    whole = encode(tmp_path / "whole", images, vae)
    for place in ("replace", "unlink"):                     # before the labels or the header are there, and after both
        with monkeypatch.context() as patch:
            if place == "replace":
                patch.setattr(latents.Cache, "complete", lambda cache: (_ for _ in ()).throw(KeyboardInterrupt))
            else:
                patch.setattr(Path, "unlink", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                encode(tmp_path / place, images, vae)
        assert encode(tmp_path / place, images, vae) == whole


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_references_and_decoding_meet_on_the_device_of_the_statistics(tmp_path, images, vae, where):
    """A cache too large for the GPU stays in memory while its statistics are there (meta stands in for the GPU)."""
    encode(tmp_path / "cache", images, vae)
    dataset = batches.load(run_of(tmp_path / "run", tmp_path / "cache", vae))
    dataset.to(torch.device(where))
    x1, y = dataset.reference(7)
    assert x1.device.type == where and x1.shape == (7, 4, 16, 16) and len(y) == 7
    assert latents.Autoencoder(str(vae), where).decode(torch.zeros(2, 4, 16, 16)).device.type == where


def test_batches_are_fresh_normalised_samples_of_the_posterior(tmp_path, images, vae):
    encode(tmp_path / "cache", images, vae)
    dataset = batches.load(run_of(tmp_path / "run", tmp_path / "cache", vae))
    index, u = np.full(4000, 7), np.column_stack([np.repeat([0.1, 0.9], 2000), np.zeros((4000, 2))])
    raw, y = dataset.read(index, u)
    x1 = dataset.x1(raw, batches.BatchRandom(0, 0, 4000))
    stored = np.fromfile(tmp_path / "cache" / "moments.f16", np.float16)
    moments = stored.reshape(20, 2, 8, 16, 16)[7].astype(np.float32)
    for part, side in ((x1[:2000], 1), (x1[2000:], 0)):                         # u < 0.5: the mirror image
        assert np.allclose(part.mean(0), 0.18215 * moments[side, :4], atol=5 * 0.18215 * moments[side, 4:].max() / 45)
        assert np.allclose(part.std(0), 0.18215 * moments[side, 4:], rtol=0.15)
    assert y.tolist() == [0] * 4000
    unflipped = batches.load(run_of(tmp_path / "run", tmp_path / "cache", vae, flip=False)).read(index, u)[0]
    assert (unflipped == unflipped[0]).all()


@pytest.mark.parametrize("settings, shift, scale", [
    (dict(scaling_factor=0.5, shift_factor=0.25), [0.25] * 4, [0.5] * 4),
    (dict(scaling_factor=0.5, latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0, 0.5]),
     [0.0, 1.0, 2.0, 3.0], [0.5, 0.25, 0.125, 1.0])])
def test_the_normalisation_is_the_vae_s_own_and_is_undone_before_decoding(tmp_path, settings, shift, scale):
    autoencoder = latents.Autoencoder(str(save_vae(tmp_path / "vae", **settings)), "cpu")
    assert autoencoder.facts["shift"] == shift and autoencoder.facts["scale"] == scale
    z = torch.randn(3, 4, 16, 16)
    x1 = (z - torch.tensor(shift).view(-1, 1, 1)) * torch.tensor(scale).view(-1, 1, 1)
    autoencoder.PIXELS = 32 * 32                                                # one image at a time
    with torch.no_grad():
        assert torch.allclose(autoencoder.decode(x1), autoencoder.vae.decode(z).sample, atol=1e-4)


def test_a_missing_vae_is_named(tmp_path):
    with pytest.raises(UserError, match="no AutoencoderKL of diffusers in"):
        latents.Autoencoder(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="no AutoencoderKL of diffusers in"):
        latents.Autoencoder(str(tmp_path), "cpu")


def test_the_hub_out_of_reach_is_reported(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot get stabilityai/sd-vae-ft-mse from the Hugging Face hub"):
        latents.Autoencoder("stabilityai/sd-vae-ft-mse", "cpu")
    with pytest.raises(UserError, match="cannot get someone/lapflow-celebahq from"):
        load.load_run("someone/lapflow-celebahq")


def test_a_revision_of_the_hub_is_the_one_asked_for(monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, revision=None, allow_patterns=None: (
        asked.append((name, revision, allow_patterns)), "folder")[1])
    assert sources.download("me/vae@v2", ["*.json"]) == sources.download("me/vae", []) == Path("folder")
    assert asked == [("me/vae", "v2", ["*.json"]), ("me/vae", None, [])]


def test_vectors_lie_beside_the_latents_and_may_be_added_later(tmp_path, images, vae):
    shutil.copytree(images, tmp_path / "images")
    bad = tmp_path / "images" / "10" / "1.png"              # the eleventh, after the ten of class 9
    bad.write_bytes(b"broken")
    vectors = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    plain = encode(tmp_path / "cache", tmp_path / "images", vae, skip_bad=True)
    cfg = run_of(tmp_path / "run", tmp_path / "cache", vae, condition="vectors", data=str(tmp_path / "images"))
    with pytest.raises(UserError, match=r"(?s)has no vectors\.npy; the same command .*--condition vectors"):
        batches.load(cfg)
    with pytest.raises(UserError, match=r"--condition vectors needs .*vectors\.npy"):
        encode(tmp_path / "cache", tmp_path / "images", vae, skip_bad=True, condition="vectors")
    np.save(tmp_path / "images" / "vectors.npy", vectors)
    assert encode(tmp_path / "cache", tmp_path / "images", vae, skip_bad=True, condition="vectors") == plain
    dataset = batches.load(cfg)
    assert np.array_equal(dataset.vectors, np.delete(vectors, 10, axis=0)) and dataset.classes == []
    raw, y = dataset.read(np.array([0, 18]), np.zeros((2, 3)))
    stored = np.fromfile(tmp_path / "cache" / "moments.f16", np.float16).reshape(20, 2, 8, 16, 16)
    assert np.array_equal(raw.numpy(), stored[[0, 19], 1])                      # mirrored
    assert torch.equal(y, torch.from_numpy(vectors[[0, 19]])) and batches.facts(dataset)["vectors"] == [19, 3]
    assert dataset.reference(5)[1].shape == (5, 3)
    assert batches.load(dataclasses.replace(cfg, condition="labels")).classes == ["9", "10"]
    np.save(tmp_path / "cache" / "vectors.npy", vectors[:5])
    with pytest.raises(UserError, match="holds 5 vectors, but there are 20 images"):
        batches.load(cfg)


# ---------------------------------------------------------------------------------------------------------------------
# training and sampling


@pytest.mark.slow
def test_encode_train_sample_decode(tmp_path, images, vae, program, give_up):
    """The whole path through the programs, as a user runs it."""
    out = program("data.latents", "--data", images, "--res", "32", "--vae", vae, "--device", "cpu")
    assert "cache      latents/folder-32-tiny-vae/train: 20 images" in out
    out = program("train.py", "--dataset", "folder", "--space", "latent", "--vae", vae, "--res", "32",
                  "--size", "32,2,2,2", "--batch", "8", "--solver", "midpoint", "--solver-steps", "4",
                  "--num-samples", "12", "--steps", "20", "--sample-every", "10", "--eval-every", "20",
                  "--log-every", "5", "--logger", "tensorboard", "--warmup", "0")
    assert "frechet_pixel" in out
    folder = tmp_path / "out" / "folder-32"
    pictures = {"samples-00000010.png", "samples.png", "trajectory.png"}
    assert pictures | {"tensorboard"} <= {p.name for p in folder.iterdir()}
    for name in pictures:
        pixels = np.asarray(Image.open(folder / name).convert("L"))
        assert min(pixels.shape) > 100 and pixels.std() > 5
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 20 and len(line["loss_bands"]) == 3
    assert line["seconds_left"] == 0 and line["epoch"] == 8.0 and line["mfu"] is None and 0 <= line["data_wait"] <= 1
    program("sample.py", "--num", "4", "--labels", "10")
    with np.load(folder / "samples" / "samples.npz") as saved:
        assert saved["images"].shape == (4, 32, 32, 3) and saved["labels"].tolist() == [1] * 4
    few = ["--bands", "2", "--num", "2", "--solver", "heun", "--steps", "6", "--out", "causal"]
    assert "previews   2 thumbnails of 16 x 16" in program("extras.causal", "preview", folder, *few)
    out = program("extras.causal", "upsample", folder, "--image", images / "9" / "0.png", *few)
    assert "16 -> 32 pixels, 2 images" in out and "bicubic" in out              # decoded, through the VAE on both ends
    with np.load(tmp_path / "causal" / "upsampled.npz") as saved:
        assert saved["images"].shape == (2, 32, 32, 3)
    program("sample.py", "--export", "shared")
    assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "model_index.json", "samples.png"]
    assert "name it yourself with --vae" in give_up("sample.py", "shared")     # a file chooses no folder here
    program("sample.py", "shared", "--vae", vae, "--num", "4", "--labels", "10", "--out", "again")
    with np.load(folder / "samples" / "samples.npz") as a, np.load(tmp_path / "again" / "samples.npz") as b:
        assert np.array_equal(a["images"], b["images"])
    assert "holds the averaged weights only" in give_up("sample.py", "shared", "--raw", "--vae", str(vae))
    facts = json.loads((tmp_path / "shared" / "config.json").read_text())
    facts["data"]["latent"]["sha256"] = "0" * 64
    (tmp_path / "shared" / "config.json").write_text(json.dumps(facts))
    out = give_up("sample.py", "shared", "--vae", str(vae))
    assert "is not the one that made the latents of this run: its sha256" in out


@pytest.mark.slow
def test_fine_tuning_takes_another_resolution_and_other_classes(tmp_path, images, vae, capsys):
    encode(tmp_path / "cache", images, vae)
    train.train(run_of(tmp_path / "first", tmp_path / "cache", vae, steps=5), device="cpu")
    for i in range(3):
        (tmp_path / "more" / str(i)).mkdir(parents=True)
        picture(i).save(tmp_path / "more" / str(i) / "x.png")
    latents.encode("folder", 64, str(tmp_path / "more"), str(vae), tmp_path / "cache-64", device="cpu")
    capsys.readouterr()
    source = load.load_run(str(tmp_path / "first"), device="cpu")
    for init in (tmp_path / "first", tmp_path / "first" / "step-00000005.pt"):
        cfg = run_of(tmp_path / "second", tmp_path / "cache-64", vae, res=64, steps=1, lr=0.0, lr_end=0.0,
                     init=str(init))
        train.train(cfg, fresh=True, device="cpu")
        out = capsys.readouterr().out
        assert "2 classes" in out and "3 classes" in out and "starts anew" in out
        tuned = load.load_run(str(tmp_path / "second"), raw=True, device="cpu").model.state_dict()
        for name, weight in source.model.state_dict().items():
            assert name.startswith("condition.") or torch.equal(weight, tuned[name])
        assert tuned["condition.table.weight"].shape[0] == 4
    renamed = {**source.facts, "classes": ["cat", "dog"]}   # as many, but others
    model = load.build_model(source.cfg, renamed)
    assert "starts anew" in load.fine_tune(model, str(tmp_path / "first"), renamed)
    assert not torch.equal(model.condition.table.weight, source.model.condition.table.weight)
    with pytest.raises(UserError, match="do not fit the configuration"):
        train.train(run_of(tmp_path / "third", tmp_path / "cache", vae, size="64,2,2,2", init=str(tmp_path / "first")),
                    device="cpu")
    with pytest.raises(UserError, match="no run directory"):
        train.train(run_of(tmp_path / "third", tmp_path / "cache", vae, init="nowhere"), device="cpu")


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_a_run_on_vectors_is_trained_loaded_and_sampled(tmp_path, images, vae, space):
    shutil.copytree(images, tmp_path / "images")
    vectors = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    np.save(tmp_path / "images" / "vectors.npy", vectors)
    encode(tmp_path / "cache", tmp_path / "images", vae, condition="vectors")
    settings = dict(condition="vectors", data=str(tmp_path / "images"), steps=3, cfg_scale=1.5, num_samples=6)
    cfg = run_of(tmp_path / "run", tmp_path / "cache", "" if space == "pixel" else vae, space=space, **settings)
    train.train(cfg, device="cpu")
    run = load.load_run(str(tmp_path / "run"), device="cpu")
    assert torch.equal(run.condition.examples, torch.from_numpy(vectors)) and run.classes == []
    y = torch.from_numpy(vectors[:2])
    drawn, _ = sample.generate(run, 2, y, progress=False, solver="euler", steps=4, cfg_scale=1.5)
    assert drawn.shape == (2, 32, 32, 3)
    np.save(tmp_path / "images" / "vectors.npy", 2 * vectors)
    encode(tmp_path / "cache", tmp_path / "images", vae, condition="vectors")
    with pytest.raises(UserError, match="was trained on other images or classes"):
        train.train(dataclasses.replace(cfg, steps=5), device="cpu")


def test_a_damaged_export_is_refused(tmp_path):
    train.train(Config(size="32,2,2,2", batch=16, steps=2, solver="midpoint", solver_steps=4, num_samples=6,
                       out=str(tmp_path / "run")), device="cpu")
    run = load.load_run(str(tmp_path / "run"), device="cpu")
    load.export(run, tmp_path / "export")
    again = load.load_run(str(tmp_path / "export"), device="cpu")
    assert again.cfg == dataclasses.replace(run.cfg, out="")                    # a path is nobody else's business
    assert again.step == 2 and again.weights == "ema" and again.classes == run.classes
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))
    drawn, _ = sample.generate(again, 2, torch.arange(2), progress=False, solver="euler", steps=4)
    assert drawn.shape == (2, 8, 8, 1)
    raw = (tmp_path / "export" / "model.safetensors").read_bytes()
    for damaged in (b"", raw[:100], b"hello" * 10):
        (tmp_path / "export" / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="is not an export"):
            load.load_run(str(tmp_path / "export"))
    (tmp_path / "export" / "model.safetensors").write_bytes(raw)
    (tmp_path / "export" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not an export"):
        load.load_run(str(tmp_path / "export"))


# ---------------------------------------------------------------------------------------------------------------------
# sources


def png(i: int) -> bytes:
    stream = io.BytesIO()
    picture(i).save(stream, "png")
    return stream.getvalue()


def test_zip_and_folder_give_the_same(tmp_path, images):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in images.glob("*/*.png"):
            archive.write(file, f"some/top/{file.relative_to(images)}")
        archive.writestr("__MACOSX/some/._x.png", b"")
    with zipfile.ZipFile(tmp_path / "masks.zip", "w") as archive:               # CelebAMask-HQ: masks beside the faces
        for i in range(3):
            archive.writestr(f"CelebAMask-HQ/CelebA-HQ-img/{i}.jpg", png(i))
            archive.writestr(f"CelebAMask-HQ/CelebAMask-HQ-mask-anno/0/0000{i}_nose.png", png(i))
    faces = sources.open_source("celebahq", str(tmp_path / "masks.zip"))
    assert [Path(name).name for name in faces.names] == ["0.jpg", "1.jpg", "2.jpg"]
    folder, packed = (sources.open_source("folder", str(p)) for p in (images, tmp_path / "images.zip"))
    assert packed.classes == folder.classes == ["9", "10"] and packed.labels == folder.labels
    for i in (0, 19):
        assert np.array_equal(folder.image(i, 32), packed.image(i, 32))
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match="is not a zip archive"):
        sources.open_source("folder", str(tmp_path / "broken.zip"))


def test_splits_and_imagenet_s_layout(tmp_path, images):
    for split, number in (("train", 2), ("val", 1)):
        for name in ("n02", "n10"):
            for i in range(number):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                picture(i).save(tmp_path / split / name / f"{i}.JPEG")
    train_, val = (sources.open_source("folder", str(tmp_path), split) for split in ("train", "val"))
    assert train_.names[0] == "train/n02/0.JPEG" and train_.classes == ["n02", "n10"] and len(train_) == 4
    assert val.labels == [0, 1] and train_.fingerprint != val.fingerprint
    with pytest.raises(UserError, match="has the splits train, val, but no 'test'"):
        sources.open_source("folder", str(tmp_path), "test")
    with pytest.raises(UserError, match="ImageNet has 1000 classes, but .* shows 2"):
        sources.open_source("imagenet", str(tmp_path))
    faces = sources.open_source("celebahq", str(images))
    assert faces.classes == [] and len(faces) == 20                             # faces have no classes
    for dataset, words in (("celebahq", "CelebAMask-HQ"), ("imagenet", "image-net.org")):
        for where in ("", str(tmp_path / "nowhere")):
            with pytest.raises(UserError, match=words):
                sources.open_source(dataset, where)


def test_links_that_form_a_loop_end(tmp_path):
    (tmp_path / "a").mkdir()
    picture(0).save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(sources.open_source("folder", str(tmp_path))) == 1


@pytest.fixture
def write_parquet(tmp_path, monkeypatch):
    """write_parquet(name, columns, **kinds): a file of four images and other columns, written by `datasets`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, columns, **kinds):
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(4)], **columns}
        (tmp_path / name).parent.mkdir(exist_ok=True)
        features = datasets.Features(image=datasets.Image(), **kinds) if kinds else None
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    return write


def test_parquet_with_and_without_labels(tmp_path, write_parquet):
    import datasets

    write_parquet("d/train-00000.parquet", {"label": [0, 2, 1, 2]}, label=datasets.ClassLabel(names=["a", "b", "c"]))
    source = sources.open_source("folder", str(tmp_path / "d"))
    assert source.classes == ["a", "b", "c"] and source.labels == [0, 2, 1, 2]
    assert np.array_equal(source.image(3, 32), sources.crop(picture(3), 32))
    with pytest.raises(UserError, match="has no vectors: .* a column of lists of floats"):
        source.vectors()
    write_parquet("d/test-00000.parquet", {"label": [0, 2, 1, 1]}, label=datasets.ClassLabel(names=["a", "b", "c"]))
    dataset = batches.load(Config(dataset="folder", data=str(tmp_path / "d"), res=16))
    assert len(dataset) == 4 and sorted(dataset.real().reference(4)[1]) == [0, 1, 1, 2]
    assert sources.open_source("folder", write_parquet("plain.parquet", {})).classes == []
    named = sources.open_source("folder", write_parquet("names.parquet", {"label": ["cat", "ant", "cat", "bee"]}))
    assert named.classes == ["ant", "bee", "cat"] and named.labels == [2, 0, 2, 1]
    unlabelled = write_parquet("unlabelled.parquet", {"label": [-1] * 4}, label=datasets.Value("int64"))
    with pytest.raises(UserError, match="labels from -1 to -1, but there are 0 classes"):
        sources.open_source("folder", unlabelled)


def test_parquet_without_images_and_damaged_files_are_named(tmp_path, write_parquet):
    import datasets

    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(UserError, match="no column of images; its columns are text"):
        sources.open_source("folder", str(tmp_path / "text.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 hello")
    with pytest.raises(UserError, match="cannot load"):
        sources.open_source("folder", str(tmp_path / "bad.parquet"))


@pytest.mark.parametrize("kind", ["float32", "float64", "float16"])
def test_vectors_in_a_column_of_parquet(write_parquet, kind):
    import datasets

    lists = getattr(datasets, "List", datasets.Sequence)
    for length in (3, -1):
        rows = {"box": [[1, 2]] * 4, "embedding": [[i, 0.5, -i] for i in range(4)], "other": [[0.0]] * 4}
        file = write_parquet(f"{kind}{length}.parquet", rows, box=lists(datasets.Value("int64")),
                             embedding=lists(datasets.Value(kind), length=length),
                             other=lists(datasets.Value("float32")))
        dataset = batches.load(Config(dataset="folder", data=file, res=16, condition="vectors"))
        assert dataset.vectors.dtype == np.float32 and dataset.vectors.tolist() == rows["embedding"]


@pytest.mark.parametrize("rows, words", [
    ([[1.0], [1.0, 2.0], [1.0], [1.0]], "a row of the same length"), ([[1.0]] * 3 + [None], "vectors|column 'v'"),
    ([[1.0]] * 3 + [[float("inf")]], "not finite in float32: see row 3"), ([[]] * 4, "shape")])
def test_columns_that_are_no_vectors_are_named(write_parquet, rows, words):
    import datasets

    lists = getattr(datasets, "List", datasets.Sequence)
    source = sources.open_source("folder", write_parquet("x.parquet", {"v": rows}, v=lists(datasets.Value("float64"))))
    with pytest.raises(UserError, match=words) as problem:
        source.vectors()
    assert "column 'v' of" in str(problem.value) and "\n" not in str(problem.value)


def test_lmdb_and_tfrecords_are_named_with_what_to_do(tmp_path):
    for name in ("data.mdb", "train-r08.tfrecords"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="LMDB and tfrecord files must be converted to PNG or parquet first"):
        sources.open_source("celebahq", str(tmp_path))
    with pytest.raises(UserError, match="LMDB of NVAE, tfrecords of GLOW.*convert to PNG or parquet"):
        sources.open_source("celebahq", "")
