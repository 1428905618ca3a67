"""`eval.py winrate` against a real HTTP server on loopback: the rule of Sec. 4.1, verdicts, templates, retries, the cache, exit statuses."""

import email.utils
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from loopback import Loopback, no_pauses
from tiny import ENVIRONMENT, ROOT, SHARED_DATA, bpe_tokenizer, hears_ctrl_c, reward_model, run_program, save, write

import torch

import eval as eval_package
import eval.judge as judge_file
import eval.server as server_file
import eval.winrate as winrate_file
from data import load_tokenizer
from eval.files import read_jsonl
from formats import InputError
from model import load_reward_model
from reward import bind_scores, score

pytest.importorskip("openai", reason="pip install -r requirements-test.txt")
torch.set_num_threads(1)
KEY = "sk-loopback-5e1f0c"


class Judge(Loopback):
    """Judges by quality unless told otherwise."""

    def __init__(self):
        super().__init__()
        self.act = self.by_quality

    def by_quality(self, request, number):
        """Prefers the answer with the higher "quality N"; equal or absent: neither."""
        a, b = answers_in(request)
        a, b = (float(found[1]) if (found := re.search(r"quality (-?\d+)", text)) else 0.0 for text in (a, b))
        return f"They differ. [[{'A' if a > b else 'B' if b > a else 'C'}]]"


def answers_in(request):
    """The texts between the markers of our own template."""
    text = request["messages"][-1]["content"]
    return [re.search(rf"----- reply {which} -----\n(.*)\n----- end of reply {which} -----", text, re.S)[1] for which in "AB"]


@pytest.fixture
def judge():
    server = Judge()
    yield server
    server.shutdown()
    server.server_close()


# ----------------------------------------------------------------------------------------------------------------------
# Running it


def rows_of(answers, seeds=(0,)):
    """{subset: [(model's answer, baseline's answer), ...]} -> rows as generate writes them; a list of model's answers gives one a seed."""
    rows = []
    for subset, pairs in answers.items():
        for i, (model, chosen) in enumerate(pairs):
            for seed, text in zip(seeds, model if isinstance(model, list) else [model] * len(seeds)):
                prompt = [{"role": "user", "content": f"{subset} question {i}?"}]
                row = {"id": f"{subset}/{i:012d}/{seed}", "subset": subset, "prompt": prompt, "chosen": chosen, "seed": seed}
                rows.append(row | {"response": text, "response_tokens": 3, "finished": True})
    return rows


def winrate(folder, server, *flags, before=no_pauses, **more):
    """`eval.py winrate` on FOLDER/gen.jsonl -> (exit status, JSON on the last line of stdout or None, stdout, stderr)."""
    usual = {"gen": folder / "gen.jsonl", "baseline": "chosen", "judge": "judge-1", "base_url": server and server.url}
    words = [str(word) for name, value in (usual | more).items() if value is not None for word in (f"--{name}", value)]
    status, out, err = run_program(eval_package, ["winrate", *words, *map(str, flags)], folder, before)
    result = json.loads(out.splitlines()[-1]) if out.endswith("}\n") else None
    return SimpleNamespace(status=status, result=result, part=result and next(iter(result.get("results", {}).values()), None), out=out, err=err)


GOOD, SAME, BAD = ("quality 2", "quality 1"), ("quality 1 here", "quality 1 there"), ("quality 0", "quality 1")

# ----------------------------------------------------------------------------------------------------------------------
# The rule


def test_two_orders_make_one_outcome_as_in_section_4_1():
    """Order 0 shows the model first. Win + tie = win, win + loss = tie, tie + loss = loss; a missing verdict is invalid."""
    expected = {
        ("A", "B"): "win", ("A", "C"): "win", ("C", "B"): "win", ("A", "A"): "tie", ("B", "B"): "tie", ("C", "C"): "tie",
        ("B", "A"): "loss", ("B", "C"): "loss", ("C", "A"): "loss", ("A", None): "invalid", (None, "B"): "invalid", (None, None): "invalid",
    }  # fmt: skip
    assert {pair: winrate_file.outcome({"type": "pairwise"}, pair) for pair in expected} == expected
    assert [winrate_file.outcome({"type": "single"}, pair) for pair in ((7.0, 6.5), (3.0, 3.0), (2.0, 9.0), (1.0, None))] == ["win", "tie", "loss", "invalid"]


