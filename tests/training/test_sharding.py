"""One, two and four processes: the same losses, norms and weights for the same global batches."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

import prism_deco
from prism_deco.config import load_config
from prism_deco.sequence import build_batch
from prism_deco.training.progress import read_metrics
from prism_deco.training.sharding import Sharding, sharded_units

# The colours have eight images and one text, in batches of four: whole batches of images, and a last one with the text
# only, of which all ranks but the first get a filler.
EXACT = {"rel": 1e-4}  # float32 sums in another order


def _numbers(folder):
    return [(row["train/loss"], row["train/grad_norm"]) for row in read_metrics(folder) if "train/loss" in row]


def _rates(folder):
    """By group: the names say what decays."""
    return [row["train/lr"] for row in read_metrics(folder) if "train/loss" in row]


@pytest.fixture
def assert_same_run(trained_weights):
    return partial(_assert_same_run, trained_weights)


def _assert_same_run(read, folder, reference):
    numbers, expected = _numbers(folder), _numbers(reference)
    assert _rates(folder) == _rates(reference) and {"projector/decay", "projector/no_decay"} <= _rates(folder)[0].keys()
    assert len(numbers) == len(expected)
    for mine, theirs in zip(numbers, expected, strict=True):
        assert mine == pytest.approx(theirs, **EXACT)
    weights, theirs = read(folder), read(reference)
    assert weights.keys() == theirs.keys()
    # An AdamW update is close to its learning rate, 1.5e-3, wherever a gradient is close to zero.
    differences = torch.cat([(weights[name] - theirs[name]).abs().flatten() for name in weights])
    assert differences.mean() < 2e-5 and differences.max() < 6e-3


CLIPPED = ["recipe.grad_clip=0.5", "recipe.epochs=1"]


@pytest.mark.slow
def test_two_processes_train_as_one_does(start, tmp_path, assert_same_run):
    jobs = [start(*CLIPPED, run="one"), start(*CLIPPED, "trainer.shard_size=2", ranks=2, run="fsdp")]
    assert [job.wait() for job in jobs] == [[0], [0, 0]], jobs[1].log.read_text()
    assert min(norm for _, norm in _numbers(tmp_path / "one")) > 0.5, "clipping must be at work"
    assert_same_run(tmp_path / "fsdp", tmp_path / "one")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "fsdp")]
    assert manifests[0]["params"] == manifests[1]["params"] and manifests[1]["devices"] == 2
    # Each rank has written about half of what one process writes.
    files = sorted((tmp_path / "fsdp" / "checkpoints" / "step_000003").glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == 2 and max(sizes) < 1.3 * min(sizes)
    assert prism_deco.load(tmp_path / "fsdp").config.trainer.strategy == "fsdp"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ["trainer=fsdp", "trainer.devices=1"]),
        (2, ["trainer=ddp", "trainer.devices=2"]),
        (2, ["trainer.shard_size=1"]),
        (4, ["trainer.shard_size=2", "trainer.activation_checkpointing=selective"]),
        (4, ["recipe.sampler=shuffled", "llm=mini_llama", "recipe.global_batch_size=3"]),
        (
            2,
            ["recipe.lm=lora", "recipe.lora_r=4", "recipe.lora_dropout=0", "recipe.weight_decay=0.5", "llm=mini_llama"],
        ),
        (2, ["recipe.tower=full", "recipe.tower_lr=3e-4", "trainer.activation_checkpointing=full"]),
        (2, ["trainer=ddp", "trainer.devices=2", "recipe.tower=full", "recipe.tower_layers=1"]),
        (2, ["recipe.tower=lora", "recipe.lora_r=4", "recipe.lora_dropout=0", "backbone=mini_dinov2_siglip"]),
        (2, ["projector=qformer", "projector.dropout=0", "llm=mini_phi", "recipe.lm=frozen", "data.val_fraction=0.3"]),
    ],
)
def test_every_way_to_share_the_work_gives_the_same_numbers(start, tmp_path, assert_same_run, ranks, options):
    alone = [option for option in options if option.startswith(("recipe.", "llm", "backbone", "projector", "data"))]
    reference = start(*CLIPPED, *alone, run="one")
    job = start(*options, *CLIPPED, "trainer.accelerator=cpu", "trainer.precision=32-true", ranks=ranks)
    assert reference.wait() == [0], reference.log.read_text()
    assert job.wait() == [0] * ranks, job.log.read_text()
    assert_same_run(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("order", ["prismatic", "shuffled"])
@pytest.mark.parametrize("tower", ["frozen", "full"])
def test_projector_and_tower_rest_where_no_process_has_an_image(
    start, tmp_path, assert_same_run, strategy, order, tower
):
    """`prismatic` has steps of text only; in a `shuffled` step of two records one process has the text alone."""
    options = ["recipe.update_idle_projector=false", f"recipe.sampler={order}", "recipe.epochs=2"]
    options += [f"recipe.tower={tower}", "recipe.tower_lr=1e-4"]
    if order == "shuffled":
        options += ["recipe.global_batch_size=2", "recipe.micro_batch_size=1"]
    shared = [f"trainer={strategy}", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    jobs = [start(*options, run="one"), start(*options, *shared, ranks=2)]
    assert [job.wait() for job in jobs] == [[0], [0, 0]], jobs[1].log.read_text()
    assert_same_run(tmp_path / "run", tmp_path / "one")
    # AdamW's own count of the updates: two of six steps are of text only; of the shuffled ten none is.
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    counts = {}
    for file in newest.glob("*.safetensors"):
        for name, value in load_file(file).items():
            if name.startswith("optimizer.step."):
                counts.setdefault(name.split(".")[2], set()).add(int(value))
    vision = {"projector", "backbone"} if tower == "full" else {"projector"}
    with_images, all_steps = (4, 6) if order == "prismatic" else (10, 10)
    assert counts == {part: {with_images} for part in vision} | {"lm": {all_steps}}


@pytest.mark.slow
def test_a_mean_over_micro_batches_is_one_over_those_of_all_processes(start, tmp_path, assert_same_run):
    """As in prismatic: each forward pass weighs the same, whatever it supervises. Two processes share three of them."""
    one = ["recipe.grad_clip=0", "recipe.epochs=1", "recipe.global_batch_size=3", "recipe.micro_batch_size=1"]
    strict = [*one, "recipe.loss=micro_batch_mean"]
    shared = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    jobs = {
        "alone": start(*strict, run="alone"),
        "shared": start(*strict, *shared, ranks=2, run="shared"),
        "by_token": start(*one, run="by_token"),
    }
    for job in jobs.values():
        assert set(job.wait()) == {0}, job.log.read_text()
    assert_same_run(tmp_path / "shared", tmp_path / "alone")
    steps = zip(_numbers(tmp_path / "alone"), _numbers(tmp_path / "by_token"), strict=True)
    assert any(strict != pytest.approx(by_token, **EXACT) for strict, by_token in steps)


@pytest.mark.slow
def test_pretrained_weights_are_read_in_pieces(start, tmp_path, assert_same_run):
    """From files in half precision and of fewer rows than the table: as the whole model's loader does it."""
    from prism_deco.llms import build_llm

    torch.manual_seed(3)
    llm = build_llm("mini_qwen2")
    llm.model.save_pretrained(tmp_path / "weights", max_shard_size="1MB")
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) > 1
    options = [*CLIPPED, "llm.pretrained=true", f"llm.weights={tmp_path / 'weights'}"]
    reference, job = start(*options, run="one"), start(*options, ranks=2)
    assert reference.wait() == [0], reference.log.read_text()
    assert job.wait() == [0, 0], job.log.read_text()
    assert_same_run(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_half_precision_compute_keeps_full_weights(start, tmp_path):
    job = start(*CLIPPED, "trainer.precision=bf16-mixed", "trainer.reduce_dtype=bfloat16", ranks=2)
    reference = start(*CLIPPED, run="one")
    assert job.wait() == [0, 0], job.log.read_text()
    assert reference.wait() == [0]
    for mine, theirs in zip(_numbers(tmp_path / "run"), _numbers(tmp_path / "one"), strict=True):
        assert mine != theirs and mine == pytest.approx(theirs, rel=0.05)
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_units_are_blocks_layers_tower_and_projector(tiny):
    vlm, _ = tiny("mini_llama")
    units = sharded_units(vlm)
    layers = list(vlm.lm.model.layers)
    assert units == [*vlm.backbone.trunk.blocks, vlm.backbone, *layers, vlm.projector]
    own = {id(p) for unit in units for p in unit.parameters()}
    rest = {name for name, p in vlm.named_parameters() if id(p) not in own}
    assert rest == {"lm.model.embed_tokens.weight", "lm.model.norm.weight", "lm.lm_head.weight"}


@pytest.fixture
def sharded(tiny, tmp_path):
    """(projector, options) -> (VLM, LanguageModel, batch), sharded for bf16-mixed in a group of this process alone."""

    def build(projector: str, **options):
        torch.manual_seed(0)
        vlm, llm = tiny("mini_llama", projector, **options)
        talk = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "red"}]
        pixels = {"mini_siglip": torch.randn(1, 3, 64, 64)}
        batch = build_batch([llm.encode(talk, num_images=1)], vlm.projector.num_tokens, pixels=pixels)
        trainer = load_config(["trainer=fsdp", "trainer.precision=bf16-mixed"]).trainer
        Sharding.of(trainer, 1).apply(vlm.float(), llm, init_device_mesh("cpu", (1,)))
        return vlm, batch

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield build
    dist.destroy_process_group()


