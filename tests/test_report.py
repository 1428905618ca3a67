"""report.html against the files it is made from: every number is theirs, every picture can be measured, nothing of a model's text is markup."""

import argparse
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from tiny import bpe_tokenizer, causal_lm, chatml_tokenizer, reward_model, run_program, save, write

import torch
from safetensors.torch import save_file

import train
from eval import report
from eval.files import item_of
from eval.report_figures import COLOURS, curves, intervals, ridges, shares, spread, ticks
from eval.winrate import win_table
from formats import InputError

NASTY = '<script>alert(1)</script><img src="http://x/y" onerror=\'z\'> & "quoted" </svg></style>'


class Page(HTMLParser):
    """What a browser sees: the tags with their attributes, the text of the body, the cells of each table, the text under each heading."""

    def __init__(self, document):
        super().__init__()
        self.tags, self.text, self.tables, self.sections, self.inside = [], "", [], {}, []
        self.feed(document)
        self.svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", document, re.S)]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" in self.inside:
            return
        self.text += data
        if self.inside and self.inside[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if "h2" in self.inside:
            self.sections[data] = ""
        elif self.sections:
            last = list(self.sections)[-1]
            self.sections[last] += data + "\n"


def make(tmp_path, *argv):
    parser = argparse.ArgumentParser()
    report.add_flags(parser)
    out = tmp_path / "out" / "report.html"  # its folder is made
    report.main(parser.parse_args([str(word) for word in argv] + ["--out", str(out)]))
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return Page(out.read_text())


def generation(question, seed=0, response="Yes.", tokens=3, finished=True, subset="kitchen", **more):
    prompt = [{"role": "user", "content": question}]
    identity = f"{subset}/{hashlib.sha256(question.encode()).hexdigest()[:6]}/{seed}"
    return {"id": identity, "subset": subset, "prompt": prompt, "seed": seed, "response": response, "response_tokens": tokens, "finished": finished} | more


def numbers(reward, error=None, **more):
    return {"n": 6, "seeds": [0, 1, 2] if error else [0], "reward": reward, "reward_error_over_seeds": error, "sigmoid100": 100 / (1 + math.exp(-reward)),
            "sigmoid100_error_over_seeds": error and 10 * error, "response_tokens": 4.25, "response_tokens_error_over_seeds": error, "cut": 0.125} | more  # fmt: skip


def results(path, name="reward", **tables):
    """A reward or win rate file about generation files, as eval.py writes it: {generation file: table}."""
    files = {str(file): table for file, table in tables["of"].items()}
    content = {"results": files, "inputs_sha256": {file: hashlib.sha256(open(file, "rb").read()).hexdigest() for file in files}}
    (path / f"{name}.json").write_text(json.dumps(content))
    return path / f"{name}.json"


def run_folder(folder, loss="var", rows=None, validation=None, metrics=(), **args):
    folder.mkdir(parents=True)
    args = {"loss": loss, "model": "BASE", "beta": 0.5, "estimator": "paper", "ref_logps": "mean", "normalize_weights": False, "batch_size": 2, "tables": None} | args
    (folder / "run.json").write_text(json.dumps({"args": args, "models": {"BASE": "sha256:1"}, "versions": {"torch": "2"}, "steps": 8, "finished": True}))
    write(folder / "metrics.jsonl", metrics)
    if validation:
        (folder / "eval").mkdir()
        write(folder / "eval" / "rewards.jsonl", validation)
    if rows:
        write(folder / "gen.jsonl", rows)
        (folder / "gen.jsonl.settings.json").write_text("{}")
    return folder


def refused(tmp_path, *argv):
    with pytest.raises(InputError) as error:
        make(tmp_path, *argv)
    assert not (tmp_path / "out").exists()
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: measured against their own axes


def children(svg, tag):
    return svg.iter(f"{{http://www.w3.org/2000/svg}}{tag}")


def axis(svg, anchor, coordinate, correction):
    """The axis of a picture, read off its tick labels: SVG coordinate -> value. Every label must lie on one straight line."""
    marks = [(float(t.get(coordinate)) - correction, float(t.text.rstrip(" %"))) for t in children(svg, "text")
             if t.get("text-anchor") == anchor and re.fullmatch(r"-?[\d.]+( %)?", t.text) and t.get("fill") is None]  # fmt: skip
    (a, va), (b, vb) = marks[0], marks[-1]
    read = lambda place: va + (place - a) / (b - a) * (vb - va)
    assert len(marks) > 2 and all(read(place) == pytest.approx(value, abs=0.002 * abs(vb - va)) for place, value in marks)
    return read


def drawn(svg):
    return ElementTree.fromstring(svg)


def test_a_curve_goes_through_its_points():
    points = {"one": [(0, -1.0), (10, 0.25), (30, 2.0)], "two": [(0, -1.0), (20, -0.5)]}
    svg = drawn(curves([(name, COLOURS[i], some) for i, (name, some) in enumerate(points.items())], "step", "reward"))
    x, y = axis(svg, "middle", "x", 0), axis(svg, "end", "y", 4)
    for line, expected in zip(children(svg, "polyline"), points.values()):
        read = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
        assert [(x(a), y(b)) for a, b in read] == [pytest.approx(point, abs=0.02) for point in expected]
    assert {"one", "two", "step", "reward"} <= {t.text for t in children(svg, "text")}


def test_an_error_bar_is_one_error_to_either_side():
    """The thick one is the first error, the thin one the second; a hollow dot has no first one."""
    svg = drawn(intervals([("a", COLOURS[0], 40.0, 2.5, 5.0), ("b", COLOURS[1], 60.0, None, None)], "score"))
    x = axis(svg, "middle", "x", 0)
    of = lambda colour: [line for line in children(svg, "line") if line.get("y1") == line.get("y2") and line.get("stroke") == colour]
    thin, thick = sorted(of(COLOURS[0]), key=lambda line: float(line.get("stroke-width")))
    assert [x(float(thick.get(end))) for end in ("x1", "x2")] == [pytest.approx(37.5, abs=0.05), pytest.approx(42.5, abs=0.05)]
    assert [x(float(thin.get(end))) for end in ("x1", "x2")] == [pytest.approx(35, abs=0.05), pytest.approx(45, abs=0.05)]
    a, b = children(svg, "circle")
    assert [x(float(c.get("cx"))) for c in (a, b)] == [pytest.approx(40, abs=0.05), pytest.approx(60, abs=0.05)]
    assert a.get("fill") == COLOURS[0] and b.get("fill") == "#fff" and not of(COLOURS[1])
    assert "40.0 ± 2.5 / 5.0" in [t.text for t in children(svg, "text")]


def steps_of(path):
    """A histogram's outline -> [(left, right, height)] of the bins that hold something."""
    corners = [tuple(map(float, corner.split(","))) for corner in re.findall(r"[ML]([\d.,-]+)", path.get("d"))]
    floor = corners[0][1]
    return [(a[0], b[0], round(floor - a[1], 1)) for a, b in zip(corners, corners[1:]) if a[1] == b[1] < floor]


def test_a_histogram_shows_shares_and_the_mean():
    """Lengths 2, 2, 2, 6: three quarters around 2, one around 6, mean 3; another model's histogram stands on the same axis and scale."""
    svg = drawn(ridges([("a", "#111111", [2, 2, 2, 6], "x"), ("b", "#222222", [4] * 9, "y")], "tokens", whole=True))
    x = axis(svg, "middle", "x", 0)
    a, b = children(svg, "path")
    assert [t.text for t in children(svg, "text") if t.get("text-anchor") == "middle"][:-1] == ["2", "3", "4", "5", "6"]
    (low, high, tall), (low6, high6, short) = steps_of(a)
    assert x(low) < 2 < x(high) and x(high) - x(low) == pytest.approx(1, abs=0.01) and x(low6) < 6 < x(high6) and tall == pytest.approx(3 * short, abs=0.2)
    ((_, _, all_of_it),) = steps_of(b)
    assert tall == pytest.approx(0.75 * all_of_it, abs=0.2)
    means = [line for line in children(svg, "line") if line.get("stroke") in ("#111111", "#222222")]
    assert [x(float(line.get("x1"))) for line in means] == [pytest.approx(3, abs=0.02), pytest.approx(4, abs=0.02)]


def test_a_logarithmic_histogram_keeps_weights_that_underflowed():
    svg = drawn(ridges([("a", "#111111", [0.0, 0.01, 1.0, 100.0], "")], "w", log=True))
    places = {float(t.text): float(t.get("x")) for t in children(svg, "text") if re.fullmatch(r"[\d.e+-]+", t.text or "") and t.get("text-anchor") == "middle"}
    assert places[1] - places[0.1] == pytest.approx(places[10] - places[1], abs=0.02) and places[10] > places[1]
    heights = [height for _, _, height in steps_of(next(children(svg, "path")))]
    assert len(heights) == 3 and heights[0] == pytest.approx(2 * heights[1], abs=0.2)  # 0 stands with the smallest one


def test_win_tie_and_loss_are_as_wide_as_their_shares():
    svg = drawn(shares([("m", [0.5, 0.2, 0.3], 0.04)], "share"))
    x = axis(svg, "middle", "x", 0)
    bars = [r for r in children(svg, "rect") if float(r.get("height")) > 12]
    edges = [(x(float(r.get("x"))), x(float(r.get("x")) + float(r.get("width")))) for r in bars]
    assert [e for pair in edges for e in pair] == [pytest.approx(v, abs=0.05) for v in (0, 50, 50, 70, 70, 100)]
    assert len({r.get("fill") for r in bars}) == 3
    whisker = max((line for line in children(svg, "line") if line.get("stroke") == "#000"), key=lambda line: float(line.get("x2")) - float(line.get("x1")))
    assert (x(float(whisker.get("x1"))), x(float(whisker.get("x2")))) == (pytest.approx(46, abs=0.05), pytest.approx(54, abs=0.05))


@pytest.mark.parametrize("low, high", [(0, 1), (-0.83, 0.21), (3, 3.0004), (0, 123456), (-7, 0)])
def test_ticks_are_few_and_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and all(low - 1e-9 <= t <= high + 1e-9 for t in found) and max(len(f"{t:.6g}") for t in found) <= 9
    steps = [b - a for a, b in zip(found, found[1:])]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_labels_that_would_lie_on_each_other_are_moved_apart():
    found = spread([100.0, 101.0, 10.0, 102.0], 16, 110)
    assert sorted(found) == [10, 78, 94, 110] and found.index(10) == 2 and max(found) == found[3]


def test_degenerate_numbers_are_drawn_too():
    """One point, one value, all alike, all zero: finite coordinates only."""
    pictures = [curves([("a", "#111", [(0, 1.0)])], "x", "y"), intervals([("a", "#111", 0.0, None, None)], "x"), intervals([("a", "#111", 0.0, 0.0, None)], "x"), ridges([("a", "#111", [5], "")], "x", whole=True),
                ridges([("a", "#111", [1.0, 1.0], "")], "x", log=True), ridges([("a", "#111", [0.0], "")], "x", log=True), shares([("a", [1.0, 0, 0], None)], "x")]  # fmt: skip
    assert not re.search(r">\d+\.\d+<", pictures[3])  # no 5.5 tokens
    for picture in pictures:
        assert drawn(picture) is not None and "nan" not in picture and "inf" not in picture


# ----------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def two_runs(tmp_path):
    """A VAR run and a DPO run with generations and rewards of different seeds, and a baseline without a run."""
    rows = [generation(q, seed, response=f"{q} {seed}", tokens=len(q), finished=q != "Cut?") for q in ("Kettle?", "Lamp?", "Cut?") for seed in (0, 1)]
    validation = [{"step": 0, "n": 32, "reward": -1.0}, {"step": 4, "n": 32, "reward": 0.5}, {"step": 8, "n": 32, "reward": 0.25}]
    metrics = [{"step": 0, "eval/loss": 2.0}, {"step": 4, "loss": 1.0, "eval/loss": 1.5, "weights/self_share": 0.25}, {"step": 8, "eval/loss": math.nan, "weights/self_share": 0.75}]
    var = run_folder(tmp_path / "runs" / "var", rows=rows, validation=validation, metrics=metrics)
    dpo = run_folder(tmp_path / "runs" / "dpo", "dpo", rows=rows[1:] + [generation("Ladder?", 1)], beta=0.1)
    base = write(tmp_path / "base.jsonl", rows[:4])
    scores = {row["id"]: 1.5 + i for i, row in enumerate(rows)}
    tables = {
        var / "gen.jsonl": {"subsets": {"kitchen": numbers(0.75, 0.125)}, "averages": {"All": numbers(0.75, 0.125, reward_error_over_items=0.25), "Helpful": None}, "scores": scores, "missing": {"Helpful": "no such subset"}},
        dpo / "gen.jsonl": {"subsets": {"kitchen": numbers(-0.5)}, "averages": {"All": numbers(-0.5)}},
    }
    reward = results(tmp_path, of=tables)
    return SimpleNamespace(var=var, dpo=dpo, base=base, reward=reward, rows=rows, tables=tables, flags=["--run", var, "--run", dpo, "--gen", base, "--reward", reward])


def test_the_table_holds_the_numbers_of_the_reward_file(tmp_path, two_runs):
    """Mean and standard errors over seeds and items as they are in the file; one seed has none; a model without rewards is named below; a null average too."""
    page = make(tmp_path, *two_runs.flags)
    head, var, dpo = page.tables[0]
    assert var[:6] == ["var", "var", "6", "3", "0.750 ± 0.125 / 0.250", "67.92 ± 1.25 / –"] and var[6:8] == ["4.2", "12.5 %"] and len(head) == len(var)
    assert dpo[:6] == ["dpo", "dpo", "6", "1", "-0.500", "37.75"]
    assert "base: no rewards" in page.sections["Results"] and "var: no numbers for Helpful (no such subset)" in page.sections["Results"]
    assert "over sampling seeds / over items" in page.sections["Results"]


def test_validation_rewards_and_losses_along_training(tmp_path, two_runs):
    """Figure 2 from eval/rewards.jsonl; the held-out loss relative to its start, without what is not a number; runs without either are named."""
    page = make(tmp_path, *two_runs.flags)
    (reward,) = [svg for svg in page.svgs if "validation reward" in svg.get("aria-label")]
    y = axis(reward, "end", "y", 4)
    (line,) = children(reward, "polyline")
    assert [y(float(place.split(",")[1])) for place in line.get("points").split()] == [pytest.approx(v, abs=0.02) for v in (-1.0, 0.5, 0.25)]
    (loss,) = [svg for svg in page.svgs if "loss" in svg.get("aria-label")]
    y, (line,) = axis(loss, "end", "y", 4), children(loss, "polyline")
    assert [y(float(place.split(",")[1])) for place in line.get("points").split()] == [pytest.approx(v, abs=0.01) for v in (1.0, 0.75)]
    assert "dpo: no validation rewards" in page.sections["Along training"] and "32 held-out prompts" in page.sections["Along training"]


def test_lengths_and_cut_shares_are_of_the_generations(tmp_path, two_runs):
    page = make(tmp_path, *two_runs.flags)
    words = page.sections["Lengths"]
    assert "mean 5.3, cut 33 %" in words and "mean 6.0, cut 0 %" in words  # var: 7, 7, 5, 5, 4, 4; base: its first four


def judged(rows, outcomes):
    """What `eval.py winrate` writes about one generation file, with its own arithmetic."""
    items = [{"id": row["id"], "item": item_of(row), "subset": row["subset"], "seed": row["seed"], "model": row["response"], "baseline": "No."} for row in rows]
    outcomes = dict(zip((row["id"] for row in rows), outcomes))
    position = {"judged": 5, "decided": 8, "first_position_wins": 0.625, "flipped": 0.2}
    return win_table(items, outcomes) | {"position": position, "outcomes": outcomes}


def test_win_rates_are_those_of_the_judged_items(tmp_path, two_runs):
    """Figure 1 per average and subset, the counts and the position bias in words, the win rate in the table, the outcome beside each answer."""
    rows = two_runs.rows[:4] + [generation("Cut?", seed, "Cut? 0", subset="helpful_garden") for seed in (0, 1)]
    write(two_runs.var / "gen.jsonl", rows)
    part = judged(rows, ["win", "win", "win", "tie", "loss", "invalid"])
    winrate = results(tmp_path, "winrate", of={two_runs.var / "gen.jsonl": part})
    winrate.write_text(json.dumps(json.loads(winrate.read_text()) | {"settings": {"judge": "J<b>", "baseline": "chosen"}}))
    reward = results(tmp_path, of={two_runs.var / "gen.jsonl": two_runs.tables[two_runs.var / "gen.jsonl"]})
    page = make(tmp_path, "--run", two_runs.var, "--winrate", winrate, "--reward", reward)
    words = page.sections["Win rates"].split("\n")
    bars = {name: words[words.index(name) + 1 :][:2] for name in words if name.startswith("var: ")}
    assert bars["var: kitchen"] == ["75 %", "25 %"]  # seed 0: two wins; seed 1: a win and a tie
    assert bars["var: All"] == ["50 %", "50 %"]  # of seed 0, the only one with every subset: kitchen won, garden lost
    assert bars["var: Helpful"][0] == bars["var: helpful_garden"][0] == "100 %"  # lost
    text = page.sections["Win rates"]
    assert "var against chosen, judged by J<b>: 3 wins, 1 ties, 1 losses, 1 invalid" in text and "shown first won 62.5 %" in text and "winner in 20.0 %" in text
    assert page.tables[0][1][8] == "50.0"
    assert "tokens, reward 1.50, win" in page.sections["Side by side"] and "loss" in page.sections["Side by side"]


def test_one_subset_is_its_own_average(tmp_path, two_runs):
    winrate = results(tmp_path, "winrate", of={two_runs.var / "gen.jsonl": judged(two_runs.rows, ["win"] * 3 + ["loss"] * 3)})
    page = make(tmp_path, *two_runs.flags, "--winrate", winrate)
    words = page.sections["Win rates"]
    assert "var: All" in words and "var: kitchen" not in words and "dpo, base: no win rates" in words
    (bars,) = [svg for svg in page.svgs if "judged" in svg.get("aria-label")]
    x = axis(bars, "middle", "x", 0)
    ends = [x(float(line.get(end))) for line in children(bars, "line") if line.get("stroke") == "#000" for end in ("x1", "x2")]
    assert (min(ends), max(ends)) == (pytest.approx(50 - 16.67, abs=0.05), pytest.approx(50 + 16.67, abs=0.05))  # over seeds, as in Figure 1
    assert page.tables[0][1][8] == "50.0 ± 16.7 / 28.9"  # seeds 2/3 and 1/3: sd 0.236, over sqrt 2; items 1, 1/2, 0: sd 0.5, over sqrt 3


def test_rewards_of_two_reward_models_are_not_compared(tmp_path, two_runs):
    one, two = (results(tmp_path, name, of={run / "gen.jsonl": two_runs.tables[run / "gen.jsonl"]}) for name, run in (("a", two_runs.var), ("b", two_runs.dpo)))
    for path, judge in ((one, "sha256:1"), (two, "sha256:2")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {"reward_model": judge}}))
    words = make(tmp_path, "--run", two_runs.var, "--run", two_runs.dpo, "--reward", one, "--reward", two).sections["Results"]
    assert "reward_model sha256:1 and with reward_model sha256:2" in words and "do not compare" in words
    page = make(tmp_path, "--run", two_runs.var, "--reward", one)
    assert "do not compare" not in page.sections["Results"]
    assert "b.json: a second scoring" not in page.text and "second scoring of dpo" in make(tmp_path, "--run", two_runs.dpo, "--reward", two, "--reward", two_runs.reward).text


