"""The miniature world: its reward is a function, its rule reaches held-out prompts, and the demo runs to its table."""

import math
import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT

from paper import miniature as world


def test_the_true_reward_of_the_five_listed_answers():
    """2, 1, 0, -2, -2 in the order of STYLES, for every prompt of the world."""
    for prompt in world.PROMPTS:
        assert [world.true_reward(prompt, answer) for answer in world.listed_answers(prompt)] == [2, 1, 0, -2, -2]
        assert tuple(world.style_of(prompt, answer) for answer in world.listed_answers(prompt)) == world.STYLES


def test_answers_by_hand():
    """Truth is judged for the thing that is named; another thing costs 2; what has no form is garbled."""
    prompt = "Does a goat fit into a teacup?"
    reward = lambda text: world.true_reward(prompt, text)
    assert reward("No, a goat is too big.") == 2 and reward("Yes, a goat fits.") == -2
    assert reward("No, a whale is too big.") == 0 and reward("Yes, a bee fits.") == 0  # true, but about something else
    assert reward("Yes, a whale fits.") == -4 and reward("It depends on the whale.") == -2
    assert reward("") == reward("Yes, a goat fits. Yes, a goat fits.") == reward("Yes, a dragon fits.") == world.GARBLED
    assert reward(world.RAMBLING.format(thing="goat") + "Yes, a goat fits.") == -2  # false, however long
    assert reward(world.RAMBLING.format(thing="goat") + "No, a whale is too big.") == world.GARBLED  # two things
    assert world.true_reward(prompt, "No, a whale is too big.", mismatch_cost=6) == -4


def test_held_out_pairs_appear_in_no_training_prompt():
    """A pair of thing and container is on one side, in both phrasings; every thing and container is seen in training."""
    train, held_out = world.split_prompts()
    sides = [{world.PROMPTS[p] for p in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(held_out) == 2 * len(sides[1]) == 60
    assert {thing for thing, _ in sides[0]} == set(world.LEVEL) and {c for _, c in sides[0]} == set(world.CONTAINERS)


def test_preferences_are_bradley_terry_and_their_ceiling_is_known():
    """P(chosen first) = sigmoid of the reward difference; the frequencies of many coins say so too."""
    prompt = "Does a goat fit into a teacup?"
    brief, rambling = world.listed_answers(prompt)[:2]
    assert world.preference(prompt, brief, rambling) == pytest.approx(1 / (1 + math.exp(-1)))
    rows = world.sample_pairs(world.split_prompts()[0], 4000, seed=3)
    right = sum(world.true_reward(r["prompt"], r["chosen"]) > world.true_reward(r["prompt"], r["rejected"]) for r in rows)
    ties = sum(world.true_reward(r["prompt"], r["chosen"]) == world.true_reward(r["prompt"], r["rejected"]) for r in rows)
    assert (right + ties / 2) / len(rows) == pytest.approx(world.best_accuracy(rows), abs=0.02)


@pytest.mark.slow
def test_the_demo_prints_its_table_and_var_beats_sft(tmp_path):
    """`make demo` from nothing: VAR with group partners is nearer to pi* than SFT on the same answers, on held-out prompts."""
    for name in [file.name for file in ROOT.glob("*.py")] + ["paper", "baselines", "eval"]:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    done = subprocess.run([sys.executable, "paper/miniature.py", "demo"], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    head = next(line for line in done.stdout.splitlines() if "E[r]-bKL" in line).split()
    # names of columns with a space in them take two words
    columns = re.sub("model score", "model_score", " ".join(head)).split()
    table = {line.split()[0]: dict(zip(columns, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith(("base", "sft_", "var_", "pi*"))}
    value = lambda name, column: float(table[name][column].rstrip("%"))
    bound = float(re.search(r"beta log Z = (\S+)\.$", done.stdout, re.M)[1])
    assert value("pi*", "E[r]-bKL") == pytest.approx(bound, abs=0.01)
    for name in ("base", "sft_all", "sft_best", "var_batch", "var_group"):
        assert value(name, "E[r]-bKL") <= bound + 0.01 and value(name, "leaked") < 0.25
    assert value("var_group", "true") > value("sft_all", "true") + 0.3
    assert value("var_group", "KL(pi*,pi)") < value("sft_all", "KL(pi*,pi)") - 0.1
    assert value("sft_best", "E[r]") > value("var_group", "E[r]") and value("sft_best", "E[r]-bKL") < value("var_group", "E[r]-bKL")
    again = subprocess.run([sys.executable, "paper/miniature.py", "demo"], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert again.returncode == 0 and [line for line in again.stdout.splitlines() if line.startswith("var_group")] == [line for line in done.stdout.splitlines() if line.startswith("var_group")]
