"""Rows of every known shape become the same records; everything else is refused or counted, with its line."""

import gzip
import json
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest
from tiny import ROOT, SHARED_DATA, write

import formats
from formats import InputError, Report, Unusable, choose_responses, parse_hh, read_records, read_rows, to_record

ASK = [{"role": "user", "content": "Is the shop open?"}]
SAY = lambda text: [{"role": "assistant", "content": text}]
HH = "\n\nHuman: Is the shop open?\n\nAssistant:"


def record(**row):
    return to_record(row, "file:1")


PAIRS = {
    "strings": dict(prompt="Is the shop open?", chosen="Until six.", rejected="Go away."),
    "message lists beside a prompt": dict(prompt=ASK, chosen=SAY("Until six."), rejected=SAY("Go away.")),
    "message lists with the prompt inside": dict(chosen=ASK + SAY("Until six."), rejected=ASK + SAY("Go away.")),
    "a string prompt repeated inside the lists": dict(prompt="Is the shop open?", chosen=ASK + SAY("Until six."), rejected=ASK + SAY("Go away.")),
    "HH transcripts": dict(chosen=HH + " Until six.", rejected=HH + " Go away."),
    "HH prompt beside the answers": dict(prompt=HH, chosen="Until six.", rejected="Go away."),
    "instruction without input": dict(instruction="Is the shop open?", input="", output="x", chosen="Until six.", rejected="Go away."),
    "OffsetBias, label 1": dict(instruction="Is the shop open?", output_1="Until six.", output_2="Go away.", label=1),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_shape_of_a_pair_is_the_same_record(name):
    """Prompt messages, two responses, the first preferred."""
    r = record(**PAIRS[name])
    assert (r.prompt, r.responses, r.chosen, r.rejected, r.scores) == (ASK, ["Until six.", "Go away."], 0, 1, None)


def test_offsetbias_label_names_the_better_output():
    """label 2 (a number, a string, a float as a table with gaps stores it) prefers output_2; anything else is unusable."""
    row = dict(instruction="a", output_1="one", output_2="two")
    assert [(r.chosen, r.rejected) for r in (record(**row, label=label) for label in (2, "2", 2.0, 1.0))] == [(1, 0)] * 3 + [(0, 1)]
    for label in (3, 0, None, True, "two"):
        with pytest.raises(Unusable, match="neither 1 nor 2"):
            record(**row, label=label)


def test_input_is_put_below_the_instruction():
    """instruction + input are one user turn."""
    assert record(instruction="Translate.", input="chat", chosen="cat", rejected="dog").prompt[0]["content"] == "Translate.\n\nchat"


def test_ultrafeedback_scores():
    """Mean of the annotation ratings (strings, "N/A" is none), else fine-grained_score, else overall_score."""
    rate = lambda *ratings: {str(i): {"Rating": r} for i, r in enumerate(ratings)}
    completions = [
        dict(response="a", annotations=rate("5", "N/A", "2"), overall_score=9), {"response": "b", "annotations": rate("N/A"), "fine-grained_score": 3.5, "overall_score": 9},
        dict(response="c", annotations={}, overall_score="8"), dict(response="d"), dict(response="e", annotations=[{"Rating": "1"}], overall_score=2), dict(response="f", annotations=None),
    ]  # fmt: skip
    r = record(instruction="q", completions=completions)
    assert (r.responses, r.scores) == (["a", "b", "c", "d", "e", "f"], [3.5, 3.5, 8.0, None, 2.0, None])


def test_the_other_shapes():
    """prompt/response (reward), prompt/responses/scores, prompt/completion/label, messages, score_chosen."""
    r = record(prompt="q", response="a", reward="0.5")
    assert (r.responses, r.scores) == (["a"], [0.5]) and record(prompt="q", response="a").scores is None
    assert record(prompt="q", responses=["a", "b"], scores=[1, "nan"]).scores == [1.0, None]
    r = record(instruction="Translate.", input="chat", output="cat")
    assert (r.prompt[0]["content"], r.responses, r.scores) == ("Translate.\n\nchat", ["cat"], None)
    labels = (True, False, "true", 0, 1.0, "Undesirable")
    assert [record(prompt="q", completion="a", label=v).desirable for v in labels] == [[True], [False], [True], [False], [True], [False]]
    r = record(messages=[{"role": "system", "content": "s"}, *ASK, *SAY("yes")])
    assert [m["role"] for m in r.prompt] == ["system", "user"] and r.responses == ["yes"]
    assert record(prompt="q", chosen="a", rejected="b", score_chosen=2, score_rejected="1").scores == [2.0, 1.0]


def test_nothing_is_guessed_where_a_column_holds_something_else():
    """No label, a text where a list belongs, a number where a text belongs: the row is dropped, the program goes on."""
    for row, reason in (
        (dict(prompt="q", completion="a", label=None), "neither true nor false"), (dict(prompt="q", completion="a", label="maybe"), "neither true nor false"),
        (dict(prompt="q", responses="ab", scores=[1, 2]), "a list expected, got str"), (dict(prompt="q", responses=["a"], scores=2), "a list expected, got int"),
        (dict(prompt="q", responses=["a"], scores=[1, 2]), "differ in number"), (dict(instruction="q", completions=3), "a list expected, got int"),
        (dict(instruction="q", completions=["a"]), "not an object"), (dict(prompt=7, response="a"), "text expected, got int"), (dict(prompt="q", response=[1]), "a message is not"),
        (dict(prompt="q", response=[]), "empty message list"), (dict(prompt="q", response=None), "needed column is null"),
    ):  # fmt: skip
        with pytest.raises(Unusable, match=reason):
            record(**row)


def test_every_record_has_a_prompt_that_asks_something():
    """Blank, missing, or ended by the assistant: unusable, in a column of its own and inside the answers."""
    for row in (
        dict(prompt=" \n", response="a"), dict(prompt=[*ASK, *SAY("yes")], response="a"), dict(messages=SAY("yes")), dict(messages=[*ASK, *SAY("yes"), *SAY("no")]),
        dict(messages=ASK), dict(messages=ASK + ASK), dict(chosen="\n\nHuman: \n\nAssistant: a", rejected="\n\nHuman: \n\nAssistant: b"), dict(chosen=SAY("a"), rejected=SAY("b")),
    ):  # fmt: skip
        with pytest.raises(Unusable, match="prompt is empty or does not end|last turn is not"):
            record(**row)


def test_a_multi_turn_transcript_keeps_its_turns():
    """Human and Assistant in turn; the last reply is the response."""
    text = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: four\n\nwith a paragraph"
    r = record(chosen=text, rejected=text.replace("four", "five"))
    assert [m["content"] for m in r.prompt] == ["one", "two", "three"] and r.responses[0] == "four\n\nwith a paragraph"


def test_trap_13_transcripts_that_diverge_early_are_dropped():
    """The last "Assistant:" of one must not cut the other."""
    one, two = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "\n\nHuman: a\n\nAssistant: B\n\nHuman: c\n\nAssistant: e"
    other = [{"role": "user", "content": "Is it late?"}]
    for row in (dict(chosen=one, rejected=two), dict(chosen=ASK + SAY("a"), rejected=other + SAY("b")), dict(prompt=other, chosen=ASK + SAY("a"), rejected=ASK + SAY("b"))):
        with pytest.raises(Unusable, match="different prompts"):
            record(**row)
    system = [{"role": "system", "content": "Be kind."}]  # a prompt column rarely repeats it: no difference
    assert record(prompt=ASK[0]["content"], chosen=system + ASK + SAY("a"), rejected=system + ASK + SAY("b")).prompt == system + ASK


def test_trap_14_only_a_paragraph_start_marks_a_turn():
    """"Human:" inside a line is text; no space after the colon is fine; two Human turns in a row are refused."""
    assert parse_hh("\n\nHuman:hi\n\nAssistant: say Human: please\nHuman: again")[1]["content"] == "say Human: please\nHuman: again"
    for bad in ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "x\n\nHuman: a\n\nAssistant: b", "\n\nAssistant: a"):
        with pytest.raises(Unusable, match="take turns"):
            parse_hh(bad)


