"""What would stop a run is found before it, and before the stages that come before it."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from prism_deco.backbones.weights import check_tower_weights
from prism_deco.build import group
from prism_deco.cli import main
from prism_deco.config import load_config, save_config
from prism_deco.distributed import World
from prism_deco.errors import UsageError
from prism_deco.llms.build import check_llm_weights
from prism_deco.llms.spec import read_spec
from prism_deco.training.checkpoints import save_checkpoint
from prism_deco.training.preconditions import check_all
from prism_deco.training.progress import set_status
from prism_deco.training.run_dir import find_run

SECOND_STAGE = ["recipe=llava_v1_5_finetune", "backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5"]


def check(config, *, overwrite=False, **options):
    """What `train --check` does."""
    found = find_run(config, overwrite=overwrite)
    if found.state == "train":
        check_all(config, World.of(config.trainer), resume=found.checkpoint, plans=True, **options)


@pytest.fixture(autouse=True)
def no_gpu_and_no_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([*SECOND_STAGE, "data=llava_v1_5_mix665k", "data.root=/nowhere"], "/nowhere/llava_v1_5_mix665k.json does not"),
        ([*SECOND_STAGE, "data=shapes", "recipe.lm=qlora"], "recipe.lm=qlora.* need"),
        (["recipe.lm=qlora", "trainer=fsdp", "trainer.accelerator=cpu"], "recipe.lm=qlora cannot be sharded"),
        (["recipe.num_tokens=81"], "num_tokens=81"),
        (["trainer.devices=-2"], "trainer.devices=-2 must be at least 1"),
        (["trainer.strategy=ddpx"], "Unknown trainer.strategy 'ddpx'"),
        (["trainer.devices=2"], "2 devices need trainer.strategy=ddp"),
        (
            ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.shard_size=3"],
            "trainer.shard_size=3 does not divide",
        ),
        (["recipe.loss=sum"], "Unknown recipe.loss 'sum'"),
        (["recipe.start_from=/nowhere"], "recipe.start_from=/nowhere holds no finished model"),
    ],
)
def test_mistakes_are_found(settings, message):
    with pytest.raises(ValueError, match=message):
        check(load_config(settings))


@pytest.mark.parametrize(
    ("way", "message"), [("full", "trains the whole LLM, which a run with"), ("lora", "trains adapters")]
)
def test_a_first_stage_whose_llm_would_be_lost_is_found_before_it(way, message):
    first = load_config(["recipe=llava_v1_5_align", *SECOND_STAGE[1:], f"recipe.lm={way}"])
    with pytest.raises(ValueError, match=f"recipe.start_from=runs/x-align {message}"):
        check(load_config([*SECOND_STAGE, "recipe.lm=frozen", "recipe.start_from=runs/x-align"]), after=first)


@pytest.mark.parametrize("key", ["backbone.weights", "llm.weights", "projector.weights"])
def test_local_weights_are_looked_for(tmp_path, key):
    settings = ["projector=qformer", "llm.pretrained=true", f"{key}={tmp_path / 'nowhere'}"]
    with pytest.raises(ValueError, match=rf"{key}={tmp_path}/nowhere: there is no such file or folder"):
        check(load_config(settings))


@pytest.mark.parametrize("key", ["backbone.weights", "llm.weights", "projector.weights"])
@pytest.mark.parametrize("name", ["tiny.json", "tiny.safetensors", ""])
def test_files_that_hold_no_weights_are_found(tmp_path, key, name):
    (tmp_path / name).write_text("{}") if name else None
    with pytest.raises(UsageError, match=rf"{tmp_path}.*((holds|has) no weights|cannot be read as safetensors)"):
        check(load_config(["projector=qformer", "llm.pretrained=true", f"{key}={tmp_path / name}"]))


def test_a_language_model_without_its_configuration_is_found(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=f"llm.weights={tmp_path} must hold config.json"):
        check(load_config(["llm.pretrained=true", f"llm.weights={tmp_path}"]), force=True)


def test_a_run_that_cannot_go_on_is_found(tmp_path, colors, capsys):
    line = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}",
            "run_id=x", f"runs_dir={tmp_path}", "trainer=cpu", "evaluate.benchmarks=null"]  # fmt: skip
    (tmp_path / "x").mkdir()
    save_config(load_config(line), tmp_path / "x" / "config.yaml")
    recorded = {"inputs": {"val": "0" * 64}}
    checkpoint = save_checkpoint(tmp_path / "x" / "checkpoints", 2, {"model.w": torch.zeros(2)}, recorded)
    assert main(["train", "--check", *line]) == 2
    assert "The validation records changed since step_000002" in capsys.readouterr().err
    accepted = [*line, "trainer.accept_changed_inputs=true"]
    assert main(["train", "--check", *accepted]) == 0
    file = checkpoint / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"1")
    assert main(["train", "--check", *accepted]) == 2
    assert "rank_00000.safetensors was damaged" in capsys.readouterr().err
    assert main(["train", "--check", "--overwrite", *line]) == 0


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An HTTP server in place of the hub, which has the weights of CLIP; the requests that it got."""
    requests = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append((self.command, self.path))
            has = self.path.startswith("/timm/vit_large_patch14_clip_336.openai/resolve/main/model.safetensors")
            self.send_response(200 if has else 404)
            for name, value in {"ETag": '"c"', "X-Repo-Commit": "a" * 40, "Content-Length": "5"}.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield requests
    server.shutdown()


