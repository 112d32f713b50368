"""Two ways to choose the next recipe: planner=bottleneck against planner=optuna, by trials and by time.

    python benchmarks/search.py planner.max_trials=24 --folder search_digits --seeds 0 1 2
    python benchmarks/search.py experiment=cifar10 data.train=... --folder search_cifar10    (paths as in the README)
    python benchmarks/search.py --folder search_digits --plot-only

Both planners of a seed share one store. A trial is charged with the recorded seconds of all that it needed and none
before it in its run, also where the other planner's run had it made: what is compared is what each would have cost
alone, but nothing is trained twice. The curve is the fastest recipe so far that holds every constraint, as a ratio to
the untouched model in its best engine, measured in turns: beside a model that is a hundred times slower, as eager
PyTorch is, what else the machine does changes the ratio by factors. Writes `search.json` and `search.svg` into the
folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

PLANNERS = ("bottleneck", "optuna")
COLORS = {"bottleneck": "tab:blue", "optuna": "tab:orange"}
AXES = {"seconds": "recorded seconds of the trials", "trials": "trials"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs, stores and results are left")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS), choices=PLANNERS)
    parser.add_argument("--plot-only", action="store_true", help="of what lies in the folder")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if not arguments.plot_only:
        for seed in arguments.seeds:
            for planner in arguments.planners:
                run(arguments.folder, planner, seed, arguments.overrides)
    runs = [found for file in sorted(arguments.folder.glob("*-*/summary.json")) if (found := read(file))]
    (arguments.folder / "search.json").write_text(json.dumps(runs, indent=1) + "\n")
    plot(runs, arguments.folder / "search.svg")
    show(runs)


def run(folder: Path, planner: str, seed: int, overrides: Iterable[str]) -> None:
    """One optimisation, where it is not there yet."""
    left = folder / f"{planner}-{seed}"
    if (left / "summary.json").is_file():
        return
    where = [f"hydra.run.dir={left.absolute()}", f"store.folder={(folder / f'store-{seed}').absolute()}"]
    chosen = [f"planner={planner}", f"seed={seed}", "tracking=none"]
    command = [sys.executable, "-m", "hasten.cli", "optimize", *chosen, *where, *overrides]
    subprocess.run(command, check=True, timeout=3 * 3600)


def read(file: Path) -> dict[str, Any]:
    """What a run tells: its curve, and its best with the certificate."""
    summary = json.loads(file.read_text())
    planner, _, seed = file.parent.name.rpartition("-")
    trials = summary["trials"]
    return {
        "experiment": summary["experiment"],
        "planner": planner,
        "seed": int(seed),
        "stopped": summary["stopped"],
        "best": " ".join(summary["best"]["overrides"]),
        "speedup": summary["speedup"],
        "certificate": summary["certificate"]["statement"],
        "certified": summary["certificate"]["held"],
        "engine": summary["engine_reference"],
        "curve": curve(trials),
        "trials": [
            {
                "number": trial["number"],
                "strategy": trial["strategy"],
                "edit": trial["edit"],
                "verdict": trial["verdict"],
                "holds": trial["holds"],
                "reason": trial["reason"],
                "seconds": trial["seconds"],
                "speedup": (trial["evaluation"] or {}).get("speedup"),
            }
            for trial in trials
        ],
    }


def curve(trials: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """After each trial: how many there were, what they cost, and the best so far that holds, as the loop judged it."""
    measured = [trial["evaluation"]["speedup"] for trial in list(trials)[1:] if trial["evaluation"]]
    eager = median(ratios["engine"]["value"] / ratios["eager"]["value"] for ratios in measured)
    found = [{"trials": 0, "seconds": 0.0, "speedup": eager}]
    for trial in list(trials)[1:]:
        last = found[-1]
        evaluation = trial["evaluation"]
        better = trial["verdict"] == "accepted" and trial["holds"]
        found.append(
            {
                "trials": last["trials"] + 1,
                "seconds": last["seconds"] + trial["seconds"],
                "speedup": evaluation["speedup"]["engine"]["value"] if better else last["speedup"],
            }
        )
    return found


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(AXES), figsize=(10, 4), sharey=True)
    for place, (axis, label) in zip(places, AXES.items(), strict=True):
        for planner in PLANNERS:
            mine = [each for each in runs if each["planner"] == planner]
            for each in mine:
                points = each["curve"]
                xs, ys = [it[axis] for it in points], [it["speedup"] for it in points]
                place.step(xs, ys, where="post", color=COLORS[planner], alpha=0.35, linewidth=1)
            ends = sorted({it[axis] for each in mine for it in each["curve"]})
            if mine:
                middle = [median(at(each["curve"], axis, end) for each in mine) for end in ends]
                place.step(ends, middle, where="post", color=COLORS[planner], linewidth=2, label=f"planner={planner}")
        place.set(xlabel=label, yscale="log")
        place.grid(visible=True, which="both", alpha=0.2)
    places[0].set_ylabel("speed-up over the best untouched engine")
    places[0].legend(frameon=False)
    seeds = len({each["seed"] for each in runs})
    figure.suptitle(f"{runs[0]['experiment']}: each seed, and their median ({seeds})" if runs else "")
    figure.tight_layout()
    figure.savefig(file)
    figure.savefig(file.with_suffix(".png"), dpi=120)


def at(points: list[dict[str, float]], axis: str, end: float) -> float:
    """The best of a run that there was by then."""
    return [point["speedup"] for point in points if point[axis] <= end][-1]


def show(runs: Iterable[Mapping[str, Any]]) -> None:
    """The table: what was found, and when within 2 % of the run's best."""
    heads = f"{'planner':<12}{'seed':>5}{'trials':>8}{'seconds':>9}{'vs engine':>10}{'at trial':>10}{'at s':>8}"
    print(f"{heads}  certified, best")
    for each in sorted(runs, key=lambda it: (it["planner"], it["seed"])):
        points = each["curve"]
        found = next(point for point in points if point["speedup"] >= 0.98 * points[-1]["speedup"])
        print(
            f"{each['planner']:<12}{each['seed']:>5}{points[-1]['trials']:>8}{points[-1]['seconds']:>9.0f}"
            f"{points[-1]['speedup']:>10.1f}{found['trials']:>10}{found['seconds']:>8.0f}"
            f"  {'yes' if each['certified'] else 'no'}, {each['best']}"
        )


if __name__ == "__main__":
    main()
