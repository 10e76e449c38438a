"""The miniature study as it is registered (registration.md): runs its cells and tests its claims.

    python runs/reference/study/study.py run       # the cells that runs.csv does not have yet
    python runs/reference/study/study.py report    # claims.csv, claims.svg, and the tables of the page

What a cell measured is a line of runs.csv, next to this file: with that file, another machine goes on with the others.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

from matplotlib.figure import Figure as Canvas
from rich.progress import MofNCompleteColumn, Progress
from scipy import stats

from prism_deco.commands.common import count
from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError
from prism_deco.files import check_writable, write_whole
from prism_deco.logs import log_console
from prism_deco.report.cells import VAL_LOSS
from prism_deco.report.collect import read_cell
from prism_deco.report.plotting import settings, to_svg
from prism_deco.report.stats import holm, seed_interval
from prism_deco.report.tabular import comma_separated
from prism_deco.sweep import parse
from prism_deco.sweep.expand import SweepCell, expand
from prism_deco.sweep.spec import Spec

HERE = Path(__file__).parent
RATE = "recipe.lr"
BOXES = ("mini_refcoco", "mini_refcocoplus", "mini_refcocog")
QUESTIONS = ("mini_pope", "mini_vizwiz", "mini_vqav2", "mini_gqa", "mini_textvqa")
SCORES = (*BOXES, *QUESTIONS)
COLUMNS = (
    *("cell", "arm", "seed", "lr", "steps", "samples", "val_loss", *SCORES, "energy_in_box", "probe"),
    *("cpu_seconds", "data_hash", "code_version"),
)
"""Of runs.csv: scores, relevance and probe in per cent."""

TEXTS = ("cell", "arm", "data_hash", "code_version")
"""The columns that are not numbers."""

BLIND = "steps-avgpool-blind"
"""The arm that is trained without its images."""

PROBED = ("steps-avgpool", "steps-qformer", "steps-c_abstractor")
"""The arms whose visual tokens are read without the LLM."""

Row = Mapping[str, str]


@dataclass(frozen=True)
class Contrast:
    """A test of a claim: the mean over seeds of `first` minus `second` is above `null`.

    Attributes:
        minus: what is taken off that difference, `first` minus `second` of two other arms.
        measure: `mean` over the eight benchmarks, or a column of runs.csv.
        equal: steps, or compute; `both` where they are the same runs.
    """

    claim: str
    first: str
    second: str
    minus: tuple[str, str] | None = None
    measure: str = "mean"
    null: float = 0.0
    equal: str = "steps"


_C, _Q, _D, _L = ("c_abstractor", "qformer", "d_abstractor", "linear")
_QUARTER, _MARGIN = "6 A quarter of the tokens costs little, less costs more", 2.5
CONTRASTS = (
    Contrast("1 Average pooling beats the C-Abstractor", "steps-avgpool", f"steps-{_C}"),
    Contrast("2 Average pooling beats the Q-Former", "steps-avgpool", f"steps-{_Q}"),
    Contrast("3 Average pooling beats the D-Abstractor", "steps-avgpool", f"steps-{_D}"),
    Contrast("4 Linear, uncompressed, is the upper bound", f"steps-{_L}", "steps-avgpool"),
    Contrast("4 Linear, uncompressed, is the upper bound", f"compute-{_L}", "steps-avgpool", equal="compute"),
    Contrast("5 Average pooling beats max pooling", "steps-avgpool", "steps-maxpool", equal="both"),
    Contrast(_QUARTER, "steps-avgpool", f"steps-{_L}", null=-_MARGIN),
    Contrast(_QUARTER, "steps-avgpool", "tokens-avgpool-4", null=_MARGIN),
    Contrast("7 Queries of their own abstract twice", "steps-avgpool", f"steps-{_Q}", measure="energy_in_box"),
    Contrast("8 Queries lose what the patches hold (probe)", "steps-avgpool", f"steps-{_Q}", measure="probe"),
    Contrast("8 Queries lose what the patches hold (probe)", "steps-avgpool", f"steps-{_C}", measure="probe"),
    Contrast("9 An LLM that has read text learns more", "steps-avgpool", "scratch-avgpool"),
    Contrast(
        "10 Average pooling gains more from such an LLM",
        "steps-avgpool",
        f"steps-{_C}",
        minus=("scratch-avgpool", f"scratch-{_C}"),
    ),
)
"""Every test of the study. Holm's adjustment is over all of them."""