def test_trap_15_plain_strings_without_a_prompt_are_refused():
    """A common beginning is no prompt: ("Paris ", "London") has none."""
    with pytest.raises(InputError, match="no prompt column"):
        record(chosen="The sky", rejected="The sky is blue")


def test_blank_responses_are_dropped_and_counted(tmp_path):
    """With a stated preference the row goes, among several responses only the blank one."""
    path = write(tmp_path / "a.jsonl", [dict(prompt="q", chosen=" \n", rejected="b"), dict(prompt="q", responses=["a", "  ", "c"], scores=[1, 2, 3])])
    (r,) = read_records(path, report := Report())
    assert r.responses == ["a", "c"] and r.scores == [1, 3] and sum(report.dropped.values()) == 2
    assert report.first["an empty or blank response"] == "a.jsonl:1" and "dropped 1" in str(report)


def test_choose_responses():
    """all, chosen (stated, else best), best (by score, ties by file order), pairs (highest against lowest)."""
    scored = record(prompt="q", responses=["a", "b", "c", "d"], scores=[1, 3, 3, 1])
    assert [choose_responses(scored, mode) for mode in ("all", "chosen", "best", "pairs")] == [[0, 1, 2, 3], [1], [1], [1, 0]]
    pair = record(prompt="q", chosen="a", rejected="b", score_chosen=1, score_rejected=2)
    assert [choose_responses(pair, mode) for mode in ("chosen", "best", "pairs")] == [[0], [1], [0, 1]]
    for row, mode in (
        (dict(prompt="q", responses=["a", "b"], scores=[1, 1]), "pairs"), (dict(prompt="q", chosen="a", rejected="a "), "pairs"),
        (dict(prompt="q", response="a"), "pairs"), (dict(prompt="q", completion="a", label=False), "chosen"), (dict(instruction="q", completions=[dict(response="a"), dict(response="b")]), "best"),
    ):  # fmt: skip
        with pytest.raises(Unusable):
            choose_responses(record(**row), mode)
    with pytest.raises(Unusable, match="all scores are equal"):
        choose_responses(record(prompt="q", responses=["a", "b"], scores=[1, 1]), "pairs")
    assert choose_responses(record(prompt="q", chosen="a", rejected="a"), "all") == [0, 1]  # equal texts matter only as a pair


