"""
One HTML page about one or several runs: Tables 1-3 and Figures 1-3 of the paper for whatever was measured, and the answers themselves.

    python eval.py report --run runs/var --run runs/dpo --gen base=base.jsonl --out report.html

Reads what the other programs leave, writes one file without scripts, fonts or links to anything else.

    RUN/run.json, metrics.jsonl, eval/rewards.jsonl, tables.safetensors     train.py
    generations         RUN/gen.jsonl (or the only file with a .settings.json beside it), --gen     eval.py generate
    their rewards       RUN/*reward.json, --reward                                                  eval.py reward
    win rates           RUN/*winrate*.json, --winrate                                               eval.py winrate

A row of the page is a model: each run, then each --gen outside of them, then whatever else --reward and --winrate speak of. Rewards and
win rates belong to a generation file by its sha256, not by its name: numbers of an older version of the file are not shown, and said.
What is missing is said where it would stand.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

from eval.files import read_generations, read_jsonl, sha256
from eval.report_figures import COLOURS
from eval.report_page import page
from formats import InputError

MOST = 2000  # micro-batches whose weights are shown: more changes no picture, and 60,000 would take a minute


# fmt: off
def add_flags(parser):
    parser.add_argument("--run", action="append", default=[], metavar="DIR", help="an output folder of train.py; several are shown side by side")
    parser.add_argument("--gen", action="append", default=[], metavar="[NAME=]FILE", help="generations of a model without a run folder (a baseline), or those of a run that lie elsewhere under NAME = the run's name")
    parser.add_argument("--reward", action="append", default=[], metavar="FILE", help="what `eval.py reward --out` wrote, besides RUN/*reward.json")
    parser.add_argument("--winrate", action="append", default=[], metavar="FILE", help="what `eval.py winrate` wrote, besides RUN/*winrate*.json")
    parser.add_argument("--examples", type=int, default=8, metavar="N", help="prompts whose answers are shown side by side, 0 = none (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the HTML file to write")
# fmt: on


@dataclasses.dataclass
class Model:
    """One row of the page."""

    name: str
    folder: Path | None = None  # of the run
    run: dict = dataclasses.field(default_factory=dict)  # run.json
    metrics: list = dataclasses.field(default_factory=list)  # metrics.jsonl
    validation: list = dataclasses.field(default_factory=list)  # eval/rewards.jsonl
    rows: list = dataclasses.field(default_factory=list)  # generations
    sha256: str | None = None  # of their file
    rewards: dict = dataclasses.field(default_factory=dict)  # {"subsets": ..., "averages": ..., "missing": ...} of reward.json
    scores: dict = dataclasses.field(default_factory=dict)  # {id of a generation: its reward}
    wins: list = dataclasses.field(default_factory=list)  # the same of each winrate.json, one a baseline or judge
    weights: tuple | str = ""  # (weights, effective sample sizes, B) of a VAR run, or why there are none
    colour: str = COLOURS[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Read


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None


def read_lines(path):
    """Rows of one of train.py's JSONL files, [] if it is not there. The last line may be torn: a run can be looked at while it goes on."""
    return read_jsonl(path, torn_end=True) if path.exists() else []