def test_every_item_is_judged_in_both_orders_and_the_rates_are_the_counted_ones(judge, tmp_path):
    """Two subsets of 4 and 2: per subset wins / n, All the mean of the two, Helpful the one of that name; half a win for a tie beside it."""
    write(tmp_path / "gen.jsonl", rows_of({"helpful_base": [GOOD, GOOD, GOOD, BAD], "harmless": [SAME, BAD]}))
    done = winrate(tmp_path, judge, out=tmp_path / "new" / "winrate.json")
    assert done.status == 0, done.err
    shown = [tuple(answers_in(request)) for request in judge.seen]
    assert len(shown) == 12 and sorted(shown) == sorted([GOOD, GOOD[::-1]] * 3 + [SAME, SAME[::-1]] + [BAD, BAD[::-1]] * 2)
    assert all(request["temperature"] == 0 and request["model"] == "judge-1" and request["max_tokens"] == 1024 for request in judge.seen)
    helpful, harmless, all_ = done.part["subsets"]["helpful_base"], done.part["subsets"]["harmless"], done.part["averages"]["All"]
    assert (helpful["win_rate"], helpful["tie_rate"], helpful["loss_rate"], helpful["win_rate_tie_half"], helpful["n"]) == (0.75, 0, 0.25, 0.75, 4)
    assert (harmless["win_rate"], harmless["win_rate_tie_half"], harmless["wins"], harmless["ties"], harmless["losses"]) == (0, 0.25, 0, 1, 1)
    assert (all_["win_rate"], all_["win_rate_tie_half"], all_["n"]) == (0.375, 0.5, 6) and done.part["averages"]["Helpful"]["win_rate"] == 0.75
    assert done.part["position"] == {"judged": 6, "decided": 10, "first_position_wins": 0.5, "flipped": 0}
    written = json.loads((tmp_path / "new" / "winrate.json").read_text())
    outcomes = written["results"][str(tmp_path / "gen.jsonl")].pop("outcomes")
    assert written == done.result and [*outcomes.values()] == ["win", "win", "win", "loss", "tie", "loss"]
    assert "37.5" in next(line for line in done.out.splitlines() if "Avg. All" in line)
    assert done.result["seeds"] == [0] and done.result["judge_models"] == ["judge-1"] and done.part["tokens"] == {"prompt_tokens": 84, "reply_tokens": 36}
    assert set(done.result["inputs_sha256"]) == {str(tmp_path / "gen.jsonl")} and done.result["versions"]["openai"] and done.result["settings"]["template"] == "ours"


def test_a_judge_that_likes_the_first_answer_shows(judge, tmp_path):
    """Every item is a tie, and the two shares say why."""
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD, BAD, SAME]}))
    judge.act = lambda request, number: "[[A]]"
    part = winrate(tmp_path, judge).part
    assert part["averages"]["All"]["tie_rate"] == 1 and part["position"] == {"judged": 3, "decided": 6, "first_position_wins": 1, "flipped": 1}
    judge.act = lambda request, number: "[[C]]" if answers_in(request)[0] == "quality 1" else "[[A]]"  # a winner in one order, a tie in the other
    part = winrate(tmp_path, judge, cache=tmp_path / "other").part
    assert part["position"]["flipped"] == pytest.approx(1 / 3) and part["position"]["first_position_wins"] == 1


def test_standard_errors_over_seeds_and_items_by_hand(judge, tmp_path):
    """Three prompts, two seeds: prompt means 1, 1/2, 0 and seed means 2/3, 1/3. One seed has no seed error."""
    two = {"a": [(["quality 2", "quality 3"], "quality 1"), (["quality 2", "quality 0"], "quality 1"), (["quality 0", "quality 0 still"], "quality 1")]}
    write(tmp_path / "gen.jsonl", rows_of(two, seeds=(0, 1)))
    numbers = winrate(tmp_path, judge).part["averages"]["All"]
    assert numbers["win_rate"] == 0.5 and (numbers["n"], numbers["n_items"], numbers["seeds"]) == (6, 3, [0, 1])
    assert numbers["win_rate_error_over_seeds"] == pytest.approx(statistics.stdev([2 / 3, 1 / 3]) / math.sqrt(2))
    assert numbers["win_rate_error_over_items"] == pytest.approx(statistics.stdev([1, 0.5, 0]) / math.sqrt(3))
    write(tmp_path / "gen.jsonl", [row for row in rows_of(two, seeds=(0, 1)) if row["seed"] == 1])
    done = winrate(tmp_path, judge)
    assert done.part["averages"]["All"]["win_rate_error_over_seeds"] is None and done.part["averages"]["All"]["win_rate_error_over_items"] > 0
    assert "+- seeds" in done.out and "+- items" in done.out