def test_the_report_counts_by_reason_and_keeps_the_first_line(tmp_path):
    """Three rows for one reason, one for another: most frequent first, with the place of the first."""
    good, blank, odd = PAIRS["strings"], PAIRS["strings"] | {"chosen": ""}, PAIRS["strings"] | {"prompt": ""}
    records = list(read_records(write(tmp_path / "a.jsonl", [good, odd, blank, blank, good, blank]), report := Report()))
    assert [r.where for r in records] == ["a.jsonl:1", "a.jsonl:5"] and report.rows == 6
    assert str(report).splitlines() == [
        "6 rows read",
        "  dropped 3: an empty or blank response (first at a.jsonl:3)",
        "  dropped 1: the prompt is empty or does not end with the user's turn (first at a.jsonl:2)",
    ]


def test_half_a_surrogate_pair_drops_its_row(tmp_path):
    """JSON can hold it, UTF-8 and tokenizers cannot; a whole emoji written as two escapes is fine."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "response": "\\ud83d\\ude42"}\n{"prompt": "q \\ud83d", "response": "a"}\n')
    (r,) = read_records(str(tmp_path / "a.jsonl"), report := Report())
    assert r.responses == ["🙂"] and "Unicode" in str(report) and list(report.first.values()) == ["a.jsonl:2"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz", "lines.json", "bom.jsonl", "bom.json", "parquet", "saved"])
def test_every_kind_of_file(tmp_path, kind):
    """The same rows from lines, gzip, an array, lines called .json, a byte order mark, parquet, a folder saved by `datasets`."""
    rows = [PAIRS["strings"], PAIRS["strings"] | {"prompt": "Ünïcode 🙂"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = tmp_path / f"data.{kind}"
    if kind in ("parquet", "saved"):
        data = pytest.importorskip("datasets").Dataset.from_list(rows)
        data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
    else:
        text = json.dumps(rows) if kind in ("json", "json.gz", "bom.json") else text
        data = text.encode("utf-8-sig" if "bom" in kind else "utf-8")
        path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    got = list(read_rows(str(path)))
    assert [row["prompt"] for _, row in got] == ["Is the shop open?", "Ünïcode 🙂"] and got[1][0].endswith(":2")


def test_a_saved_dataset_dict_needs_its_split(tmp_path):
    """The splits there are named."""
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(train=datasets.Dataset.from_list([PAIRS["strings"]])).save_to_disk(tmp_path / "d")
    assert len(list(read_rows(str(tmp_path / "d")))) == 1
    with pytest.raises(InputError, match="no split 'test'; it has train"):
        list(read_rows(str(tmp_path / "d"), "test"))


@pytest.mark.parametrize(
    "name, text, named",
    [
        ("a.jsonl", '{"prompt": "q"}\n{"prompt": \n', "a.jsonl:2"), ("a.json", "[{]", "a.json:1"), ("a.jsonl", '{"foo": 1, "bar": 2}\n', "a.jsonl:1.*bar, foo"),
        ("a.jsonl", "", "no usable row"), ("a.jsonl", '{"prompt": "q", "chosen": " ", "rejected": "b"}\n', "no usable row among 1.*blank"),
        ("a.jsonl", "[1, 2]", "a.jsonl:1.*int"), ("a.txt", "x", "unknown file type"), ("a.jsonl", '{"prompt": "q", "chosen": "a"}\n', "a.jsonl:1.*chosen, prompt"),
    ],
)  # fmt: skip
def test_file_faults_name_file_line_and_remedy(tmp_path, name, text, named):
    """Malformed lines, unknown columns, no usable row, unknown endings."""
    (tmp_path / name).write_text(text)
    if named == "a.jsonl:2":
        text = (tmp_path / name).write_text('{"prompt": "q", "response": "a"}\n{"prompt": \n')
    with pytest.raises(InputError, match=named):
        list(read_records(str(tmp_path / name), Report()))


def test_missing_files_and_the_missing_package_are_clear(tmp_path, monkeypatch):
    """No such file; a hub name or a saved folder without `datasets`; a broken gzip."""
    for path in ("nowhere.jsonl", "./x", "a/b/c", "/no/such"):
        with pytest.raises(InputError, match="no such file"):
            list(read_rows(path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in ("someone/something", str(tmp_path)):
        with pytest.raises(InputError, match="pip install datasets"):
            list(read_rows(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="pip install datasets"):
        list(read_rows(str(tmp_path / "a.parquet")))


def test_damaged_files_are_one_clear_line(tmp_path):
    """No gzip at all, a gzip cut short or with a hole, bytes that are not UTF-8."""
    whole = gzip.compress(json.dumps(dict(prompt="q", response="".join(map(str, range(3000))))).encode())
    hole = whole[:200] + bytes(byte ^ 255 for byte in whole[200:230]) + whole[230:]
    with pytest.raises(zlib.error):  # a kind of its own, not one of gzip's
        gzip.decompress(hole)
    files = {"no.jsonl.gz": b"not gzip", "cut.jsonl.gz": whole[:-20], "hole.jsonl.gz": hole, "latin.jsonl": '{"prompt": "é"}'.encode("latin-1")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            list(read_rows(str(tmp_path / name)))


def test_a_broken_parquet_file_and_a_folder_of_something_else_are_one_clear_line(tmp_path):
    """The libraries' own errors do not come through as tracebacks."""
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing that parquet knows")
    (tmp_path / "folder").mkdir()
    for name in ("a.parquet", "folder"):
        with pytest.raises(InputError, match=name):
            list(read_rows(str(tmp_path / name)))


