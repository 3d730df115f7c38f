"""README.md and docs/ tell the truth: listings are the code, names exist, commands work, forks are complete."""

import json
import math
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import warnings
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
from config import UserError
from conftest import ROOT
from run import load, memory, paper
from schedule import PATHS, Schedule
from scores import table
from studies import compare, tables

PAGES = {name: (ROOT / name).read_text() for name in (
    "README.md", "docs/results.md", "docs/paper.md", "docs/scores.md", "CONTRIBUTING.md")}
README = PAGES["README.md"]
RESULTS = PAGES["docs/results.md"].replace("\n", " ")
TABLES = {"fashion", "fashion_ablations", "fashion_steps", "fashion_guidance", "crops", "crops64", "garments",
          "presets", "speed", "systems", "ablations", "gpu", "quality", "variety"}


def section(title: str, page: str = README) -> str:
    return re.split(rf"^## {re.escape(title)}\n", page, flags=re.M)[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


# ---------------------------------------------------------------------------------------------------------------------
# the pages


def test_the_readme_is_short_and_in_order():
    assert len(README.encode()) <= 14_000
    assert re.findall(r"^## (.*)$", README, flags=re.M) == [
        "How much code is LapFlow?", "What is measured, and what is not", "The method in five steps",
        "From the paper to the code", "Fork it", "Recipes", "More"]


def test_the_first_listing_is_mini_py():
    assert blocks(README, "python")[0] == (ROOT / "mini.py").read_text()
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in ("pyramid.py", "schedule.py", "model.py"))
    (written,) = re.findall(r"`model.py`: (\d+) lines", README)
    assert abs(lines - int(written)) < 50


def test_excerpts_are_the_code():
    """Parts between lines of three dots stand in the file one after the other, word for word."""
    excerpts = blocks(section("The method in five steps"), "python")
    assert [block.splitlines()[0] for block in excerpts] == [
        f"# {name}.py" for name in ("pyramid", "schedule", "model", "schedule", "sample")]
    for block in excerpts:
        name, _, code = block.partition("\n")
        source, place = (ROOT / name[2:]).read_text(), 0
        for part in re.split(r"^\.\.\.\n", code, flags=re.M):
            place = source.find("\n" + part, place)
            assert place >= 0 and len(part) > 50, f"not in {name[2:]}:\n{part}"
            place += len(part)


def test_the_map_names_what_is_there():
    rows = [row.split("|")[1:-1] for row in section("From the paper to the code").splitlines() if row.startswith("|")]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) >= 8
    for _, where, proof in rows[2:]:
        for place in re.findall(r"`(.*?)`", where):
            file, _, name = place.rpartition(".")
            assert re.search(rf"^(def|class) {name}\b|^{name} = ", (ROOT / f"{file}.py").read_text(), re.M), place
        for name in re.findall(r"`(.*?)`", proof):
            assert f"def {name}(" in tests, name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)(.*?)\)", PAGES[page]):
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_every_table_has_one_place():
    text = "".join(PAGES.values())
    for name in TABLES:
        assert len(re.findall(rf"^<!-- {name} -->\n(?:.*\n)+?<!-- /{name} -->$", text, re.M)) == 1, name
    assert set(re.findall(r"<!-- /?(\w+) -->", text)) == TABLES


def test_what_the_text_says_of_digits_is_in_the_results():
    text = re.search(r"<!-- systems -->(.*?)<!-- /systems -->", PAGES["docs/results.md"], re.S)[1].strip().splitlines()
    head, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in text if row.startswith("|"))
    table = {row[0]: dict(zip(head, (cell.split()[0] for cell in row if cell), strict=False)) for row in rows[1:]}
    for score, sign in (("FD, pixels", 1), ("class variance", -1), ("precision", 1)):   # LFM is closer
        assert sign * (float(table["LapFlow"][score]) - float(table["LFM"][score])) > 0
    rows = [json.loads(line) for line in open(ROOT / "results" / "digits.jsonl")]
    agreement, distance, novelty, seconds = (sum(row[name] for row in rows) / len(rows) for name in (
        "label_agreement", "frechet_pixel", "novelty", "seconds_total"))
    assert f"agreement {agreement:.3f}, Frechet distance {distance:.3f}." in PAGES["docs/results.md"]
    assert f"That takes {seconds:.0f} s" in PAGES["docs/results.md"] and f"digits have {novelty:.2f}" in README