def test_identical_answers_are_ties_without_a_call_and_empty_ones_are_judged(judge, tmp_path):
    write(tmp_path / "gen.jsonl", rows_of({"a": [("Yes.", "Yes. "), ("", "quality 1"), ("", "")]}))
    done = winrate(tmp_path, judge)
    assert len(judge.seen) == 2 and sorted(answers_in(judge.seen[0])) == ["", "quality 1"]
    assert done.part["counts"] == {"wins": 0, "ties": 2, "losses": 1, "invalid": 0, "failed": 0, "identical": 2} and done.part["averages"]["All"]["n"] == 3
    assert "identical 2" in done.out and done.part["position"]["judged"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Which items


def test_per_subset_draws_prompts_with_all_their_seeds_whatever_the_order_of_the_file(tmp_path):
    """The same prompts for every seed, others for another --sample_seed; a small subset is taken whole."""
    rows = rows_of({"a": [GOOD] * 30, "b": [GOOD] * 2}, seeds=(0, 1, 2))
    path = write(tmp_path / "gen.jsonl", rows)
    items, _ = winrate_file.read_items(path, "chosen", per_subset=5)
    drawn = {item["item"] for item in items if item["subset"] == "a"}
    assert len(items) == 3 * 7 and len(drawn) == 5 and all(sum(i["item"] == d for i in items) == 3 for d in drawn)
    again, _ = winrate_file.read_items(write(tmp_path / "gen.jsonl", rows[::-1]), "chosen", per_subset=5)
    assert {i["id"] for i in again} == {i["id"] for i in items}
    other, _ = winrate_file.read_items(path, "chosen", per_subset=5, sample_seed=1)
    assert {i["id"] for i in other} != {i["id"] for i in items}


def test_the_baseline_may_be_another_file(tmp_path):
    """Same prompt and seed; a file of a single seed serves every seed; rows without a partner are counted."""
    gen = write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD, GOOD, GOOD]}, seeds=(0, 1)))
    mine = [row | {"response": f"other {row['id']}"} for row in rows_of({"a": [GOOD, GOOD]}, seeds=(0, 1))]
    items, unmatched = winrate_file.read_items(gen, write(tmp_path / "other.jsonl", mine))
    assert [(i["id"], i["baseline"]) for i in items] == [(f"a/{n:012d}/{s}", f"other a/{n:012d}/{s}") for n in (0, 1) for s in (0, 1)] and unmatched == 2
    items, unmatched = winrate_file.read_items(gen, write(tmp_path / "one.jsonl", [row for row in mine if row["seed"] == 1]))
    assert [i["baseline"] for i in items] == [f"other a/{n:012d}/1" for n in (0, 0, 1, 1)] and unmatched == 2
    with pytest.raises(InputError, match="no row has an answer in .*none.jsonl"):
        winrate_file.read_items(gen, write(tmp_path / "none.jsonl", [row | {"id": "b" + row["id"][1:], "subset": "b"} for row in mine]))
    with pytest.raises(InputError, match="no row has a preferred response"):
        winrate_file.read_items(write(tmp_path / "gen.jsonl", [row | {"chosen": None} for row in mine]), "chosen")


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts and templates

STOP = {"finish": "stop"}


@pytest.mark.parametrize("text, expected", [
    ("[[A]] at first, but no: [[B]]", "B"), ("I would say [[C]].", "C"), ("A is better", None), ("", None), ("[[a]] [[D]] [A] [[ A ]]", None), ("[[[A]]]", "A"),
])  # fmt: skip
def test_the_last_verdict_of_a_reply_counts(text, expected):
    assert judge_file.verdict({"type": "pairwise"}, STOP | {"text": text}) == expected


def test_a_rating_is_a_number_and_a_cut_reply_has_no_verdict():
    single = {"type": "single"}
    assert [judge_file.verdict(single, STOP | {"text": t}) for t in ("Rating: [[5]], no, [[7.5]]", "[[10]]", "[[A]]", "7")] == [7.5, 10.0, None, None]
    assert judge_file.verdict({"type": "pairwise"}, {"finish": "length", "text": "[[A]] because"}) is None and judge_file.verdict(single, None) is None


@pytest.mark.parametrize("useless", ["", "both are fine", ("length", "[[A]] or rather"), "shape", "garbage", None])
def test_a_useless_reply_is_asked_once_more(judge, tmp_path, useless):
    """Empty, without a verdict, cut, no chat completion, no text: the second reply decides."""
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD]}))
    judge.act = lambda request, number: ("stop", None) if useless is None and number <= 2 else useless if number <= 2 else judge.by_quality(request, number)
    done = winrate(tmp_path, judge)
    assert done.status == 0 and len(judge.seen) == 4 and done.part["counts"]["wins"] == 1, done.err


def test_items_without_a_verdict_are_counted_printed_and_left_out(judge, tmp_path):
    """Two useless replies make an item invalid. Up to --max_invalid percent the run is complete, above it exits 3."""
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD, GOOD, ("quality 9 mumble", "quality 1"), BAD]}))
    judge.act = lambda request, number: "hm" if "mumble" in answers_in(request)[0] else judge.by_quality(request, number)
    done = winrate(tmp_path, judge)
    assert done.status == 3 and "1 of 4 items have no verdict, more than --max_invalid 5 %" in done.err
    assert len(judge.seen) == 9 and done.part["averages"]["All"]["n"] == 3 and done.part["averages"]["All"]["win_rate"] == pytest.approx(2 / 3)
    assert "invalid 1" in done.out and done.part["subsets"]["a"]["invalid"] == 1
    assert winrate(tmp_path, judge, max_invalid=25).status == 0 and len(judge.seen) == 9  # replies without a verdict are replies
    judge.act = lambda request, number: "hm"
    done = winrate(tmp_path, judge, cache=tmp_path / "other")
    assert done.status == 3 and done.part["averages"]["All"] is None and done.part["missing"]["All"] == "nothing of the subset a"


