import json
import os
import socket
from dataclasses import asdict

import pytest
import torch.multiprocessing

from prism_deco.evaluation import build_benchmark, evaluate, load_predictions, local_device, process_group, score_file
from prism_deco.evaluation.scoring import predict

KINDS = ("pope", "refcoco", "vqav2", "vizwiz", "textvqa", "gqa", "mme", "seed", "mmbench")


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_and_metrics(files, fake_model, tmp_path, kind):
    benchmark = build_benchmark(getattr(files, kind)())
    result = evaluate(fake_model(lambda path, prompt: "Yes"), benchmark, tmp_path, batch_size=3, progress=False)
    written = lines(tmp_path)
    assert [p["question_id"] for p in written] == [item.question_id for item in benchmark.items()]
    assert all(list(p) == ["question_id", "image", "prompt", "output", "answer", "target", "score"] for p in written)
    assert (
        json.loads((tmp_path / "metrics.json").read_text())
        == result
        == score_file(tmp_path / "predictions.jsonl", benchmark)
    )
    assert result.keys() == {
        "benchmark",
        "metrics",
        "primary",
        "n",
        "invalid_rate",
        "interval95",
        "decoding",
        "prompt_hash",
        "data_hash",
    }
    assert result["primary"] in result["metrics"]
    assert result["decoding"] == {"strategy": "greedy", "max_new_tokens": 128, "dtype": None, "model": None}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "decoding.json",
        "metrics.json",
        "predictions.jsonl",
    ]


def test_every_answer_belongs_to_its_image_and_prompt(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.textvqa())
    model = fake_model(lambda path, prompt: f"{path.name} {prompt}")
    evaluate(model, benchmark, tmp_path, batch_size=2, progress=False)
    for prediction in load_predictions(tmp_path / "predictions.jsonl"):
        assert prediction.output == f"{prediction.image.removeprefix('images/')} {prediction.prompt}"


def test_a_model_that_knows_everything_scores_full_marks(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.pope())
    truth = {(i.path, i.prompt): i.target["answer"] for i in benchmark.items()}
    model = fake_model(lambda path, prompt: truth[path, prompt].capitalize())
    result = evaluate(model, benchmark, tmp_path, progress=False)
    assert result["metrics"]["accuracy"] == result["metrics"]["generate/f1"] == 100
    assert result["interval95"] == [100, 100] and result["invalid_rate"] == 0


@pytest.mark.parametrize("image_cache", [1, 2, 100])
def test_each_image_is_encoded_once(files, fake_model, tmp_path, image_cache):
    model = fake_model()
    evaluate(model, build_benchmark(files.pope()), tmp_path, batch_size=3, image_cache=image_cache, progress=False)
    assert model.encoded == {"0.png": 1, "1.png": 1}


def test_batches_hold_prompts_of_similar_length(files, fake_model, tmp_path):
    model = fake_model()
    evaluate(model, build_benchmark(files.textvqa()), tmp_path, batch_size=2, progress=False)
    lengths = [len(prompt) for call in model.calls for prompt in call]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 2


def test_batch_size_does_not_change_the_file(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.vqav2())
    for batch_size in (1, 2, 50):
        model = fake_model(lambda path, prompt: path.stem)
        evaluate(model, benchmark, tmp_path / str(batch_size), batch_size=batch_size, progress=False)
    first, *others = ((tmp_path / str(size) / "predictions.jsonl").read_bytes() for size in (1, 2, 50))
    assert all(other == first for other in others)