def test_weights_are_those_the_run_trained_with(tmp_path, two_runs):
    """By Eq. 9 and 10 written out, per micro-batch, with per-token means; a micro-batch that was not measured does not count."""
    generator = torch.Generator().manual_seed(0)
    rewards, ref_logps = torch.randn(3, 2, 2, generator=generator), -20 * torch.rand(3, 2, 2, generator=generator)
    rewards[2], ref_logps[2] = math.nan, math.nan
    tokens = torch.tensor([[4, 7], [9, 2], [3, 3]], dtype=torch.int32)
    save_file({"rewards": rewards, "ref_logps": ref_logps, "response_tokens": tokens}, two_runs.var / "tables.safetensors")
    expected = []
    for m in range(2):
        for i in range(2):
            z = sum(math.exp(rewards[m, i, j] / 0.5 + ref_logps[m, i, j] / tokens[m, j]) for j in range(2)) / 2
            expected.append(math.exp(rewards[m, i, i] / 0.5) / z)
    weights, sizes, B = report.weights_of(report.read_run(two_runs.var))
    assert weights == pytest.approx(expected, rel=1e-5) and B == 2
    assert sizes == pytest.approx([(a + b) ** 2 / (a**2 + b**2) for a, b in (expected[:2], expected[2:])], rel=1e-5)
    page = make(tmp_path, *two_runs.flags)
    words = page.sections["Weights"]
    (ess,) = [svg for svg in page.svgs if "sample size" in svg.get("aria-label")]
    assert [t.text for t in children(ess, "text") if t.get("text-anchor") == "middle"][:-1] == ["1", "1.2", "1.4", "1.6", "1.8", "2"]  # from 1 to B
    (two_runs.var / "tables.safetensors").rename(tmp_path / "shared.safetensors")
    run = report.read_run(two_runs.var)
    run.run["args"]["tables"] = str(tmp_path / "shared.safetensors")
    assert report.weights_of(run)[0] == weights
    assert f"max / mean {4 * max(expected) / sum(expected):.1f}" in words and f"mean {sum(sizes) / 2:.1f} of 2" in words and "var 0.50" in words
    assert "dpo: a method without the weights" in words