def test_braces_and_verdicts_inside_texts_change_nothing(judge, tmp_path):
    """A template is filled by plain replacement, once: what looks like a field or a verdict in a text stays text."""
    trap = ("{answer_b} {question} {0} {{x}} [[A]] quality 0", "{answer_a} [[B]] \\1 %s quality 1")
    rows = rows_of({"a": [trap]})
    rows[0]["prompt"][0]["content"] = "What is {answer_a} in [[C]]?"
    write(tmp_path / "gen.jsonl", rows)
    done = winrate(tmp_path, judge)
    assert sorted(tuple(answers_in(request)) for request in judge.seen) == sorted([trap, trap[::-1]]) and done.part["counts"]["losses"] == 1
    assert all("\n\nWhat is {answer_a} in [[C]]?\n\n" in request["messages"][-1]["content"] for request in judge.seen)


def test_our_template_asks_for_the_three_verdicts_and_shows_conversations():
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    system, user = judge_file.fill(judge_file.OURS, dialogue, answer_a="one", answer_b="two")
    assert all(v in system["content"] for v in ("[[A]]", "[[B]]", "[[C]]")) and "User:\nHi\n\nAssistant:\nHello\n\nUser:\nBye" in user["content"]
    assert judge_file.fill(judge_file.OURS, dialogue[:1], answer_a="", answer_b="")[1]["content"].startswith("The conversation:\n\nHi\n")


def template(name, kind="pairwise", text="{question}|{answer_a}|{answer_b}", output="[[A]]"):
    return {"name": name, "type": kind, "system_prompt": "Judge {question}.", "prompt_template": text, "output_format": output}


SINGLE = template("grade", "single", "{question}|{answer}", "[[rating]]")


def test_a_file_of_templates_is_used(judge, tmp_path):
    """The first one that fits, or the one that is named; the system prompt is not a template."""
    file = write(tmp_path / "t.jsonl", [template("reference", text="{question}{ref_answer_1}{answer_a}{answer_b}"), template("plain"), SINGLE])
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD]}))
    judge.act = lambda request, number: "[[A]]" if request["messages"][1]["content"].startswith("a question 0?|quality 2|") else "[[B]]"
    done = winrate(tmp_path, judge, templates=file)
    assert done.part["counts"]["wins"] == 1 and done.result["settings"]["template"] == "plain" and str(file) in done.result["inputs_sha256"], done.err
    assert judge.seen[0]["messages"][0] == {"role": "system", "content": "Judge {question}."}
    done = winrate(tmp_path, judge, templates=file, template="reference")
    assert done.status == 2 and "it fills answer_a, answer_b, question, ref_answer_1" in done.err and "usable are plain, grade" in done.err


def test_single_scores_are_compared(judge, tmp_path):
    """Each answer is graded once, a baseline's answer once for all seeds; there are no orders to disagree."""
    file = write(tmp_path / "t.jsonl", [SINGLE])
    write(tmp_path / "gen.jsonl", rows_of({"a": [(["quality 4", "quality 1 too"], "quality 1")], "b": [(["quality 0", "quality 2"], "quality 1")]}, seeds=(0, 1)))
    judge.act = lambda request, number: f"Rating: [[{re.search('quality (.)', request['messages'][1]['content'])[1]}]]"
    done = winrate(tmp_path, judge, templates=file)
    assert len(judge.seen) == 6 and done.part["counts"] | {"identical": 0} == {"wins": 2, "ties": 1, "losses": 1, "invalid": 0, "failed": 0, "identical": 0}
    assert done.part["position"] is None and done.status == 0


@pytest.mark.skipif(not (SHARED_DATA / "mt_bench_judge_prompts.jsonl").exists(), reason="no shared data here")
def test_mt_benchs_own_file_is_read():
    file = SHARED_DATA / "mt_bench_judge_prompts.jsonl"
    assert judge_file.load_template(file)["name"] == "pair-v2" and judge_file.load_template(file, "single-v1")["type"] == "single"
    text = judge_file.fill(judge_file.load_template(file), [{"role": "user", "content": "Why?"}], answer_a="One {answer_b}", answer_b="Two")[1]["content"]
    assert text.count("Two") == 1 and "One {answer_b}" in text and "Why?" in text
    with pytest.raises(InputError, match="pair-math-v1 cannot be used here: it fills answer_a, answer_b, question, ref_answer_1"):
        judge_file.load_template(file, "pair-math-v1")