@pytest.mark.parametrize(("projector", "inside"), [("d_abstractor", torch.float32), ("c_abstractor", torch.bfloat16)])
def test_a_projector_computes_in_the_type_it_asks_for(sharded, projector, inside):
    vlm, batch = sharded(projector)
    seen = {"projector": set(), "llm": set()}

    def look(place):
        def hook(module, inputs, kwargs):
            tensors = [*inputs, *kwargs.values(), *module.parameters()]
            seen[place] |= {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()}

        return hook

    part = next(child for child in vlm.projector.modules() if isinstance(child, torch.nn.Linear | torch.nn.Conv2d))
    part.register_forward_pre_hook(look("projector"), with_kwargs=True)
    vlm.lm.model.layers[0].self_attn.q_proj.register_forward_pre_hook(look("llm"), with_kwargs=True)
    vlm(batch).total.backward()
    assert seen == {"projector": {inside}, "llm": {torch.bfloat16}}
    assert {p.grad.dtype for p in vlm.parameters() if p.grad is not None} == {torch.float32}


def test_a_forward_pass_does_not_enter_the_model_twice(sharded, monkeypatch):
    """To FSDP `visual_tokens` is an entry of its own; behind one, layers are gathered at their turn and not before."""
    vlm, batch = sharded("avgpool")
    monkeypatch.setattr(vlm, "visual_tokens", None)
    assert torch.isfinite(vlm(batch).total)
    blank = replace(batch, pixels=None, visual=torch.zeros_like(batch.visual))
    assert torch.isfinite(vlm(blank).total)


def test_the_size_of_a_shard_divides_the_number_of_processes():
    with pytest.raises(ValueError, match="trainer.shard_size=3 does not divide the 4 processes"):
        Sharding.of(load_config(["trainer=fsdp", "trainer.shard_size=3"]).trainer, 4)
