"""The programs as a user runs them: help, errors in one sentence, outputs, and every command of the README."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from PIL import Image

import config
import train
from conftest import ROOT
from scores import classifier
from studies import bench

QUICK = ["--size", "32,2,2,2", "--steps", "6", "--batch", "16", "--solver", "midpoint", "--solver-steps", "4"]


def programs() -> list[str]:
    """train.py at the root, data.latents in a folder: every file that ends by running its main."""
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("tests", "docs", "build", "venv") and not any(part.startswith(".") for part in parts):
            if "\n    config.run(main)" in path.read_text():
                names.append(f"{parts[0]}.py" if len(parts) == 1 else ".".join(parts))
    return names


def help_of(program, capsys, name: str) -> str:
    with pytest.raises(SystemExit) as stop:
        program(name, "--help")
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_programs_are_there():
    assert {"train.py", "sample.py", "fid.py", "data.latents", "scores.reference", "extras.causal", "extras.demo",
            "studies.bench", "studies.compare", "studies.plan", "studies.tables"} <= set(programs())


@pytest.mark.parametrize("name", programs())
def test_help_is_worth_reading(program, capsys, name):
    text = help_of(program, capsys, name)
    usage = text.split("\n\n")[0]
    assert ("python " + ("" if name.endswith(".py") else "-m ") + name) in usage and len(text.splitlines()) >= 8, usage
    if name in ("train.py", "sample.py", "fid.py", "data.latents"):
        assert len(text.splitlines()) > 20


def test_torchrun_takes_no_flag_of_ours_for_its_own(program, capsys):
    """It completes shortened options, also behind the script's name: --num is its --numa-binding."""
    from torch.distributed.run import get_args_parser

    flags = set()
    for name in ("train.py", "sample.py", "fid.py", "data.latents", "scores.reference"):
        text = help_of(program, capsys, name)
        flags |= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text.split("options:")[1]))
    assert {"--dataset", "-n", "--export", "--logger", "--vectors"} <= flags and len(flags) > 80
    for flag in flags - {"--num"}:                          # which has -n
        parsed = get_args_parser().parse_args(["--standalone", "script.py", flag, "1"])
        assert parsed.training_script_args == [flag, "1"], flag


@pytest.mark.parametrize("command, words", [
    ("train.py --sclaes 3", "unrecognized arguments: --sclaes 3"),
    ("train.py --dataset cats", "unknown dataset 'cats'"),
    ("train.py --dataset folder --data nowhere", "no image folder 'nowhere'"),
    ("train.py --num-scales 4", "the nearest that works is 16"),
    ("train.py --starts 0,1.5", "starts must increase from 0 to below 1"),
    ("train.py --starts 0.5,0", "starts must increase"),
    ("train.py --starts 0,x", "--starts: invalid numbers value: '0,x'"),
    ("train.py --path zigzag", "unknown path 'zigzag'"),
    ("train.py --pyramid zigzag", "unknown pyramid 'zigzag'"),
    ("train.py --noise pink", "unknown noise 'pink'"),
    ("train.py --stages all", "unknown stages 'all'"),
    ("train.py --pyramid egyptian", "unknown pyramid 'egyptian'"),
    ("train.py --condition smell", "unknown condition 'smell'"),
    ("train.py --condition vectors", "has labels and no vectors"),
    ("train.py --method magic", "unknown method 'magic'"),
    ("train.py --preset magic", "unknown preset 'magic'"),
    ("train.py --mask all", "unknown mask 'all'"),
    ("train.py --experts all", "unknown experts 'all'"),
    ("train.py --size Q/2", "unknown model size 'Q/2'"),
    ("train.py --batch ten", "--batch"),
    ("train.py --batch 1", "need a batch of at least 2"),
    ("train.py --data pictures", "add --dataset folder"),
    ("train.py --stop-after later", "takes a time like 90s"),
    ("train.py --device meta", "the device 'meta' cannot be used"),
    ("train.py --device tpu9", "the device 'tpu9' cannot be used"),
    ("train.py --solver-steps 10", "dopri5 chooses its own steps"),
    ("train.py --solver euler", "the solver euler needs a number of steps"),
    ("sample.py nowhere", "no run directory 'nowhere'"),
    ("sample.py", "no trained run"),
    ("fid.py", "no trained run"),
    ("extras.causal preview", "no trained run"),
    ("sample.py --solver magic", "invalid choice: 'magic'"),
])
def test_bad_input_gets_a_sentence(give_up, tmp_path, command, words):
    text = give_up(*shlex.split(command))
    assert words in text and len(text.splitlines()) <= 2                        # at most a usage line before it
    assert not list(tmp_path.iterdir())