def test_of_a_large_table_some_micro_batches_are_shown(tmp_path, monkeypatch):
    """Evenly spaced over those that were measured: 3 of 6, the first and every second one."""
    monkeypatch.setattr(report, "MOST", 3)
    folder = run_folder(tmp_path / "var", estimator="constant", beta=1.0)
    rewards = torch.full((8, 2, 2), math.nan)
    for m in range(6):
        rewards[m + (m > 1)] = math.log(m + 1)  # micro-batches 2 and 7 were not measured
    save_file({"rewards": rewards, "ref_logps": torch.full((8, 2, 2), math.nan), "response_tokens": torch.ones(8, 2, dtype=torch.int32)}, folder / "tables.safetensors")
    assert report.weights_of(report.read_run(folder))[0] == pytest.approx([1, 1, 3, 3, 5, 5])


@pytest.mark.parametrize("estimator", ["constant", "monte_carlo"])
def test_weights_need_no_reference_where_the_estimator_reads_none(tmp_path, estimator):
    folder = run_folder(tmp_path / "var", estimator=estimator, normalize_weights=True)
    rewards = torch.tensor([[[1.0, 0.0], [0.5, 2.0]]])
    if estimator == "constant":
        rewards[0, 0, 1] = rewards[0, 1, 0] = math.nan
    save_file({"rewards": rewards, "ref_logps": torch.full((1, 2, 2), math.nan), "response_tokens": torch.ones(1, 2, dtype=torch.int32)}, folder / "tables.safetensors")
    z = [1.0, 1.0] if estimator == "constant" else [(math.exp(2) + 1) / 2, (math.exp(1) + math.exp(4)) / 2]
    raw = [math.exp(2) / z[0], math.exp(4) / z[1]]
    assert report.weights_of(report.read_run(folder))[0] == pytest.approx([2 * w / sum(raw) for w in raw], rel=1e-5)