def test_what_the_text_says_of_the_garments_is_on_the_card_of_their_weights():
    card = (ROOT / "docs/models/fashion/README.md").read_text()
    distance, agreement = (tuple(map(float, re.search(rf"^{name} +(\S+) +(\S+)", card, re.M).groups()))
                           for name in ("FRECHET-1k", "label_agreement"))
    text = "of 1,000 images FD {:.2f} in the classifier's features (real ones {:.2f}) and agreement {:.3f} ({:.3f})"
    assert text.format(*distance, *agreement) in RESULTS


def errors_apart(rows: dict, ours: str, theirs: str, key: str = "frechet") -> float:
    """Standard errors by which the mean over seeds of one system is above that of another."""
    a, b = ([row[key] for row in rows[name]] for name in (ours, theirs))
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (a, b)))
    return (statistics.mean(a) - statistics.mean(b)) / error


def means(rows: dict, key: str) -> dict:
    return {name: statistics.mean(row[key] for row in runs) for name, runs in rows.items()}


def test_what_the_pages_say_of_photographs_is_in_the_results():
    names = ("LapFlow", "LFM", "Pyramidal Flow", "LapFlow, 4 coarse tokens", "Pyramidal Flow, 16 coarse tokens")
    runs, _ = tables.of_one_length("crops", {name: compare.FOLDER_32[name] for name in names})
    ours, lfm, pyramidal, _, sixteen = means(runs, "frechet").values()
    large, _ = tables.of_one_length("crops64", {name: compare.IMAGES[name] for name in names[:3]})
    larger = means(large, "frechet")
    assert (f"LapFlow ({ours:.2f}) leads LFM ({lfm:.2f}) and is level with Pyramidal Flow ({pyramidal:.2f}) in the "
            "classifier's FD only; at 64 x 64: {:.2f}, {:.2f}, {:.2f}.".format(
                *larger.values())) in README
    agreement, judged = (list(means(large, key).values()) for key in ("label_agreement", "frechet_efficientnet"))
    ours_64, lfm_64, pyramidal_64 = larger.values()
    assert (f"At 64 x 64 LapFlow is {100 * (1 - ours_64 / lfm_64):.0f}% closer than LFM (at 32 x 32 "
            f"{100 * (1 - ours / lfm):.0f}%)") in RESULTS
    assert "asked for in {:.0f}, {:.0f} and {:.0f}% of its images".format(*(100 * x for x in agreement)) in RESULTS
    assert f"Pyramidal Flow is {100 * (1 - pyramidal_64 / ours_64):.0f}% closer than LapFlow" in RESULTS
    assert "LapFlow and LFM apart ({:.0f}, {:.0f}; Pyramidal Flow {:.0f})".format(*judged) in RESULTS
    gap = errors_apart(large, "Pyramidal Flow", "LapFlow")
    assert f"by {-gap:.1f} standard errors of two seeds" in RESULTS
    one, _ = tables.of_one_length("crops64", compare.FOLDER_64)
    (fine,), (often,), (tokens,), (steps,) = ([row["frechet"] for row in one[name]] for name in (
        "LapFlow, stages 1:1:1", "LapFlow, stages 4:4:1", "LapFlow, 64 coarse tokens", "Pyramidal Flow, stages 2:2:1"))
    assert f"2,318 steps ({often:.2f}; with all stages equally often {fine:.2f})" in RESULTS
    assert f"64 coarse tokens in place of 16 ({tokens:.2f})" in RESULTS
    assert f"in place of 1:1:1 has {steps:.2f}" in RESULTS
    assert one["LapFlow, stages 4:4:1"][0]["config"]["steps"] == 2318
    kernel = {name: [errors_apart(runs, "LapFlow", name, key) for key in ("kid", "kid_efficientnet")]
              for name in names[1:3]}
    both, _ = tables.of_one_length("crops", {
        name: compare.FOLDER_32[name] for name in ("LapFlow", "LapFlow, two scales")})
    apart = [errors_apart(both, "LapFlow, two scales", "LapFlow", key) for key in (
        "frechet", "kid", "frechet_efficientnet", "kid_efficientnet")]
    assert f"in all four distances, by {min(apart):.1f} to {max(apart):.1f} standard errors" in RESULTS
    assert ("LapFlow is behind LFM by {:.1f} and {:.1f} and behind Pyramidal Flow by {:.1f} and {:.1f}".format(
        *kernel["LFM"], *kernel["Pyramidal Flow"])) in RESULTS
    errors = {name: (errors_apart(runs, "LapFlow", name), errors_apart(runs, "LapFlow", name, "frechet_efficientnet"))
              for name in names[1:3]}
    assert (f"{-errors['LFM'][0]:.1f} standard errors ahead of LFM and level with Pyramidal Flow "
            f"({errors['Pyramidal Flow'][0]:.1f} behind)") in RESULTS
    assert (f"Pyramidal Flow is {errors['Pyramidal Flow'][1]:.1f} ahead of it, and LFM level "
            f"({errors['LFM'][1]:.1f} ahead)") in RESULTS
    assert f"gets worse with them: {sixteen:.2f}, one seed" in RESULTS and f"photographs 4.9, garments unchanged. " \
        f"Measured: {ours:.2f}" in RESULTS
    for key in ("precision", "label_agreement"):
        assert means(runs, key)["LapFlow"] == max(means(runs, key).values())