def test_a_hub_name_may_name_a_folder_and_its_failure_is_one_line(monkeypatch):
    """NAME:FOLDER is load_dataset(NAME, data_dir=FOLDER), streamed; without a network the library's own words follow the name."""
    asked = []
    fake = SimpleNamespace(load_dataset=lambda *a, **k: asked.append((a, k)) or [PAIRS["strings"]])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(read_rows("someone/pairs:part", "test")) == [("someone/pairs:part:1", PAIRS["strings"])]
    assert asked == [(("someone/pairs",), dict(data_dir="part", split="test", streaming=True))]

    def offline(*_, **__):
        raise ConnectionError("no way out")

    fake.load_dataset = offline
    with pytest.raises(InputError, match="someone/pairs: neither a file here nor a readable hub dataset .*no way out"):
        list(read_rows("someone/pairs"))


def test_user_errors_end_a_program_with_status_2_and_one_line_and_bugs_do_not(capsys):
    """run(): InputError 2, Ctrl-C 130, success 0, anything else keeps its traceback."""

    def ends(error):
        with pytest.raises(SystemExit) as stop:
            formats.run(lambda: (_ for _ in ()).throw(error) if error else None)
        return stop.value.code or 0, capsys.readouterr().err.splitlines()

    assert ends(None) == (0, [])
    status, lines = ends(InputError("a.jsonl:3: two\nlines"))
    assert status == 2 and len(lines) == 1 and lines[0].endswith("error: a.jsonl:3: two lines")
    status, lines = ends(KeyboardInterrupt())
    assert status == 130 and "interrupted" in lines[-1]
    with pytest.raises(ZeroDivisionError):
        formats.run(lambda: 1 / 0)