def test_train_sample_score(program, give_up, tmp_path):
    out = program("train.py", *QUICK, "--num-samples", "40")
    run = tmp_path / "out" / "digits"
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", "samples.png", "trajectory.png",
                                               "loss.png", "scores.json", "starts.jsonl", "step-00000006.pt"}
    assert json.loads((run / "config.json").read_text())["size"] == "32,2,2,2" and "frechet_pixel" in out
    for name in ("samples.png", "trajectory.png", "loss.png"):
        picture = np.asarray(Image.open(run / name).convert("L"))
        assert min(picture.shape) > 200 and picture.std() > 5                   # large enough to see, and not empty

    out = program("sample.py", "--num", "12", "--seed", "3", "--out", "images", "--labels", "7", "--cfg", "1.5",
                  "--solver", "rk4", "--steps", "4")
    assert "8 + 8 = 16" in out and "s per image" in out and "guidance   1.5" in out and "32 network passes" in out
    with np.load(tmp_path / "images" / "samples.npz") as saved:
        assert saved["images"].shape == (12, 8, 8, 1) and saved["images"].dtype == np.uint8
        assert saved["labels"].tolist() == [7] * 12
    assert (tmp_path / "images" / "grid.png").exists()

    (tmp_path / "broken.npz").write_bytes(b"PK hello")
    for command, words in (("sample.py --labels 10", "no label '10'"), ("sample.py --num 0", "--num"),
                           ("sample.py --vectors x.npy", "trained on labels"),
                           ("sample.py --solver dopri5 --steps 9", "leave out --steps"),
                           ("sample.py --solver heun --steps 0", "add --steps"),
                           ("sample.py --solver heun --steps 9 --rtol 1e-3", "no tolerance"),
                           ("sample.py --rtol -1", "--rtol must be a positive number"),
                           ("sample.py --seed 99999999999999999999", "below 2^63"),
                           ("sample.py --out out/digits/config.json", "cannot be written"),
                           ("fid.py --record .", "cannot be appended"),
                           ("fid.py --num 3", "at least 5"),
                           ("fid.py broken.npz", "is not a samples.npz"),
                           ("fid.py nowhere", "no run directory"),
                           ("sample.py --cfg-interval 0.5", "two increasing times")):
        text = give_up(*shlex.split(command))
        assert words in text and len(text.strip().split("\n")) <= 2, text       # perhaps a progress bar before it

    out = program("fid.py", "--num", "20", "--solver", "euler", "--steps", "4", "--record", "scores.jsonl")
    assert "20 generated images against 1797" in out and "ema at step 6" in out and "recall" in out
    line = json.loads((tmp_path / "scores.jsonl").read_text())
    assert line["n"] == 20 and line["nfe"] == 4 and "--record" in line["command"] and line["real"]["n"] == 20
    out = program("fid.py", "images/samples.npz")
    assert "12 generated images against 179" in out                             # the sevens only
    assert "guidance   1.5" in out
    assert json.loads((tmp_path / "images" / "scores.json").read_text())["against"] == "out/digits"
    np.savez(tmp_path / "images" / "other.npz", images=np.zeros((12, 8, 8, 1), np.uint8), labels=np.full(12, 7))
    assert "guidance" not in program("fid.py", "images/other.npz")                # which sample.py did not draw

    before = (run / "scores.json").read_text()              # those of the end of the training
    program("fid.py", "out/digits/step-00000006.pt", "--num", "20", "--solver", "euler", "--steps", "4")
    assert (run / "scores.json").read_text() == before and (run / "scores-step-6.json").exists()
    assert "dopri5 chooses its own steps" in give_up(*"sample.py --solver dopri5 --steps 4 --out images".split())
    assert not (tmp_path / "images" / "job.json").exists()                        # the samples stay whole
    assert "too few for 128 features" in give_up("fid.py", "--features", "classifier", "--num", "20")
    assert not list(tmp_path.glob("judges/*"))                                    # nothing was trained for it


def test_scores_of_a_run_in_training_do_not_say_that_it_is_finished(program, give_up, tmp_path):
    out = program("train.py", *QUICK, "--steps", "40", "--stop-after", "0s", "--fresh", "--label-drop", "0")
    assert "the same command without --fresh continues" in out
    program("fid.py", "--num", "20", "--solver", "euler", "--steps", "4")
    run = tmp_path / "out" / "digits"
    assert not (run / "scores.json").exists() and list(run.glob("scores-step-*.json"))
    assert "has --label-drop 0" in give_up("sample.py", "--cfg", "2") and not (run / "samples").exists()