def test_what_the_pages_say_of_the_lengths_of_training_is_in_the_results():
    rows = [json.loads(line) for line in open(ROOT / "results" / "fashion.jsonl")]
    quarter, whole = ({name: [row for row in rows if row["settings"] == compare.IMAGES[name] and row["what"] == "run"
                              and f"{row['training_flops']:.1e}" == flops]
                       for name in ("LapFlow", "LFM", "Pyramidal Flow")} for flops in ("1.3e+13", "5.1e+13"))
    distance = [f"from {means(quarter, 'frechet')[name]:.2f} to {end:.2f}" for name, end in means(
        whole, "frechet").items()]
    assert "falls {}, LFM's {}, Pyramidal Flow's {}, and".format(*distance) in RESULTS
    judged = [f"{means(quarter, 'frechet_efficientnet')[name]:.0f} to {end:.0f}" for name, end in means(
        whole, "frechet_efficientnet").items()]
    assert "EfficientNet's from {}, {} and {}.".format(*judged) in RESULTS
    ends = [f"{end:.2f}" for end in means(whole, "frechet").values()]
    assert "all three are level: {}, LFM {}, Pyramidal Flow {}; with".format(*ends) in README
    (lfm, lfm_2), (pyramidal, pyramidal_2) = ([errors_apart(whole, "LapFlow", name, key) for key in (
        "frechet", "frechet_efficientnet")] for name in ("LFM", "Pyramidal Flow"))
    assert (f"{-lfm:.1f} standard errors closer than LFM and {pyramidal:.1f} behind Pyramidal Flow in the classifier's "
            f"FD, {-lfm_2:.1f} closer and {pyramidal_2:.1f} behind in EfficientNet's") in RESULTS
    assert max(map(abs, (lfm, lfm_2, pyramidal, pyramidal_2))) < 2              # level
    for key, best in (("precision", max), ("label_agreement", max), ("recall", min)):
        assert means(whole, key)["LapFlow"] == best(means(whole, key).values())


