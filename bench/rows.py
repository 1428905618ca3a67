"""
The rows of the benchmark's table: one function each, named as `--only` names it, returning the lines it adds.

Each takes the settings (device, rounds, quick, bf16, compile) and measures our side through the product's own functions.
"""

import copy
import importlib.util
import math
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path

import naive
import torch
import workload
from plan import GB, PAPER_MODELS, dims, training_memory, useful_flops
from timing import alternate, compared, in_fresh_process, seconds

import model as product
import reward
import tables

TRL = importlib.util.find_spec("trl") is not None
NO_TRL = {"value": None, "text": "not measured", "target": None, "note": "TRL is not installed: pip install -r requirements-bench.txt"}


def shape(settings, hidden, layers, vocab_size, heads=4):
    """The CPU shape of a row, or on a GPU, where such a model would measure nothing but launches, Qwen2.5-0.5B's with this V."""
    found = dims(hidden, layers, heads, heads // 2, 11 * hidden // 4, vocab_size, tied=True, bias=True)
    if settings.device == "cuda":
        found = PAPER_MODELS["Qwen2.5-0.5B"] | {"vocab_size": vocab_size}
    return found | {"attn_implementation": settings.attn_implementation}


def autocast(settings):
    """Both sides under the precision that the row is stored with."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16)


class Rows:
    """Pairs to train on, with their tokenizer."""

    def __init__(self, settings, n):
        self.folder = tempfile.mkdtemp()
        self.file, self.what = workload.rows_file(self.folder)
        self.tokenizer = workload.tokenizer_of(self.file)
        self.pairs = workload.pairs_of(self.file, self.tokenizer, 16 if settings.quick else n)
        self.chosen = self.pairs[0::2]


def training(loss, causal_lm, examples, B, tokenizer, settings):
    return workload.Training(loss, copy.deepcopy(causal_lm), examples, B, tokenizer, settings.compile)


# ----------------------------------------------------------------------------------------------------------------------
# Tables and reward scoring


def b_by_b(settings):
    """B x B tables of the reference against full forwards."""
    lines = []
    model_shape = shape(settings, 256, 6, 32000)
    causal_lm = product.bind_sequence_logps(workload.policy(workload.config_of(model_shape))).eval().to(settings.device)
    tokenizer = Namespace(pad_token_id=0)
    for prompt_tokens, response_tokens, target in ((128, 64, 2.7), (512, 64, 6.5), (256, 256, 2.2)):
        if settings.quick:
            prompt_tokens, response_tokens = prompt_tokens // 16, response_tokens // 16
        rows = workload.shaped_rows(8, prompt_tokens, response_tokens, model_shape["vocab_size"])
        cells = [(rows[i], rows[j]) for i, j in tables.cells_of(8, "all")]
        scorer = tables.ref_scorer(causal_lm, tokenizer, 8)
        with torch.no_grad(), autocast(settings):
            scorer(cells)  # its first call checks the fast form against the plain one
        x, y = [e.prompt_ids.tolist() for e in rows], [e.response_ids.tolist() for e in rows]

        @torch.no_grad()
        def ours():
            return scorer(cells)

        with autocast(settings):
            times = alternate(settings.rounds, ours=ours, naive=lambda: naive.ref_logps_table(causal_lm, x, y))
            apart = (torch.tensor(ours()).view(8, 8) - naive.ref_logps_table(causal_lm, x, y)).abs().max().item()
            one_by_one = seconds(lambda: naive.ref_logps_table(causal_lm, x, y, batched=False))
        note = f"largest difference {apart:.0e} nats; one forward a pair took {one_by_one:.2f} s"
        lines.append(compared(f"B x B table, prompt/response {prompt_tokens}/{response_tokens}", times, "ours", "naive", f">= {target}", faster=True, note=note))
    return lines


def reward_scoring(settings):
    """reward.score against batches padded in file order."""
    found = Rows(settings, 1000)
    model_shape = shape(settings, 128, 4, 4096)
    plain = workload.reward_model(workload.config_of(model_shape)).to(settings.device)
    bound = reward.bind_scores(copy.deepcopy(plain))
    texts = [(e.messages, e.response) for e in found.pairs]
    both = {}

    def ours():
        both["ours"] = reward.score(bound, found.tokenizer, texts, progress=False)

    def plainly():
        both["plain"] = naive.scores_in_file_order(plain, found.tokenizer, texts, 32)

    with autocast(settings):
        times = alternate(settings.rounds, ours=ours, plain=plainly)
    apart = max(abs(a - b) for a, b in zip(both["ours"], both["plain"]))
    note = f"{found.what}; largest difference {apart:.0e}; batches of 32"
    return [compared(f"reward scores of {len(found.pairs) // 2:,} pairs", times, "ours", "plain", ">= 2", faster=True, note=note)]


# ----------------------------------------------------------------------------------------------------------------------
# Training steps


def steps(settings):
    """One epoch of VAR against our SFT, TRL's SFT and TRL's DPO on the same rows; our DPO and A-LoL beside them."""
    found = Rows(settings, 64)
    causal_lm = workload.policy(workload.config_of(shape(settings, 128, 4, 4096)))
    make = lambda loss, examples: training(loss, causal_lm, examples, 8, found.tokenizer, settings)
    ours = {loss: make(loss, found.pairs if loss == "dpo" else found.chosen) for loss in ("var", "sft", "dpo", "alol")}
    contenders = {loss: one.epoch for loss, one in ours.items()}
    if TRL:
        import peers

        contenders["trl sft"] = peers.sft(causal_lm, found.tokenizer, ours["var"].plan, 8, settings.bf16).epoch
        contenders["trl dpo"] = peers.dpo(causal_lm, found.tokenizer, ours["dpo"].plan, 8, settings.bf16).epoch
    times = alternate(settings.rounds, **contenders)
    rows = ours["var"].rows()
    rate = sum(map(sum, rows)) / statistics.median(times["var"])
    note = f"{len(rows)} {found.what}, B = 8; {rate:,.0f} tokens/s"
    lines = [compared("VAR step / our SFT step", times, "var", "sft", "<= 1.05", note=note)]
    lines.append(compared("A-LoL step / our SFT step", times, "alol", "sft", note="TRL has no A-LoL"))
    if not TRL:
        return [*lines, NO_TRL | {"what": "VAR step / TRL SFT and DPO"}]
    lines.append(compared("VAR step / TRL SFT step, V = 4,096", times, "var", "trl sft", "<= 0.35"))
    lines.append(compared("VAR step / TRL DPO step", times, "var", "trl dpo", "<= 0.12", note="8 responses a step against 8 pairs, same prompts"))
    lines.append(compared("our DPO step / TRL DPO step", times, "dpo", "trl dpo", note="ours reads the reference from its table"))
    return [*lines, compared("our SFT step / TRL SFT step", times, "sft", "trl sft")]


def large_vocabulary(settings):
    """One step at the vocabulary of Qwen2.5."""
    found = Rows(settings, 8)
    vocab_size = 8192 if settings.quick else 151936
    causal_lm = workload.policy(workload.config_of(shape(settings, 128, 2, vocab_size)))
    ours = training("var", causal_lm, found.chosen, 8, found.tokenizer, settings)
    if not TRL:
        return [NO_TRL | {"what": "VAR step / TRL SFT step, V = 151,936"}]
    import peers

    peer = peers.sft(causal_lm, found.tokenizer, ours.plan, 8, settings.bf16)
    times = alternate(settings.rounds, var=ours.epoch, trl=peer.epoch)
    return [compared(f"VAR step / TRL SFT step, V = {vocab_size:,}", times, "var", "trl", "<= 0.25", note=f"{len(found.chosen)} {found.what}")]


def grpo(settings):
    """Tables and one epoch of VAR against one epoch of GRPO on the same prompts, TRL's and ours."""
    n, tokens = (8, 16) if settings.quick else (16, 128)
    found = Rows(settings, n)
    found.pairs = found.pairs[: 2 * n]
    model_shape = shape(settings, 128, 4, 4096)
    config = workload.config_of(model_shape)
    causal_lm, judge, folder = workload.policy(config), workload.reward_model(config), Path(found.folder)
    paths = [workload.tiny.save(folder / name, one, found.tokenizer) for name, one in (("policy", causal_lm), ("judge", judge))]
    var = training("var", causal_lm, found.pairs, 8, found.tokenizer, settings)
    args = data_args(paths)

    def tables_and_epoch():
        (folder / "tables").unlink(missing_ok=True)
        needed = range(len(var.plan.batches))
        var.tables = tables.build_tables(
            folder / "tables", var.plan, {"rewards": "all", "ref_logps": "all"}, needed, var.accelerator, found.tokenizer, found.tokenizer, args
        )
        var.epoch()

    prompts = [e.messages for e in found.pairs[0::2]]
    contenders = {"var": silently(tables_and_epoch), "epoch": var.epoch, "grpo": lambda: our_grpo(paths, prompts, tokens, folder)}
    if TRL:
        import peers

        contenders["trl"] = peers.grpo(causal_lm, judge, found.tokenizer, prompts, 8, 8, 8, tokens, settings.bf16).epoch
    times = alternate(settings.rounds, **contenders)
    what = f"{len(var.plan.examples)} responses of {len(prompts)} prompts against 8 samples of {tokens} tokens each"
    ours = compared("tables and an epoch of VAR / our GRPO", times, "var", "grpo", note=what)
    if not TRL:
        return [ours, NO_TRL | {"what": "VAR / TRL GRPO"}]
    lines = [compared("tables and an epoch of VAR / TRL GRPO", times, "var", "trl", "<= 0.1", note=what)]
    lines.append(compared("an epoch of VAR with the tables there / TRL GRPO", times, "epoch", "trl", note="every further epoch, beta or learning rate"))
    return [*lines, ours, compared("our GRPO / TRL GRPO", times, "grpo", "trl", note="8 prompts x 8 samples a step, micro-batches of 8")]


def data_args(paths):
    """The flags that tables.build_tables reads."""
    return tables.parse_args(["--model", paths[0], "--reward_model", paths[1], "--data", "-"])


def our_grpo(paths, prompts, tokens, folder):
    """Seconds that baselines/grpo.py spends in its steps, as its own metrics.jsonl says."""
    import json

    from baselines import grpo as program

    out = tempfile.mkdtemp()
    file = workload.tiny.write(folder / "prompts.jsonl", [{"prompt": messages, "chosen": "a", "rejected": "b"} for messages in prompts])
    flags = ["--model", paths[0], "--reward_model", paths[1], "--data", file, "--output_dir", f"{out}/run", "--max_response_tokens", str(tokens)]
    silently(lambda: program.main(program.parse_args([*flags, "--save_every", "0"])))()
    lines = map(json.loads, open(f"{out}/run/metrics.jsonl"))
    return float(sum(line["time/total"] for line in lines))


def silently(work):
    """`work` without its progress bars and notes."""
    import contextlib
    import io

    def quiet():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            work()

    return quiet


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def memory(settings):
    """Peak above weights, gradients and optimizer, each side in a fresh process."""
    B, T, V = (2, 64, 8192) if settings.quick else (8, 512, 151936)
    job = {"job": "memory", "shape": shape(settings, 128, 2, V), "B": B, "T": T, "device": settings.device, "bf16": settings.bf16}
    peaks = {}  # (tied, V) -> bytes
    for tied in (True, False):
        for vocab_size in (V, 2 * V):
            one = job["shape"] | {"vocab_size": vocab_size, "tie_word_embeddings": tied}
            peaks[tied, vocab_size] = in_fresh_process(job | {"side": "ours", "shape": one})["peak"]
    lines = []
    for tied, name in ((True, "tied"), (False, "apart")):
        once, twice = peaks[tied, V], peaks[tied, 2 * V]
        note = f"ours {once / GB:.2f} GB, then {twice / GB:.2f} GB"
        lines.append({"what": f"peak memory when V doubles to {2 * V:,}, embedding and head {name}", "target": "<= 1.05", "value": twice / once, "note": note})
    if not TRL:
        return [NO_TRL | {"what": "peak memory / TRL SFT"}, *lines]
    peer, ours = in_fresh_process(job | {"side": "trl"})["peak"], peaks[True, V]
    what = f"peak memory / TRL SFT, V = {V:,}, B = {B}, {T} tokens"
    note = f"ours {ours / GB:.2f} GB, TRL {peer / GB:.2f} GB, above weights, gradients and optimizer"
    return [{"what": what, "target": "<= 0.25", "value": ours / peer, "note": note}, *lines]


def plan(settings):
    """bench/plan.py's formula against measured peaks."""
    lines = []
    sizes = [(64, 2, 2), (64, 2, 4)] if settings.quick else [(512, 6, 8), (1024, 8, 8)]
    for hidden, layers, heads in sizes:
        one = dims(hidden, layers, heads, heads // 2, 11 * hidden // 4, 32000, tied=True, bias=True)
        B, T = (2, 64) if settings.quick else (8, 512)
        measured = in_fresh_process({"job": "memory", "side": "ours", "shape": one, "B": B, "T": T, "device": settings.device, "bf16": settings.bf16, "whole": True})["peak"]
        parts = training_memory(one, 1, B, T, checkpointing=False, autocast=settings.bf16, kind="gpu" if settings.device == "cuda" else "cpu")
        note = f"formula {sum(parts.values()) / GB:.2f} GB, measured {measured / GB:.2f} GB"
        what = f"memory formula / measured, hidden {hidden}, {layers} layers, B = {B}, {T} tokens"
        lines.append({"what": what, "target": None, "value": sum(parts.values()) / measured, "note": note})
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Utilisation and growth


PEAK_BF16 = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # dense matrix products a second, as the maker states them


def matrix_rate(device, dtype=torch.float32, size=2048):
    """A call that multiplies two matrices, and its FLOPs."""
    size = 4 * size if device == "cuda" else size
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    return lambda: [a @ b for _ in range(4)] and None, 4 * 2 * size**3


def utilisation(settings):
    """Useful FLOPs of a training step against this machine's matrix products, measured in turn."""
    found, lines = Rows(settings, 8), []
    names = {"6 layers, hidden 512, V = 32,000": dims(512, 6, 8, 4, 1408, 32000, tied=True, bias=True)}
    if settings.device == "cuda":
        names = {name: PAPER_MODELS[name] for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B")}
    for name, model_shape in names.items():
        model_shape = model_shape if not settings.quick else dims(64, 2, 4, 2, 128, 4096, True)
        model_shape = model_shape | {"attn_implementation": settings.attn_implementation}
        cuda = settings.device == "cuda"
        examples = workload.shaped_rows(8, 512, 512, 4096) if cuda else found.chosen[:8]
        one = training("var", workload.policy(workload.config_of(model_shape)), examples, 8, found.tokenizer, settings)
        flops, what = useful_flops(model_shape, one.rows(0)), "8 rows of 512 + 512 tokens" if cuda else f"8 {found.what}"
        product_flops, more = {}, ""
        if cuda:
            torch.cuda.empty_cache()
            one.step(0)
            torch.cuda.reset_peak_memory_stats()
            one.step(0)
            more = f"; peak {torch.cuda.max_memory_allocated() / GB:.1f} GB"
        contenders = {"step": lambda: one.step(0) and None}
        for dtype in (torch.float32, torch.bfloat16):
            contenders[str(dtype)], product_flops[str(dtype)] = matrix_rate(settings.device, dtype)
        times = alternate(settings.rounds, warm_up=2, **contenders)
        for dtype, needed in product_flops.items():
            step, matrices = [flops / s for s in times["step"]], [needed / s for s in times[dtype]]
            shares = [100 * a / b for a, b in zip(step, matrices)]
            aimed = ">= 45" if dtype == "torch.float32" and not cuda else None
            tokens = sum(map(sum, one.rows(0)))
            note = f"{what}; {statistics.median(step) / 1e9:,.0f} of {statistics.median(matrices) / 1e9:,.0f} GFLOP/s; {tokens / statistics.median(times['step']):,.0f} tokens/s"
            note += more
            lines.append({"what": f"useful FLOPs of a step, {name}, of the {dtype[6:]} rate", "target": aimed, "value": statistics.median(shares), "unit": " %",
                          "low": min(shares), "high": max(shares), "rounds": len(shares), "ours": statistics.median(times["step"]), "note": note})  # fmt: skip
        peak = next((peak for part, peak in PEAK_BF16.items() if cuda and part in torch.cuda.get_device_name()), None)
        if peak:  # model-FLOPs utilisation as it is usually quoted
            shares = [100 * flops / s / peak for s in times["step"]]
            lines.append({"what": f"model-FLOPs utilisation, {name}, of {peak / 1e12:.0f} TFLOP/s", "target": ">= 50", "value": statistics.median(shares), "unit": " %",
                          "low": min(shares), "high": max(shares), "rounds": len(shares), "ours": statistics.median(times["step"]), "note": what})  # fmt: skip
    return lines


def growth(settings):
    """How the time of a VAR step grows with T, B and V: the exponent of a straight line through log time."""
    base, lines = {"T": 256, "B": 8, "V": 4096}, []
    ranges = {"T": (128, 256, 512, 1024), "B": (4, 8, 16, 32), "V": (4096, 16384, 65536)}
    if settings.quick:
        base, ranges = {"T": 32, "B": 4, "V": 512}, {"T": (32, 64), "B": (4, 8), "V": (512, 1024)}
    tokenizer = Namespace(pad_token_id=0)
    for letter, values in ranges.items():
        contenders = {}
        for value in values:
            now = base | {letter: value}
            causal_lm = workload.policy(workload.config_of(shape(settings, 128, 4, now["V"])))
            rows = workload.shaped_rows(now["B"], now["T"] // 2, now["T"] // 2, 512)
            one = training("var", causal_lm, rows, now["B"], tokenizer, settings)
            contenders[f"{value:06d}"] = lambda one=one: one.step(0) and None
        times = alternate(settings.rounds, **contenders)
        medians = [statistics.median(times[f"{value:06d}"]) for value in values]
        exponent = slope([math.log(v) for v in values], [math.log(t) for t in medians])
        note = ", ".join(f"{value:,}: {1000 * t:.0f} ms" for value, t in zip(values, medians))
        others = ", ".join(f"{k} = {v:,}" for k, v in base.items() if k != letter)
        lines.append({"what": f"time of a step ~ {letter}^p ({others})", "target": None, "value": exponent, "unit": " = p", "note": note})
    return lines


def slope(x, y):
    """Of the least-squares line through the points."""
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