@pytest.mark.parametrize("row, words", [
    ({"name": "x"}, "t.jsonl:1: not a judge template"), ("x", "t.jsonl:1: not a judge template"), (template("x", output="[[rating_a,rating_b]]"), "usable are none"),
])  # fmt: skip
def test_a_bad_template_is_one_clear_line(tmp_path, row, words):
    with pytest.raises(InputError, match=re.escape(words)):
        judge_file.load_template(write(tmp_path / "t.jsonl", [row]))


# ----------------------------------------------------------------------------------------------------------------------
# The server


FAULTS = [(408, {}, "x"), (409, {}, "x"), (429, {}, "x"), (500, {}, "x"), (502, {}, "x"), (503, {"x-should-retry": "false"}, "x"), "cut", "late"]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_passing_fault_is_tried_again(judge, tmp_path, fault):
    """408, 409, 429, 5xx, a cut connection, no reply in time: the same request once more, then all is well."""
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD]}))
    judge.act = lambda request, number: fault if number == 1 else judge.by_quality(request, number)
    done = winrate(tmp_path, judge, concurrency=1, timeout=2 if fault == "late" else 60)
    assert done.status == 0 and done.part["counts"]["wins"] == 1 and len(judge.seen) == 3 and judge.seen[0] == judge.seen[1], done.err


@pytest.mark.parametrize("status, remedy", [(400, "flags"), (401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "/v1"), (422, "flags")])
def test_a_refusal_stops_at_once_with_the_servers_words(judge, tmp_path, status, remedy):
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD, BAD, SAME]}))
    judge.act = lambda request, number: (status, {"x-should-retry": "true"}, "the moon is in the wrong house")
    done = winrate(tmp_path, judge, concurrency=1)
    line = done.err.strip().splitlines()[-1]
    assert done.status == 2 and len(judge.seen) == 1 and "Traceback" not in done.err
    assert line.startswith("eval.py: error: ") and str(status) in line and "the moon is in the wrong house" in line and remedy in line


def arguments(judge, **more):
    return SimpleNamespace(**{"base_url": judge.url, "api_key_env": "NO_SUCH_KEY", "concurrency": 1, "rpm": None, "timeout": 5.0, "retries": 5} | more)


def ask(monkeypatch, judge, n=1, **more):
    """`ask_all` in this process -> (replies, failed, the pauses it made in seconds)."""
    pauses, replies = [], {}

    async def at_once(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(server_file, "sleep", at_once)
    requests = {f"{i}": {"model": "m", "messages": [{"role": "user", "content": f"{i}"}]} for i in range(n)}
    failed = server_file.ask_all(arguments(judge, **more), requests, replies.__setitem__)
    return replies, failed, pauses


def test_pauses_grow_and_retry_after_is_honoured(monkeypatch, judge):
    """Without a word of the server about 1, 2, 4 seconds; with Retry-After exactly that, a number or a date. One that is too long is a failure."""
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    faults = [(500, {}, ""), (500, {}, ""), "cut", (429, {"Retry-After": "17"}, ""), (503, {"Retry-After": date}, "")]
    judge.act = lambda request, number: faults[number - 1] if number <= len(faults) else "fine"
    replies, failed, pauses = ask(monkeypatch, judge)
    assert replies["0"]["text"] == "fine" and not failed
    assert 0.75 <= pauses[0] <= 1 and 1.5 <= pauses[1] <= 2 and 3 <= pauses[2] <= 4 and pauses[3] == 17 and 50 < pauses[4] <= 100
    judge.act = lambda request, number: (429, {"Retry-After": "86400"}, "")
    replies, failed, pauses = ask(monkeypatch, judge)
    assert not replies and "Retry-After asks for 86400 s" in failed["0"] and not pauses


def test_a_lasting_fault_is_given_up(monkeypatch, judge, capsys):
    """--retries more attempts; after GIVE_UP failures in a row the rest is not asked. A success in between starts the count again."""
    judge.act = lambda request, number: (500, {}, "")
    _, failed, _ = ask(monkeypatch, judge, n=40, retries=2)
    assert len(failed) == 40 and len(judge.seen) == 3 * server_file.GIVE_UP and "status 500, 3 times" in capsys.readouterr().err
    judge.seen.clear()
    judge.act = lambda request, number: "fine" if request["messages"][0]["content"] in ("9", "19") else (500, {}, "")
    replies, failed, _ = ask(monkeypatch, judge, n=30, retries=0)
    assert set(replies) == {"9", "19"} and len(judge.seen) == 30


def test_items_that_failed_are_said_and_asked_again_by_the_next_run(judge, tmp_path):
    """Exit 3 with their number; the results of the others stand; the same command asks for these alone."""
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD, ("quality 5 unlucky", "quality 1"), BAD]}))
    judge.act = lambda request, number: (500, {}, "") if "unlucky" in str(request) else judge.by_quality(request, number)
    done = winrate(tmp_path, judge, retries=1)
    assert done.status == 3 and "1 of 3 items failed" in done.err and done.part["counts"]["failed"] == 1 and done.part["averages"]["All"]["n"] == 2
    assert len(judge.seen) == 8 and len(read_jsonl(tmp_path / "gen.jsonl.judge.jsonl")) == 4
    judge.act, judge.seen[:] = judge.by_quality, []
    done = winrate(tmp_path, judge)
    assert done.status == 0 and len(judge.seen) == 2 and done.part["averages"]["All"]["win_rate"] == pytest.approx(2 / 3)