def test_weights_that_cannot_be_had_are_found():
    with pytest.raises(UsageError, match="clip_vit_l_336 needs the file model.safetensors .* could not be downloaded"):
        check(load_config(["backbone=clip_vit_l_336"]), force=True)
    with pytest.raises(UsageError, match="weights of phi2 .* are not in the local Hugging Face cache and could not"):
        check_llm_weights(read_spec(group(load_config(["llm=phi2"]), "llm")))


def test_weights_on_the_hub_are_asked_for_and_not_downloaded(hub):
    check_tower_weights("clip_vit_l_336")
    assert {command for command, _ in hub} == {"HEAD"}
    with pytest.raises(UsageError, match="dinov2_l_384 needs the file"):
        check_tower_weights("dinov2_siglip_384")


def test_weights_in_the_cache_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--microsoft--phi-2" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--microsoft--phi-2" / "refs"
    refs.mkdir()
    spec = read_spec(group(load_config(["llm=phi2", "llm.revision=main"]), "llm"))
    (refs / "main").write_text("a" * 40)
    (snapshot / "config.json").touch()
    with pytest.raises(UsageError, match="weights of phi2"):
        check_llm_weights(spec)
    (snapshot / "model.safetensors").touch()
    check_llm_weights(spec)


def test_a_folder_that_cannot_be_written_is_found(tmp_path):
    (tmp_path / "file").touch()
    for command in (["--check"], []):
        assert main(["train", *command, f"runs_dir={tmp_path}/file", "run_id=x", "data=llava"]) == 2


