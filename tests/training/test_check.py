"""What would stop a run is found before it, and before the stages that come before it."""

import pytest
import torch

from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.training import session
from prism_deco.training.session import check

SECOND_STAGE = ["recipe=llava_v1_5_finetune", "backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([*SECOND_STAGE, "data=llava_v1_5_mix665k", "data.root=/nowhere"], "/nowhere/llava_v1_5_mix665k.json does not"),
        ([*SECOND_STAGE, "data=shapes", "recipe.lm=qlora"], "recipe.lm=qlora.* need"),
        (["recipe.lm=qlora", "trainer=fsdp"], "recipe.lm=qlora cannot be sharded"),
        (["recipe.num_tokens=81"], "num_tokens=81"),
        (["trainer.devices=-2"], "trainer.devices=-2 must be at least 1"),
    ],
)
def test_mistakes_are_found(settings, message):
    with pytest.raises(ValueError, match=message):
        check(load_config(settings))


def test_memory_is_a_mistake_that_can_be_forced(monkeypatch):
    monkeypatch.setattr(session, "device_memory", lambda: 2**20)
    with pytest.raises(ValueError, match="This run cannot work.*--force starts it anyway"):
        check(load_config([]))
    check(load_config([]), force=True)


def test_only_the_first_process_looks(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
                        "TORCHELASTIC_RUN_ID": "x"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    config = load_config(["data=llava", "trainer=ddp"])
    check(config)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="data=llava needs"):
        check(config)


@pytest.mark.parametrize(("line", "says"), [([], "error: "), (["recipe=mini_two_stage"], "Stage finetune: ")])
def test_the_command_says_which_stage_and_leaves_no_trace(tmp_path, capsys, line, says):
    runs = tmp_path / "runs"
    wrong = "finetune.recipe.num_tokens=81" if line else "recipe.num_tokens=81"
    assert main(["train", "--check", *line, wrong, f"runs_dir={runs}"]) == 2
    assert f"{says}num_tokens=81" in capsys.readouterr().err
    assert main(["train", "--check", *line, f"runs_dir={runs}"]) == 0
    assert not runs.exists()
