"""The preflight passes sound runs, names what is wrong with others, and leaves no trace."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prism_deco.build import build_model, group
from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.data import build_source
from prism_deco.errors import UsageError
from prism_deco.sweep.launchers import train_command
from prism_deco.sweep.ledger import LedgerEntry
from prism_deco.training import model_folder
from prism_deco.training.datamodule import Conversations
from prism_deco.training.preflight import preflight

RUN = ["data=llava", "trainer=cpu", "data.val_fraction=0", "data.num_workers=0", "evaluate.benchmarks=null",
       "recipe.global_batch_size=4", "recipe.micro_batch_size=3", "trainer.threads=1",
       "backbone.pretrained=false"]  # fmt: skip


@pytest.fixture
def parts(colors, tmp_path):
    """(overrides) -> what `preflight` takes, of a miniature run on the colours."""

    def build(*overrides: str):
        source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
        config = load_config([*RUN, *source, *overrides])
        torch.manual_seed(0)
        vlm, llm = build_model(config)
        data = Conversations(build_source(group(config, "data")), config, vlm, llm)
        return config, tmp_path, vlm, llm, data, torch.device("cpu")

    return build


def _losses(run: Path) -> list[float]:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [event.value for event in board.Scalars("train/loss")]


def _digests(vlm) -> dict[str, str]:
    named = [*vlm.named_parameters(), *vlm.named_buffers()]
    return {name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for name, tensor in named}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("recipe.lm=lora", "llm=mini_llama"),
        ("recipe.lm=lora", "llm=mini_llama", "trainer.precision=bf16-mixed"),
        pytest.param(("recipe.lm=frozen", "projector=d_abstractor"), marks=pytest.mark.slow),
        ("recipe.packing=true", "recipe.standardise_features=true", "trainer.precision=bf16-mixed"),
    ],
    ids=lambda overrides: " ".join(overrides) or "default",
)
def test_a_sound_run_passes_and_is_as_it_was(parts, tmp_path, caplog, overrides):
    arguments = parts(*overrides)
    vlm = arguments[2]
    before = _digests(vlm)
    random = torch.random.get_rng_state()
    with caplog.at_level("INFO"):
        preflight(*arguments)
    assert _digests(vlm) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in vlm.parameters())
    assert not list(tmp_path.iterdir()), "what was saved for the comparison must go"
    assert "record red40 is supervised on ['red', 'Yes']" in caplog.text
    assert "logits differ by 0 after saving and loading" in caplog.text
    assert "the loss with black images" in caplog.text and "Preflight passed" in caplog.text


@pytest.fixture
def train(colors, tmp_path):
    """(overrides) -> exit code of `prism-deco train` on the colours."""
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={tmp_path}"]
    return lambda *overrides: main(["train", *RUN, *source, "trainer.log_every=1", *overrides])


def test_the_losses_of_a_run_are_the_same_with_it_and_resuming_leaves_it_out(train, tmp_path):
    more = ["recipe.lm=lora", "recipe.lora_dropout=0.1"]
    for name in ("with", "without"):
        assert train(*more, f"run_id={name}", f"trainer.preflight={str(name == 'with').lower()}") == 0
    losses = {name: _losses(tmp_path / name) for name in ("with", "without")}
    assert losses["with"] == losses["without"] and len(losses["with"]) == 3
    digests = {json.loads((tmp_path / name / "manifest.json").read_text())["model_sha256"] for name in losses}
    assert len(digests) == 1
    assert "Preflight" not in (tmp_path / "without" / "train.log").read_text()
    (tmp_path / "with" / "status.json").write_text('{"state": "preempted"}')
    assert train(*more, "run_id=with", "trainer.preflight=true") == 0
    text = (tmp_path / "with" / "train.log").read_text()
    assert text.count("Preflight passed") == 1 and text.count("Training with") == 2


def test_a_question_that_leaves_its_answer_no_room_is_passed_over(parts, colors, tmp_path, caplog):
    """As the strict recipes cut it; a run in which every question does is refused."""
    records = json.loads((colors / "train.json").read_text())
    records[0]["conversations"][0]["value"] = "What colour is it? " * 20
    path = tmp_path / "train.json"

    def check(records):
        path.write_text(json.dumps(records))
        arguments = parts(f"data.json={path}", "recipe.long_questions=cut", "recipe.max_text_tokens=40")
        with caplog.at_level("INFO"):
            preflight(*arguments)

    check(records)
    assert "red40 is supervised" not in caplog.text and "red90 is supervised on ['red'" in caplog.text
    with pytest.raises(UsageError, match="none of 1 records has readable images and room for an answer"):
        check(records[:1])


def _break_examples(data, monkeypatch, change) -> None:
    encoder = data.train_examples.encoder
    fit = encoder.fit
    monkeypatch.setattr(encoder, "fit", lambda encoded: (change(fit(encoded)[0]), 0))


def test_labels_that_miss_the_answers_are_found(parts, monkeypatch):
    arguments = parts()
    data = arguments[4]
    with monkeypatch.context() as patch:
        _break_examples(data, patch, lambda encoded: replace(encoded, labels=[-100] * len(encoded.labels)))
        with pytest.raises(ValueError, match=r"Preflight, labels: record red40 has no supervised token"):
            preflight(*arguments)
    _break_examples(data, monkeypatch, lambda encoded: replace(encoded, labels=list(encoded.input_ids)))
    with pytest.raises(
        ValueError, match=r"labels: record red40 would be supervised on .*What color is it.*\['red', 'Yes'\]"
    ):
        preflight(*arguments)


@pytest.mark.parametrize("lm", ["full", "frozen"])
def test_a_projector_that_no_gradient_reaches_is_found(parts, monkeypatch, lm):
    arguments = parts(f"recipe.lm={lm}")
    vlm = arguments[2]
    project = vlm.project
    monkeypatch.setattr(vlm, "project", lambda *features: project(*features).detach())
    before = _digests(vlm)
    with pytest.raises(ValueError, match=r"gradient: the norm of the projector's first gradient is 0\.0"):
        preflight(*arguments)
    assert _digests(vlm) == before


def test_a_gradient_that_is_not_finite_is_found(parts):
    arguments = parts()
    next(arguments[2].lm.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match=r"gradient: the norm of the LLM's first gradient is nan"):
        preflight(*arguments)


def test_a_loss_that_does_not_fall_is_found(parts):
    with pytest.raises(ValueError, match=r"learning: 10 steps at recipe.lr=30\.0 change the loss of 8 records from"):
        preflight(*parts("recipe.lr=30"))


def test_ignored_images_are_found_unless_the_recipe_says_so(parts, monkeypatch, caplog):
    arguments = parts()
    vlm = arguments[2]
    features = vlm.features
    with monkeypatch.context() as patch:
        # Every image looks alike: gradients still reach the projector.
        patch.setattr(vlm, "features", lambda pixels: torch.ones_like(features(pixels)))
        with pytest.raises(ValueError, match=r"images: the loss is bitwise the same.*recipe\.blind=true"):
            preflight(*arguments)
    vlm.blind = True
    with pytest.raises(ValueError, match=r"gradient: .*projector"):
        preflight(*arguments)
    with caplog.at_level("INFO"):
        preflight(*parts("recipe.blind=true"))
    assert "Preflight passed" in caplog.text and "black images" not in caplog.text


def test_weights_that_do_not_come_back_are_found(parts, monkeypatch, tmp_path):
    arguments = parts()
    write = model_folder.write_safetensors

    def damaged(change):
        def write_damaged(path: Path, tensors, **options) -> str:
            return write(path, change(tensors) if path.name == "model.safetensors" else tensors, **options)

        monkeypatch.setattr(model_folder, "write_safetensors", write_damaged)

    damaged(lambda weights: {k: v for k, v in weights.items() if k != "projector.mlp.0.weight"})
    with pytest.raises(ValueError, match=r"saving: the saved model cannot be loaded: .*missing projector\.mlp\.0\.wei"):
        preflight(*arguments)
    damaged(lambda weights: {k: v.detach().bfloat16().float() for k, v in weights.items()})
    with pytest.raises(ValueError, match=r"saving: logits of up to .* differ by"):
        preflight(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_failed_preflight_ends_the_run_before_it_starts(train, tmp_path):
    assert train("run_id=run", "trainer.preflight=true", "recipe.lr=30") == 2
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "Preflight, learning" in status["reason"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_sharded_runs_have_their_labels_checked_only(parts, monkeypatch, caplog):
    arguments = parts("trainer.strategy=fsdp", "recipe.lr=30")
    with caplog.at_level("INFO"):
        preflight(*arguments)
    assert "labels are correct; the other checks need the whole model" in caplog.text
    assert "steps at" not in caplog.text
    _break_examples(arguments[4], monkeypatch, lambda encoded: replace(encoded, labels=[-100] * len(encoded.labels)))
    with pytest.raises(ValueError, match="Preflight, labels"):
        preflight(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "codes"), [("3e-3", [0, 0]), ("30", [2, 2])])
def test_what_the_first_process_finds_holds_for_all(start, lr, codes):
    job = start("trainer.preflight=true", "trainer.strategy=ddp", "recipe.max_steps=1", f"recipe.lr={lr}", ranks=2)
    assert job.wait() == codes, job.log.read_text()[-2000:]
    text = (job.folder / "train.log").read_text()
    assert text.count("red40 is supervised") == 1 and text.count("Preflight passed") == codes.count(0) // 2


def test_sweeps_ask_for_it_unless_they_say_otherwise(tmp_path):
    def asked(*overrides: str) -> bool:
        command = train_command(tmp_path, LedgerEntry("cell", {}, list(overrides)))
        return load_config(command[command.index("train") + 1 :]).trainer.preflight

    assert asked() and asked("trainer=gpu") and not asked("trainer.preflight=false")
    assert not load_config([]).trainer.preflight