def test_a_server_that_is_not_there_is_an_incomplete_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD]}))
    done = winrate(tmp_path, SimpleNamespace(url=url))
    assert done.status == 3 and "connection fault" in done.err and "1 of 1 items failed" in done.err


def test_no_more_than_so_many_requests_are_under_way(judge, monkeypatch):
    """Three at once: each waits for the two others, and there is never a fourth."""
    together = threading.Barrier(3, timeout=20)
    judge.act = lambda request, number: f"{together.wait()}"
    replies, failed, _ = ask(monkeypatch, judge, n=9, concurrency=3)
    assert len(replies) == 9 and not failed and judge.most == 3


def test_requests_are_spaced_by_rpm():
    pace = server_file.Pace(120)
    assert [pace.wait(now) for now in (10.0, 10.0, 10.1, 20.0, 20.5)] == pytest.approx([0, 0.5, 0.9, 0, 0])
    assert server_file.Pace(None).wait(3.0) == server_file.Pace(None).wait(3.0) == 0


def test_every_request_waits_for_its_turn(judge, monkeypatch):
    """Retries too: nine starts, eight gaps of a minute / rpm, booked one after the other."""
    judge.act = lambda request, number: "fine" if number > 1 else (429, {"Retry-After": "0"}, "")
    monkeypatch.setattr(server_file.time, "monotonic", lambda: 0.0)
    pace = server_file.Pace
    monkeypatch.setattr(server_file, "Pace", lambda rpm: pace(rpm))
    _, _, pauses = ask(monkeypatch, judge, n=8, rpm=6)
    assert [p for p in pauses if p] == [10.0 * i for i in range(1, 9)]


def test_the_key_is_sent_and_appears_nowhere_else(judge, tmp_path):
    """Not in results, cache, stdout or stderr, not even where the server repeats it. Without the variable a placeholder is sent."""
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD]}))
    with_key = lambda: (os.environ.update(MY_KEY=KEY), no_pauses())
    assert winrate(tmp_path, judge, api_key_env="MY_KEY", out=tmp_path / "w.json", before=with_key).status == 0
    assert set(judge.keys) == {f"Bearer {KEY}"}
    judge.act = lambda request, number: (401, {}, f"Incorrect API key provided: {KEY}")
    done = winrate(tmp_path, judge, api_key_env="MY_KEY", cache=tmp_path / "c.jsonl", before=with_key)
    assert done.status == 2 and "Incorrect API key provided: ***" in done.err
    judge.act = lambda request, number: (500, {}, f"{KEY}")
    assert winrate(tmp_path, judge, api_key_env="MY_KEY", cache=tmp_path / "c.jsonl", before=with_key, retries=0).status == 3
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY in file.read_text()]
    judge.keys.clear()
    winrate(tmp_path, judge, cache=tmp_path / "c.jsonl", before=lambda: (os.environ.pop("OPENAI_API_KEY", None), no_pauses()))
    assert set(judge.keys) == {"Bearer none"}


def test_a_key_that_no_header_can_carry_is_one_line_without_the_key(judge, tmp_path):
    """A line end around it, as files have it, does no harm."""
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD]}))
    done = winrate(tmp_path, judge, api_key_env="MY_KEY", before=lambda: os.environ.update(MY_KEY="sk-ключ"))
    assert done.status == 2 and "MY_KEY" in done.err and "ключ" not in done.err and not judge.seen
    assert winrate(tmp_path, judge, api_key_env="MY_KEY", before=lambda: os.environ.update(MY_KEY=f" {KEY}\n")).status == 0
    assert set(judge.keys) == {f"Bearer {KEY}"}


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def test_a_rerun_asks_nothing_and_reads_the_verdicts_again(judge, tmp_path):
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD, BAD]}))
    first = winrate(tmp_path, judge)
    cache = tmp_path / "gen.jsonl.judge.jsonl"
    before = cache.read_bytes()
    again = winrate(tmp_path, judge)
    assert len(judge.seen) == 4 and again.result == first.result and cache.read_bytes() == before
    cache.write_text("".join(json.dumps(row | {"reply": row["reply"] | {"text": "[[C]]"}}) + "\n" for row in read_jsonl(cache)))
    assert winrate(tmp_path, judge).part["averages"]["All"]["tie_rate"] == 1 and len(judge.seen) == 4