def test_a_reader_that_has_seen_enough_is_no_error():
    """`python program.py | head -1`: no traceback, the status a shell gives for a broken pipe."""
    program = subprocess.Popen([sys.executable, "-c", "import formats; formats.run(lambda: print('x\\n' * 100000))"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.readline()
    program.stdout.close()
    assert (program.stderr.read(), program.wait()) == (b"", 141)


def test_strict_stops_at_the_first_unusable_row(tmp_path):
    """--strict names the row; null columns and odd messages are unusable rows, not unknown files."""
    rows = [PAIRS["strings"], PAIRS["strings"] | {"chosen": None}, PAIRS["strings"] | {"chosen": [{"role": "robot", "content": "x"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    assert len(list(read_records(path, report := Report()))) == 1 and sum(report.dropped.values()) == 2
    with pytest.raises(InputError, match="a.jsonl:2.*--strict"):
        list(read_records(path, Report(strict=True)))


@pytest.mark.parametrize(
    "name, records",
    [("truthfulqa_pairs.jsonl", 5440), ("truthfulqa_ultrafeedback.jsonl", 680), ("piqa_pairs.jsonl", 1445), ("instruction_preference.json", 1100), ("hh_helpful_base.jsonl.gz", 1198), ("vicuna_scored.jsonl", 40)],
)  # fmt: skip
def test_real_files_are_read_whole(name, records):
    """Only two rows of HH fall out, for an empty last reply."""
    if not (SHARED_DATA / name).exists():
        pytest.skip(f"{SHARED_DATA / name} is not here")
    assert len(list(read_records(str(SHARED_DATA / name), report := Report()))) == records
    assert sum(report.dropped.values()) == (2 if "hh" in name else 0)
