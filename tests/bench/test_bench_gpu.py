"""`prism-deco bench gpu`: its rehearsal in miniature on the CPU, and every part of it where there is a GPU."""

import json

import pytest
import torch

from prism_deco.bench.gpu import CELLS, MINIATURES, Bench, Finding, Part, run_parts
from prism_deco.bench.gpu_parts import BATCH, PARTS
from prism_deco.cli import main
from prism_deco.config import load_config

CPU = torch.device("cpu")
QUICK = ["agreement_fp32", "pooling_twice", "memory_B5", "speed_B5", "towers_B5", "input_pipeline", "generation_B5"]


@pytest.mark.slow
def test_the_quick_parts_are_rehearsed(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["bench", "gpu", *QUICK, "--rehearse", "--out", str(out)]) == 0
    results = {part["name"]: part for part in json.loads((out / "results.json").read_text())["parts"]}
    assert list(results) == [part.name for part in PARTS if part.name in QUICK]
    states = {name: part["state"] for name, part in results.items()}
    assert states.pop("memory_B5") == "not run" and results["memory_B5"]["text"] == "needs CUDA"
    assert states.pop("agreement_fp32") == states.pop("pooling_twice") == states.pop("input_pipeline") == "passed"
    assert set(states.values()) == {"measured"}
    assert max(results["agreement_fp32"]["facts"]["padded"].values()) < 1e-4
    speed = results["speed_B5"]["facts"]
    assert speed["prism_deco"]["samples_per_s"] > 0 and speed["about"]["flops_per_sample"] > 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "needs CUDA" in printed and "questions/s" in printed
    assert not (out / "memory_B5.json").exists()


def _parts(log: list[str]) -> list[Part]:
    def run(name):
        def found(bench):
            log.append(name)
            if name == "broken":
                raise ValueError("three\nlines")
            return Finding(name, {"good": True, "bad": False}.get(name), {"n": 1})

        return found

    return [Part(name, 2, run(name)) for name in ("good", "broken", "bad", "late")]


def test_results_are_kept_and_errors_and_time_stop_one_part_only(tmp_path):
    log: list[str] = []
    bench, parts = Bench(tmp_path / "new", CPU), _parts(log)
    first = run_parts(bench, parts[:3], minutes=30)
    assert [part["state"] for part in first] == ["passed", "error", "failed"] and first[1][
        "text"
    ] == "ValueError: three"
    again = run_parts(bench, parts, minutes=1)
    assert again[:3] == [part | {"about": part["about"]} for part in first] and log == ["good", "broken", "bad"]
    assert again[3]["state"] == "not run" and "the same command goes on here" in again[3]["text"]
    assert run_parts(bench, parts, minutes=30)[3]["state"] == "measured" and bench.facts("late") == {"n": 1}
    run_parts(bench, parts, minutes=30, redo=True, names=["bad"])
    assert log == ["good", "broken", "bad", "late", "bad"]
    # A rehearsal tells nothing of the real sizes.
    run_parts(Bench(bench.folder, CPU, rehearse=True), parts[:1], minutes=30)
    assert log[5:] == ["good"]
    with pytest.raises(ValueError, match="Unknown part 'goof'"):
        run_parts(bench, parts, minutes=1, names=["goof"])


def test_an_error_without_a_message_is_named_by_its_type(tmp_path):
    def fail(bench):
        raise AssertionError

    (result,) = run_parts(Bench(tmp_path, CPU), [Part("silent", 1, fail)], minutes=30)
    assert (result["state"], result["text"]) == ("error", "AssertionError: ")


def test_cells_and_their_miniatures_are_valid():
    assert CELLS.keys() == MINIATURES.keys() == BATCH.keys()
    for settings in (*CELLS.values(), *MINIATURES.values()):
        assert load_config(settings).recipe.packing


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_this_gpu(part, tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    bench = Bench(tmp_path_factory.getbasetemp() / "bench_gpu", torch.device("cuda", 0))
    (result,) = run_parts(bench, [part], minutes=30)
    assert result["state"] in ("passed", "measured"), result["text"]
