"""The plots of a run, as SVG files that depend on the records only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.contenders.libraries import DIFFUSERS, LIBRARIES, LIGHTNING, TORCH_EMA
from bench.contenders.peers import FOREACH, OURS, STEP
from bench.harness.cases import REAL_NETS, RESNET50, Unavailable
from bench.harness.contender import COPY
from bench.harness.growth import growth
from bench.harness.records import Cache, Record, Run
from bench.pages.tables import IN_SHORT

# fmt: off
_COLOURS = (
    "#c0392b", "#7f8c8d", "#2980b9", "#8e44ad", "#27ae60", "#d68910", "#16a085",
    "#5d6d7e", "#a04000", "#117864", "#e59aa2", "#1b2631", "#a9cce3", "#c39bd3",
)
# fmt: on
#: The implementations in the plots.
_IN_BARS = (OURS, COPY, FOREACH, *LIBRARIES)


def draw(run: Run, folder: Path) -> list[Path]:
    """Write every plot for which the run has records; return the files.

    Raises:
        Unavailable: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise Unavailable(f"plots need matplotlib, which is not installed ({error})") from None
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    from matplotlib import pyplot

    written = []
    options: dict[Any, Any] = {
        "svg.hashsalt": "fastema",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
    }
    plots: dict[str, Callable[[Any, Run], Any]] = {
        "front": _front,
        "update": _updates,
        "scale": _growth,
        "train_step": _shares,
    }
    with pyplot.rc_context({**options, "axes.spines.right": False}):
        for name, plot in plots.items():
            figure = plot(pyplot, run)
            if figure is None:
                continue
            path = folder / f"{name}.svg"
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            written.append(path)
    return written


def _front(pyplot: Any, run: Run) -> Any:
    """Plot the front page's two panels: an update, and a swap in and out, of ResNet-50."""
    figure, all_axes = pyplot.subplots(1, 2, figsize=(8, 2.2))
    peers_of = {"update": IN_SHORT, "swap": (OURS, TORCH_EMA, DIFFUSERS, LIGHTNING)}
    titles = {"update": "an update, ms", "swap": "average into the model and out, ms (log)"}
    for axes, (bench, entrants) in zip(all_axes, peers_of.items(), strict=True):
        cache: Cache = "warm" if bench == "swap" else "cold"
        medians = {peer.name: run.median(bench, RESNET50, peer.name, cache) for peer in entrants}
        times = {name: median / 1000 for name, median in medians.items() if median}
        if OURS.name not in times:
            return None
        bars = axes.barh(list(times), list(times.values()), color=[_COLOURS[0], *["#b0b7bd"] * (len(times) - 1)])
        axes.bar_label(bars, [f"{time:.3g}" for time in times.values()], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log" if bench == "swap" else "linear")
        axes.margins(x=0.15)
        axes.set_title(titles[bench], loc="left", fontsize=9)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    figure.tight_layout()
    return figure


def _updates(pyplot: Any, run: Run) -> Any:
    """Plot an update as a multiple of copying the model, a group of bars per net."""
    cases = [net for net in REAL_NETS if run.median("update", net, COPY.name)]
    if not cases:
        return None
    names = [peer.name for peer in _IN_BARS if any(run.median("update", net, peer.name) for net in cases)]
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    width = 0.85 / len(names)
    for index, name in enumerate(names):
        heights = [
            (run.median("update", net, name) or float("nan")) / (run.median("update", net, COPY.name) or 1)
            for net in cases
        ]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, heights, width, label=name, color=_COLOURS[index % len(_COLOURS)])
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("time of an update,\ncopies of the model")
    axes.set_title(f"float32, cold cache, {run.environment['device']}", loc="left", fontsize=9)
    axes.legend(fontsize=7, ncols=3, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.1))
    return figure


def _growth(pyplot: Any, run: Run) -> Any:
    """Plot the three series of `bench.scale`."""
    lines = {one.impl: one for one in growth(run.records)}
    if not lines:
        return None
    colours = {impl: _COLOURS[index % len(_COLOURS)] for index, impl in enumerate(_in_order(lines))}
    panels: tuple[tuple[str, str, str, Callable[[Record], int], float], ...] = (
        ("scale: tensors", "tensors of 16 elements", "us a tensor", lambda record: record.tensors, 1.0),
        ("scale: parameters", "parameters in one tensor", "ns a parameter", lambda record: record.params, 1e3),
        ("scale: elements", "elements in each of 1,000 tensors", "us a tensor", _elements, 1.0),
    )
    figure, all_axes = pyplot.subplots(1, 3, figsize=(11, 3.4))
    for axes, (bench, across, up, x_of, scale) in zip(all_axes, panels, strict=True):
        for impl, colour in colours.items():
            found = sorted(
                (x_of(record), record.median_us / (1000 if bench.endswith("elements") else x_of(record)) * scale)
                for record in run.records
                if record.bench == bench and record.impl == impl and record.median_us
            )
            axes.plot(*zip(*found, strict=True), ".-", color=colour, linewidth=1, markersize=4, label=impl)
            bend = lines[impl].bend
            if bench.endswith("elements") and bend:
                axes.axvline(bend, color=colour, linewidth=0.5, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
    all_axes[2].set_title("dotted: where each bends", loc="right", fontsize=8)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0))
    figure.tight_layout()
    return figure


def _elements(record: Record) -> int:
    return record.params // record.tensors


def _in_order(found: dict[str, Any]) -> list[str]:
    return [peer.name for peer in _IN_BARS if peer.name in found]


def _shares(pyplot: Any, run: Run) -> Any:
    """Plot shares of a training step, a group of bars per model."""
    cases = list(dict.fromkeys(record.case for record in run.records if record.bench == "train_step"))
    if not cases:
        return None
    names = _in_order({record.impl: record for record in run.records if record.bench == "train_step"})
    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.18 * len(names) * len(cases)))
    height = 0.85 / len(names)
    for index, name in enumerate(names):
        shares = []
        for case in cases:
            step, update = run.median("train_step", case, STEP), run.median("train_step", case, name)
            shares.append(100 * update / (step + update) if step and update else float("nan"))
        places = [place + (index - (len(names) - 1) / 2) * height for place in range(len(cases))]
        axes.barh(places, shares, height, label=name, color=_COLOURS[index % len(_COLOURS)])
    axes.invert_yaxis()
    axes.set_yticks(range(len(cases)), cases)
    axes.set_xlabel("share of a training step, %")
    axes.legend(fontsize=7, frameon=False)
    return figure