@pytest.mark.slow                                           # counts the FLOPs of every row of the paper
def test_the_readme_shows_what_the_results_say(program):
    program("studies.tables", "--check")


def commands_of(page: str) -> list[str]:
    """Those that a machine with Python alone can run."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ") and "DIR" not in line.split()      # the reader's data
            and "studies.compare" not in line               # many trainings: tests/test_compare.py runs it
            and "extras.demo" not in line]                  # a server, until it is stopped: slow/test_demo_page.py


def test_fine_tuning_on_the_pages_keeps_the_network(monkeypatch):
    """As its commands stand there: the shortened ones below all have one size."""
    runs = {}
    monkeypatch.setattr(train, "train", lambda cfg, *_: runs.update({cfg.out: cfg}))
    for command in commands_of("docs/paper.md"):
        if "train.py" in command and "--dry-run" not in command:
            monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
            train.main()
    (tuned,) = (cfg for cfg in runs.values() if cfg.init)
    assert tuned.init in runs and set(config.differences(tuned, runs[tuned.init])) <= {"data", "res", "init"}


def make_inputs(folder) -> None:
    """The files that the commands name."""
    for i, name in product(range(4), ("my-images", "others", "package/img/twitter/64")):        # too few to score
        (folder / name / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (80, 70, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / name / "ab"[i % 2] / f"{i}.png")
    np.save(folder / "my-images" / "vectors.npy", np.arange(8.0).reshape(4, 2))
    np.save(folder / "prompts.npy", np.arange(6.0).reshape(3, 2))
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(folder / "small.png")
    shutil.copytree(ROOT / "docs" / "models", folder / "docs" / "models")
    (folder / "clothes").mkdir()
    for name, sizes in (("images-idx3", (40, 28, 28)), ("labels-idx1", (40,))):
        header = bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)
        content = (np.arange(np.prod(sizes)) % 10).astype(np.uint8).tobytes()
        for split in ("train", "t10k"):
            (folder / "clothes" / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + content))


@pytest.mark.slow
def test_every_command_of_the_pages_runs(program, tmp_path, monkeypatch):
    """In their order, in one directory, where the digits are the newest run as a page begins. Training is shortened."""
    make_inputs(tmp_path)
    monkeypatch.setitem(classifier.SETTINGS, "most", 20)
    for name, value in (("WIDTH", 32), ("DEPTH", 1), ("HEADS", 2)):                 # of what is timed
        monkeypatch.setattr(bench, name, value)
    pages = {page: commands_of(page) for page in ("README.md", "docs/scores.md", "docs/paper.md", "docs/results.md")}
    assert {"python train.py", "python sample.py", "python fid.py", "python -m studies.plan"} <= {
        command for commands in pages.values() for command in commands}
    few = {"train.py": [*QUICK, "--num-samples", "40"],
           "studies.bench": ["--sides", "16", "--rounds", "1"]}
    for commands in pages.values():
        for checkpoint in (tmp_path / "out" / "digits").glob("step-*.pt"):
            checkpoint.touch()
        for command in commands:
            name, *arguments = [word for word in shlex.split(command)[1:] if word != "-m"]
            if "--dry-run" not in arguments:
                arguments += few.get(name, [])
            if "--dataset fashion" in command:
                arguments += ["--data", "clothes"]
            if "docs/models/fashion" in command:
                arguments += ["--solver", "euler", "--steps", "6"]
            if "--dataset folder" in command:
                arguments += ["--size", "32,2,2,8"]         # larger images, fewer tokens
            print(name, *arguments)
            if name == "studies.bench":                     # of a small network: imported, so that its size is ours
                monkeypatch.setattr(sys, "argv", [name, *arguments])
                bench.main()
            else:
                program(name, *arguments)


def test_ctrl_c_is_not_a_traceback():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="^stopped$"):
        config.run(main)


def test_a_reader_that_leaves_early_is_not_a_traceback():
    """python -m studies.plan | head -1"""
    script = "import config\ndef main():\n    for _ in range(10**6): print('x' * 100)\nconfig.run(main)"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, cwd=ROOT) as it:
        assert it.stdout.readline() == b"x" * 100 + b"\n"
        it.stdout.close()
        assert it.stderr.read() == b"" and it.wait() == 1
