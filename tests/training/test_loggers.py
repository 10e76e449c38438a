"""Loggers of Lightning by name: what they get from real runs, and how a resumed run goes on in them."""

import csv
import json
from pathlib import Path

import pytest
import pytorch_lightning.loggers
import yaml
from pytorch_lightning.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import prism_deco
from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.training.board import IDS, LOGGERS, Loggers, read_loggers

FAST = ["data.num_workers=0", "evaluate.benchmarks=null", "recipe.global_batch_size=4", "recipe.micro_batch_size=2",
        "trainer.log_every=1", "trainer.threads=1", "backbone.pretrained=false", "llm.pretrained=false",
        "trainer.checkpoint_every=1", "data.val_fraction=0.3", "recipe.epochs=2"]  # fmt: skip

EVENTS: list[tuple] = []
"""What every `Remote` was told, in order."""


@LOGGERS.register("remote")
class Remote(Logger):
    """A tracker on a server, in one list: runs have ids, and media can be shown."""

    def __init__(self, project: str, name: str | None = None, id: str | None = None):
        super().__init__()
        self.project, self._name, self._id = project, name, id or f"id{len(EVENTS)}"
        EVENTS.append(("open", self._id, project, name))

    @property
    def name(self):
        return self._name

    @property
    def version(self):
        return self._id

    def log_metrics(self, metrics, step=None):
        EVENTS.append(("metrics", step, dict(metrics)))

    def log_hyperparams(self, params):
        EVENTS.append(("hparams", dict(params)))

    def log_image(self, key, images, step=None):
        EVENTS.append(("image", step, key, [image.shape for image in images]))

    def log_text(self, key, columns=None, data=None, step=None):
        EVENTS.append(("text", step, key, columns, data))

    def finalize(self, status):
        EVENTS.append(("end", status))


@pytest.fixture(autouse=True)
def _no_events():
    EVENTS.clear()


@pytest.fixture
def train(colors, tmp_path):
    def run(*overrides: str) -> Path:
        source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
        run.code = main(["train", "data=llava", *source, f"runs_dir={tmp_path}", "run_id=run", *FAST, *overrides])
        return tmp_path / "run"

    return run


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _losses(run: Path) -> dict[int, float]:
    return {row["step"]: pytest.approx(row["train/loss"]) for row in _metrics(run) if "train/loss" in row}


def _events(*kinds: str) -> list[tuple]:
    return [event for event in EVENTS if event[0] in kinds]


def test_csv_beside_tensorboard(train):
    run = train("trainer.loggers=[tensorboard,{csv: {name: mine}}]", "recipe.tower=full")
    folder = run / "csv" / "mine" / "version_0"
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]} == _losses(run)
    assert {row["train/lr/tower/decay"] for row in rows} > {""} and any(row["val/loss"] for row in rows)
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["tower"] == "full"
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {event.step: event.value for event in board.Scalars("train/loss")} == _losses(run)


def test_csv_alone(train):
    """It can show no media, which does not stop anything."""
    run = train("trainer.loggers=[csv]", "trainer.samples=2")
    assert (run / "csv" / "run" / "version_0" / "metrics.csv").is_file() and not (run / "tensorboard").exists()


def test_one_that_can_shows_choices_numbers_and_media(train):
    run = train("trainer.loggers=[{remote: {project: colors}}]", "trainer.samples=2")
    assert EVENTS[0] == ("open", "id0", "colors", "run") and EVENTS[-1] == ("end", "success")
    [(_, choices)] = _events("hparams")
    assert (choices["backbone"], choices["tower"], choices["seed"]) == ("mini_siglip", "frozen", 7)
    numbers = {step: metrics["train/loss"] for _, step, metrics in _events("metrics") if "train/loss" in metrics}
    assert numbers == _losses(run)
    assert all(isinstance(value, float | int) for _, _, metrics in _events("metrics") for value in metrics.values())
    images, texts = _events("image"), _events("text")
    assert len(images) == len(texts) > 0 and images[0][2:] in [("val/sample_0", [(60, w, 3)]) for w in (40, 90)]
    assert texts[0][3] == ["question", "answer", "reference"] and texts[0][4][0][0] == "What color is it?"