@pytest.mark.parametrize("command", [["--check"], []])
def test_a_gpu_that_is_not_there_is_one_line_at_once(tmp_path, capsys, command):
    """Before the data, which do not exist either."""
    line = ["data=llava", "data.json=nowhere.json", f"runs_dir={tmp_path}/runs"]
    assert main(["train", *command, "trainer=gpu", *line]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "trainer.accelerator=gpu: this machine has no GPU that torch can use. Use" in said
    assert not (tmp_path / "runs").exists()


def test_what_is_malformed_is_no_question_of_force(tmp_path):
    (tmp_path / "a.json").write_text('[{"id": "x", "conversations": "none"}]')
    settings = ["data=llava", f"data.json={tmp_path / 'a.json'}", f"data.image_root={tmp_path}"]
    with pytest.raises(ValueError, match=r"a\.json.*x") as found:
        check(load_config(settings), force=True)
    assert "--force" not in str(found.value)


def test_memory_is_a_mistake_that_can_be_forced(monkeypatch):
    monkeypatch.setattr("prism_deco.plan.devices.device_memory", lambda: 2**20)
    with pytest.raises(ValueError, match="This run would fail: .*Use --force to start it anyway"):
        check(load_config([]))
    check(load_config([]), force=True)


def test_every_process_finds_the_same(monkeypatch):
    """Or those that found nothing would wait for the others."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
                        "TORCHELASTIC_RUN_ID": "x"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match="data=llava needs"):
            check(load_config(["data=llava", "trainer=ddp", "trainer.accelerator=cpu"]))


def test_what_a_plug_in_brings_is_known(tmp_path, monkeypatch):
    (tmp_path / "my_source.py").write_text(
        "from prism_deco.data.base import SOURCES\n"
        "@SOURCES.register('mine')\n"
        "def mine(**_):\n"
        "    raise ValueError('mine was asked')\n"
    )
    (tmp_path / "mine.yaml").write_text("family: mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="mine was asked"):
        check(load_config([f"data={tmp_path / 'mine.yaml'}", "plugins=[my_source]"]))


def test_the_folder_s_run_is_looked_at(tmp_path):
    """Another one is in the way; of one that is through nothing is asked any more, not even its data."""
    settings = ["data=llava", "run_id=x", f"runs_dir={tmp_path}"]
    (tmp_path / "x").mkdir()
    save_config(load_config(settings), tmp_path / "x" / "config.yaml")
    with pytest.raises(ValueError, match="already holds a run of another configuration: seed was 7 and is 8"):
        check(load_config([*settings, "seed=8"]))
    with pytest.raises(ValueError, match="data=llava needs"):
        check(load_config([*settings, "seed=8"]), overwrite=True)
    with pytest.raises(ValueError, match="data=llava needs"):
        check(load_config(settings))
    set_status(tmp_path / "x", "trained")
    check(load_config(settings))


def test_a_stage_of_another_model_than_the_one_before(tmp_path, capsys):
    line = ["train", "--check", "recipe=mini_two_stage", f"runs_dir={tmp_path}", "run_id=x"]
    assert main([*line, "finetune.projector=qformer"]) == 2
    said = f"Stage finetune: recipe.start_from={tmp_path}/x-align is a run of another model: projector.name is"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("line", "says"), [([], "error: "), (["recipe=mini_two_stage"], "Stage finetune: ")])
def test_the_command_says_which_stage_and_leaves_no_trace(tmp_path, capsys, line, says):
    runs = tmp_path / "runs"
    wrong = "finetune.recipe.loss=sum" if line else "recipe.loss=sum"
    assert main(["train", "--check", *line, wrong, f"runs_dir={runs}"]) == 2
    assert f"{says}Unknown recipe.loss 'sum'" in capsys.readouterr().err
    assert main(["train", "--check", *line, f"runs_dir={runs}"]) == 0
    assert not runs.exists()


SMALL = ["data.train_images=20", "data.val_images=10", "data.test_images=10", "data.val_items=6", "data.test_items=6"]


@pytest.mark.parametrize("stages", [False, True])
@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("evaluate.benchmarks=pope", "evaluate.benchmarks: pope, split"),
        ("evaluate.benchmarks=mini,pop", "Unknown benchmark 'pop'"),
        ("evaluate.split=tset", "evaluate.benchmarks: mini_pope, split 'tset'"),
        ("evaluate.relevance=mini_gqa", "evaluate.relevance: mini_gqa has no boxes"),
        ("evaluate.relevance=mini", "evaluate.relevance: mini is a group of benchmarks"),
    ],
)
def test_what_a_run_is_scored_on_is_looked_at(tmp_path, capsys, stages, setting, says):
    """By `--check`, and before training starts: an earlier run then keeps its folder."""
    recipe = ["recipe=mini_two_stage"] if stages else []
    line = ["train", *recipe, *SMALL, f"runs_dir={tmp_path / 'runs'}", "run_id=x", setting]
    assert main([*line, "--check"]) == 2
    if not stages:
        (tmp_path / "runs/x").mkdir(parents=True)
        assert main([*line, "--overwrite"]) == 2
        assert (tmp_path / "runs/x").is_dir() and not list((tmp_path / "runs/x").iterdir())
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(says) == 1 + (not stages) and ("Stage finetune: " in said) == (stages and "Unknown" not in says)


def test_the_miniature_s_own_benchmarks_come_with_its_data(tmp_path):
    line = ["train", "--check", *SMALL, f"runs_dir={tmp_path / 'runs'}"]
    assert main([*line, "evaluate.relevance=mini_refcoco", "evaluate.split=test"]) == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("most", "warns"), [(60, True), (4, False)])
def test_fewer_steps_than_asked_for_are_told(tmp_path, colors, caplog, most, warns):
    """One pass over nine records in batches of two is five steps, whatever `recipe.max_steps` says."""
    line = ["train", "data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}",
            "data.val_fraction=0", "recipe.global_batch_size=2", "evaluate.benchmarks=null", f"runs_dir={tmp_path}",
            "run_id=x", f"recipe.max_steps={most}", "trainer=cpu"]  # fmt: skip
    said = "recipe.max_steps=60 is not reached: recipe.epochs=1 over 9 records in batches of 2 is 5 steps."
    assert main([*line, "--check"]) == 0
    assert caplog.text.count(said) == warns
    assert main(line) == 0
    assert caplog.text.count(said) == 2 * warns
    assert len((tmp_path / "x" / "metrics.jsonl").read_text().splitlines()) == min(most, 5)


def test_images_are_looked_for(tmp_path, colors):
    settings = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={tmp_path}", "run_id=x"]
    with pytest.raises(ValueError, match="8 of 8 images are missing"):
        check(load_config(settings))