@pytest.mark.parametrize("kind", ["pope", "vqav2", "mme"])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_evaluation_resumes(files, fake_model, tmp_path, kind, torn):
    benchmark = build_benchmark(getattr(files, kind)())
    answer = lambda path, prompt: f"No {path.stem}"  # noqa: E731
    whole = evaluate(fake_model(answer), benchmark, tmp_path / "whole", batch_size=2, image_cache=1, progress=False)
    folder = tmp_path / "killed"
    dying = fake_model(answer, dies_at=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(dying, benchmark, folder, batch_size=2, image_cache=1, progress=False)
    finished = {p["question_id"] for p in lines(folder)}
    assert len(finished) == sum(map(len, dying.calls[:2])) > 0
    if torn:
        with (folder / "predictions.jsonl").open("a") as file:
            file.write('{"question_id": "half a li')
    rest = fake_model(answer)
    assert evaluate(rest, benchmark, folder, batch_size=2, image_cache=1, progress=False) == whole
    assert sum(map(len, rest.calls)) == len(benchmark.items()) - len(finished)
    assert (folder / "predictions.jsonl").read_bytes() == (tmp_path / "whole/predictions.jsonl").read_bytes()


def test_progress_shows_the_count(files, fake_model, tmp_path, capsys):
    evaluate(fake_model(), build_benchmark(files.gqa()), tmp_path, batch_size=1)
    assert "tiny_gqa" in (shown := capsys.readouterr().out) and "3/3" in shown


def test_a_finished_evaluation_asks_nothing(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.gqa())
    first = evaluate(fake_model(), benchmark, tmp_path, progress=False)
    again = fake_model()
    assert evaluate(again, benchmark, tmp_path, progress=False) == first
    assert not again.calls and not again.encoded


def test_a_limited_evaluation_can_be_completed(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.gqa())
    assert evaluate(fake_model(), benchmark, tmp_path, limit=2, progress=False)["n"] == 2
    model = fake_model()
    assert evaluate(model, benchmark, tmp_path, progress=False)["n"] == 3
    assert sum(map(len, model.calls)) == 1


def test_answers_are_not_mixed(files, fake_model, tmp_path):
    keys = files.gqa()
    evaluate(fake_model(), build_benchmark(keys), tmp_path, model_id="a", progress=False)
    with pytest.raises(ValueError, match="choose another folder"):
        evaluate(fake_model(), build_benchmark(keys), tmp_path, model_id="b", progress=False)
    with pytest.raises(ValueError, match="choose another folder"):
        evaluate(fake_model(), build_benchmark(keys, max_new_tokens=5), tmp_path, model_id="a", progress=False)
    with pytest.raises(ValueError, match="choose another folder"):
        evaluate(fake_model(), build_benchmark(keys), tmp_path, model_id="a", dtype="bfloat16", progress=False)
    with pytest.raises(ValueError, match="not one that this evaluation asks"):
        evaluate(fake_model(), build_benchmark(keys), tmp_path, limit=1, model_id="a", progress=False)
    with pytest.raises(ValueError, match="not one that this evaluation asks"):
        evaluate(fake_model(), build_benchmark(files.vizwiz()), tmp_path, model_id="a", progress=False)


def test_bad_images_fail_before_any_question(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.gqa())
    (files.path / "images/n2.png").write_bytes(b"no image")
    model = fake_model()
    with pytest.raises(ValueError, match=r"Question 202: .*n2\.png"):
        evaluate(model, benchmark, tmp_path, progress=False)
    assert not model.calls


def test_bad_images_count_as_wrong(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.gqa(on_bad_image="count_wrong"))
    (files.path / "images/n0.png").unlink()
    result = evaluate(fake_model(), benchmark, tmp_path, progress=False)
    assert [(p["output"], p["score"]) for p in lines(tmp_path)] == [(None, 0), ("yes", 1), ("yes", 0)]
    assert result["metrics"]["accuracy"] == pytest.approx(100 / 3) and result["invalid_rate"] == pytest.approx(1 / 3)
    again = fake_model()
    assert evaluate(again, benchmark, tmp_path, progress=False) == result and not again.calls


def test_damage_within_the_file_is_named(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.gqa())
    evaluate(fake_model(), benchmark, tmp_path, progress=False)
    path = tmp_path / "predictions.jsonl"
    path.write_text(path.read_text().replace('{"question_id": "201"', "#", 1))
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2 is damaged"):
        evaluate(fake_model(), benchmark, tmp_path, progress=False)


def test_hashes_tell_prompts_and_data_apart(files, fake_model, tmp_path):
    def hashes(name, **keys):
        result = evaluate(fake_model(), build_benchmark(files.refcoco(**keys)), tmp_path / name, progress=False)
        return result["prompt_hash"], result["data_hash"]

    quoted, again = hashes("a"), hashes("b")
    trained = hashes("c", variants=["trained"])
    other = hashes("d", size=(100, 60))
    assert quoted == again
    assert trained[0] != quoted[0] and trained[1] == quoted[1]
    assert other[0] == quoted[0] and other[1] != quoted[1]


def _rank(rank, keys, folder, fake_model, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model = fake_model(_stem)
    with process_group() as is_first:
        result = evaluate(model, build_benchmark(keys), folder, batch_size=2, progress=False)
    report = [result, model.encoded, sum(map(len, model.calls)), is_first]
    (folder.parent / f"rank{rank}.json").write_text(json.dumps(report))


def _stem(path, prompt):
    return path.stem


def test_two_ranks_share_the_images(files, fake_model, tmp_path):
    keys = files.vqav2()
    benchmark = build_benchmark(keys)
    alone = evaluate(fake_model(_stem), benchmark, tmp_path / "alone", batch_size=2, progress=False)
    folder = tmp_path / "shared"
    folder.mkdir()
    # an earlier process was killed after one answer
    done = benchmark.grade(predict(benchmark.items()[2], "002"))
    (folder / "predictions.jsonl").write_text(json.dumps(asdict(done)) + "\n" + '{"torn')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, keys, folder, fake_model, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [report[0] for report in reports] == [alone, alone]
    assert [report[1] for report in reports] == [{"000.png": 1}, {"001.png": 1}]
    assert [report[3] for report in reports] == [True, False]
    assert (folder / "predictions.jsonl").read_bytes() == (tmp_path / "alone/predictions.jsonl").read_bytes()
    assert not list(folder.glob("predictions.rank*"))


@pytest.mark.parametrize("kind", ["cuda", "gpu", "auto"])
def test_each_process_scores_on_its_own_gpu(monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device(kind) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device(kind) == torch.device("cpu")


def test_other_devices_are_torch_s():
    assert local_device("cpu") == torch.device("cpu") and local_device("cuda:1") == torch.device("cuda", 1)
