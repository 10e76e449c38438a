"""Plans of the paper's grid and of runs that cannot work."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from prism_deco.cli import main
from prism_deco.config import load_choice, load_config
from prism_deco.plan import PlanTable, as_json, estimate_run, problems
from prism_deco.plan.meta_models import build_shallow, llm_key

GIB = 2**30
GOOD = {"id": "good", "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]}
REAL = ("recipe=prism", "data=llava_v1_5_mix665k", "trainer=fsdp", "trainer.devices=8")
B6 = ("backbone=dinov2_siglip_384", "llm=vicuna_7b_v1_5", "projector=avgpool", *REAL)


@pytest.fixture(scope="module")
def b6():
    return estimate_run(load_config(B6), "B6")


def test_the_largest_cell_of_the_paper(b6):
    needs = b6.needs
    # SigLIP and DINOv2 up to their tapped blocks, the projector, Vicuna with 32064 rows.
    assert needs.parameters == 397_745_440 + 291_115_008 + 25_698_304 + 6_738_939_904
    assert needs.trained == 25_698_304 + 6_738_939_904
    assert (needs.visual_in, needs.visual_out) == (729, 144)
    assert (needs.records, needs.steps) == (665_298, 5198)
    assert needs.longest == 2048 + 144 and needs.positions == 4096
    images = 624_610 / 665_298
    assert needs.sequence == pytest.approx(200 + 144 * images)
    # 6 N D, and the tower: two operations per parameter and patch, at least.
    language = 6 * 6.607e9 * needs.sequence * 665_298
    tower = 2 * (397e6 + 291e6) * 729 * 624_610
    assert language + tower < needs.flops < 1.1 * (language + tower)
    assert needs.hours == pytest.approx(needs.flops / (8 * 989.4e12 * 0.4) / 3600)
    assert needs.checkpoint == 12 * needs.trained


def test_shards_of_weights_gradients_and_moments(b6):
    memory, eighth = b6.needs.memory, 4 * b6.needs.trained / 8
    assert (memory.weights, memory.gradients, memory.optimizer) == pytest.approx((eighth, eighth, 2 * eighth), rel=1e-6)
    assert memory.tower == pytest.approx(4 * (397_745_440 + 291_115_008) / 8, rel=0.01)
    assert problems(b6) == [] and "data.root=FOLDER" in b6.warnings[0]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("recipe.num_tokens=900",), "does not fit the patch grid 8x8"),
        (("llm.architecture.max_position_embeddings=16",), "16 visual tokens leave no room"),
        (("data=llava",), "data.json"),
        (("recipe=llava_v1_5",), "has stages"),
        (("recipe.sampler=prismatic", "trainer=ddp", "trainer.devices=3"), "16 is not divisible by 3"),
        (("trainer=gpu", "recipe.micro_batch_size=200000", "recipe.global_batch_size=200000"), "GiB per device"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_run_says_why(overrides, reason):
    [found] = problems(estimate_run(load_config(overrides)))
    assert reason in found


def test_rows_that_training_would_not_compute_independently_are_a_problem(tmp_path):
    content = {key: value for key, value in load_choice("llm", "mini_qwen2").items() if key != "name"}
    content["architecture"] |= {"model_type": "mistral", "sliding_window": 32}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    own = (f"llm={tmp_path / 'own.yaml'}", "llm.pretrained=false")
    [found] = problems(estimate_run(load_config([*own, "recipe.turn_mask=causal", "recipe.packing=true"])))
    assert "MistralForCausalLM does not compute" in found and "Set recipe.packing=false" in found
    [found] = problems(estimate_run(load_config([*own, "recipe.turn_mask=block"])))
    assert "Set recipe.turn_mask=causal" in found
    assert problems(estimate_run(load_config([*own, "recipe.turn_mask=causal"]))) == []
    wide = load_config([*own, "recipe.turn_mask=block", "llm.architecture.sliding_window=2048"])
    assert problems(estimate_run(wide)) == []
    [found] = problems(estimate_run(load_config(["llm=mini_qwen2", "llm.attention=eager", "recipe.turn_mask=block"])))
    assert "Set recipe.turn_mask=causal" in found


def test_a_list_with_an_entry_per_layer_goes_with_the_layers(tmp_path):
    """As `config.json` has it since transformers 5."""
    content = load_choice("llm", "mini_qwen2")
    del content["name"]
    types = ["full_attention", "sliding_attention", "full_attention"]
    content["architecture"] |= {"model_type": "qwen3", "num_hidden_layers": 3, "layer_types": types}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    shallow = build_shallow(llm_key(load_config([f"llm={tmp_path / 'own.yaml'}"])), 2)
    assert shallow.config.layer_types == types[:2] and len(shallow.model.layers) == 2


def test_problems_go_by_the_memory_at_hand(b6):
    assert problems(b6, 1000 * GIB) == []
    [reason] = problems(b6, 10 * GIB)
    assert "which has 10.0: lower recipe.micro_batch_size" in reason
    on_cpu = estimate_run(load_config([]))
    assert on_cpu.needs.hours is None and problems(on_cpu) == [] and len(problems(on_cpu, 1000)) == 1


def test_lengths_are_measured_where_the_files_are(colors):
    config = load_config(["data=llava", f"data.json={colors}/train.json", f"data.image_root={colors}/images"])
    needs = estimate_run(config).needs
    assert needs.source == "measured" and needs.records == 9 and needs.cut == 0.0
    from prism_deco.data.records import open_records
    from prism_deco.llms import build_llm

    llm = build_llm("mini_qwen2", pretrained=False, device="meta")
    records = open_records(colors / "train.json", colors / "index")
    tokens = [len(llm.encode(record.messages, len(record.images)).input_ids) for record in records]
    assert needs.sequence == pytest.approx(sum(tokens) / 9 + 16 * 8 / 9)
    short = estimate_run(load_config([*_given(config), "recipe.max_text_tokens=10"])).needs
    assert short.cut == 1.0 and short.longest == 10 + 16


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([{"id": "odd", "conversations": []}, GOOD], r"data.json, record 0 \(id odd\): human and gpt turns"),
        ([{"id": "odd"}], r"data.json, record 0 \(id odd\): expected an object"),
        (
            [GOOD],
            "nothing to train on: .*data.json has 1 usable records, and all are held out: lower data.val_fraction",
        ),
    ],
)
def test_records_that_training_refuses_are_a_problem(tmp_path, records, reason):
    (tmp_path / "data.json").write_text(json.dumps(records))
    given = ["data=llava", f"data.json={tmp_path}/data.json", f"data.image_root={tmp_path}", "data.val_fraction=0.9999"]
    [found] = problems(estimate_run(load_config(given)))
    assert re.search(reason, found)


def _given(config):
    return ["data=llava", f"data.json={config.data.json}", f"data.image_root={config.data.image_root}"]


def test_unknown_names():
    with pytest.raises(ValueError, match="h100"):
        estimate_run(load_config([]), accelerator_name="h1000")
    with pytest.raises(ValueError, match="mfu=40"):
        estimate_run(load_config([]), mfu=40)


def test_table_and_json(b6):
    broken = estimate_run(load_config(["recipe.num_tokens=900"]), "broken")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(PlanTable([b6, broken], 0.4))
    text = console.export_text()
    for part in ("8 x h100 at 40%", "7.45B (6.76B)", "729>144", "/2192/4096", "ok", "no", "broken: num_tokens=900"):
        assert part in text
    first, second = json.loads(json.dumps(as_json([b6, broken])))
    assert first["needs"]["memory"]["peak"] == b6.needs.memory.peak
    assert second["needs"] is None and "num_tokens=900" in second["problems"][0]


def test_command_over_a_sweep(tmp_path, capsys):
    assert main(["plan", "mini", "row=M1", "--json", str(tmp_path / "plan.json")]) == 0
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert [plan["name"] for plan in plans] == ["M1-c_abstractor", "M1-avgpool"]
    assert "M1-avgpool" in capsys.readouterr().out


TERMINALS = """
import fcntl, struct, sys, termios
from prism_deco.cli import main
for width in (60, 80, 160):
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    print(f"\\nwidth {width}", flush=True)
    assert main(["plan", "mini"]) == 0