def arm_of(cell: SweepCell) -> str:
    """A cell's name without its seed and its learning rate: the cells of an arm differ in nothing else."""
    return "-".join(part for part in cell.id.split("-") if not part.startswith(("seed", "lr")))


def read_runs(path: Path) -> dict[str, dict[str, str]]:
    """The lines of a runs.csv by cell; none where there is no file yet.

    Raises:
        UsageError: the file was cut or damaged.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_bytes().decode()
        lines = list(csv.reader(text.splitlines(keepends=True), strict=True))
        if not lines or lines.pop(0) != list(COLUMNS):
            raise ValueError("its columns are not those of this script")
        runs: dict[str, dict[str, str]] = {}
        for number, line in enumerate(lines, start=2):
            row = dict(zip(COLUMNS, line, strict=False))
            if len(line) != len(COLUMNS) or (number == len(lines) + 1 and not text.endswith("\n")):
                raise ValueError(f"line {number} is cut or too long")
            if row["cell"] in runs:
                raise ValueError(f"line {number} repeats the cell {row['cell']}")
            wrong = [name for name in COLUMNS if name not in TEXTS and not _is_number(row[name], name != "val_loss")]
            if wrong:
                raise ValueError(f"{wrong[0]} is {row[wrong[0]]!r} in line {number}")
            runs[row["cell"]] = row
    except (csv.Error, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}. Restore it from a copy, or take that line out.") from error
    return runs


def _is_number(text: str, or_empty: bool) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return or_empty and not text


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps the folder's runs.csv to this process; `UsageError` if another one adds lines to it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another process runs a study into {folder}: wait for it to end, or give it more --jobs."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def best_rate(arm: str, ladder: Sequence[SweepCell], runs: Mapping[str, Row]) -> str | None:
    """The learning rate of a ladder's arm with the lowest mean `val/loss`; None while one of its cells is to run."""
    own = [cell for cell in ladder if arm_of(cell) == arm]
    if not own:
        raise UsageError(f"The study has no ladder {arm}.")
    if any(cell.id not in runs for cell in own):
        return None
    losses = defaultdict(list)
    for cell in own:
        losses[cell.settings[RATE]].append(float(runs[cell.id]["val_loss"]))
    return min(losses, key=lambda rate: fmean(losses[rate]))


def command_of(cell: SweepCell, cells: Sequence[SweepCell], runs: Mapping[str, Row]) -> list[str] | None:
    """Settings of `prism-deco train`; None while the learning rate is still to be chosen."""
    if not cell.choose:
        return list(cell.overrides)
    part = cell.choose[RATE]
    rate = best_rate(f"{part}-{cell.labels['projector']}", [one for one in cells if one.part == part], runs)
    return None if rate is None else [*cell.overrides, f"{RATE}={rate}"]


def run(name: str, table: Path, jobs: int, only: Sequence[str] = ()) -> None:
    """Trains the cells of a sweep that a table does not have, and adds each to it when it is done.

    Args:
        only: arms to run; none is all.

    Raises:
        UsageError: the sweep, the arms or the table do not fit, or a cell has failed; the others have run.
    """
    spec = parse([name])
    cells = expand(spec)
    arms = {arm_of(cell) for cell in cells}
    for arm in only:
        if arm not in arms:
            raise unknown("arm", arm, arms)
    unrated = [cell.id for cell in cells if RATE not in cell.settings and RATE not in cell.choose]
    if unrated:
        raise UsageError(
            f"{unrated[0]} of the sweep {name} neither sets nor chooses {RATE}: run it by `prism-deco sweep`."
        )
    check_writable(table.parent, "Name another folder with --folder.")
    table.parent.mkdir(parents=True, exist_ok=True)
    with alone(table.parent):
        runs = read_runs(table)
        others = runs.keys() - {cell.id for cell in cells}
        if others:
            raise UsageError(
                f"{table} has {len(others)} cells that the sweep {name} does not have, such as {min(others)}: name "
                "another folder with --folder."
            )
        failed = _train(spec, cells, runs, table, jobs, only)
    if failed:
        raise UsageError(f"{', '.join(sorted(failed))} failed: see CELL.log in {spec.folder}, then run this again.")
    waiting = {
        arm_of(cell): cell.choose[RATE] for cell in cells if cell.choose and command_of(cell, cells, runs) is None
    }
    if waiting and (not only or waiting.keys() & set(only)):
        arm = min(waiting.keys() & set(only or waiting))
        raise UsageError(f"{arm} chooses its learning rate by the part {waiting[arm]}: run the arms of that, too.")