def test_what_the_pages_say_of_the_cost_of_sampling_is_in_the_results():
    runs, seconds = tables.of_one_length("fashion", {name: given for name, (given, _) in compare.STEPS.items()})
    distance, judged = means(runs, "frechet"), means(runs, "frechet_efficientnet")
    cost = {name: f"{rows[0]['sampling_flops'] / 1e9:.2f}" for name, rows in runs.items()}
    (a, b, c), (d, e, f) = ([f"{name}, {steps} steps" for name in ("LapFlow", "LFM", "Pyramidal Flow")]
                            for steps in (12, 24))
    ms = {name: f"{1000 * value:.0f}" for name, value in seconds.items()}
    assert (f"24 calls give {distance[a]:.1f} in {ms[a]} ms an image, LFM {distance[b]:.1f} in {ms[b]}, Pyramidal Flow "
            f"{distance[c]:.1f} in {ms[c]}.") in README
    assert (f"{distance[a]:.1f} in {ms[a]} ms an image ({cost[a]} GFLOPs), Pyramidal Flow's {distance[c]:.1f} in "
            f"{ms[c]} ms ({cost[c]}), LFM's {distance[b]:.1f} in {ms[b]} ms ({cost[b]}); in 24 steps "
            f"{distance[d]:.1f}, {distance[f]:.1f} and {distance[e]:.1f}.") in RESULTS
    ahead = [-errors_apart(runs, d, name, "frechet_efficientnet") for name in (f, e)]
    assert (f"close in 12 steps ({judged[a]:.0f}, {judged[c]:.0f}, {judged[b]:.0f}), and in 24 LapFlow leads "
            f"({judged[d]:.0f}, {judged[f]:.0f}, {judged[e]:.0f}) by {ahead[0]:.1f} and {ahead[1]:.1f} standard errors"
            ) in RESULTS
    points = {name: (seconds[name], distance[name]) for name in runs}
    assert not [(name, other) for name in runs if name.startswith("LapFlow") for other in runs
                if points[other][0] < points[name][0] and points[other][1] < points[name][1]]


def test_what_the_text_says_of_the_ablations_on_garments_is_in_the_results():
    settings = {f"{name} {variant}": changes for name in (
        "scales", "mask", "experts", "starts", "path") for variant, (changes, _) in
                compare.IMAGE_ABLATIONS[name].items()}
    runs, _ = tables.of_one_length("fashion", settings)
    runs = {name: rows for name, rows in runs.items() if rows}

    def behind(name, key="frechet"):
        return f"{errors_apart(runs, name, 'mask causal', key):.1f}"

    assert (f"one, two and four are farther from real images by {behind('scales 1 (LFM)')}, {behind('scales 2')} and "
            f"{behind('scales 4')} standard errors") in RESULTS
    assert f"({behind('mask none')} and {behind('mask self')} standard errors)" in RESULTS
    assert f"agreement with the label falls, by {behind('mask none', 'label_agreement')[1:]}" in RESULTS
    assert (f"LapFlow is behind by {behind('experts qkv')} standard errors, with all weights shared by "
            f"{behind('experts none')}, at the same training FLOPs but with fewer parameters") in RESULTS
    assert (f"0.33 and 0.67 are behind by {behind('starts 0.33, 0.67')} standard errors of the classifier's FD, 0.2 "
            f"and 0.4 by {behind('starts 0.2, 0.4')}") in RESULTS
    assert f"0.7 and 0.9 are behind by {behind('starts 0.7, 0.9')}, with less of both" in RESULTS
    recall, agreement, distance = (means(runs, key) for key in ("recall", "label_agreement", "frechet"))
    starts = [f"starts {starts}" for starts in ("0.5, 0.8", "0.33, 0.67", "0.2, 0.4")]
    for values, sign in ((recall, -1), (agreement, 1)):
        assert [sign * values[name] for name in starts] == sorted(sign * values[name] for name in starts)
    assert all(values["starts 0.7, 0.9"] < values["starts 0.5, 0.8"] for values in (recall, agreement))
    quadratic, cubic, gvp = (distance[f"path {path}"] / distance["path linear"] for path in (
        "quadratic", "cubic", "GVP"))
    assert (f"{quadratic:.1f} times as large with quadratic noise and {cubic:.1f} times with cubic") in RESULTS
    left = [Schedule((0, 0.5, 0.8), path).coefficients(2, 0.8)[1].item() for path in PATHS]
    assert [round(x, 3) for x in left] == [0.2, 0.04, 0.008, 0.309] and f"is {100 * (gvp - 1):.0f}% farther" in RESULTS


