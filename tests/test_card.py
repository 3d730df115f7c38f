"""Sharing a run: one line to load and draw, the model card of an export, and the upload to a stand-in of the hub."""

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import sample
import train
from config import Config, UserError, differences
from conftest import ROOT, randomize, tiny
from data import batches
from data.conditions import Vectors
from extras import causal
from run import card, load, log
from run.load import Run, build_model, load_run
from run.paper import PRESETS, resolve
from run.ranks import Ranks
from scores.classes import class_scores
from scores.features import pixel_features

ALONE = Ranks(0, 1, torch.device("cpu"))
DIGITS = {"channels": 1, "side": 8, "classes": [str(i) for i in range(10)], "vectors": None, "count": 1797,
          "fingerprint": "x", "latent": None}
ELSEWHERE = dict(dataset="folder", data="/home/me/images", res=64, space="latent", vae="/home/me/vae")
SMALL = dict(size="32,2,2,2", batch=20, solver="midpoint", solver_steps=4)


def random_run(folder: Path, facts: dict | None = None, examples=None, **settings) -> Run:
    """A run whose network has random weights, as if trained for 7 steps."""
    cfg, facts = Config(**{**SMALL, **settings}), facts or DIGITS
    torch.manual_seed(0)
    return Run(cfg, randomize(build_model(cfg, facts, examples)).eval().requires_grad_(False), facts, folder, 7, "ema")


def exported(folder: Path, *arguments, **settings) -> str:
    """The name of an export of such a run, without a card: as it was before there were cards."""
    load.export(random_run(folder, *arguments, **settings), folder / "export")
    return str(folder / "export")


def on_vectors(folder: Path) -> str:
    examples = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    return exported(folder, {**DIGITS, "classes": [], "vectors": [6, 3]}, examples, condition="vectors")


def program(monkeypatch, tmp_path, *arguments) -> np.ndarray:
    """The images that sample.py writes."""
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments), *out])
    sample.main()
    with np.load(tmp_path / "out" / "samples.npz") as saved:
        return saved["images"]


# ---------------------------------------------------------------------------------------------------------------------
# one line to load and draw


@pytest.mark.parametrize("flags, arguments", [
    ("-n 16 --labels 7 --seed 3", dict(labels=["7"] * 16, seed=3)),
    ("-n 16 --labels 7 --seed 3", dict(labels=[7] * 16, seed=3)),
    ("-n 16 --labels 7 --seed 3", dict(labels="7", num=16, seed=3)),
    ("", dict()),
    ("-n 3", dict(num=3)),
    ("-n 5 --batch 2", dict(num=5, batch=2)),
    ("-n 4 --cfg 2.5 --steps 6", dict(num=4, cfg_scale=2.5, steps=6)),
])
def test_images_are_those_of_the_program(monkeypatch, tmp_path, flags, arguments):
    run = load_run(exported(tmp_path), device="cpu")
    images = run.sample(**arguments)
    assert images.dtype == np.uint8 and images.shape[1:] == (8, 8, 1)
    assert np.array_equal(images, program(monkeypatch, tmp_path, tmp_path / "export", *flags.split()))
    assert images.std() > 5 and not np.array_equal(images, run.sample(**{**arguments, "seed": 8}))


def test_steps_alone_are_those_of_heun_where_the_run_has_dopri5(monkeypatch, tmp_path):
    run = load_run(exported(tmp_path, solver="dopri5", solver_steps=0), device="cpu")
    drawn = program(monkeypatch, tmp_path, tmp_path / "export", "-n", "4", "--solver", "heun", "--steps", "6")
    assert np.array_equal(run.sample(4, steps=6), drawn) and not np.array_equal(run.sample(4), drawn)


def test_labels_in_any_order_and_in_turn(tmp_path):
    run = load_run(exported(tmp_path), device="cpu")
    mixed = run.sample(labels=["3", 3, "0", np.int64(9)])
    for i, label in enumerate((3, 3, 0, 9)):
        assert np.array_equal(mixed[i], run.sample(labels=[label] * 4)[i])
    assert np.array_equal(run.sample(4, labels=["3", "0"]), run.sample(labels=[3, 0, 3, 0]))
    for wrong, text in ((dict(batch=0), "batch must be at least 1"), (dict(seed=-1), "seed at least 0"),
                        (dict(labels=[1.5]), "there is no class number 1.5: this run has 0 to 9")):
        with pytest.raises(UserError, match=text):
            run.sample(**{"num": 2, **wrong})


