"""The committed results are whole, and the texts beside them and in the README quote them."""

import csv
import re
import statistics
from functools import cache
from pathlib import Path

import pytest
from scipy import stats

from prism_deco.config.schema import EvaluateConfig
from prism_deco.sweep import parse
from prism_deco.sweep.expand import expand

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "runs" / "reference"
STUDY = REFERENCE / "study"
SWEEPS = ("study", "mini_projectors", "mini_compression", "mini_pooling", "mini_convergence")


@cache
def rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(path):
    """Every Markdown table of a page: its rows without the heading, as stripped cells."""
    found = re.findall(r"^\|[ :|-]+\|\n((?:\|.*\|\n)+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [[[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in one.splitlines()] for one in found]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_cell_of_a_sweep_is_in_its_report(name):
    cells = rows(REFERENCE / name / "cells.csv")
    assert {cell["state"] for cell in cells} == {"done"}
    assert {cell["cell"] for cell in cells} == {cell.id for cell in expand(parse([name]))}
    # One version of the code, whose results these are, and one world.
    assert len({cell["code_version"] for cell in cells}) == 1
    assert len({cell["data_hash"] for cell in cells}) == 1


@pytest.mark.parametrize("name", SWEEPS)
def test_a_page_names_no_machine(name):
    for path in [path for path in (REFERENCE / name).rglob("*.*") if path.suffix != ".pyc"]:
        assert not re.search(r"(?<![\w.])/(work|home|root|tmp|Users)/", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", SWEEPS)
def test_scores_and_their_intervals_are_percentages(name):
    for row in rows(REFERENCE / name / "scores.csv"):
        assert 0 <= float(row["low95"]) <= float(row["score"]) <= float(row["high95"]) <= 100, row


def _verdict(kinds):
    both = {"holds", "reversed"} <= kinds
    return "mixed" if both else next(iter(kinds)) if len(kinds) == 1 else "not resolved"


def verdicts():
    """Claim -> what equal -> its verdict, from the contrasts that judge it."""
    found = {}
    for row in rows(STUDY / "claims.csv"):
        if row["judged"] == "True":
            found.setdefault(row["claim"], {}).setdefault(row["equal"], set()).add(row["verdict"])
    return {claim: {equal: _verdict(seen) for equal, seen in kinds.items()} for claim, kinds in found.items()}


def test_the_verdicts_follow_from_the_intervals():
    for row in rows(STUDY / "claims.csv"):
        assert row["seeds"] == "1 2 3 4 5"
        null, low, high = -float(row["margin"]), float(row["low95"]), float(row["high95"])
        assert row["verdict"] == ("holds" if low > null else "reversed" if high < null else "not resolved")
        assert float(row["effect"]) == pytest.approx(float(row["first_mean"]) - float(row["second_mean"]), abs=1e-3)


BOXES = ("mini_refcoco", "mini_refcocoplus", "mini_refcocog")
QUESTIONS = ("mini_pope", "mini_vizwiz", "mini_vqav2", "mini_gqa", "mini_textvqa")
NAMES = BOXES + QUESTIONS
PARTS = ("steps", "compute")
LABELS = ("linear", "avgpool", "maxpool", "qformer", "c_abstractor", "d_abstractor", "avgpool (blind)")
MEASURES = {"mean": NAMES, "boxes": BOXES, "questions": QUESTIONS} | {
    name: (f"relevance {name}",) for name in ("energy_in_box", "pointing", "query_redundancy", "query_spread")
}


def runs(part, projector, tokens="", blind=False):
    """Seed -> measure -> value, in per cent but for the loss, of runs of the study, from the scores of single runs."""
    row = "mini_siglip + mini_qwen2" + (f", num_tokens={tokens}" if tokens else "")
    found = {}
    for one in rows(STUDY / "run_scores.csv"):
        if (one["part"], one["projector"], one["row"], one["blind"]) == (part, projector, row, str(blind)):
            unit = 100 if one["measure"].startswith("relevance") else 1
            found.setdefault(one["seed"], {})[one["measure"]] = unit * float(one["value"])
    assert found.keys() == set("12345")
    return found


def means(side, names=NAMES):
    return {seed: statistics.mean(values[name] for name in names) for seed, values in side.items()}


def centre(side, names=NAMES):
    return statistics.mean(means(side, names).values())


def compared(first, second, names=NAMES):
    """Mean difference and the ends of its 95 % interval."""
    first, second = means(first, names), means(second, names)
    differences = [first[seed] - second[seed] for seed in first]
    effect = statistics.mean(differences)
    return effect, *(float(end) for end in stats.t.interval(0.95, 4, effect, stats.sem(differences)))


def printed(effect, low, high):
    return f"{effect:+.1f} ({low:+.1f} to {high:+.1f})"


def without(name):
    return [other for other in NAMES if other != name]


def _side(labels):
    wanted = dict(label.split("=") for label in labels.split())
    return runs(wanted["part"], wanted["projector"], wanted.get("recipe.num_tokens", ""))


def test_effects_and_intervals_follow_from_the_scores_of_single_runs():
    claims = rows(STUDY / "claims.csv")
    assert len(claims) == 58
    for row in claims:
        first, second, names = _side(row["first"]), _side(row["second"]), MEASURES[row["measure"]]
        expected = compared(first, second, names)
        assert [float(row[key]) for key in ("effect", "low95", "high95")] == pytest.approx(expected, abs=2e-3)
        first, second = means(first, names), means(second, names)
        p = stats.ttest_1samp([first[seed] - second[seed] for seed in first], -float(row["margin"]))[1]
        assert float(row["p"]) == pytest.approx(p, rel=1e-2)


def test_what_stands_after_holm_s_adjustment_is_counted_right():
    claims = sorted(rows(STUDY / "claims.csv"), key=lambda row: float(row["p"]))
    stand = 0
    while float(claims[stand]["p"]) <= 0.05 / (len(claims) - stand):
        stand += 1
    assert [row["after_holm"] for row in claims] == ["True"] * stand + ["False"] * (len(claims) - stand)
    judging = [row for row in claims[:stand] if row["judged"] == "True"]
    assert {row["equal"] for row in judging} == {"compute"} and len(judging) == 3 and stand == 3 + 8
    text = " ".join((STUDY / "README.md").read_text(encoding="utf-8").split())
    assert "After Holm's adjustment for all 58 tests three of the contrasts that judge a claim stand" in text
    assert "So do eight details" in text and len(claims) == 58


@pytest.mark.parametrize("page", [REFERENCE / "README.md", STUDY / "README.md"])
def test_the_texts_quote_the_verdicts(page):
    expected = verdicts()
    table = next(table for table in tables(page) if table[0][0] in expected)
    assert [row[0] for row in table] == list(expected)
    for claim, steps, compute, *_ in table:
        assert steps.startswith(expected[claim]["steps"])
        assert compute.startswith(expected[claim].get("compute", "-"))


EFFECT = r"[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)"


def quoted(text):
    return set(re.findall(EFFECT, " ".join(text.split())))


AGAINST = {
    "steps": {
        "36": "part=tokens projector=avgpool recipe.num_tokens=36",
        "64": "part=steps projector=linear",
        "4": "part=tokens projector=avgpool recipe.num_tokens=4",
        "Q-Former": "part=steps projector=qformer",
        "D-Abstractor": "part=steps projector=d_abstractor",
    },
    "compute": {
        "36": "part=compute projector=avgpool recipe.num_tokens=36",
        "64": "part=compute projector=linear",
        "4": "part=compute projector=avgpool recipe.num_tokens=4",
        "Q-Former": "part=compute projector=qformer",
        "average": "part=steps projector=avgpool",
    },
}
"""What equal -> what the tables call a side -> its labels."""


def effects(**wanted):
    """Effects with intervals as a text has them, of the rows with these values."""
    return {
        f"{float(row['effect']):+.1f} ({float(row['low95']):+.1f} to {float(row['high95']):+.1f})"
        for row in rows(STUDY / "claims.csv")
        if all(row[key] == value for key, value in wanted.items())
    }


@pytest.mark.parametrize("page", [REFERENCE / "README.md", STUDY / "README.md"])
def test_the_texts_quote_the_effects(page):
    """Every effect with an interval in a text is one of the study's, and in the table one that judges that claim."""
    text = page.read_text(encoding="utf-8")
    assert quoted(text) and quoted(text) <= effects() | {*without_textvqa(), *evenly_weighted()}
    claims = {row["claim"] for row in rows(STUDY / "claims.csv")}
    table = next(table for table in tables(page) if table[0][0] in claims)
    for claim, *cells in table:
        for equal, cell in zip(("steps", "compute"), cells, strict=True):
            mine = {"claim": claim, "equal": equal, "judged": "True"}
            assert quoted(cell) <= effects(**mine), (claim, equal)
            for effect, against in re.findall(rf"({EFFECT}) against (?:the )?(\S+)", cell):
                assert effect in effects(**mine, second=AGAINST[equal].get(against.strip(",;"))), (claim, effect)


def without_textvqa():
    """Of average pooling against the D-Abstractor, at equal steps and at equal compute."""
    first = runs("steps", "avgpool")
    return [printed(*compared(first, runs(part, "d_abstractor"), without("mini_textvqa"))) for part in PARTS]


def evenly_weighted():
    """The same with boxes and questions at equal weight."""
    first = runs("steps", "avgpool")
    both = [*BOXES * len(QUESTIONS), *QUESTIONS * len(BOXES)]
    return [printed(*compared(first, runs(part, "d_abstractor"), both)) for part in PARTS]


def losses():
    """Model -> the losses of its ladder from the lowest rate to the highest, and those of its five seeds."""
    ladder, found = rows(STUDY / "ladder.csv"), {}
    for label in LABELS:
        rungs = sorted((float(row["value"]), float(row["val_loss"])) for row in ladder if row["projector"] == label)
        seeds = runs("steps", label.partition(" ")[0], blind="blind" in label).values()
        found[label] = [loss for _, loss in rungs], [values["val/loss"] for values in seeds]
    assert {row["projector"] for row in ladder} == set(LABELS)
    return found


def test_the_study_quotes_its_ladder():
    rungs, spread = (table for table in tables(STUDY / "README.md") if table[0][0] in LABELS)
    found = losses()
    rates = sorted({float(row["value"]) for row in rows(STUDY / "ladder.csv")})
    heads = "".join(f" {float(m):g}e{int(e)} |" for m, e in (f"{rate:.2e}".split("e") for rate in rates))
    assert f"\n| model |{heads}\n" in (STUDY / "README.md").read_text(encoding="utf-8")
    assert {row[0]: row[1:] for row in rungs} == {
        label: [f"{loss:.3f}" for loss in ladder] for label, (ladder, _) in found.items()
    }
    expected = {}
    for label, (ladder, seeds) in found.items():
        best, second, *_ = sorted(ladder)
        numbers = second - best, statistics.stdev(seeds), best, statistics.mean(seeds)
        expected[label] = [f"{value:.3f}" for value in numbers]
        # "Of the projectors only max pooling's gap is more than that."
        assert (numbers[0] > numbers[1]) == (label in ("maxpool", "avgpool (blind)"))
        # "No projector's best rate is at an end of the ladder; the blind model's is."
        assert (best in (ladder[0], ladder[-1])) == ("blind" in label)
    assert {row[0]: row[1:] for row in spread} == expected


def twin(name):
    """Visual tokens or projector -> mean over the benchmarks of a twin."""
    scores = {}
    for row in rows(REFERENCE / name / "scores.csv"):
        key = row["row"].partition("num_tokens=")[2] or row["projector"]
        scores.setdefault(key, []).append(float(row["score"]))
    assert {len(values) for values in scores.values()} == {8}
    return {key: statistics.mean(values) for key, values in scores.items()}


def _on_the_c_abstractor():
    mine, blind = runs("steps", "c_abstractor"), runs("steps", "avgpool", blind=True)
    (ladder, seeds), (blind_ladder, blind_seeds) = (losses()[label] for label in ("c_abstractor", "avgpool (blind)"))
    _, low, high = compared(mine, blind, ["val/loss"])
    assert low < 0 < high and min(blind_ladder) - min(ladder) < statistics.stdev(seeds)
    return [
        f"{centre(mine, QUESTIONS):.1f}, where the model trained blind has {centre(blind, QUESTIONS):.1f}",
        f"its best is {min(ladder):.3f}, the blind model's {min(blind_ladder):.3f} (over the five seeds "
        f"{statistics.mean(seeds):.3f} and {statistics.mean(blind_seeds):.3f}, a difference whose interval includes",
    ]


def _paper(second, measure):
    return next(
        float(row["paper_table1"])
        for row in rows(STUDY / "claims.csv")
        if row["second"] == f"part=steps projector={second}" and row["measure"] == measure and row["equal"] == "steps"
    )


def _on_the_q_former():
    reading = [values["mini_textvqa"] for values in runs("steps", "qformer").values()]
    spread = {label: statistics.stdev(means(runs("steps", label)).values()) for label in LABELS[:-1]}
    assert max(spread, key=lambda label: spread[label]) == "qformer"
    _, low, high = compared(runs("steps", "qformer"), runs("steps", "avgpool", blind=True), BOXES)
    assert low < 0 < high
    return [
        f", against {_paper('qformer', 'boxes'):+.1f} in Table 1, whose Q-Former starts from BLIP-2's weights",
        f", where the paper has {_paper('qformer', 'questions'):+.1f}.",
        f"is at {statistics.mean(reading):.1f} with a standard deviation of {statistics.stdev(reading):.1f}.",
    ]


def _undecided(first, second):
    """The benchmarks without each of which an interval includes zero."""
    found = {name: compared(first, second, without(name)) for name in NAMES}
    return {name for name, (_, low, high) in found.items() if low < 0 < high}


def _on_the_d_abstractor():
    first = runs("steps", "avgpool")
    for part in PARTS:
        needed = _undecided(first, runs(part, "d_abstractor"))
        assert needed == {"mini_textvqa", "mini_vqav2", "mini_gqa"}
    for part, other in (("steps", "c_abstractor"), ("compute", "c_abstractor"), ("compute", "qformer")):
        assert not _undecided(first, runs(part, other))
    assert not _undecided(first, runs("steps", "maxpool"))
    boxes, questions = _paper("d_abstractor", "boxes"), _paper("d_abstractor", "questions")
    steps = runs("steps", "d_abstractor")
    stay = [compared(first, steps, without(name))[0] for name in ("mini_vqav2", "mini_gqa")]
    alone, even = without_textvqa(), evenly_weighted()
    return [
        f"without it the effect is {alone[0]} at equal steps and {alone[1]} at equal compute.",
        "(Without `mini_vqav2` or `mini_gqa` the intervals reach zero, too, but the effect stays, "
        f"{stay[0]:+.1f} and {stay[1]:+.1f} at equal steps.)",
        f"With boxes and questions at equal weight it is {even[0]} and {even[1]}.",
        f"the gain is largest in the boxes ({boxes:+.1f}, questions {questions:+.1f}).",
    ]


def _on_linear():
    order = sorted(twin("mini_projectors").items(), key=lambda item: -item[1])
    (first, best), (second, next_best), *_ = order
    assert (first, second) == ("linear", "avgpool")
    cells = rows(REFERENCE / "mini_projectors/cells.csv")
    [(steps, _)] = {(row["steps"], row["seed"]) for row in cells}
    assert not {row["row"] for row in cells} & {row["row"] for row in rows(STUDY / "cells.csv")}
    return [
        f"({steps} steps of finetuning, another tower and LLM, one rate for all, one seed)",
        f"linear is first with {best:.1f}, average pooling second with {next_best:.1f}.",
    ]


def _on_a_quarter():
    quarter = runs("steps", "avgpool")
    few = {"steps": runs("tokens", "avgpool", "4"), "compute": runs("compute", "avgpool", "4")}
    more = {"steps": runs("tokens", "avgpool", "36"), "compute": runs("compute", "avgpool", "36")}
    all_of_them = {part: runs(part, "linear") for part in PARTS}
    for part in PARTS:
        _, low, high = compared(quarter, few[part])
        assert low < 2.5 < high  # with one yardstick for both
        lows = [compared(quarter, side[part], without("mini_textvqa"))[1] for side in (few, more, all_of_them)]
        assert lows[0] < 0 or min(lows[1:]) < -2.5
    assert min(compared(quarter, side["compute"])[1] for side in (few, more, all_of_them)) > 0
    lines = {row["row"]: row for row in rows(ROOT / "prism_deco/assets/paper/table1.csv")}
    columns = [name.removeprefix("mini_") for name in NAMES]
    linear, pooled = (
        statistics.mean(float(lines[name][column]) for column in columns) for name in ("linear_star", "deco_avgpool")
    )
    loss, top = linear - pooled, centre(all_of_them["steps"])
    margin = f"{loss / linear * top:.1f}"
    lower = [compared(quarter, side["steps"])[1] for side in (more, all_of_them)]
    assert max(lower) < -float(margin)
    by_tokens = twin("mini_compression")
    texts = [f"{by_tokens[tokens]:.1f}" for tokens in ("64", "36", "16")]
    share, both = f"{100 * loss / linear:.1f} %", {f"{centre(side['steps']):.1f}" for side in (more, all_of_them)}
    [longer] = {int(row["steps"]) - 700 for row in rows(STUDY / "compute.csv") if row["visual_tokens"] == "4"} - {0}
    fewer = [f"{centre(side['compute']):.1f}" for side in (more, all_of_them)]
    return [
        f"in Table 1, {loss:.2f} of {linear:.1f}, rounded down. That is {share}; {share} of linear's {top:.1f} here is "
        f"{margin}, and with a margin of {margin} neither contrast at equal steps holds (lower limits {lower[0]:.2f} "
        f"against 36 tokens and {lower[1]:.2f} against 64).",
        f"64, 36 and 16 tokens have {texts[0]}, {texts[1]} and {texts[2]}, so that a quarter loses "
        f"{by_tokens['64'] - by_tokens['16']:.1f} points.",
        f"with 700 steps 36 and 64 tokens are at {both.pop()}, with fewer at {fewer[0]} and {fewer[1]}.",
        f"The {longer} steps that 4 tokens have more change little, {centre(few['steps']):.1f} and "
        f"{centre(few['compute']):.1f}.",
    ]


def _on_double_abstraction():
    own = [row for row in rows(STUDY / "claims.csv") if row["claim"].endswith("abstract twice")]
    judging = [row for row in own if row["judged"] == "True"]
    assert {re.sub(r".*projector=", "", row["second"]) for row in judging} == {"qformer", "d_abstractor"}
    assert len(judging) == 4 and {row["after_holm"] for row in judging} == {"False"}
    assert {row["verdict"] for row in own if row["measure"] == "pointing"} == {"not resolved"}
    # What judged at first, and what after redundancy was taken out.
    steps = [row for row in own if row["equal"] == "steps"]
    energy = {row["verdict"] for row in steps if row["measure"] == "energy_in_box"}
    overlap = {row["verdict"] for row in steps if row["measure"] == "query_redundancy"}
    assert [_verdict(energy | overlap), _verdict(energy), verdicts()[own[0]["claim"]]["steps"]] == [
        "mixed",
        "not resolved",
        "reversed",
    ]
    places = {label: centre(runs("steps", label), MEASURES["energy_in_box"]) for label in LABELS[:-1]}
    places["blind"] = centre(runs("steps", "avgpool", blind=True), MEASURES["energy_in_box"])
    boxes = {label: centre(runs("steps", label), BOXES) for label in LABELS[:-1]}
    assert max(places, key=lambda label: places[label]) == min(boxes, key=lambda label: boxes[label]) == "qformer"
    assert centre(runs("steps", "avgpool", blind=True), BOXES) < boxes["qformer"]
    cosines = {
        label: centre(runs("steps", label), MEASURES["query_redundancy"]) / 100
        for label in ("avgpool", "qformer", "d_abstractor", "c_abstractor")
    }
    assert cosines.pop("avgpool") == 0
    return [
        "(cosine of their maps {qformer:.2f}; D-Abstractor {d_abstractor:.2f}, C-Abstractor {c_abstractor:.2f})".format(
            **cosines
        ),
        f"by R-GAE on {EvaluateConfig.relevance_limit} questions, "
        "{qformer:.1f} % lies inside the right box for the Q-Former and {d_abstractor:.1f} % for the D-Abstractor, "
        "{avgpool:.1f} % for average pooling and {blind:.1f} % for a model trained blind".format(**places),
        f"and is at {places['c_abstractor']:.1f} %,",
        f"which abstracts nothing, is at {places['linear']:.1f} %.",
    ]


def _on_the_rest():
    cells, compute = rows(STUDY / "cells.csv"), rows(STUDY / "compute.csv")
    steps = [int(row["steps"]) for row in cells]
    total = re.search(r"models of ([\d,]+) to ([\d,]+) parameters", (STUDY / "report.md").read_text(encoding="utf-8"))
    sizes = [int(size.replace(",", "")) / 1e6 for size in total.groups()] if total else []
    trained = min(int(row["trained_parameters"]) for row in cells) / 1e6
    highest = {label: ladder[-1] for label, (ladder, _) in losses().items()}
    blind = highest.pop("avgpool (blind)")
    for row in rows(STUDY / "scores.csv"):
        assert row["benchmark"] != "mini_pope" or abs(float(row["score"]) - 50) < 2
    means_of = [row for row in rows(STUDY / "claims.csv") if row["judged"] == "True" and row["unit"] == "points"]
    widths = [(float(row["high95"]) - float(row["low95"])) / 2 for row in means_of]
    assert [round(min(widths)), round(max(widths))] == [1, 5]
    [records] = {int(row["samples"]) for row in compute if row["part"] == "steps"}
    [epoch] = {int(row["samples"]) for row in rows(REFERENCE / "mini_projectors/cells.csv")}
    assert records / epoch == pytest.approx(2 / 3, abs=5e-3)
    assert {row["steps"] for row in compute if row["part"] == "steps"} == {"700"}
    return [
        f"models of {sizes[0]:.1f} to {sizes[1]:.1f} million parameters: {len(cells)} trainings of {min(steps)} to "
        f"{max(steps)} steps",
        f"at 3e-3 the lowest validation loss of a projector is {min(highest.values()):.3f}, where the blind model has "
        f"{blind:.3f}.",
        f"within {trained:.1f} million trained parameters",
        f"{records:,} records are two thirds of one pass over a small set; the paper's recipes have 665 thousand.",
        f"average {statistics.mean(losses()['maxpool'][1]):.3f} where the ladder's one had "
        f"{min(losses()['maxpool'][0]):.3f}.",
    ]


def _on_the_study_in_the_readme():
    by_tokens = twin("mini_compression")
    claims, cells = rows(STUDY / "claims.csv"), rows(STUDY / "cells.csv")
    stand = [row for row in claims if (row["judged"], row["after_holm"], row["expect"]) == ("True", "True", "greater")]
    assert len(stand) == 1
    return [
        f"`prism-deco sweep study`, {len(cells)} cells",
        f"after Holm's adjustment for all {len(claims)} only the {float(stand[0]['effect']):.1f} of this table stands",
        f"a quarter of the tokens loses {by_tokens['64'] - by_tokens['16']:.1f} points",
    ]


SENTENCES = {
    REFERENCE / "README.md": (_on_the_study_in_the_readme,),
    STUDY / "README.md": (
        _on_the_c_abstractor,
        _on_the_q_former,
        _on_the_d_abstractor,
        _on_linear,
        _on_a_quarter,
        _on_double_abstraction,
        _on_the_rest,
    ),
}
"""By page; each checks by the way what a page says of them without a number."""


def _prose(page):
    """What a page says of the study, without its tables and code."""
    text = page.read_text(encoding="utf-8")
    if page == REFERENCE / "README.md":
        text = text.partition("What the paper claims about projectors, tested")[2].partition("\n## ")[0]
    return " ".join(re.sub(r"^```[^`]*```|^\|.*$", " ", text, flags=re.MULTILINE).split())


@pytest.mark.parametrize(("page", "about"), [(page, about) for page, every in SENTENCES.items() for about in every])
def test_the_sentences_on_the_study_have_the_numbers_of_its_runs(page, about):
    for sentence in about():
        assert sentence in _prose(page)


@pytest.mark.parametrize("page", SENTENCES)
def test_no_number_on_the_study_is_without_a_test(page):
    text = _prose(page)
    for about in SENTENCES[page]:
        for sentence in about():
            text = text.replace(sentence, " ")
    text = re.sub(rf"{EFFECT}|`[^`]*`|\(\S+\.\w+\)", " ", text)
    cells, claims = rows(STUDY / "cells.csv"), rows(STUDY / "claims.csv")
    planned = {row[key] for row in cells for key in ("steps", "visual_tokens")} | {row["margin"] for row in claims}
    planned.add(str(len(claims)))
    found = set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+|e-\d)?", text))
    assert found - planned <= {"0", "95"}, found - planned


def test_the_readme_quotes_the_twins():
    text = (REFERENCE / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    place = next(k for k, cells in enumerate(lines) if cells[0] == "`linear` (64 tokens)")
    projectors = twin("mini_projectors") | twin("mini_pooling")
    assert [f"{projectors[cell.split('`')[1]]:.1f}" for cell in lines[place]] == lines[place + 2]
    tokens = twin("mini_compression")
    assert [f"{tokens[key]:.1f}" for key in ("64", "36", "16", "9", "4")] == lines[place + 5]
    at_the_end = {
        row["projector"]: f"{float(row['value']):.3f}" for row in rows(REFERENCE / "mini_convergence/run_scores.csv")
    }
    quoted = text.partition("at the end of the alignment")[2].partition("\n\n")[0]
    assert dict(re.findall(r"`(\w+)`\s(\d\.\d+)", quoted)) == at_the_end and len(at_the_end) == 5