def read_run(folder):
    """An output folder of train.py -> Model. InputError: it is none."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise InputError(f"{folder}: no run.json in it; --run takes output folders of train.py")
    found = {"run": read_json(folder / "run.json"), "metrics": read_lines(folder / "metrics.jsonl")}
    return Model(folder.resolve().name, folder, validation=read_lines(folder / "eval" / "rewards.jsonl"), **found)


def own_generations(model, said):
    """The generation file inside a run folder: gen.jsonl, or the only one that has its settings beside it; else None, and why if there are several."""
    found = [path for path in sorted(model.folder.glob("*.jsonl")) if Path(f"{path}.settings.json").exists()]
    named = [path for path in found if path.name == "gen.jsonl"] or found
    if len(named) > 1:
        said.append(f"{model.folder}: {', '.join(path.name for path in named)} all hold generations; name one with --gen {model.name}=FILE")
    return named[0] if len(named) == 1 else None


def read_results(files, models, said):
    """Yield (model, its part of "results" and the file's "settings", file) of reward or win rate files.

    A generation file that is not on the page becomes a model without generations.
    """
    for file in dict.fromkeys(Path(file).resolve() for file in files):
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
            raise InputError(f"{file}: no \"results\" in it; --reward and --winrate take what `eval.py reward` and `eval.py winrate` wrote")
        for path, part in content["results"].items():
            version = content.get("inputs_sha256", {}).get(path)
            model = next((m for m in models if version and m.sha256 == version), None)
            namesake = next((m for m in models if m.name in (Path(path).stem, Path(path).parent.name)), None)
            if model is None and namesake and namesake.sha256:
                said.append(f"{file}: its numbers for {path} are of another version of that file and not shown; run eval.py again")
                continue
            if model is None and namesake is None:
                namesake = Model(Path(path).stem if Path(path).stem != "gen" else Path(path).parent.name, sha256=version)
                models.append(namesake)
            yield model or namesake, part | {"settings": content.get("settings") or {}}, file


def collect(args):
    """The flags -> (models in the order of the page, lines about what could not be used)."""
    models, said = [read_run(folder) for folder in args.run], []
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            model.name = str(model.folder)  # runs/a/var and runs/b/var
    for argument in args.gen:
        name, equals, path = argument.partition("=")
        name, path = (name, Path(path)) if equals else (Path(argument).stem, Path(argument))
        model = next((m for m in models if m.name == name), None)
        if model is None:
            model = next((m for m in models if not equals and m.folder and m.folder.resolve() == path.resolve().parent), None)
        if model is None:
            models.append(model := Model(name))
        model.rows, model.sha256 = read_generations(path), sha256(path)
    for model in models:
        if model.folder and not model.rows and (path := own_generations(model, said)):
            model.rows, model.sha256 = read_generations(path), sha256(path)
    folders = [model.folder for model in models if model.folder]
    for model, part, file in read_results([*args.reward, *(f for folder in folders for f in sorted(folder.glob("*reward.json")))], models, said):
        if model.rewards:
            said.append(f"{file}: a second scoring of {model.name}, not shown")
        else:
            model.rewards, model.scores = part, part.get("scores") or {}
    for model, part, _ in read_results([*args.winrate, *(f for folder in folders for f in sorted(folder.glob("*winrate*.json")))], models, said):
        model.wins.append(part)
    if not models:
        raise InputError("nothing to report: name a folder with --run, or files with --gen, --reward or --winrate")
    for i, model in enumerate(models):
        model.weights = weights_of(model) if model.folder else ""
        model.colour = COLOURS[i % len(COLOURS)]
    return models, said


def weights_of(model):
    """(weights, effective sample sizes, B) of at most MOST evenly spaced micro-batches in a VAR run's table, or a line that says why there are none."""
    args, path = model.run.get("args", {}), model.folder / "tables.safetensors"
    if args.get("loss") != "var":
        return "a method without the weights exp(r/beta)/Zhat"
    path = Path(args["tables"]) if args.get("tables") else path
    if not path.exists():
        return f"no table at {path}"
    from safetensors.torch import load_file

    from tables import Tables
    from var import effective_sample_size, log_weights, weights_from_log

    stored, weights, sizes = SimpleNamespace(**load_file(path)), [], []
    measured = (~stored.rewards[:, 0, 0].isnan()).nonzero().flatten().tolist()  # --max_steps needs only some of the micro-batches
    for m in measured[:: math.ceil(len(measured) / MOST) or 1]:
        rewards, ref_logps = Tables.micro_batch(stored, m, args["ref_logps"])
        if args["estimator"] == "constant":
            rewards, ref_logps = rewards.diagonal(), None
        elif args["estimator"] == "monte_carlo":
            ref_logps = None
        if rewards.isnan().any() or (ref_logps is not None and ref_logps.isnan().any()):
            continue  # an interrupted tables.py: one of the two halves is missing
        log_w = log_weights(rewards, ref_logps, args["beta"], args["estimator"])
        weights += weights_from_log(log_w, args["normalize_weights"]).tolist()
        sizes.append(effective_sample_size(log_w).item())
    return (weights, sizes, args["batch_size"]) if weights else f"{path}: no micro-batch was measured"


def main(args):
    document = page(*collect(args), args.examples)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{out}.tmp")
    temporary.write_text(document, encoding="utf-8", errors="replace")  # half of a surrogate pair in a model's text must not stop the page
    os.replace(temporary, out)
    print(f"{out}: {out.stat().st_size / 1024:,.0f} kB, one file, nothing else is needed to read it")