def test_a_resumed_run_goes_on_under_its_id(train, monkeypatch):
    from prism_deco.training.module import TrainingModule

    step = TrainingModule.training_step

    def fail(self, *batch):
        if self.trainer.global_step == 2:
            raise RuntimeError("power cut")
        return step(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(TrainingModule, "training_step", fail)
        train("trainer.loggers=[{remote: {project: colors}}]")
    assert EVENTS[-1] == ("end", "failed")
    run = train("trainer.loggers=[{remote: {project: colors}}]")
    assert [event[1] for event in _events("open")] == ["id0", "id0"]
    assert json.loads((run / IDS).read_text()) == {"remote": "id0"}
    steps = [step for _, step, metrics in _events("metrics") if "train/loss" in metrics]
    assert steps == sorted(set(steps)) == list(_losses(run))
    train("trainer.loggers=[{remote: {project: colors}}]", "--overwrite")
    assert _events("open")[-1][1] != "id0", "a new run is not the old one"


def test_wandb_offline(train, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb (pip install wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train("trainer.loggers=[{wandb: {project: colors}}]", "trainer.samples=1")
    [record] = (run / "wandb" / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.stem == f"run-{json.loads((run / IDS).read_text())['wandb']}"
    content = record.read_bytes()
    assert all(name in content for name in (b"train/loss", b"val/sample_0_text", b"mini_siglip", b"grad_norm_lm"))
    import wandb

    assert wandb.run is None, "the next run of this process is one of its own"


@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        ("[wandbb]", "Unknown logger 'wandbb'. Did you mean 'wandb'?"),
        ("[{csv: {nam: 1}}]", "trainer.loggers: csv got an unexpected keyword argument 'nam'"),
        ("[comet]", "trainer.loggers: comet is not installed: pip install 'comet-ml"),
        ("[3]", "trainer.loggers: 3 is not a logger. Write NAME, or {NAME: {OPTION: VALUE}}"),
        ("[{csv: x}]", "{'csv': 'x'} is not a logger. Write NAME, or {NAME: {OPTION: VALUE}}"),
        ("[{csv: [1, 2]}]", "{'csv': [1, 2]} is not a logger. Write NAME, or {NAME: {OPTION: VALUE}}"),
        ("[{csv: {name: a}},{csv: {name: b}}]", "csv is named twice. A run has at most one logger of each kind"),
        ("[{tensorboard: {run: x}}]", "tensorboard got an unexpected keyword argument 'run'"),
        ("[{tensorboard: {start: 5}}]", "tensorboard got an unexpected keyword argument 'start'"),
        ("[{csv: {save_dir: null}}]", "csv: save_dir=None must be of the type Union[str, pathlib.Path]"),
        ("[{csv: {save_dir: 5}}]", "csv: save_dir=5 must be of the type"),
        ("[{csv: {save_dir: /proc/nope}}]", "Name another folder in trainer.loggers"),
        ("[{csv: {name: 5}}]", "csv: name=5 must be of the type"),
        ("[{csv: {flush_logs_every_n_steps: x}}]", "csv: flush_logs_every_n_steps='x' must be of the type int"),
        ("[{csv: {flush_logs_every_n_steps: 0}}]", "flush_logs_every_n_steps=0 must be a whole number above 0"),
        ("null", "trainer.loggers=null must be a list of names or mappings such as [a, {b: {key: value}}]"),
    ],
)
def test_wrong_ones_are_named_before_anything_is_done(train, capsys, loggers, message):
    run = train(f"trainer.loggers={loggers}")
    assert train.code == 2 and message in " ".join(capsys.readouterr().err.split()) and not run.exists()


def test_every_logger_of_lightning_has_a_name():
    kinds = {getattr(pytorch_lightning.loggers, name) for name in pytorch_lightning.loggers.__all__}
    assert kinds - {LOGGERS.get(name) for name in LOGGERS.names()} == {
        pytorch_lightning.loggers.Logger, pytorch_lightning.loggers.TensorBoardLogger
    }  # fmt: skip


def test_none_at_all(train):
    run = train("trainer.loggers=[]")
    assert train.code == 0 and not (run / "tensorboard").exists() and _losses(run)
    assert prism_deco.load(run)


def test_scores_of_a_later_evaluation_follow(tmp_path):
    """Without the package, on another machine, they stay in the run's folder."""
    from prism_deco.commands.scoring import _log_scores

    config = load_config(["trainer.loggers=[csv,{remote: {project: colors}}]", "run_id=run"])
    assert read_loggers(config.trainer) == {"csv": {}, "remote": {"project": "colors"}}
    Loggers(tmp_path, config, 0).close("success")
    _log_scores(tmp_path, config, {"eval/gqa": 0.5}, 7)
    assert EVENTS[-2:] == [("metrics", 7, {"eval/gqa": 0.5}), ("end", "success")]
    assert {event[1] for event in _events("open")} == {"id0"}
    config.trainer.loggers = ["comet"]
    _log_scores(tmp_path, config, {"eval/gqa": 0.5}, 7)