def _train(
    spec: Spec, cells: Sequence[SweepCell], runs: dict[str, dict[str, str]], table: Path, jobs: int, only: Sequence[str]
) -> list[str]:
    """`run`, with what the table has; returns the cells that failed."""
    lock, failed, processes = Lock(), [], set[int]()
    progress = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=log_console())
    task = progress.add_task("Cells", total=len(cells), completed=len(runs))

    def train(cell: SweepCell, overrides: list[str]) -> None:
        folder, log = spec.folder / cell.id, spec.folder / f"{cell.id}.log"
        begun = folder.exists()  # by an earlier call, whose seconds are not known
        place = [f"runs_dir={spec.folder}", f"run_id={cell.id}"]
        seconds, code = _measured(["train", *overrides, *place], log, processes)
        if code == 0 and arm_of(cell) in PROBED:
            _, code = _measured(["probe", str(folder)], log, processes)
        with lock:
            try:
                row = result_of(cell, overrides, folder, None if begun else seconds) if code == 0 else None
            except UsageError as error:
                progress.console.print(f"{cell.id}: {error}", markup=False)
                row = None
            if row is None:
                failed.append(cell.id)
                return
            runs[cell.id] = row
            order = [runs[one.id] for one in cells if one.id in runs]
            write_whole(table, comma_separated(order))
            progress.console.print(f"{len(order)} of {len(cells)} cells: {cell.id}, {seconds:.0f} CPU s")
            progress.update(task, completed=len(order))

    spec.folder.mkdir(parents=True, exist_ok=True)
    with progress:
        for part in (False, True):  # the ladders come first: the others choose by them
            todo = [
                (cell, overrides)
                for cell in cells
                if bool(cell.choose) == part and cell.id not in runs and (not only or arm_of(cell) in only)
                if (overrides := command_of(cell, cells, runs)) is not None
            ]
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    list(pool.map(lambda one: train(*one), todo))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    for process in tuple(processes):  # it saves a checkpoint
                        with suppress(ProcessLookupError):
                            os.kill(process, signal.SIGTERM)
                    raise
    return failed