def test_answers_to_the_same_question_and_seed_stand_side_by_side(tmp_path, two_runs):
    """The lowest seed that all share, evenly spaced prompts, each with its reward, length and whether it was cut."""
    page = make(tmp_path, *two_runs.flags)
    words = page.sections["Side by side"]
    assert "1 of 1 prompts" in words and "seed 1" not in words  # seed 0 in common: Lamp? only (dpo lacks Kettle? 0, base Cut?)
    assert words.count("Lamp? 0") == 3 and "5 tokens, reward 3.50" in words and "Kettle?" not in words and "dpo, base: no rewards of single" in words
    assert "Lamp?" not in make(tmp_path, *two_runs.flags, "--examples", "0").sections["Side by side"]
    words = make(tmp_path, "--run", two_runs.var, "--reward", two_runs.reward, "--examples", "2").sections["Side by side"]
    assert "2 of 3 prompts" in words and "Kettle? 0" in words and "Lamp? 0" not in words and "4 tokens, cut, reward 5.50" in words


def test_settings_that_differ_come_first(tmp_path, two_runs):
    head, *rows = make(tmp_path, *two_runs.flags).tables[-1]
    assert head == ["", "var", "dpo"] and rows[0] == ["--loss", "var", "dpo"] and rows[1] == ["--beta", "0.5", "0.1"]
    assert ["fingerprint of BASE", "sha256:1", "sha256:1"] in rows[2:] and ["torch", "2", "2"] in rows[2:]


