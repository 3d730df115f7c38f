"""The scripts as a user runs them: help, errors in one sentence, outputs, and every command of the README."""

import json
import re
import shlex
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

QUICK = ["--size", "32,2,2,2", "--steps", "6", "--batch", "16", "--solver", "midpoint", "--solver-steps", "4"]


@pytest.mark.parametrize("script", ["train.py", "sample.py", "fid.py", "latents.py", "bench.py", "compare.py"])
def test_help_is_worth_reading_and_does_not_wait_for_torch(run_script, tmp_path, script):
    out = run_script(script, "--help").stdout
    assert "python " + script in out and len(out.splitlines()) > 20
    (tmp_path / "loaded.py").write_text(
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else 'NONE'))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nsys.argv = [{script!r}, '--help']\n"
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n")
    assert run_script(tmp_path / "loaded.py").stdout.endswith("NONE\n")


def test_torchrun_takes_no_flag_of_ours_for_its_own():
    """It completes shortened options, also behind the script's name: --num is its --numa-binding."""
    from torch.distributed.run import get_args_parser

    flags = set()
    for script in ("train.py", "sample.py", "fid.py", "latents.py", "bench.py", "compare.py"):
        text = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True).stdout
        flags |= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text.split("options:")[1]))
    assert {"--dataset", "-n", "--preview", "--logger"} <= flags and len(flags) > 80
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
    ("train.py --path sine", "unknown path 'sine'"),
    ("train.py --mask all", "unknown mask 'all'"),
    ("train.py --size M/2", "unknown model size 'M/2'"),
    ("train.py --batch ten", "--batch"),
    ("train.py --batch 1", "need a batch of at least 2"),
    ("train.py --data pictures", "add --dataset folder"),
    ("train.py --device meta", "the device 'meta' cannot be used"),
    ("train.py --device tpu9", "the device 'tpu9' cannot be used"),
    ("train.py --solver-steps 10", "dopri5 chooses its own steps"),
    ("train.py --solver euler", "the solver euler needs a number of steps"),
    ("sample.py nowhere", "no run directory 'nowhere'"),
    ("sample.py", "no trained run"),
    ("fid.py", "no trained run"),
    ("sample.py --solver magic", "invalid choice: 'magic'"),
])
def test_bad_input_gets_a_sentence(give_up, tmp_path, command, words):
    said = give_up(*shlex.split(command))
    assert words in said and len(said.splitlines()) <= 2                        # at most a usage line before it
    assert not list(tmp_path.iterdir())


def test_train_sample_score(run_script, give_up, tmp_path):
    out = run_script("train.py", *QUICK).stdout
    run = tmp_path / "out" / "digits"
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", "samples.png", "trajectory.png",
                                               "loss.png", "scores.json", "step-00000006.pt"}
    assert json.loads((run / "config.json").read_text())["size"] == "32,2,2,2" and "frechet_pixel" in out
    for name in ("samples.png", "trajectory.png", "loss.png"):
        picture = np.asarray(Image.open(run / name).convert("L"))
        assert min(picture.shape) > 200 and picture.std() > 5                   # large enough to see, and not empty

    out = run_script("sample.py", "--num", "12", "--seed", "3", "--out", "images", "--labels", "7", "--cfg", "1.5",
                     "--solver", "rk4", "--steps", "4").stdout
    assert "8 + 8 = 16" in out and "s per image" in out and "guidance   1.5" in out and "32 network passes" in out
    with np.load(tmp_path / "images" / "samples.npz") as saved:
        assert saved["images"].shape == (12, 8, 8, 1) and saved["images"].dtype == np.uint8
        assert saved["labels"].tolist() == [7] * 12
    assert (tmp_path / "images" / "grid.png").exists()

    (tmp_path / "broken.npz").write_bytes(b"PK hello")
    for command, words in (("sample.py --labels 10", "no label '10'"), ("sample.py --num 0", "--num"),
                           ("sample.py --solver dopri5 --steps 9", "leave out --steps"),
                           ("sample.py --solver heun --steps 0", "add --steps"),
                           ("sample.py --solver heun --steps 9 --rtol 1e-3", "no tolerance"),
                           ("sample.py --rtol -1", "--rtol must be a positive number"),
                           ("sample.py --seed 99999999999999999999", "below 2^63"),
                           ("sample.py --out out/digits/config.json", "cannot be written"),
                           ("fid.py --record .", "cannot be appended"),
                           ("fid.py --num 3", "at least 5"),
                           ("fid.py broken.npz", "is no samples.npz"),
                           ("fid.py nowhere", "no run directory"),
                           ("sample.py --cfg-interval 0.5", "two increasing times")):
        assert words in give_up(*shlex.split(command))

    out = run_script("fid.py", "--num", "20", "--solver", "euler", "--steps", "4", "--record", "scores.jsonl").stdout
    assert "20 generated images against 1797" in out and "ema at step 6" in out and "recall" in out
    line = json.loads((tmp_path / "scores.jsonl").read_text())
    assert line["n"] == 20 and line["nfe"] == 4 and "--record" in line["command"] and line["real"]["n"] == 20
    out = run_script("fid.py", "images/samples.npz").stdout
    assert "12 generated images against 179" in out                             # the sevens only


@pytest.mark.parametrize("script, words", [("model.py", "input of band 2 changed:  band 0 0.0e+00  band 1 0.0e+00"),
                                           ("schedule.py", "picture: schedule.png")])
def test_demonstrations(run_script, script, words):
    assert words in run_script(script).stdout


def test_the_readme_shows_what_the_results_say(run_script):
    run_script("results/tables.py", "--check")


def commands_of_the_readme() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()
            if line.startswith("python ") and " DIR " not in line]              # without the reader's own data


@pytest.mark.slow
def test_every_command_of_the_readme_runs(run_script, tmp_path):
    """In their order, in one directory; training is shortened, and the folder they speak of is made here."""
    for i, folder in product(range(4), ("my-images", "others")):                # too few to score: that is said
        (tmp_path / folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (80, 70, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / folder / "ab"[i % 2] / f"{i}.png")
    Image.fromarray(np.full((4, 4), 128, np.uint8)).save(tmp_path / "small.png")
    commands = commands_of_the_readme()
    assert {"python train.py", "python sample.py", "python fid.py"} <= set(commands)
    for command in commands:
        script, *arguments = shlex.split(command)[1:]
        if script == "train.py":
            arguments += QUICK
        if script == "compare.py":
            arguments += ["--seeds", "1", "--steps", "1", "--size", "32,2,2,2", "--jobs", "2"]
        if script == "bench.py":
            arguments += ["--sides", "16", "--rounds", "1"]
        run_script(script, *arguments)