def test_vectors_and_no_condition(monkeypatch, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    np.save(tmp_path / "asked.npy", vectors)
    run = load_run(on_vectors(tmp_path), device="cpu")
    drawn = program(monkeypatch, tmp_path, tmp_path / "export", "-n", "4", "--vectors", tmp_path / "asked.npy")
    for given in (vectors, torch.tensor(vectors), vectors.tolist()):
        assert np.array_equal(run.sample(vectors=given), drawn)
    assert not np.array_equal(run.sample(4), drawn)         # the examples of the run
    run = load_run(exported(tmp_path / "free", {**DIGITS, "classes": []}), device="cpu")
    assert run.sample(5).shape == (5, 8, 8, 1) and run.sample().shape == (40, 8, 8, 1)


def test_thumbnails_are_the_coarse_bands_of_the_images(tmp_path):
    run = load_run(exported(tmp_path), device="cpu")
    arguments = dict(labels=[1, 5, 7], seed=2, cfg_scale=1.5)
    small, images = run.sample(preview=True, **arguments), run.sample(**arguments)
    assert small.shape == (3, 4, 4, 1) and small.dtype == np.uint8
    bands, _ = causal.draw_bands(run, causal.noise_of(run, 2, range(3)), torch.tensor([1, 5, 7]), cfg_scale=1.5,
                                 solver="midpoint", steps=4)
    assert np.abs(small.astype(int) - run.decode(bands[0])).max() <= 1          # of whole images, drawn apart
    assert np.array_equal(images, run.decode(run.schedule.image(bands)))
    assert np.array_equal(small, run.sample(preview=True, batch=2, **arguments)) and small.std() > 5


@pytest.mark.parametrize("arguments, sentence", [
    (dict(labels=["x"]), "there is no label 'x'"),
    (dict(labels=[10]), "there is no class number 10: this run has 0 to 9"),
    (dict(labels=[-1]), "there is no class number -1"),
    (dict(labels=[]), "the list of labels is empty"),
    (dict(num=0), "the number of images must be at least 1, not 0"),
    (dict(vectors=[[1.0]]), "this run was trained on labels: leave out the vectors"),
    (dict(cfg_scale=float("nan")), "must be a number"),
])
def test_what_cannot_be_drawn_is_a_sentence(tmp_path, arguments, sentence):
    run = random_run(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        run.sample(**arguments)


@pytest.mark.parametrize("change, sentence", [
    (dict(mask="none"), "its coarse bands read finer ones"),
    (dict(method="lfm", num_scales=1), "--method lfm, not lapflow"),
    (dict(num_scales=1), "this run has one band"),
])
def test_runs_without_previews_say_so(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        random_run(tmp_path, **change).sample(2, preview=True)


def test_wrong_conditions_are_sentences(tmp_path):
    free = random_run(tmp_path, {**DIGITS, "classes": []})
    for arguments, sentence in ((dict(labels=["7"]), "trained without classes: leave out the labels"),
                                (dict(num=2, cfg_scale=2.0), "guidance needs a condition"),
                                (dict(num=2, cfg_scale=2.0, preview=True), "guidance needs a condition")):
        with pytest.raises(UserError, match=sentence):
            free.sample(**arguments)
    run = load_run(on_vectors(tmp_path), device="cpu")
    for vectors in ([[1.0, 2.0]], [1.0, 2.0, 3.0], [[1.0, 2.0, float("nan")]], np.zeros((0, 3))):
        with pytest.raises(UserError, match="vectors must be finite, of shape"):
            run.sample(vectors=vectors)


# ---------------------------------------------------------------------------------------------------------------------
# the card


def header_of(text: str) -> dict:
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def test_a_trained_run_gets_a_whole_card(monkeypatch, tmp_path, capsys):
    cfg = tiny(tmp_path, steps=4, save_every=4)
    train.finish(train.train(cfg, device="cpu"))
    monkeypatch.setattr(sys, "argv", ["sample.py", cfg.out, "--export", str(tmp_path / "shared"), "--device", "cpu"])
    sample.main()
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted(card.FILES)
    text = (tmp_path / "shared" / "README.md").read_text()
    assert header_of(text) == {
        "license": "cc-by-4.0", "library_name": "lapflow", "pipeline_tag": "unconditional-image-generation",
        "tags": ["lapflow", "flow-matching", "laplacian-pyramid", "image-generation"]}
    report = json.loads((Path(cfg.out) / "scores.json").read_text())
    assert f"{report['novelty']:9.4f} {report['real']['novelty']:9.4f}" in text
    assert "10 images, seed 0, midpoint" in text
    assert f"commit {log.commit() or 'not known'} |" in text and log.cpu_name() in text and torch.__version__ in text
    assert "4 of 16 images, 0.0 epochs of 1,797 images" in text and "![40 samples" in text
    assert "UCI" in text and "CC BY 4.0" in text and str(tmp_path) not in text
    names = re.findall(r"^## (.*)", text, re.M)
    assert names == ["Use", "Training", "Scores", "Limits", "Licences"]
    lines = re.search(r"```python\n(.*?)```", text, re.S)[1]
    found = {}
    exec(lines.replace("OWNER/NAME", str(tmp_path / "shared")), found)          # the loader of the card runs
    assert found["images"].shape == (16, 8, 8, 1)
    run = load_run(str(tmp_path / "shared"), device="cpu")
    again = card.write(run, "me/digits", grid=False)        # of the export
    for words in ("Not measured on these weights", "commit not known", "repeat training images is not known",
                  "whether its training started from other weights is not known"):
        assert words in again
        assert words not in text or words == "commit not known" and not log.commit()       # a copy without git
    raw = load_run(cfg.out, raw=True, device="cpu")         # the scores are of the averaged weights
    assert "Not measured" in card.write(raw, "me/x", grid=True)


def test_a_card_says_how_its_samples_were_drawn(tmp_path, program):
    cfg = tiny(tmp_path, steps=1)
    train.train(cfg, device="cpu")
    program("fid.py", cfg.out, "-n", "10", "--labels", "7", "--noise-scale", "1,0.5", "--cfg", "3", "--cfg-interval",
            "0.1,0.5", "--solver", "heun", "--steps", "2")
    text = card.scores(load_run(cfg.out, device="cpu"))
    program("fid.py", cfg.out, "-n", "10")         # its own settings need no words
    assert ", labels balanced" not in card.scores(load_run(cfg.out, device="cpu"))
    for words in ("guidance 3", "steps 2", "interval [0.1, 0.5]", "noise scale [1.0, 0.5]", "labels 7"):
        assert words in text, text


def test_a_run_and_an_export_do_not_share_a_directory(tmp_path):
    cfg = tiny(tmp_path, steps=1)
    train.train(cfg, device="cpu")
    with pytest.raises(UserError, match="is the directory of a run, and an export cannot be in it too"):
        load.export(load_run(cfg.out, device="cpu"), Path(cfg.out))
    load.export(load_run(cfg.out, device="cpu"), tmp_path / "shared")
    with pytest.raises(UserError, match="shared is an export, and a run cannot be in it too"):
        train.train(tiny(tmp_path, "shared", steps=1), fresh=True, device="cpu")
    assert load_run(str(tmp_path / "shared"), device="cpu").step == 1


def test_an_earlier_checkpoint_is_sampled_by_its_name(tmp_path, program):
    cfg = tiny(tmp_path, steps=2, save_every=1)
    train.train(cfg, device="cpu")
    first = Path(cfg.out) / "step-00000001.pt"
    run = load_run(str(first), device="cpu")
    assert (run.step, run.folder) == (1, Path(cfg.out))
    assert "step 1 of" in program("fid.py", first, "-n", "10", "--steps", "2", "--solver", "heun")
    with pytest.raises(UserError, match="is not a checkpoint|cannot be read|damaged"):
        load_run(str(Path(cfg.out) / "config.json"), device="cpu")


def test_a_card_names_the_code_of_every_part_of_the_training(monkeypatch, tmp_path):
    """Of a start that saved something: not of one that was cut off, of a finished run's, or of what --fresh deleted."""
    def trained(commit, **settings):
        monkeypatch.setattr(log, "commit", lambda: commit)
        return train.train(tiny(tmp_path, save_every=2, **settings), device="cpu", fresh=commit == "first")

    trained("before", steps=2)
    trained("first", steps=2)
    monkeypatch.setattr(log.Log, "end_step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained("cut-off", steps=4)
    monkeypatch.undo()
    trained("second", steps=4)
    trained("only-samples", steps=4)
    text = card.write(load_run(str(tmp_path / "run"), device="cpu"), "me/x", grid=False)
    assert "| code | commit first; second |" in text


def test_the_flops_are_those_of_the_network(tmp_path):
    run, total = random_run(tmp_path), 0
    model = build_model(run.cfg, DIGITS, device="meta")     # torch's counter leaves out attention on a CPU
    for stage in (0, 1):                                    # each trains half of every batch; backward is two forwards
        with FlopCounterMode(display=False) as counter:
            model(*model.stage_inputs(stage, 10, "meta"))
        total += 3 * 7 * counter.get_total_flops()
    assert f"| training FLOPs | {total:.2e} " in card.write(run, "me/digits", grid=True)


@pytest.mark.parametrize("given", [
    {}, dict(preset="fashion"), dict(dataset="folder", data="/home/me/x", flip=False, starts=(0.0, 0.4, 0.7)),
    dict(method="lfm"), dict(method="edify", num_scales=2, steps=3), dict(preset="imagenet-256-XL", data="/home/me/x"),
    dict(preset="celebahq-256-lfm"), dict(dataset="celebahq", res=256, space="pixel", size="B/16"),
    dict(dataset="folder", data="/home/me/x", condition="vectors", seed=3, cfg_scale=2.0), dict(num_scales=1, lr=1e-4)])
def test_the_command_of_the_card_gives_the_same_run(given):
    cfg = resolve(given)
    line = card.command(cfg)
    parser = ArgumentParser()
    config.add_config_flags(parser)
    again = resolve(vars(parser.parse_args(shlex.split(line)[2:])))
    free = {name: "" for name in load.PLACES}
    assert not differences(cfg, again) and replace(cfg, **free) == replace(again, **free) and "/home" not in line


def test_every_preset_has_a_short_command():
    for name in PRESETS:
        line = card.command(resolve({"preset": name, **({"data": "x"} if name == "folder" else {})}))
        assert line.replace(" --data DIR", "") == "python train.py" + ("" if name == "digits" else f" --preset {name}")


@pytest.mark.parametrize("dataset, licence, words", [
    ("digits", "cc-by-4.0", "Alpaydin"), ("fashion", "mit", "Zalando"),
    ("celebahq", "other", "non-commercial research"), ("imagenet", "other", "non-commercial research"),
    ("folder", "unknown", "say their licence here")])
def test_the_licence_is_that_of_the_data(tmp_path, dataset, licence, words):
    places = dict(data="/home/me/x") if dataset in ("folder", "celebahq", "imagenet") else {}
    run = random_run(tmp_path, {**DIGITS, "classes": []}, dataset=dataset, **places)
    text = card.write(run, "me/model", grid=True)
    header = header_of(text)
    assert header["license"] == licence and words in text.split("## Licences")[1]
    assert bool(header.get("license_name")) == (licence == "other") and "/home" not in text
    assert "images = load_run(\"me/model\").sample(16, seed=0)" in text


def test_a_card_tells_no_place_and_no_licence_of_other_weights(tmp_path):
    run = random_run(tmp_path, **ELSEWHERE, latents="/home/me/latents", out="/home/me/out", init="/home/me/start")
    text = card.write(run, "me/model", grid=False)
    assert "/home/me" not in text and 'load_run("me/model", vae="DIR")' in text and "--vae DIR" in text
    assert header_of(text)["license"] == "unknown" and "started from other weights" in text
    assert "samples.png" not in text


def test_an_export_without_its_autoencoder_has_a_card_without_samples(tmp_path, monkeypatch, capsys):
    run = random_run(tmp_path)
    monkeypatch.setattr(Run, "sample", lambda *a, **k: (_ for _ in ()).throw(UserError("the autoencoder is away")))
    card.share(run, Namespace(export=str(tmp_path / "shared"), push=None, yes=False, batch=250), ALONE)
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "model_index.json"]
    assert "the card has no samples: the autoencoder is away" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# the hub: a server on this machine with the part of its API that uploads and downloads use


class Hub(ThreadingHTTPServer):
    """requests: (method, path) of all; files: name -> bytes of the newest commit; status: of every answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.files, self.blobs, self.made, self.status = [], {}, {}, [], 200
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, content: dict | list | bytes, **headers):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(self.server.status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": len(raw), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def handle_any(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "PUT":
            hub.blobs[path.split("/")[-1]] = body
            return self.answer(b"")
        if self.command in ("GET", "HEAD"):
            if "/resolve/" in path:
                raw = hub.files[path.split("/")[-1]]
                return self.answer(raw, ETag=f'"{hashlib.sha256(raw).hexdigest()}"', X_Repo_Commit="0" * 40)
            if "/tree/" in path:
                return self.answer([{"type": "file", "path": name, "size": len(raw),
                                     "oid": hashlib.sha1(raw).hexdigest()} for name, raw in hub.files.items()])
            return self.answer({"id": "me/digits", "sha": "0" * 40, "siblings": [{"rfilename": n} for n in hub.files]})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            return self.answer({"commitUrl": f"{hub.url}/me/digits/commit/0", "commitOid": "0" * 40, "success": True})
        asked = json.loads(body)
        if path == "/api/repos/create":
            hub.made.append(asked)
            return self.answer({"url": f"{hub.url}/me/digits", "name": "me/digits"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            return self.answer({"files": [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "regular" if f["path"].endswith((".md", ".json")) else "lfs"} for f in asked["files"]]})
        assert path.endswith("/info/lfs/objects/batch"), path
        self.answer({"transfer": "basic", "objects": [
            {**o, "actions": {"upload": {"href": f"{hub.url}/upload/{o['oid']}"}}} for o in asked["objects"]]})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)                  # the older upload, in plain HTTP
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def share(tmp_path, monkeypatch):
    """share("y"): sample.py --export --push on a terminal where this is answered; None: nobody is there."""
    run = exported(tmp_path)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "private.txt").write_text("not to be uploaded")

    def program(answer, *flags):
        monkeypatch.setattr(sys.stdin, "isatty", lambda: answer is not None, raising=False)
        monkeypatch.setattr("builtins.input", lambda question: answer)
        monkeypatch.setattr(sys, "argv", ["sample.py", run, "--export", str(tmp_path / "shared"), "--push", "me/digits",
                                          "--device", "cpu", *flags])
        sample.main()

    return program


@pytest.mark.parametrize("answer", ["", "n", "no", "what?", "yesterday"])
def test_nothing_is_uploaded_without_a_yes(hub, share, answer, capsys):
    share(answer)
    assert not hub.requests and not hub.files
    text = capsys.readouterr().out
    assert "nothing was uploaded" in text
    for words in ("me/digits on the Hugging Face hub: everybody can read", *card.FILES, "classes 0, 1, 2", "cc-by-4.0"):
        assert words in text


def test_a_closed_terminal_is_a_no(hub, share, monkeypatch, capsys):
    def closed(question):
        raise EOFError

    monkeypatch.setattr(card, "input", closed, raising=False)                   # before the built-in one
    share("y")
    assert not hub.requests and "nothing was uploaded" in capsys.readouterr().out


@pytest.mark.parametrize("answer, flags", [("y", ()), ("Yes", ()), (None, ("--yes",))])
def test_after_a_yes_the_files_of_the_export_go_and_no_others(hub, share, tmp_path, answer, flags, capsys):
    share(answer, *flags)
    assert hub.files == {name: (tmp_path / "shared" / name).read_bytes() for name in card.FILES}
    assert len(hub.files["model.safetensors"]) > 1e5 and b'load_run("me/digits")' in hub.files["README.md"]
    assert [(repo["name"], repo["organization"]) for repo in hub.made] == [("digits", "me")]
    text = capsys.readouterr().out
    assert text.index("everybody can read") < text.index(f"uploaded   {hub.url}/me/digits/commit/0")


def test_without_a_terminal_the_question_stops_before_the_work(hub, share, tmp_path):
    with pytest.raises(UserError, match="nobody can answer here: add --yes"):
        share(None)
    assert not hub.requests and not (tmp_path / "shared" / "README.md").exists()


def test_a_refusal_of_the_hub_is_a_sentence(hub, share, tmp_path):
    hub.status = 401
    with pytest.raises(UserError, match="cannot upload to me/digits: .*; log in with `hf auth login`, or set HF_TOKEN"):
        share("y")
    assert not hub.files and (tmp_path / "shared" / "README.md").exists()


@pytest.mark.parametrize("flags, sentence", [
    ("--push me/x", "--push uploads an export: name its directory too"),
    ("--export a --push me/x@main", "--push takes OWNER/NAME"),
    ("--export a --push x", "--push takes OWNER/NAME"),
])
def test_uploads_that_cannot_be(give_up, flags, sentence):
    assert sentence in give_up("sample.py", *flags.split())


def test_what_is_private_is_told_before_the_question(tmp_path):
    examples = torch.randn(6, 3)
    run = random_run(tmp_path, {**DIGITS, "classes": [], "vectors": [6, 3]}, examples, condition="vectors", **ELSEWHERE)
    load.export(run, tmp_path)
    assert isinstance(run.condition, Vectors)
    text = card.public(run, tmp_path, ["config.json", "model.safetensors"], "me/x")
    assert "6 vectors of training images as they are" in text and "the folder of the autoencoder, /home/me/vae" in text


# ---------------------------------------------------------------------------------------------------------------------
# diffusers

PIPELINE = dict(custom_pipeline=str(ROOT / "extras" / "pipeline.py"), trust_remote_code=True)


def test_an_export_is_a_pipeline_of_diffusers(tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = random_run(tmp_path)
    card.share(run, Namespace(export=str(tmp_path / "shared"), push=None, yes=False, batch=250), ALONE)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "shared", **PIPELINE)
    assert pipe.to("cpu") is pipe and pipe.device == torch.device("cpu")
    drawn = pipe(labels=["7", "2"], seed=3, guidance_scale=1.5, num_inference_steps=6).images
    images = run.sample(labels=["7", "2"], seed=3, cfg_scale=1.5, steps=6)
    assert np.array_equal(np.stack([np.asarray(image) for image in drawn]), images[..., 0])
    assert np.array_equal(pipe(3, output_type="np", preview=True).images, run.sample(3, preview=True))
    assert len((ROOT / "extras" / "pipeline.py").read_text().splitlines()) < 80


@pytest.mark.slow
def test_up_to_the_hub_and_back_in_new_processes(tmp_path):
    """By HF_ENDPOINT, with nothing imported but the loader."""
    hub, name = Hub(), exported(tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_not_a_token", "PYTHONPATH": str(ROOT),
                   "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

    def python(*arguments):
        process = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True,
                                 text=True, timeout=200, stdin=subprocess.DEVNULL)
        return process.returncode, process.stdout + process.stderr

    push = [str(ROOT / "sample.py"), name, "--export", "shared", "--push", "me/digits"]
    code, text = python(*push)
    assert code == 1 and "add --yes" in text and not hub.requests
    code, text = python(*push, "--yes")
    assert code == 0 and set(hub.files) == set(card.FILES), text
    code, text = python("-c", "from run.load import load_run; import hashlib; images = load_run('me/digits')"
                        ".sample(labels=['7'] * 16, seed=0); print(images.shape, hashlib.sha256(images).hexdigest())")
    images = load_run(name, device="cpu").sample(labels=["7"] * 16, seed=0)
    pipeline = ("from diffusers import DiffusionPipeline; import hashlib; pipe = DiffusionPipeline.from_pretrained("
                f"'me/digits', **{PIPELINE}); images = pipe(labels=['7'] * 16, seed=0, output_type='np').images; "
                "print('diffusers', hashlib.sha256(images).hexdigest())")
    assert code == 0 and f"(16, 8, 8, 1) {hashlib.sha256(images).hexdigest()}" in text, text
    code, text = python("-c", pipeline)
    assert code == 0 and f"diffusers {hashlib.sha256(images).hexdigest()}" in text, text
    hub.shutdown()
    hub.server_close()


@pytest.mark.slow
def test_the_weights_in_the_repository_draw_the_digits_asked_for():
    """A hundred, by Euler; the classifier is that of the scores. The card beside them is of the same run."""
    run = load_run(str(ROOT / "docs/models/digits"), device="cpu")
    images = run.sample(labels=[str(i % 10) for i in range(100)], seed=3, steps=20)
    x1, labels = batches.digits().reference(1797)
    scores = class_scores(pixel_features(batches.to_images(x1)), labels, pixel_features(images), np.arange(100) % 10)
    assert scores["label_agreement"] > 0.9
    text = (ROOT / "docs/models/digits/README.md").read_text()
    assert f"{run.step:,} of 128 images" in text and "python train.py --seed 1" in text and run.weights == "ema"


def test_the_garments_in_the_repository_are_those_asked_for():
    """Trousers and shoes are told apart by how wide they are: the middle rows of the images, without a classifier."""
    run = load_run(str(ROOT / "docs/models/fashion"), device="cpu")
    images = run.sample(labels=["trouser", "sneaker"] * 10, seed=3, steps=10)[..., 0] > 64      # (20, 32, 32)
    height, width = (images.any(axis=axis).sum(axis=1) for axis in (2, 1))
    assert (height[::2] > 1.2 * width[::2]).mean() >= 0.9 and (width[1::2] > 1.2 * height[1::2]).mean() >= 0.9
    text = (ROOT / "docs/models/fashion/README.md").read_text()
    assert f"{run.step:,} of 128 images" in text and "python train.py --preset fashion" in text
    assert run.weights == "ema" and (ROOT / "docs/models/fashion/model.safetensors").stat().st_size < 10e6