# ----------------------------------------------------------------------------------------------------------------------
# What can go wrong


def test_what_a_model_wrote_is_never_markup(tmp_path):
    """Prompt, role, answer, subset, chosen answer, file name, settings and reasons: all come out as the text they are, and nothing is loaded."""
    rows = [generation(NASTY, response=NASTY, subset=NASTY, chosen=NASTY, tokens=9)]
    rows[0]["prompt"].insert(0, {"role": NASTY, "content": "\u2028 first"})
    var = run_folder(tmp_path / "a<script>&'\"c", rows=rows, validation=[{"step": s, "n": 1, "reward": s} for s in (0, 1)], metrics=[{"step": 0, "eval/loss": 1.0}], note=NASTY, model=NASTY)
    part = {"win_rate": 0.5, "tie_rate": 0.0, "loss_rate": 0.5}
    tables = {var / "gen.jsonl": {"subsets": {NASTY: numbers(1.0, 0.5), "x": numbers(0.0)}, "averages": {"All": numbers(1.0)}, "missing": {NASTY: "</p><b>none"}}}
    winrate = results(tmp_path, "winrate", of={var / "gen.jsonl": {"subsets": {NASTY: part, "b": part}, "averages": {"All": part}}})
    page = make(tmp_path, "--run", var, "--reward", results(tmp_path, of=tables), "--winrate", winrate, "--gen", f"<u>&amp;={var / 'gen.jsonl'}")
    allowed = "html head meta title style body h1 h2 h3 ul li span p table tr th td figure figcaption svg text line rect circle polyline path div b i".split()
    assert {tag for tag, _ in page.tags} <= set(allowed)
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on") or a in ("src", "href", "action", "srcdoc")]
    assert page.text.count(NASTY) >= 8 and all(name in page.text for name in ("a<script>&'\"c", "<u>&amp;")) and "</p><b>none" in page.text
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_rewards_follow_the_file_not_its_name(tmp_path, two_runs):
    """Moved after scoring: still found. Generated anew after scoring: not shown, and said."""
    moved = tmp_path / "elsewhere" / "mine"
    moved.parent.mkdir()
    two_runs.var.rename(moved)
    page = make(tmp_path, "--run", moved, "--reward", two_runs.reward)
    assert page.tables[0][1][0] == "mine" and page.tables[0][1][4] == "0.750 ± 0.125 / 0.250"
    write(moved / "gen.jsonl", two_runs.rows[:2])
    moved.rename(two_runs.var)
    page = make(tmp_path, "--run", two_runs.var, "--reward", two_runs.reward)
    assert "another version" in page.text and "0.750 ±" not in page.text and "var: no rewards" in page.text