def test_the_standard_errors_between_systems_are_those_of_the_results():
    names = ("LFM", "Pyramidal Flow", "PixelFlow", "EdifyImage", "LapFlow, two scales")
    scaled, others, cold = "LapFlow, finer noise x 0.85", "Pyramidal Flow, finer noise x 0.9", "LFM, noise x 0.95"
    runs, _ = tables.of_one_length("fashion", {
        name: compare.IMAGES[name] for name in ("LapFlow", scaled, others, cold, *names)})

    def apart(name, key, first="LapFlow"):
        return errors_apart(runs, first, name, key)

    lfm, pyramidal, pixelflow, edify, two = ([f"{abs(apart(name, key)):.1f}" for key in (
        "frechet", "frechet_efficientnet")] for name in names)
    text = RESULTS
    assert f"{lfm[0]} standard errors ahead of LFM's" in README
    assert f"by {lfm[0]} standard errors in the classifier's FD and by {lfm[1]} in EfficientNet's" in text
    assert f"Pyramidal Flow ({pyramidal[0]} and {pyramidal[1]} standard errors) and with" in text
    assert f"PixelFlow ({pixelflow[0]} and {pixelflow[1]})" in text
    assert f"EdifyImage is behind by {edify[0]} in the first and ahead by {edify[1]} in the second" in text
    assert apart("EdifyImage", "frechet") < 0 < apart("EdifyImage", "frechet_efficientnet")
    assert f"closer than two by {two[0]} and {two[1]}" in text
    rest, _ = tables.of_one_length("fashion", {name: compare.IMAGES[name] for name in (
        "LapFlow, shared weights", "DFM", "LapFlow, as in the paper")})
    shared, dfm, bare = means(rest, "frechet").values()
    assert f"with shared weights ({shared:.2f}) and DFM ({dfm:.2f})" in text
    assert f"options and with two scales it is at {bare:.2f}" in text
    assert f"without them, in two scales, {bare:.2f}." in README
    for name in names[:4]:
        assert all(apart(name, key) > 4 for key in ("precision", "label_agreement"))
        assert apart(name, "recall") < -4 and (apart(name, "class_variance") < -4 or name == "LFM")
    assert f"(LFM's variance: {-apart('LFM', 'class_variance'):.1f})" in text
    gains = [apart("LapFlow", key, scaled) for key in ("frechet", "frechet_efficientnet", "label_agreement", "recall")]
    assert f"closer in both judges, by {-gains[0]:.1f} and {-gains[1]:.1f} standard errors" in text
    assert min(gains[2:]) > 2
    ahead, behind = (apart(others, key, scaled) for key in ("frechet", "frechet_efficientnet"))
    assert f"by {-ahead:.1f} standard errors in the classifier's FD and behind by {behind:.1f} in Eff" in text
    kernel = [[apart(name, key) for key in ("kid", "kid_efficientnet")] for name in names[:2]]
    assert (f"is level with LFM ({kernel[0][0]:.1f} standard errors behind) and {kernel[1][0]:.1f} behind Pyramidal "
            f"Flow; in EfficientNet's it is {-kernel[0][1]:.1f} ahead and level ({kernel[1][1]:.1f} behind)") in text
    assert f"in the classifier's kernel distance level with LFM's and {kernel[1][0]:.1f} behind Pyramidal" in README
    times = [runs["LapFlow"][0]["parameters"] / runs[name][0]["parameters"] for name in names[:2]]
    assert f"It has {times[0]:.1f} times LFM's parameters; with as many its FD is {shared:.2f}, behind both." in README
    assert f"{times[0]:.1f} times the parameters of LFM and Pyramidal Flow" in text
    assert times[1] == pytest.approx(times[0], rel=0.01) and max(kernel[0][0], abs(kernel[1][1])) < 2
    assert shared > means(runs, "frechet")["LFM"] > means(runs, "frechet")["Pyramidal Flow"]


