"""Alternating timings and their ratios, peak memory of a fresh process, the machine's name, the results file, the Markdown table."""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

# ----------------------------------------------------------------------------------------------------------------------
# Time


def seconds(work):
    """How long a call takes; work that returns a float has measured itself."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    own = work()
    wait()
    return own if isinstance(own, float) else time.perf_counter() - start


def alternate(pairs, warm_up=1, **contenders):
    """Each contender once a round, every second round in reverse order -> {name: [seconds, ...]}. `warm_up` rounds come first and do not count."""
    times = {name: [] for name in contenders}
    for k in range(-warm_up, pairs):
        for name in sorted(contenders, reverse=k % 2 == 1):
            found = seconds(contenders[name])
            if k >= 0:
                times[name].append(found)
    return times


def ratio(times, ours, other):
    """Median, lowest and highest of ours/other over the rounds: a machine that slows down slows both of a round."""
    ratios = [a / b for a, b in zip(times[ours], times[other])]
    return statistics.median(ratios), min(ratios), max(ratios)


def compared(what, times, ours, other, target=None, faster=False, note=""):
    """One line of the table: the times of `ours` against those of `other`; `faster` counts other/ours instead of ours/other.

    `target` is "<= 0.35" or ">= 2.7" in the same unit.
    """
    value, low, high = ratio(times, other, ours) if faster else ratio(times, ours, other)
    medians = {"ours": statistics.median(times[ours]), "other": statistics.median(times[other])}
    return {"what": what, "target": target, "value": value, "low": low, "high": high, **medians, "rounds": len(times[ours]), "note": note}


# ----------------------------------------------------------------------------------------------------------------------
# Memory


class Peak:
    """Peak memory above weights, gradients and optimizer: `begin(model)` before a step, `end()` after it -> bytes.

    CPU: resident memory of this process, its high-water mark reset through /proc/self/clear_refs. Gradients that do not exist at `begin`
    are counted as if they did. GPU: torch's own allocator.
    """

    def begin(self, model):
        import torch

        self.cuda = next(model.parameters()).device.type == "cuda"
        to_come = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad and p.grad is None)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated() + to_come
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not look as if it were used
            Path("/proc/self/clear_refs").write_text("5")
            self.base = resident("VmRSS") + to_come

    def end(self):
        import torch

        return (torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")) - self.base


def resident(field):
    """VmRSS (now) or VmHWM (highest) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_fresh_process(job):
    """Run `bench/jobs.py JOB` where nothing has been allocated yet -> what it prints, from JSON."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("jobs.py")), json.dumps(job)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Machine, results, table


def machine(device):
    """Where this ran, in words."""
    import accelerate
    import torch
    import transformers

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    name = f"{os.cpu_count()} x {cpu}, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"


def store(path, row, result):
    """Put the result of one row into the JSON file, beside those of earlier runs."""
    path = Path(path)
    found = json.loads(path.read_text()) if path.exists() else {}
    found[row] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def verdict(line):
    """"met", or by how much the target is missed."""
    if not line["target"]:
        return ""
    sign, number = line["target"].split()
    number, value = float(number), line["value"]
    met = value <= number if sign == "<=" else value >= number
    return "met" if met else f"missed ({value / number:.2f}x)"


def duration(value):
    return "" if value is None else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def table(found, order):
    """The stored results as one Markdown table, with the conditions of each run below."""
    lines = ["| what | target | measured | lowest to highest | ours | other | |", "|---|---|---|---|---|---|---|"]
    about = {}
    for name in order:
        if name not in found:
            lines.append(f"| `{name}` | | not measured | | | | |")
            continue
        result = found[name]
        about.setdefault((result["machine"], result["date"][:10], result["precision"]), []).append((name, result))
        for line in result["lines"]:
            number = f"{line['value']:.3g}{line.get('unit', 'x')}" if line["value"] is not None else line.get("text", "")
            spread = f"{line['low']:.3g} to {line['high']:.3g}, {line['rounds']} rounds" if line.get("low") is not None else ""
            after = " ".join(filter(None, [verdict(line), line.get("note", "")]))
            cells = [line["what"], line["target"] or "", number, spread, duration(line.get("ours")), duration(line.get("other")), after]
            lines.append("| " + " | ".join(cells) + " |")
    for (where, day, precision), rows in about.items():
        load = max(result["load"] for _, result in rows)
        lines.append(f"\n{', '.join(name for name, _ in rows)}: {where}; precision {precision}; {day}; load before a row at most {load:.1f}.")
    return "\n".join(lines)