def test_rewards_of_a_model_that_was_not_named_are_a_row_too(tmp_path, two_runs):
    page = make(tmp_path, "--run", two_runs.var, "--reward", two_runs.reward)
    assert [row[0] for row in page.tables[0]] == ["model", "var", "dpo"] and "dpo: no generations" in page.sections["Lengths"]


def test_what_is_missing_is_said_in_every_section(tmp_path):
    """A folder with nothing but run.json."""
    page = make(tmp_path, "--run", run_folder(tmp_path / "var"))
    said = {"Results": "var: no rewards", "Along training": "var: no validation rewards", "Lengths": "var: no generations", "Win rates": "var: no win rates"}
    said |= {"Weights": "var: no table at", "Side by side": "no generations"}
    assert [*page.sections] == [*said, "Settings"] and all(words in page.sections[title] for title, words in said.items())
    assert not page.svgs and len(page.tables) == 1


def test_several_generation_files_are_not_guessed_from(tmp_path, two_runs):
    """Two files with settings beside them and none named gen.jsonl: said, until --gen names one of them under the run's name."""
    for name in ("helpful", "harmless"):
        write(two_runs.var / f"{name}.jsonl", two_runs.rows[:2])
        (two_runs.var / f"{name}.jsonl.settings.json").write_text("{}")
    assert "all hold" not in make(tmp_path, "--run", two_runs.var).text  # gen.jsonl it is
    (two_runs.var / "gen.jsonl").unlink()
    page = make(tmp_path, "--run", two_runs.var)
    assert "harmless.jsonl, helpful.jsonl all hold generations; name one with --gen var=FILE" in page.text and "var: no generations" in page.sections["Lengths"]
    page = make(tmp_path, "--run", two_runs.var, "--gen", two_runs.var / "helpful.jsonl")
    assert "mean 7.0, cut 0 %" in page.sections["Lengths"] and "all hold" not in page.text