def test_what_the_pages_say_of_guidance_is_in_the_results():
    runs, _ = tables.of_one_length("fashion", {name: row[0] for name, row in compare.GUIDANCE.items()})
    runs = {name: rows for name, rows in runs.items() if rows}
    low, plain, high = (f"LapFlow, guidance {w}" for w in ("0.85", "1", "1.25"))
    theirs, theirs_high = (f"Pyramidal Flow, guidance {w}" for w in ("1", "1.25"))
    distance, judged, agree, recall = (means(runs, key) for key in (
        "frechet", "frechet_efficientnet", "label_agreement", "recall"))
    assert (f"leads Pyramidal Flow by the classifier ({distance[high]:.2f}, {distance[theirs_high]:.2f}), not by "
            f"EfficientNet ({judged[high]:.0f}, {judged[theirs_high]:.0f}).") in README
    lost = 100 * (agree[plain] - agree[low])
    assert f"costs LapFlow {lost:.1f} points of agreement and gains one of recall" in RESULTS
    assert f"{100 * (recall[low] - recall[plain]):.0f}" == "1"
    assert agree[theirs_high] > agree[plain] and recall[theirs_high] > recall[plain]
    assert (f"Measured: {distance[high]:.2f}, {agree[high]:.3f}, {recall[high]:.3f}, and "
            f"{distance[theirs_high] - distance[high]:.2f} ahead") in RESULTS
    assert all(f"{4 * (1 - distance[b] / distance[a]):.0f}" == "1" for a, b in ((plain, high), (theirs, theirs_high)))
    apart = [[errors_apart(runs, a, b, key) for a, b in ((plain, theirs), (high, theirs_high))] for key in (
        "frechet", "kid", "frechet_efficientnet")]
    said = ("FD (by {:.1f} and {:.1f} standard errors, without guidance and with 1.25) and in its KID ({:.1f} and "
            "{:.1f}), and farther in EfficientNet's ({:.1f} and {:.1f} in FD)")
    assert said.format(*(abs(x) for pair in apart for x in pair)) in RESULTS
    assert max(apart[0] + apart[1]) < 0 < min(apart[2])
    whole, gains = tables.lines("fashion"), []
    for name, gain in (("LapFlow", plain), ("Pyramidal Flow", theirs)):
        rows = [row["frechet"] for row in whole if row["settings"] == compare.IMAGES[name] and row["what"] == "run"
                and f"{row['training_flops']:.1e}" == "5.1e+13" and row["config"]["seed"]]
        gains.append(100 * (1 - distance[gain] / statistics.mean(rows)))
    assert "LapFlow gains {:.0f}% and Pyramidal Flow {:.0f}%".format(*gains) in RESULTS


def test_what_the_pages_say_of_variety_is_in_the_results():
    real, ours, coarse, middle, _, theirs = tables.lines("variety")
    distances = [row["frechet"] for row in (ours, coarse, middle, real)]
    shares = [5 * (a - b) / (ours["frechet"] - real["frechet"]) for a, b in zip(distances, distances[1:], strict=False)]
    assert [round(share) for share in shares] == [1, 2, 2]  # fifths
    lost = [1 - x for x in ours["band_variance"]]
    assert lost[0] < 0 and [round(10 * x) for x in lost[1:]] == [1, 1]
    components = [np.array(row["component_variance"]) / real["component_variance"] for row in (ours, theirs)]
    assert [round(7 * (1 - x)) for x in components[0]] == [0, 1, 0] and round(7 * (1 - components[1][1])) == 1
    assert components[1][0] < components[0][0] and theirs["recall"] > ours["recall"]


