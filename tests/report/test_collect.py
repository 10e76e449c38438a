import json

import pytest
from torch.utils.tensorboard import SummaryWriter

from prism_deco.report.cells import seed_groups
from prism_deco.report.collect import collect, read_curves


def test_a_sweeps_cells_come_with_their_states_and_scores(mini_sweep):
    cells = {cell.id: cell for cell in collect([mini_sweep])}
    assert len(cells) == 12
    done = cells["M1-avgpool-7"]
    assert (done.state, done.row, done.variant, done.seed) == ("done", "M1", "avgpool", "7")
    assert len(done.scores[""]) == 8 and done.tokens == 16 and done.seconds == 61.5
    failed = cells["M2-c_abstractor-8"]
    assert (failed.state, failed.reason, failed.log_tail) == ("failed", "ValueError: <b>bad</b>", "one\n<two>")
    running = cells["M2-c_abstractor-9"]
    assert running.state == "running" and running.log_tail == "starting\nstep 3 of 200" and not running.scores
    assert running.curves["train/loss"]  # of an unfinished run too
    planned = cells["M1-c_abstractor-9"]
    assert planned.state == "planned" and planned.config.projector.name == "c_abstractor" and planned.tokens is None


def test_a_killed_runs_state_is_what_the_sweep_saw(make, tmp_path):
    make.run(tmp_path / "s/a", state="running")
    make.run(tmp_path / "s/b", "seed=8", state="running")
    cells = [
        {"id": "a", "labels": {}, "state": "failed", "reason": "killed"},
        {"id": "b", "labels": {}, "state": "planned"},
    ]
    make.ledger(tmp_path / "s", cells)
    assert [(cell.state, cell.reason) for cell in collect([tmp_path / "s"])] == [("failed", "killed"), ("running", "")]


@pytest.mark.parametrize("damage", [("{", ""), ('"interval95": [', '"interval95": null, "x": [')])
def test_a_damaged_run_is_shown_not_dropped(make, tmp_path, damage):
    make.run(tmp_path / "a")
    make.run(tmp_path / "b", "seed=8")
    metrics = tmp_path / "b/eval/mini_gqa/metrics.json"
    assert damage[0] in metrics.read_text()
    metrics.write_text(metrics.read_text().replace(*damage))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.yaml").write_text("llm: {name: x}")
    make.run(tmp_path / "d", "seed=9")
    path = tmp_path / "d/config.yaml"
    path.write_text(path.read_text().replace("seed: 9", "seed: ${oc.env:HOME}"))
    good, bad, worse, foreign = collect([tmp_path])
    assert foreign.state == "unreadable" and "${oc.env:HOME}" in foreign.reason
    assert worse.state == "unreadable" and "has no backbone, projector, data" in worse.reason
    assert good.state == "done" and bad.state == "unreadable"
    assert "metrics.json is damaged" in bad.reason and bad.seed == "8" and not bad.manifest


def test_runs_without_a_sweep_are_labelled_by_what_differs(make, tmp_path):
    make.run(tmp_path / "a")
    make.run(tmp_path / "b", "projector=c_abstractor", "projector.hidden_dim=96")
    make.run(tmp_path / "c", "projector=c_abstractor", "projector.hidden_dim=96", "trainer.threads=1")
    make.run(tmp_path / "d", "recipe.num_tokens=4")
    make.run(tmp_path / "e", "recipe.blind=true")
    text = (tmp_path / "a/config.yaml").read_text()
    assert "  turn_mask: block\n" in text
    (tmp_path / "a/config.yaml").write_text(text.replace("  turn_mask: block\n", ""))  # as of an earlier version
    groups = seed_groups(collect([tmp_path / name for name in "abcde"]))
    base = "mini_siglip + mini_qwen2"
    assert [(group.row, group.variant) for group in groups] == [
        (f"{base}, num_tokens=16", "avgpool"),
        (f"{base}, num_tokens=16", "c_abstractor, projector.run=b"),
        (f"{base}, num_tokens=16", "c_abstractor, projector.run=c"),
        (f"{base}, num_tokens=4", "avgpool"),
    ]
    assert {group.family for group in groups} == {base}


def test_second_stages_share_a_row_though_each_starts_from_its_own_first(make, tmp_path):
    for name in ("avgpool", "maxpool"):
        start = f"recipe.start_from={tmp_path}/{name}-align"
        make.run(tmp_path / name, "recipe=mini_finetune", f"projector={name}", start, benchmarks=("gqa",))
    groups = seed_groups(collect([tmp_path]))
    assert [(group.row, group.variant) for group in groups] == [
        ("mini_siglip + mini_qwen2", "avgpool"),
        ("mini_siglip + mini_qwen2", "maxpool"),
    ]


def test_folders_that_hold_no_runs_are_refused(tmp_path, make):
    with pytest.raises(ValueError, match="neither a run folder"):
        collect([tmp_path])
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(ValueError, match="lists no cells"):
        collect([tmp_path])
    make.ledger(tmp_path, [])
    assert collect([tmp_path]) == []


def test_cells_of_one_name_in_two_sweeps_keep_apart(make, tmp_path):
    for name in ("one", "two"):
        make.ledger(tmp_path / name, [{"id": "a", "labels": {}, "state": "planned"}])
    assert [cell.id for cell in collect([tmp_path / "one", tmp_path / "two"])] == ["one/a", "two/a"]


def test_curves_of_both_kinds(tmp_path):
    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    for step, value in ((9, 20.0), (19, 15.0)):
        writer.add_scalar("train/samples_per_s", value, step)
    writer.add_scalar("train/mfu", 0.5, 19)
    writer.close()
    speed = {"train/samples_per_s": [(9, 20.0), (19, 15.0)]}
    assert read_curves(tmp_path) == speed
    lines = [{"step": 9, "train/loss": 4.0}, {"step": 19, "train/loss": 3.0}, {"step": 9, "train/loss": 3.5, "x": 1}]
    lines.append({"step": 19, "val/loss": 1.75})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 29, "train/l')  # the last line is being written
    assert read_curves(tmp_path) == speed | {"train/loss": [(9, 3.5), (19, 3.0)], "val/loss": [(19, 1.75)]}
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match="is damaged"):
        read_curves(tmp_path)
    assert read_curves(tmp_path / "nothing") == {}


def test_references_in_a_ledger_are_not_followed(make, tmp_path):
    overrides = ["data=llava", "data.json=${oc.env:HOME}/x.json"]
    make.ledger(tmp_path, [{"id": "a", "labels": {"projector": "avgpool"}, "overrides": overrides, "state": "planned"}])
    [cell] = collect([tmp_path])
    assert cell.config is None and (cell.state, cell.projector) == ("planned", "avgpool")


def test_step_times_are_the_batch_over_the_median_speed(make, tmp_path):
    make.run(tmp_path / "a")
    lines = [json.dumps({"step": k, "train/samples_per_s": speed}) for k, speed in enumerate((8.0, 32.0, 1000.0))]
    (tmp_path / "a/metrics.jsonl").write_text("\n".join(lines) + "\n")
    [cell] = collect([tmp_path / "a"])
    assert cell.step_seconds == 16 / 32