def test_whatever_determines_a_reply_is_in_its_key(judge, tmp_path):
    """Another judge, server, length, wording, answer or prompt is another question; what changes no reply asks nothing."""
    rows = rows_of({"a": [GOOD]})
    write(tmp_path / "gen.jsonl", rows)
    judge.act = lambda request, number: "[[C]]"
    cache = {"cache": tmp_path / "kept.jsonl"}
    winrate(tmp_path, judge, **cache)
    asked = lambda **more: (judge.seen.clear(), winrate(tmp_path, judge, **cache | more), len(judge.seen))[2]
    assert asked(concurrency=1, max_invalid=50, per_subset=1, timeout=9, rpm=1e6, retries=1) == 0
    other = SimpleNamespace(url=judge.url.replace("127.0.0.1", "localhost"))
    assert asked(judge="judge-2") == 2 and asked(max_judge_tokens=9) == 2 and asked(templates=write(tmp_path / "t.jsonl", [template("x")])) == 2
    judge.seen.clear()
    assert winrate(tmp_path, other, **cache).status == 0 and len(judge.seen) == 2
    write(tmp_path / "gen.jsonl", [rows[0] | {"response": "quality 3"}])
    assert asked() == 2
    write(tmp_path / "gen.jsonl", [rows[0] | {"prompt": [{"role": "user", "content": "another?"}]}])
    assert asked() == 2 and asked() == 0


def test_a_torn_last_line_is_skipped_and_the_file_goes_on(judge, tmp_path):
    """A kill inside a line, inside a character even, or just before its end: one reply is asked again, or none."""
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD, BAD]}))
    judge.act = lambda request, number: judge.by_quality(request, number) + " é"
    first, cache = winrate(tmp_path, judge), tmp_path / "gen.jsonl.judge.jsonl"
    whole = cache.read_bytes()
    for cut, asked in ((whole.rindex("é".encode()) + 1, 1), (len(whole) - 1, 0), (len(whole), 0), (0, 4)):
        cache.write_bytes(whole[:cut])
        judge.seen.clear()
        assert winrate(tmp_path, judge).part == first.part and len(judge.seen) == asked
        assert {row["key"] for row in read_jsonl(cache)} == {json.loads(line)["key"] for line in whole.splitlines()} and cache.read_bytes()[:cut] in whole


def test_a_file_that_is_no_cache_is_refused_and_left_alone(judge, tmp_path):
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD]}))
    before = (tmp_path / "gen.jsonl").read_bytes()
    done = winrate(tmp_path, judge, cache=tmp_path / "gen.jsonl")
    assert done.status == 2 and "gen.jsonl:1: not a line of a judge's cache" in done.err and (tmp_path / "gen.jsonl").read_bytes() == before


def test_ctrl_c_keeps_what_was_received(judge, tmp_path):
    """Exit 130 while requests are under way; the same command asks only for the rest."""
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD, BAD, SAME]}))
    held = threading.Event()
    judge.act = lambda request, number: judge.by_quality(request, number) if number <= 3 else held.wait(20) and "late"
    argv = ["winrate", "--gen", "gen.jsonl", "--baseline", "chosen", "--judge", "judge-1", "--base_url", judge.url, "--concurrency", "2"]
    program = subprocess.Popen([sys.executable, ROOT / "eval.py", *argv], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c)
    until = time.monotonic() + 60
    while len(judge.seen) < 5 and time.monotonic() < until:
        time.sleep(0.02)
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=60)
    held.set()
    assert program.returncode == 130 and "interrupted; what was written is kept" in err and "Traceback" not in err
    assert len(read_jsonl(tmp_path / "gen.jsonl.judge.jsonl")) == 3
    judge.act, judge.seen[:] = judge.by_quality, []
    assert winrate(tmp_path, judge).status == 0 and len(judge.seen) == 3


# ----------------------------------------------------------------------------------------------------------------------
# Before anything is asked


def hide_openai():
    sys.modules["openai"] = None
    no_pauses()