def test_every_score_is_explained():
    names = {name for row in PAGES["docs/scores.md"].splitlines() if row.startswith("| `")
             for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert set(table.MEANING) <= names


def test_the_estimates_for_24_gb():
    text = section("Recipes")
    for given, images, words in (
            (dict(dataset="imagenet", res=256, batch=32), 32, "{} GB for `--dataset imagenet --res 256 --batch 32`"),
            (dict(dataset="imagenet", res=256, size="L/2"), 0, "L/2 takes {} GB before the first image"),
            (dict(dataset="imagenet", res=256, size="XL/2"), 0, "XL/2 {} GB")):
        cfg = paper.resolve(given)
        need = memory.memory_bytes(memory.meta_model(cfg, memory.paper_facts(cfg)), cfg, images) / 1e9
        assert words.format(round(need)) in text, given


# ---------------------------------------------------------------------------------------------------------------------
# commands


def commands(page: str) -> list[list[str]]:
    """The commands of a page as words: of its blocks and in its sentences. Its tables keep those of their day."""
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", (ROOT / page).read_text(), flags=re.S)
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()] if page in PAGES else []
    if page.endswith(".sbatch"):
        lines = re.findall(r"torchrun .*?train.py .*?(?= \|\|)", text.replace("\\\n", ""))
    lines += re.findall(r"`((?:python|torchrun) [^`]*(?:\.py|-m \w)[^`]*)`", text)
    return [shlex.split(line, comments=True) for line in lines if line.split("#")[0].strip()]


class Parsed(Exception):
    pass


def parse(program: list[str], monkeypatch) -> None:
    """Starts a program, [train.py, ...] or [-m, data.latents, ...], as far as its command line."""
    read = ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise Parsed

    is_module = program[0] == "-m"
    monkeypatch.setattr(ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", program[is_module:])
    with pytest.raises(Parsed), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)     # the module is imported already
        if is_module:
            runpy.run_module(program[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / program[0]), run_name="__main__")
    monkeypatch.undo()


@pytest.mark.parametrize("page", [*PAGES, "docs/slurm.sbatch"])
def test_every_command_is_understood(page, monkeypatch):
    from torch.distributed.run import get_args_parser

    monkeypatch.setenv("MPLBACKEND", "agg")
    for words in commands(page):
        if words[0] == "torchrun":
            of_torchrun = get_args_parser().parse_args(words[1:])
            program = ["-m"] * of_torchrun.module + [of_torchrun.training_script, *of_torchrun.training_script_args]
            parse(program, monkeypatch)
        elif words[0] == "python" and words[1:2] == ["mini.py"]:
            assert (ROOT / "mini.py").exists()
        elif words[0] == "python":
            parse(words[1:], monkeypatch)
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        else:
            assert words[0] in ("npm", "pip", "pytest", "ruff"), words
            extras = re.findall(r"\.\[(\w+)\]", " ".join(words))
            assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M) for extra in extras)


def test_the_listing_that_loads_a_run_draws(tmp_path):
    cfg, facts = config.Config(size="8,1,1,2"), {
        "channels": 1, "side": 8, "classes": [str(i) for i in range(10)], "vectors": None, "count": 9,
        "fingerprint": "", "latent": None}
    load.export(load.Run(cfg, load.build_model(cfg, facts), facts, tmp_path, 5, "ema"), tmp_path / "shared")
    names = {}
    exec(blocks(PAGES["docs/paper.md"], "python")[1].replace("OWNER/NAME", str(tmp_path / "shared")), names)
    assert names["small"].shape == (16, 4, 4, 1) and names["images"].shape == (8, 8, 8, 1)


def test_the_lmdb_of_nvae_becomes_png(tmp_path, monkeypatch):
    """The listing of docs/paper.md, on a small LMDB."""
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    with lmdb.open("train.lmdb") as database, database.begin(write=True) as writing:
        for i, image in enumerate(pixels):
            writing.put(str(i).encode(), image.tobytes())
    exec(blocks(PAGES["docs/paper.md"], "python")[0], {})
    for i, image in enumerate(pixels):
        assert np.array_equal(np.asarray(Image.open(f"faces/{i:05d}.png")), image)


# ---------------------------------------------------------------------------------------------------------------------
# forks

FORKS = {part.split()[0].strip(".*:,"): part for part in re.split(r"^\*\*A ", section("Fork it"), flags=re.M)[1:]}


