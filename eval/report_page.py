"""
The sections of report.html: eval/report.py's models in, HTML out. Every text that a model, a data set or a user wrote passes `escape`.

A section is a list of HTML strings. Captions say what to look at and name the error bars; what a model lacks becomes one line, `missing`.
"""

import json
import math
from html import escape

from eval.report_figures import curves, intervals, ridges, shares

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1060px; margin: 2em auto; padding: 0 1.5em }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2.2em; border-bottom: 1px solid #ddd } h3 { font-size: 1em; margin-bottom: 0.3em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
td, th { padding: 0.25em 0.8em; border-bottom: 1px solid #eee; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left } td.same { color: #888 } .settings td, .settings th { text-align: left; white-space: normal; overflow-wrap: anywhere }
figure { margin: 1.2em 0 } figcaption, .note { color: #555; font-size: 0.92em } .missing { color: #8a4b00; background: #fff6e8; padding: 0.3em 0.7em }
svg { width: 100%; height: auto; fill: #333 } svg text { font: 12px system-ui, sans-serif } svg text.axis { font-weight: 600 }
.prompt { background: #f2f4f7; padding: 0.5em 0.8em } .answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 0.6em }
.answer { border: 1px solid #ddd; border-top: 4px solid; padding: 0.4em 0.7em } .text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24em; overflow-y: auto }
.role { color: #777; font-size: 0.85em } .swatch { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.5em }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # whatever a model wrote, a browser loads and runs nothing


def missing(what):
    return f'<p class="missing">{escape(what)}</p>'


def missing_of(models, what):
    """One line for all models that lack the same thing, none if there are none."""
    return [missing(f"{', '.join(m.name for m in models)}: {what}")] if models else []


def figure(svg, caption):
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def html_table(head, rows, kind=""):
    """head: texts; rows: lists of cells, each a text (escaped here) or a pair (class, text)."""
    cell = lambda c: f'<td class="{c[0]}">{escape(c[1])}</td>' if isinstance(c, tuple) else f"<td>{escape(c)}</td>"
    lines = ["<tr>" + "".join(f"<th>{escape(word)}</th>" for word in head) + "</tr>"]
    return f'<table class="{kind}">' + "".join(lines + ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]) + "</table>"


def number(value, digits=3):
    return "–" if not finite(value) else f"{value:.{digits}f}"


def percent(value):
    return f"{number(100 * value, 1)} %" if finite(value) else "–"


def finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def with_errors(numbers, quantity, factor=1.0):
    """(mean, standard error over seeds, standard error over items) of one quantity of a reward or win rate table; None for what there is not."""
    found = (numbers.get(quantity), *(numbers.get(f"{quantity}_error_over_{over}") for over in ("seeds", "items")))
    return tuple(factor * value if finite(value) else None for value in found)


def show(mean, seeds, items, digits=2):
    """'mean ± over seeds / over items'; a mean alone where neither error is known."""
    errors = "" if seeds is None and items is None else f" ± {number(seeds, digits)} / {number(items, digits)}"
    return number(mean, digits) + errors


def averages(part):
    """{"All": numbers, ...} of a result; an average that is null has no numbers."""
    return {name: numbers for name, numbers in (part.get("averages") or {}).items() if isinstance(numbers, dict)}


def results_section(models):
    scored = [m for m in models if averages(m.rewards).get("All", {}).get("reward") is not None]
    lacking, parts = missing_of([m for m in models if m not in scored], "no rewards (eval.py generate, then eval.py reward --out RUN/reward.json)"), []
    for name, why in dict.fromkeys(item for m in models for item in (m.rewards.get("missing") or {}).items()):
        lacking += missing_of([m for m in models if (m.rewards.get("missing") or {}).get(name) == why], f"no numbers for {name} ({why})")
    if scored:
        head = ["model", "method", "n", "seeds", "reward (raw)", "100·sigmoid", "tokens", "cut", "win %"]
        rows = []
        for m in scored:
            all_, wins = averages(m.rewards)["All"], averages(m.wins[0]) if m.wins else {}
            win = show(*with_errors(wins.get("All", {}), "win_rate", 100), 1)
            cells = [m.name, m.run.get("args", {}).get("loss", "–"), f"{all_.get('n', 0):,}", str(len(all_.get("seeds", [])))]
            cells += [show(*with_errors(all_, "reward"), 3), show(*with_errors(all_, "sigmoid100")), number(all_.get("response_tokens"), 1)]
            rows.append(cells + [percent(all_.get("cut")), win])
        parts.append(html_table(head, rows))
        judges = list(dict.fromkeys(", ".join(f"{k} {v}" for k, v in m.rewards["settings"].items()) for m in scored))
        parts.append(f'<p class="note">Scored with {escape(" and with ".join(judges))}.</p>' if judges != [""] else "")
        if len(judges) > 1:
            parts.append(missing("the rewards are not all of the same reward model and settings: do not compare them"))
        parts.append(figure(
            intervals([(m.name, m.colour, *with_errors(averages(m.rewards)["All"], "sigmoid100")) for m in scored], "average reward, 100 · sigmoid(logit)"),
            "Tables 1 and 2. In table and picture ± is one standard error, over sampling seeds / over items (prompts). The thick bar is over seeds: would "
            "the same prompts say the same again? The thin one is over items: would other prompts? A hollow dot has no error over seeds, as there was "
            "one. No error covers training, which was done once.",
        ))  # fmt: skip
        columns = list(dict.fromkeys(name for m in scored for name in [*averages(m.rewards), *m.rewards.get("subsets", {})]))
        if len(columns) > 2:
            of = lambda m, name: averages(m.rewards).get(name) or m.rewards.get("subsets", {}).get(name) or {}
            parts.append(html_table(["100·sigmoid", *columns], [[m.name, *(show(*with_errors(of(m, c), "sigmoid100")) for c in columns)] for m in scored]))
    return parts + lacking


def curve_points(rows, name):
    return [(row["step"], row[name]) for row in rows if finite(row.get("step")) and finite(row.get(name))]


def training_section(models):
    parts, runs = [], [m for m in models if m.folder]
    if series := [(m.name, m.colour, points) for m in runs if (points := curve_points(m.validation, "reward"))]:
        n = sorted({row["n"] for m in runs for row in m.validation if "n" in row})
        parts.append(figure(
            curves(series, "optimizer step", "mean validation reward (raw logit)"),
            f"Figure 2. A good run rises and stays up. A point is the mean over {' or '.join(map(str, n))} held-out prompts, one answer each; "
            "no error bars, as the file stores means only. Step 0 is the model before training; runs with other --responses may be asked other "
            "held-out prompts and then start elsewhere.",
        ))  # fmt: skip
    losses = [(m.name, m.colour, curve_points(m.metrics, "eval/loss")) for m in runs]
    if losses := [(name, colour, [(x, y / points[0][1]) for x, y in points]) for name, colour, points in losses if points and points[0][1] > 0]:
        parts.append(figure(
            curves(losses, "optimizer step", "held-out loss / its first value"),
            "Held-out loss of each run's own method, relative to the first evaluation: only its shape can be compared between methods. Rising "
            "again while the training loss falls is overfitting.",
        ))  # fmt: skip
    without = [m for m in runs if not curve_points(m.validation, "reward")]
    why = "no validation rewards in eval/rewards.jsonl (train with a reward model and --eval_data or --eval_fraction)"
    return parts + missing_of(without, why) if runs else [missing("no --run was named")]


def lengths_section(models):
    parts, have = [], [m for m in models if m.rows]
    if have:
        rows = []
        for m in have:
            tokens, cut = [row["response_tokens"] for row in m.rows], sum(not row["finished"] for row in m.rows)
            rows.append((m.name, m.colour, tokens, f"mean {sum(tokens) / len(tokens):.1f}, cut {100 * cut / len(tokens):.0f} %"))
        parts.append(figure(
            ridges(rows, "tokens of a response, end of turn included", whole=True),
            "Figure 3. The height is the share of a model's own responses, the thick line their mean. A reward that comes with much longer "
            "answers may be bought with length. A peak at the right edge means answers cut at the limit.",
        ))  # fmt: skip
    return parts + missing_of([m for m in models if not m.rows], "no generations (eval.py generate --out RUN/gen.jsonl)")


def win_parts(numbers):
    """((win, tie, loss) shares, standard error of the win share over seeds, else items), or None where there are no such numbers."""
    rates = [numbers.get(f"{word}_rate") for word in ("win", "tie", "loss")]
    _, seeds, items = with_errors(numbers, "win_rate")
    return (rates, items if seeds is None else seeds) if all(map(finite, rates)) else None


def wins_section(models):
    rows, notes = [], []
    for m, part in [(model, part) for model in models for part in model.wins]:
        subsets = part.get("subsets") or {}
        subsets = averages(part) | (subsets if len(subsets) != 1 else {})  # one subset is its own average
        rows += [(f"{m.name}: {name}", *found) for name, numbers in subsets.items() if numbers and (found := win_parts(numbers))]
        settings, counts, position = part["settings"], part.get("counts") or {}, part.get("position") or {}
        words = f"{m.name} against {settings.get('baseline', '?')}, judged by {settings.get('judge', '?')}: "
        words += ", ".join(f"{counts[word]:,} {word}" for word in ("wins", "ties", "losses", "invalid", "failed", "identical") if word in counts)
        if position.get("judged"):
            words += f"; the answer shown first won {percent(position.get('first_position_wins'))} of the decided verdicts, the order changed the winner in "
            words += f"{percent(position.get('flipped'))} of the items"
        notes.append(f'<p class="note">{escape(words)}.</p>')
    parts = []
    if rows:
        parts.append(figure(
            shares(rows, "share of judged items"),
            "Figure 1. Every item is judged in both orders; green is won, grey tied, orange lost. The black bar is the share of wins ± one "
            "standard error, over seeds where there are several, else over items. Far from 50 % for the answer shown first, the judge is biased.",
        ))  # fmt: skip
    return parts + notes + missing_of([m for m in models if not m.wins], "no win rates (eval.py winrate --out RUN/winrate.json)")


def weights_section(models):
    runs = [m for m in models if m.folder]
    have, parts = [m for m in runs if not isinstance(m.weights, str)], []
    if have:
        rows = []
        for m in have:
            weights, _, _ = m.weights
            rows.append((m.name, m.colour, weights, f"max / mean {max(weights) * len(weights) / sum(weights):.1f}"))
        parts.append(figure(
            ridges(rows, "weight w of a training response, logarithmic", log=True),
            "Weights of Eq. 10 in the run's table (2,000 micro-batches of it at most). A narrow peak is nearly SFT. A thin tail far to the right of the mean (thick line): "
            "a few responses decide every step.",
        ))  # fmt: skip
        rows = [(m.name, m.colour, sizes, f"mean {sum(sizes) / len(sizes):.1f} of {B}") for m in have for _, sizes, B in [m.weights]]
        parts.append(figure(
            ridges(rows, "effective sample size of a micro-batch, from 1 to B", limits=(1, max(m.weights[2] for m in have))),
            "(Σw)² / Σw², one value a micro-batch. At 1 a single response is trained on; at B the weights hardly differ. Healthy is well above 1; near B, "
            "look at self_share below: close to 1, the weights are equal because the reward has cancelled.",
        ))  # fmt: skip
        shares_of = {m.name: [share for _, share in curve_points(m.metrics, "weights/self_share")] for m in have}
        words = [f"{name} {sum(some) / len(some):.2f}" for name, some in shares_of.items() if some]
        parts += [f'<p class="note">self_share, mean over training: {escape(", ".join(words))}.</p>'] if words else []
    reasons = dict.fromkeys(m.weights for m in runs if isinstance(m.weights, str))
    return parts + [line for why in reasons for line in missing_of([m for m in runs if m.weights == why], why)] or [missing("no --run was named")]


def side_by_side_section(models, most):
    have = [m for m in models if m.rows]
    if not have:
        return [missing("no generations")]
    key = lambda row: (row["subset"], json.dumps(row["prompt"]), row["seed"])
    tables = [{key(row): row for row in m.rows} for m in have]
    common = [k for k in tables[0] if all(k in table for table in tables)]
    parts = [] if common else [missing("the models answered no prompt with the same seed in common; those of the first one are shown")]
    common = common or list(tables[0])
    seed = min(k[2] for k in common)
    common = [k for k in common if k[2] == seed]
    picked = common[:: max(1, math.ceil(len(common) / max(1, most)))][:most]
    unscored = [m for m in have if not m.scores]
    parts.append(f'<p class="note">{len(picked)} of {len(common):,} prompts, evenly spaced in the order of the data and not chosen by anybody; seed {seed}.</p>')
    parts += missing_of(unscored, "no rewards of single responses (eval.py reward --out RUN/reward.json)")
    for i, k in enumerate(picked, 1):
        first = next(table[k] for table in tables if k in table)
        turns = "".join(f'<div class="role">{escape(str(t.get("role")))}</div><div class="text">{escape(str(t.get("content")))}</div>' for t in first["prompt"])
        answers = [answer(m, table[k]) for m, table in zip(have, tables) if k in table]
        if isinstance(first.get("chosen"), str):
            answers.append(f'<div class="answer" style="border-color: #bbb"><b>chosen in the data</b><div class="text">{escape(first["chosen"])}</div></div>')
        parts.append(f'<h3>{i}. {escape(k[0])}</h3><div class="prompt">{turns}</div><div class="answers">{"".join(answers)}</div>')
    return parts


def answer(model, row):
    about = f"{row['response_tokens']} tokens" + ("" if row["finished"] else ", cut")
    if finite(reward := model.scores.get(row["id"])):
        about += f", reward {reward:.2f}"
    if outcome := (model.wins[0].get("outcomes") or {}).get(row["id"]) if model.wins else None:
        about += f", {outcome}"
    words = escape(row["response"]) or "<i>(empty)</i>"
    return (
        f'<div class="answer" style="border-color: {model.colour}"><b>{escape(model.name)}</b> <span class="role">{escape(about)}</span>'
        f'<div class="text">{words}</div></div>'
    )


def settings_section(models):
    runs = [m for m in models if m.folder]
    if not runs:
        return [missing("no --run was named")]
    columns = [{"finished": m.run.get("finished", False)} | {f"--{k}": v for k, v in m.run.get("args", {}).items() if v is not None} for m in runs]
    for m, column in zip(runs, columns):
        column |= {k: m.run.get(k) for k in ("steps", "processes", "device", "plan", "mean_response_tokens")}
        column |= {f"fingerprint of {k}": v for k, v in m.run.get("models", {}).items()} | m.run.get("versions", {})
    names = list(dict.fromkeys(name for column in columns for name in column))
    differ = {name for name in names if len({json.dumps(column.get(name)) for column in columns}) > 1}
    shown = sorted(names, key=lambda name: name not in differ)  # stable: what differs comes first
    words = lambda value: "–" if value is None else value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    rows = [[name, *((("" if name in differ or len(runs) == 1 else "same"), words(column.get(name))) for column in columns)] for name in shown]
    note = "" if len(runs) == 1 else '<p class="note">What differs between the runs comes first; what all share is grey.</p>'
    return [note, html_table(["", *(m.name for m in runs)], rows, "settings")]


def page(models, said, examples):
    """The whole document."""
    legend = "".join(f'<li><span class="swatch" style="background: {m.colour}"></span>{escape(m.name)}{escape(about(m))}</li>' for m in models)
    sections = {
        "Results": results_section(models),
        "Along training": training_section(models),
        "Lengths": lengths_section(models),
        "Win rates": wins_section(models),
        "Weights": weights_section(models),
        "Side by side": side_by_side_section(models, examples),
        "Settings": settings_section(models),
    }
    body = "".join(f"<h2>{title}</h2>" + "\n".join(parts) for title, parts in sections.items())
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>VAR report: {escape(", ".join(m.name for m in models))}</title><style>{STYLE}</style></head>'
        f"<body><h1>VAR report</h1><ul>{legend}</ul>{''.join(map(missing, said))}{body}</body></html>\n"
    )


def about(model):
    args = model.run.get("args", {})
    words = [f"--loss {args['loss']}"] if "loss" in args else []
    words += [f"from {args['model']}"] if args.get("model") else []
    words += [f"{len(model.rows):,} generations"] if model.rows else []
    words += ["not finished"] if model.folder and not model.run.get("finished") else []
    return f" ({', '.join(words)})" if words else ""