"""


@pytest.mark.slow
def test_names_verdicts_and_numbers_are_whole_in_terminals_of_any_width():
    screens = _in_terminal([sys.executable, "-c", TERMINALS]).split("\nwidth ")[1:]
    names = [f"M{row}-{projector}" for row in (1, 2, 3) for projector in ("c_abstractor", "avgpool")]
    assert [screen.partition("\n")[0] for screen in screens] == ["60", "80", "160"]
    tables = {}
    for screen in screens:
        width = int(screen.partition("\n")[0])
        lines = [line.rstrip() for line in screen.splitlines()]
        assert all(f"Planning {name}" in screen for name in names)
        shown = [line for line in lines if not line.startswith("Planning ")]
        assert max(map(len, shown)) <= width
        rows = [line.split() for line in shown if line.strip().startswith("M") and line.endswith(" ok")]
        assert [row[0] for row in rows] == names
        tables[width] = rows
        text = " ".join(" ".join(shown).split())
        assert "Hours are without validation and scoring." in text
        assert ("--json has all" in text) == (width < 160)
    # What a narrow table shows are the first columns of the wide one, digit by digit.
    for row, narrow, narrower in zip(tables[160], tables[80], tables[60], strict=True):
        assert len(narrower) < len(narrow) < len(row)
        assert narrow[:-1] == row[: len(narrow) - 1] and narrower[:-1] == row[: len(narrower) - 1]
    assert tables[160][0][1:5] == ["0.13", "?", "1.42M", "(897K)"]


def _in_terminal(command: list[str]) -> str:
    """What a command shows in a pseudo-terminal, without colours and movements."""
    ours, its = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment | {"TERM": "xterm-256color"})
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # its end, on Linux
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n").replace("\n\n", "\n")
    assert process.wait() == 0, text
    return text


def test_every_stage_of_a_recipe_is_planned(tmp_path):
    """As cells of a sweep and as a single run."""
    out = tmp_path / "plan.json"
    assert main(["plan", "mini_projectors", "projector=avgpool,maxpool", "--json", str(out)]) == 0
    stages = ["align", "finetune"]
    plans = json.loads(out.read_text())
    cells = ("avgpool", "maxpool")
    assert [plan["name"] for plan in plans] == [f"{cell} {stage}" for cell in cells for stage in stages]
    line = ["recipe=mini_two_stage", "backbone=mini_clip", "llm=mini_llama", "projector=avgpool"]
    assert main(["plan", *line, "--json", str(out)]) == 0
    alone = json.loads(out.read_text())
    assert [plan["name"] for plan in alone] == stages
    trained = [[plan["needs"]["trained"] for plan in found] for found in (plans, alone)]
    assert trained[0] == 2 * trained[1] and len(set(trained[0])) == 2  # the projector; it and adapters


def test_as_little_is_recomputed_as_memory_allows():
    asked = "trainer.activation_checkpointing="
    deep = ("recipe.turn_mask=causal", "llm.architecture.num_hidden_layers=24")
    peaks = {}
    for policy in ("none", "selective", "full"):
        peaks[policy] = estimate_run(load_config([*deep, asked + policy])).needs.memory.peak
    assert peaks["full"] < peaks["selective"] < peaks["none"]
    auto = load_config([*deep, asked + "auto"])
    for policy, peak in peaks.items():
        # A tenth is left to the allocator: one byte less, and the next policy is taken.
        room = -(-peak * 10 // 9)
        assert estimate_run(auto, memory_bytes=room).needs.setup.checkpointing == policy
        less = {"none": "selective", "selective": "full", "full": "full"}[policy]
        assert estimate_run(auto, memory_bytes=room - 10).needs.setup.checkpointing == less
    assert problems(estimate_run(auto, memory_bytes=peaks["full"] // 2), peaks["full"] // 2)
    assert estimate_run(auto).needs.setup.checkpointing == "none"  # a CPU of unknown size
