"""The pictures of paper/reproduce.py: numbers in, a PNG and an SVG out, and the Markdown that shows the picture with what to look at. Needs matplotlib."""

from formats import InputError

COLOURS = {"DPO": "#d55e00", "DPO at 1e-4": "#cc79a7", "VAR": "#0072b2", "SFT": "#009e73", "Base": "#666666", "SFT+DPO": "#e69f00", "SFT+VAR": "#56b4e9"}


def canvas(columns=1, width=7.5, height=3.6, rows=1, **more):
    try:
        import matplotlib
    except ImportError:
        raise InputError("the figures need the optional package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "svg.fonttype": "none", "svg.hashsalt": "var"})
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", **more)


def save(figure, path, caption):
    """Write path.png and path.svg -> Markdown."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.png", dpi=150)
    figure.savefig(f"{path}.svg", metadata={"Date": None})
    pyplot.close(figure)
    return f"![{caption}]({path.parent.name}/{path.name}.png)\n\n{caption} ([SVG]({path.parent.name}/{path.name}.svg))"


def curves_figure(curves, path):
    """Figure 2. {(size, method): [[(step, reward), ...] per seed]}: a panel a size, thin lines the seeds, thick their mean."""
    sizes = list(dict.fromkeys(size for size, _ in curves))
    figure, axes = canvas(len(sizes), 9.0, 3.2, sharey=True)
    for ax, size in zip(axes, sizes):
        for (_, method), seeds in ((key, some) for key, some in curves.items() if key[0] == size and some):
            for points in seeds:
                ax.plot(*zip(*points), color=COLOURS[method], linewidth=0.7, alpha=0.5)
            steps = [step for step, _ in seeds[0]]
            ax.plot(steps, [sum(points[i][1] for points in seeds) / len(seeds) for i in range(len(steps))], color=COLOURS[method], linewidth=2.2, label=method)
        ax.set(title=f"{size} model", xlabel="optimizer step (8 responses each)")
        ax.grid(axis="y", color="#e5e5e5")
    axes[0].set_ylabel("true reward of held-out answers")
    axes[0].legend(frameon=False)
    return save(figure, path, "Validation reward along training. Look at whether a curve falls after its best point. Thin: seeds; thick: their mean.")


def lengths_figure(counts, path, limit=64):
    """Figure 3. {variant: [tokens of each response]}: a histogram a variant, one above the other."""
    figure, axes = canvas(1, 7.5, 0.8 * len(counts) + 0.6, rows=len(counts), sharex=True, sharey=True)
    for ax, (name, lengths) in zip(axes, counts.items()):
        ax.hist(lengths, bins=range(0, limit + 3, 2), weights=[100 / len(lengths)] * len(lengths), color=COLOURS[name])
        ax.axvline(sum(lengths) / len(lengths), color="black", linewidth=1)
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set_yticks([0, 50], ["0", "50 %"])
    axes[-1].set_xlabel(f"tokens of a sampled answer to a held-out prompt (limit {limit})")
    return save(figure, path, f"Lengths of sampled answers, all seeds; the line is the mean. Look for weight at the right end: text that does not end before {limit} has left the language.")


def win_figure(shares, path):
    """Figure 1. {model: (win, tie, loss) shares}: a stacked bar a model."""
    figure, ax = canvas(width=8.0, height=0.28 * len(shares) + 1.0)
    left = [0.0] * len(shares)
    for kind, colour, column in (("win", "#009e73", 0), ("tie", "#c9c9c9", 1), ("loss", "#d55e00", 2)):
        widths = [100 * share[column] for share in shares.values()]
        ax.barh(list(shares), widths, left=left, color=colour, label=kind, height=0.75)
        for y, (start, width) in enumerate(zip(left, widths)):
            if width >= 6:
                ax.text(start + width / 2, y, f"{width:.0f}", ha="center", va="center", color="black" if kind == "tie" else "white", fontsize=8)
        left = [a + b for a, b in zip(left, widths)]
    ax.invert_yaxis()
    ax.set(xlabel="% of held-out prompts, against the chosen response", xlim=(0, 100))
    ax.legend(ncols=3, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return save(figure, path, "Win, tie and loss against the chosen response of a preference pair. Compare the green ends of VAR and DPO within a size.")


def readings_figure(points, bound, path):
    """The story of Algorithm 1's readings. points: dicts with share, gap (KL(pi*, pi)), reward, partners, estimator, cost, data."""
    figure, (ax, right) = canvas(2, 9.5, 4.0)
    colours = {"paper, mean": "#0072b2", "paper, sum": "#d55e00", "monte carlo": "#009e73", "Zhat = 1": "#666666"}
    for name, colour in colours.items():
        for partners, marker in (("batch", "o"), ("group", "^")):
            for data, face in (("train", colour), ("on_policy", "none")):
                some = [p for p in points if (p["estimator"], p["partners"], p["data"]) == (name, partners, data)]
                known, look = [p for p in some if p["share"] is not None], dict(edgecolors=colour, facecolors=face, marker=marker, s=34, linewidths=0.9)
                ax.scatter([p["share"] for p in known], [p["reward"] for p in known], **look)
                right.scatter([p["gap"] for p in some], [p["objective"] for p in some], **look, label=f"{name}, {partners}" if data == "train" and some else None)
    for p in points:  # the paper's own reading, named by what a mismatched answer costs
        if (p["estimator"], p["partners"], p["data"], p["normalize"]) == ("paper, mean", "batch", "train", False):
            for axis, x, y in ((ax, "share", "reward"), (right, "gap", "objective")):
                axis.annotate(p["cost"], (p[x], p[y]), xytext=(5, 4), textcoords="offset points", fontsize=7, color="#0072b2")
    ax.set(xlabel="self_share: how much of Zhat(x) is y's own term", ylabel="true reward of held-out answers", xlim=(-0.03, 1.03))
    right.axhline(bound, color="black", linewidth=0.8, linestyle="--")
    right.plot([0], [bound], marker="*", markersize=11, color="black", clip_on=False)
    right.text(0.03, bound, "pi*: beta log Z", va="bottom", fontsize=8)
    right.set(xlabel="KL(pi*, pi), nats", ylabel="E[r] - beta KL(pi, pi_ref)", xlim=(0, None))
    right.legend(frameon=False, fontsize=7, loc="lower left")
    for axis in (ax, right):
        axis.grid(color="#eeeeee")
    return save(figure, path, "Each point is one reading of Algorithm 1 (beta 1, mean over seeds). Blue words: what a mismatched answer costs under the paper's reading. Left: follow them to the "
                "right, where the reward cancels from the weights. Right: how near pi* each reading comes. Circles take partners from other prompts (the paper), triangles from the same prompt; "
                "hollow: trained on draws of pi_ref.")  # fmt: skip