def test_a_run_can_be_looked_at_while_it_goes_on(tmp_path, two_runs):
    """A metrics line that is being written, a reward file inside the folder that is named as well, a run that is not finished."""
    with open(two_runs.var / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    (two_runs.var / "reward.json").write_text(two_runs.reward.read_text())
    about = json.loads((two_runs.var / "run.json").read_text())
    (two_runs.var / "run.json").write_text(json.dumps(about | {"finished": False}))
    page = make(tmp_path, "--run", two_runs.var, "--reward", two_runs.var / ".." / "var" / "reward.json")
    assert "second scoring" not in page.text and page.tables[0][1][4] == "0.750 ± 0.125 / 0.250" and "not finished" in page.text


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    one, two = (run_folder(tmp_path / name / "var") for name in "ab")
    assert make(tmp_path, "--run", one, "--run", two).tables[-1][0] == ["", str(one), str(two)]


def test_wrong_input_is_named_in_one_line_and_no_page_is_written(tmp_path, two_runs):
    assert "nothing to report" in refused(tmp_path)
    assert "base.jsonl: no run.json" in refused(tmp_path, "--run", two_runs.base) and "/no: no run.json" in refused(tmp_path, "--run", "/no")
    assert "/no.jsonl: cannot be read" in refused(tmp_path, "--gen", "/no.jsonl") and "/no.json: cannot be read" in refused(tmp_path, "--reward", "/no.json")
    assert 'no "results"' in refused(tmp_path, "--reward", two_runs.var / "run.json")
    for column, value in (("response", 7), ("response_tokens", None), ("prompt", "text"), ("seed", "0")):
        path = write(tmp_path / "bad.jsonl", [two_runs.rows[0], two_runs.rows[1] | {column: value}])
        line = refused(tmp_path, "--gen", path)
        assert "bad.jsonl:2" in line and column in line
    (two_runs.var / "run.json").write_text("{")
    assert "run.json: cannot be read as JSON" in refused(tmp_path, "--run", two_runs.var)


# ----------------------------------------------------------------------------------------------------------------------
# A run as train.py leaves it


def test_a_real_run_becomes_a_page(tmp_path):
    """Four steps of VAR on a tiny model: the curve has an evaluation per point, the weights are the run's, the settings are its flags."""
    tokenizer, reward_tokenizer = chatml_tokenizer(), bpe_tokenizer(vocab_size=350)
    policy = save(tmp_path / "policy", causal_lm(vocab_size=len(tokenizer)), tokenizer)
    judge = save(tmp_path / "judge", reward_model("qwen2", vocab_size=len(reward_tokenizer), initializer_range=0.2), reward_tokenizer)
    pairs = [{"prompt": f"Where is the {x}?", "chosen": f"The {x} is in the hall.", "rejected": "No idea!"} for x in "kettle lamp stove spoon shelf broom".split()]
    out = tmp_path / "run"
    argv = ["--model", policy, "--reward_model", judge, "--data", write(tmp_path / "pairs.jsonl", pairs[:4]), "--eval_data", write(tmp_path / "held.jsonl", pairs[4:])]
    argv += ["--output_dir", str(out), "--batch_size", "2", "--max_steps", "4", "--eval_every", "2", "--max_response_tokens", "8", "--save_every", "0"]
    status, _, err = run_program(train, argv, tmp_path)
    assert status == 0, err
    page = make(tmp_path, "--run", out)
    (reward,) = [svg for svg in page.svgs if "validation reward" in svg.get("aria-label")]
    stored = [json.loads(line) for line in (out / "eval" / "rewards.jsonl").read_text().splitlines()]
    assert len(list(children(reward, "circle"))) == len(stored) == 3
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [row["weights/max"] for row in metrics if "weights/max" in row]
    assert max(report.weights_of(report.read_run(out))[0]) == pytest.approx(max(trained), rel=1e-4)  # 4 steps are one pass
    assert ["--batch_size", "2"] in page.tables[-1] and ["--eval_every", "2"] in page.tables[-1] and ["steps", "4"] in page.tables[-1]