def _measured(arguments: Sequence[str], log: Path, processes: set[int]) -> tuple[float, int]:
    """Runs `prism-deco`; its CPU seconds and its exit code. Its process is among `processes` while it runs."""
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, "-m", "prism_deco.cli", *arguments], stdout=file, stderr=file)
        processes.add(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        processes.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, process.returncode


def result_of(cell: SweepCell, overrides: Iterable[str], folder: Path, seconds: float | None) -> dict[str, str]:
    """A line of runs.csv, from a finished run folder.

    Raises:
        UsageError: the folder cannot be read, or has no validation loss.
    """
    measured = read_cell(folder)
    if not measured.manifest or VAL_LOSS not in measured.curves:
        raise UsageError(f"{folder} has no {VAL_LOSS}. {measured.reason}")
    rate = dict(one.split("=", 1) for one in overrides)[RATE]
    scores = next(iter(measured.scores.values()), {})
    found: dict[str, Any] = {
        "cell": cell.id,
        "arm": arm_of(cell),
        "seed": cell.config.seed,
        "lr": rate,
        "val_loss": measured.curves[VAL_LOSS][-1][1],
        "cpu_seconds": "" if seconds is None else round(seconds),
        **{key: measured.manifest[key] for key in ("steps", "samples", "data_hash", "code_version")},
        **{name: score.percent for name, score in scores.items()},
    }
    if measured.relevance:
        found["energy_in_box"] = 100 * measured.relevance["methods"]["r-gae"]["energy_in_box"]["mean"]
    probe = folder / "probe" / "probe.json"
    if probe.is_file():
        read = json.loads(probe.read_text(encoding="utf-8"))["readers"]["tokens"]["mlp"]
        found["probe"] = 100 * fmean(one["mean"] for one in read.values())
    return {column: str(found.get(column, "")) for column in COLUMNS}


def value(row: Row, measure: str) -> float:
    """Of a run: a mean of its scores, or a column."""
    groups = {"mean": SCORES, "boxes": BOXES, "questions": QUESTIONS}
    names = groups.get(measure, (measure,))
    missing = [name for name in names if not row[name]]
    if missing:
        raise UsageError(f"{row['cell']} has no {missing[0]} in runs.csv: take its line out and run it again.")
    return fmean(float(row[name]) for name in names)


def by_seed(runs: Mapping[str, Row], arm: str, measure: str) -> dict[str, float]:
    """What the runs of an arm measured."""
    return {row["seed"]: value(row, measure) for row in runs.values() if row["arm"] == arm}


def unseeing_arms(runs: Mapping[str, Row]) -> set[str]:
    """The arms one of whose seeds has a validation loss above the lowest of the blind model's."""
    lowest = min((float(row["val_loss"]) for row in runs.values() if row["arm"] == BLIND), default=float("inf"))
    return {row["arm"] for row in runs.values() if row["arm"] != BLIND and float(row["val_loss"]) > lowest}


def claim_records(runs: Mapping[str, Row], contrasts: Sequence[Contrast] = CONTRASTS) -> list[dict[str, Any]]:
    """A record per contrast: effect, Student's 95 % interval over seeds, p of the t test against `null`, p adjusted by
    Holm's method, the verdict (`holds` or `reversed` where the adjusted p is below 0.05), and the arms that have not
    learnt to see (`unseeing_arms`).

    Raises:
        UsageError: an arm lacks seeds that another one has, or runs saw different data.
    """
    if len({row["data_hash"] for row in runs.values()}) > 1:
        raise UsageError("The runs saw different data: run the study again from the start.")
    unseeing = unseeing_arms(runs)
    records = []
    for contrast in contrasts:
        arms = [contrast.first, contrast.second, *(contrast.minus or ())]
        values = [by_seed(runs, arm, contrast.measure) for arm in arms]
        if len({frozenset(one) for one in values}) > 1 or len(values[0]) < 2:
            raise UsageError(f"{contrast.claim}: not every seed of {', '.join(arms)} has run yet.")
        signs = (1, -1, -1, 1)
        effects = [sum(s * one[seed] for s, one in zip(signs, values, strict=False)) for seed in sorted(values[0])]
        low, high = seed_interval(effects)
        result: Any = stats.ttest_1samp(effects, contrast.null)
        minus = f" - ({' - '.join(contrast.minus)})" if contrast.minus else ""
        records.append(
            {
                "claim": contrast.claim,
                "contrast": f"{contrast.first} - {contrast.second}{minus}",
                "measure": contrast.measure,
                "equal": contrast.equal,
                "null": contrast.null,
                "seeds": len(effects),
                "effect": fmean(effects),
                "low95": low,
                "high95": high,
                "p": float(result.pvalue),
                "unseeing": " ".join(arm for arm in arms if arm in unseeing),
            }
        )
    for record, adjusted in zip(records, holm([one["p"] for one in records]), strict=True):
        significant = adjusted is not None and adjusted < 0.05
        direction = "holds" if record["effect"] > record["null"] else "reversed"
        record |= {"p_holm": adjusted, "verdict": direction if significant else "not resolved"}
    return records


def claims_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Every contrast, as Markdown."""
    lines = ["| claim | contrast | effect (95 % interval) | p (Holm) | verdict |", "|---|---|---|--:|---|"]
    for one in records:
        null = f" > {one['null']:+g}" if one["null"] else ""
        effect = f"{one['effect']:+.1f} ({one['low95']:+.1f} to {one['high95']:+.1f}){null}"
        name = f"`{one['contrast']}`" + (f", {one['measure']}" if one["measure"] != "mean" else "")
        p = "<0.001" if one["p_holm"] < 0.001 else f"{one['p_holm']:.3f}"
        before = f"{one['unseeing']} not having learnt to see, " if one["unseeing"] else ""
        lines.append(f"| {one['claim']} | {name} | {effect} | {p} | {before}{one['verdict']} |")
    return "\n".join(lines)


def arms_table(runs: Mapping[str, Row]) -> str:
    """Means over seeds of every arm that was tested: its rate, scores, validation loss and cost, as Markdown."""
    lines = [
        "| arm | lr | steps | mean | boxes | questions | val/loss (least to most) | CPU s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in runs.values()):
        own = [row for row in runs.values() if row["arm"] == arm]
        if not own[0]["mini_pope"]:
            continue
        losses = [float(row["val_loss"]) for row in own]
        means = " | ".join(f"{fmean(value(row, name) for row in own):.1f}" for name in ("mean", "boxes", "questions"))
        costs = [float(row["cpu_seconds"]) for row in own if row["cpu_seconds"]]
        cost = f"{fmean(costs):.0f}" if costs else ""
        span = f"{fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        lines.append(f"| `{arm}` | {own[0]['lr']} | {own[0]['steps']} | {means} | {span} | {cost} |")
    return "\n".join(lines)


def ladder_table(runs: Mapping[str, Row]) -> str:
    """Mean `val/loss` of every rung, the chosen one bold, as Markdown."""
    losses: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in runs.values():
        if "ladder" in row["arm"]:
            losses[row["arm"]][row["lr"]].append(float(row["val_loss"]))
    rates = sorted({rate for own in losses.values() for rate in own}, key=float)
    lines = [f"| arm | {' | '.join(rates)} |", "|---|" + "--:|" * len(rates)]
    for arm, own in losses.items():
        means = {rate: fmean(found) for rate, found in own.items()}
        best = min(means, key=lambda rate: means[rate])
        shown = [f"{means[rate]:.3f}" if rate in means else "" for rate in rates]
        shown[rates.index(best)] = f"**{shown[rates.index(best)]}**"
        lines.append(f"| `{arm}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def forest(records: Sequence[Mapping[str, Any]]) -> bytes:
    """An SVG of every effect with its interval and its null."""
    with settings():
        figure = Canvas(figsize=(8, 0.3 * len(records) + 0.8), layout="constrained")
        ax = figure.subplots()
        ax.axvline(0, color="#000000", linewidth=0.9)
        for y, one in enumerate(records):
            color = {"holds": "#0072B2", "reversed": "#D55E00"}.get(one["verdict"], "#777777")
            ax.plot([one["low95"], one["high95"]], [y, y], color=color)
            ax.plot([one["effect"]], [y], "o", color=color)
            if one["null"]:
                ax.plot([one["null"]], [y], "|", color="#000000", markersize=12)
        ax.set_yticks(range(len(records)), [f"{one['claim']} ({one['equal']})" for one in records], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel("points")
        return to_svg(figure)


def report(folder: Path) -> str:
    """Writes claims.csv and claims.svg next to a runs.csv; returns the page's tables."""
    runs = read_runs(folder / "runs.csv")
    if not runs:
        raise UsageError(f"{folder / 'runs.csv'} has no cells: `study.py run` trains them.")
    check_writable(folder, "Copy its runs.csv to another folder, and name that with --folder.")
    records = claim_records(runs)
    write_whole(folder / "claims.csv", comma_separated(records))
    write_whole(folder / "claims.svg", forest(records))
    return "\n\n".join((claims_table(records), arms_table(runs), ladder_table(runs)))


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train the cells that runs.csv does not have yet")
    running.add_argument("arms", nargs="*", help="only these, for example steps-avgpool (default: all)")
    running.add_argument("--jobs", type=count, default=2, help="cells at a time (default: %(default)s)")
    running.add_argument("--sweep", default="study", help="a choice of conf/sweep, or a YAML (default: %(default)s)")
    for command in (running, commands.add_parser("report", help="test the claims")):
        command.add_argument("--folder", type=Path, default=HERE, help="of runs.csv (default: next to this file)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.command == "run":
            run(arguments.sweep, arguments.folder / "runs.csv", arguments.jobs, arguments.arms)
        else:
            print(report(arguments.folder))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