def changes(fork: str) -> list[tuple[str, str, str]]:
    """(file, old text, new text) of a fork: diffs with lines ---, @@, and new files whose first line is their name."""
    result = []
    for part in re.split(r"^--- ", "".join(blocks(FORKS[fork], "diff")), flags=re.M)[1:]:
        name, *hunks = re.split(r"\n@@\n", part)
        for hunk in hunks:
            rows = hunk.rstrip("\n").split("\n")
            result.append((name, *("\n".join(row[1:] for row in rows if row[:1] != sign) for sign in "+-")))
    return result + [(block.split("\n")[0][2:], "", block) for block in blocks(FORKS[fork], "python")]


def copy(folder: Path, *forks: str) -> Path:
    """The repository with some forks."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "*.egg-info", "out",
                                                                "latents", "judges", "samples"))
    for name, old, new in [change for fork in forks for change in changes(fork)]:
        if not old:
            (folder / name).write_text(new)
            continue
        text = (folder / name).read_text()                  # lines are whole, but for a comment at their end
        places = [match.start() for match in re.finditer(rf"^{re.escape(old)}(?=$| +#|[ ,])", text, flags=re.M)]
        assert len(places) == 1, f"{len(places)} times in {name}:\n{old}"
        (folder / name).write_text(text[: places[0]] + new + text[places[0] + len(old) :])
    return folder


def run(folder: Path, *command: str, limit: int = 300) -> str:
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_forks_are_small():
    assert list(FORKS) == ["path", "pyramid", "data", "mask", "method"]
    files = {fork: {name for name, _, _ in changes(fork)} for fork in FORKS}
    added = {fork: len(re.findall(r"^\+", FORKS[fork], flags=re.M)) for fork in FORKS}
    assert files["path"] == {"schedule.py"} and added["path"] <= 5
    assert files["pyramid"] == {"pyramid.py"} and added["pyramid"] <= 20
    assert files["mask"] == {"model.py"} and added["mask"] <= 5
    assert len(files["data"]) == 3 and len(files["method"]) == 3


@pytest.mark.slow
def test_forks_train(tmp_path):
    """All five in one copy: each trains, samples and is scored. This code refuses the run of another pyramid."""
    fork = copy(tmp_path / "fork", *FORKS)
    random = np.random.default_rng(0)
    np.savez(fork / "mine.npz", pixels=random.integers(0, 256, (40, 3, 32, 32)).astype(np.uint8),
             labels=np.arange(40) % 2)
    script = """if True:
        import torch, train
        from model import attention
        from run.paper import resolve
        tiny = dict(size="32,2,2,2", steps=3, batch=16, solver="midpoint", solver_steps=4, num_samples=12)
        for settings in (dict(dataset="arrays", data="mine.npz", path="cosine", mask="neighbours", num_scales=3),
                         dict(pyramid="gaussian", out="out/gaussian"), dict(method="modes")):
            train.finish(train.train(resolve({**tiny, **settings}), device="cpu"))
        q, k, v = ([torch.randn(1, 1, n, 4) for n in (2, 3, 5)] for _ in range(3))
        before = attention(q, k, v, "neighbours", 0)
        v[0] += 1
        print([torch.equal(a, b) for a, b in zip(before, attention(q, k, v, "neighbours", 0))])
        """
    out = run(fork, "-c", script)
    assert "[False, False, True]" in out and out.count("frechet_pixel") == 3 and "dataset arrays" in out
    with pytest.raises(UserError) as problem:
        load.load_run(str(fork / "out" / "gaussian"), device="cpu")
    assert str(problem.value) == "unknown pyramid 'gaussian'; choose one of haar, bilinear"


@pytest.mark.slow
def test_the_tests_pass_on_a_copy_with_all_forks(tmp_path):
    """All fast ones but those of sizes and of this README, and those that no fork here can reach, for their time."""
    folder = copy(tmp_path / "fork", *FORKS)
    again = [f"--ignore=tests/test_{name}.py" for name in (
        "readme", "house", "gpu", "features", "ranks", "plan", "bench", "images", "card", "demo", "notebook", "latents",
        "graphs", "crops", "mini", "fid", "compare", "causal")]
    run(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *again, limit=1800)