def test_a_dry_run_prints_the_papers_2376_calls_and_what_they_cost(judge, tmp_path):
    """396 items, two orders, three seeds. Nothing is asked or written, and neither a key nor the openai package is needed."""
    texts = [([f"{subset} {i} {s} quality 2" for s in range(3)], f"the chosen one {i}") for subset in "abcd" for i in range(120)]
    rows = rows_of({subset: texts[n * 120 : n * 120 + 120] for n, subset in enumerate("abcd")}, seeds=(0, 1, 2))
    write(tmp_path / "gen.jsonl", rows)
    done = winrate(tmp_path, judge, "--dry_run", per_subset=99, price_in=2.5, price_out=10, max_judge_tokens=500, before=hide_openai)
    found = done.result["dry_run"]
    assert done.status == 0 and not judge.seen and (found["calls"], found["cached"], found["to_ask"]) == (2376, 0, 2376), done.err
    texts = [m["content"] for item in winrate_file.read_items(tmp_path / "gen.jsonl", "chosen", 99)[0] for m in judge_file.fill(judge_file.OURS, item["prompt"], answer_a=item["model"], answer_b=item["baseline"])]
    assert found["prompt_tokens"] == 2 * sum(map(len, texts)) // 4 and found["reply_tokens_at_most"] == 2376 * 500
    assert found["cost_at_most"] == pytest.approx((2.5 * found["prompt_tokens"] + 10 * 2376 * 500) / 1e6) and f"{found['cost_at_most']:.2f}" in done.out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gen.jsonl", "stderr0.txt", "stdout0.txt"]


def test_a_dry_run_subtracts_what_the_cache_has(judge, tmp_path):
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD]}))
    winrate(tmp_path, judge)
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD, BAD, ("same", "same")]}))
    found = winrate(tmp_path, judge, "--dry_run").result["dry_run"]
    assert (found["calls"], found["cached"], found["to_ask"], found["cost_at_most"]) == (4, 2, 2, None) and len(judge.seen) == 2


def test_without_the_openai_package_one_line_says_so(judge, tmp_path):
    write(tmp_path / "gen.jsonl", rows_of({"a": [GOOD]}))
    done = winrate(tmp_path, judge, before=hide_openai)
    assert done.status == 2 and "pip install openai" in done.err.strip().splitlines()[-1]


WINRATE = ["winrate", "--gen", "g", "--baseline", "chosen", "--judge", "j"]


@pytest.mark.parametrize("flags, words", [
    ([], "--base_url"), (["--base_url", "localhost:8000"], "localhost:8000"), (["--base_url", "http://me:secret@host/v1"], "--base_url holds a secret"),
    (["--base_url", "http://h/v1?key=x"], "--base_url holds a secret"), (["--base_url", "http://h", "--rpm", "0"], "--rpm must be above 0, got 0"),
    (["--base_url", "http://h", "--timeout", "nan"], "--timeout"), (["--base_url", "http://h", "--concurrency", "0"], "--concurrency must be at least 1, got 0"),
    (["--base_url", "http://h", "--retries", "-1"], "--retries"), (["--base_url", "http://h", "--per_subset", "0"], "--per_subset"),
    (["--base_url", "http://h", "--template", "pair"], "--templates"), (["--base_url", "http://h", "--judge", "reward:x"], "--judge reward:x"),
])  # fmt: skip
def test_an_impossible_flag_is_named(capsys, flags, words):
    with pytest.raises(SystemExit, match="2"):
        eval_package.parse_args([*WINRATE, *flags])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message and "secret@" not in message


def test_one_process_judges(capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        eval_package.parse_args([*WINRATE, "--base_url", "http://h"])
    assert "winrate runs in one process" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# A reward model as judge


def test_a_reward_model_as_judge_prefers_the_higher_score(tmp_path):
    """Against reward.score by hand; both orders agree by nature; no server and no openai package; the cache serves the next run."""
    tokenizer = bpe_tokenizer()
    folder = save(tmp_path / "reward", reward_model("qwen2", vocab_size=len(tokenizer), initializer_range=0.3), tokenizer)
    answers = ["Yes.", "No, never.", "Perhaps tomorrow, in the shed.", "", "Bread dough, an hour.", "Boats!"]
    rows = rows_of({"a": [(x, y) for x, y in zip(answers, answers[1:] + answers[:1])] + [("Equal", "Equal")]})
    write(tmp_path / "gen.jsonl", rows)
    done = winrate(tmp_path, None, judge=f"reward:{folder}", out=tmp_path / "w.json", before=hide_openai)
    model = bind_scores(load_reward_model(folder))
    mine, theirs = (score(model, load_tokenizer(folder), [(r["prompt"], r[side]) for r in rows], progress=False) for side in ("response", "chosen"))
    expected = ["win" if a > b else "loss" if a < b else "tie" for a, b in zip(mine, theirs)]
    assert done.status == 0 and len(set(expected)) == 3, done.err
    assert [*json.loads((tmp_path / "w.json").read_text())["results"][str(tmp_path / "gen.jsonl")]["outcomes"].values()] == expected
    assert done.part["position"]["flipped"] == 0 and done.part["position"]["first_position_wins"] == 0.5 and done.result["settings"]["reward_model"].startswith("sha256:")

    def load_nothing():
        import model as model_file

        model_file._load = None

    again = winrate(tmp_path, None, judge=f"reward:{folder}", before=load_nothing)
    assert again.status == 0 and again.part == done.part, again.err
    shutil.rmtree(folder)
    assert winrate(tmp_path, None, judge=f"reward:{folder}").status == 2
