import json
import os
import shutil
from dataclasses import asdict

import pytest
import torch
import torch.multiprocessing

from prism_deco.config.choices import results_name
from prism_deco.distributed import World
from prism_deco.errors import UsageError
from prism_deco.evaluation import build_benchmark, evaluate, load_predictions, score_file
from prism_deco.evaluation.choose import check_keys, prepare, prepare_one
from prism_deco.evaluation.scoring import predict

KINDS = ("pope", "refcoco", "vqav2", "vizwiz", "textvqa", "gqa", "mme", "seed", "mmbench", "questions")


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
    assert result["variants"] == list(benchmark.variants)
    assert result.keys() == {
        "benchmark",
        "variants",
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


def test_what_does_not_fit_the_memory_is_asked_in_parts(files, fake_model, tmp_path, caplog):
    """Smaller ones from then on, and one question at a time at the least."""
    benchmark, model = build_benchmark(files.textvqa()), fake_model(lambda path, prompt: f"{path.name} {prompt}")
    whole = evaluate(model, benchmark, tmp_path / "whole", batch_size=4, progress=False)
    assert max(map(len, model.calls)) == 4

    def short_of_memory(room):
        small = fake_model(model.answer)
        ask = small._ask

        def limited(images, prompts):
            if len(prompts) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return ask(images, prompts)

        small._ask = limited
        return small

    small = short_of_memory(1)
    assert evaluate(small, benchmark, tmp_path / "parts", batch_size=4, progress=False) == whole
    assert {len(call) for call in small.calls} == {1} and len(small.calls) == sum(map(len, model.calls))
    assert (tmp_path / "parts/predictions.jsonl").read_bytes() == (tmp_path / "whole/predictions.jsonl").read_bytes()
    assert "Out of memory with 4 questions at a time: continuing with 2" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(short_of_memory(0), benchmark, tmp_path / "none", batch_size=4, progress=False)


def test_every_answer_belongs_to_its_image_and_prompt(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.textvqa())
    model = fake_model(lambda path, prompt: f"{path.name} {prompt}")
    evaluate(model, benchmark, tmp_path, batch_size=2, progress=False)
    for prediction in load_predictions(tmp_path / "predictions.jsonl"):
        assert prediction.output == f"{prediction.image.removeprefix('images/')} {prediction.prompt}"


@pytest.mark.parametrize("image_cache", [1, 2, 100])
def test_questions_about_several_images_or_none(files, fake_model, tmp_path, image_cache):
    """The answer to each shows which images the model was given, in their order."""
    names = lambda seen: [path.name for path in seen] if isinstance(seen, list) else seen.name  # noqa: E731
    model = fake_model(lambda seen, prompt: str(names(seen)))
    benchmark = build_benchmark(files.questions())
    evaluate(model, benchmark, tmp_path, batch_size=2, image_cache=image_cache, progress=False)
    written = lines(tmp_path)
    assert [p["output"] for p in written] == ["q0.png", "['q1.png', 'q0.png']", "[]"]
    assert [p["image"] for p in written] == ["images/q0.png", ["images/q1.png", "images/q0.png"], []]
    again = fake_model()
    evaluate(again, benchmark, tmp_path, batch_size=2, progress=False)
    assert not again.calls, "the written file is that of the same questions"


def test_one_bad_image_of_several_counts_the_question_wrong(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.questions(on_bad_image="count_wrong"))
    (files.path / "images/q1.png").unlink()
    evaluate(fake_model(lambda seen, prompt: "2"), benchmark, tmp_path, progress=False)
    assert [(p["output"], p["score"]) for p in lines(tmp_path)] == [("2", 0), (None, 0), ("2", 1)]


def test_a_model_that_knows_everything_scores_full_marks(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.pope())
    truth = {(i.paths[0], i.prompt): i.target["answer"] for i in benchmark.items()}
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


@pytest.mark.parametrize("kind", ["pope", "gqa", "questions", "mme"])
def test_wherever_an_evaluation_is_killed_the_same_answers_come_out(files, fake_model, tmp_path, kind):
    """Also where the composition of a batch, or of the images that are encoded together, changes an answer."""

    class Sensitive(fake_model):
        def encode_images(self, images):
            group = " ".join(path.name for path in images)
            tokens = super().encode_images(images)
            for token in tokens:
                token[1] = sum(group.encode())
            return tokens

        def _ask(self, images, prompts):
            seen = [float(i[1, 0]) if not isinstance(i, list) else [float(one[1, 0]) for one in i] for i in images]
            return [f"{answer} of {sorted(prompts)} and {seen}" for answer in super()._ask(images, prompts)]

        def choice_probabilities(self, images, prompts, choices):
            sums = [len(answer) + sum(answer.encode()) for answer in self._ask(images, prompts)]
            return torch.tensor([[1 / total, 1 - 1 / total] for total in sums])

    def answers(folder, **more):
        model = Sensitive(**more)
        evaluate(model, benchmark, folder, batch_size=2, progress=False)
        return (folder / "predictions.jsonl").read_bytes(), model

    benchmark = build_benchmark(getattr(files, kind)())
    whole, model = answers(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        answers(tmp_path / "killed", dies_at=len(model.calls))
    content = (tmp_path / "killed/predictions.jsonl").read_bytes()
    written = content.splitlines(keepends=True)
    assert written
    for k in range(len(written) + 1):
        for torn in (b"", b'{"question_id": "half'):
            folder = tmp_path / f"{k}{len(torn)}"
            shutil.copytree(tmp_path / "killed", folder)
            (folder / "predictions.jsonl").write_bytes(b"".join(written[:k]) + torn)
            assert answers(folder)[0] == whole, k


def test_progress_shows_the_count(files, fake_model, tmp_path, capsys, caplog):
    """Of the answers: two variants ask every question twice."""
    caplog.set_level("INFO")
    evaluate(fake_model(), build_benchmark(files.pope()), tmp_path, batch_size=1)
    shown = capsys.readouterr().out
    assert "tiny_pope" in shown and "16/16 answers" in shown
    assert "8 questions in 2 variants (likelihood, generate), 0 of 16 answers already there" in caplog.text


def test_a_finished_evaluation_asks_nothing(files, fake_model, tmp_path):
    benchmark = build_benchmark(files.gqa())
    first = evaluate(fake_model(), benchmark, tmp_path, progress=False)
    again = fake_model()
    assert evaluate(again, benchmark, tmp_path, progress=False) == first
    assert not again.calls and not again.encoded


def test_a_limited_evaluation_can_be_completed(files, fake_model, tmp_path):
    benchmark, two = build_benchmark(files.gqa()), build_benchmark(files.gqa(limit=2))
    assert evaluate(fake_model(), two, tmp_path, progress=False)["n"] == 2
    model = fake_model()
    assert evaluate(model, benchmark, tmp_path, progress=False)["n"] == 3
    assert sum(map(len, model.calls)) == 3, "the batch of which two answers were there is asked as a whole"
    limited, rest = tmp_path / "limited", fake_model()
    evaluate(fake_model(), two, limited, batch_size=1, progress=False)
    assert evaluate(rest, benchmark, limited, batch_size=1, progress=False)["n"] == 3
    assert sum(map(len, rest.calls)) == 1


def test_answers_are_not_mixed(files, fake_model, tmp_path):
    """The message names the folder, what differs, and both ways out."""
    keys = files.gqa()
    evaluate(fake_model(), build_benchmark(keys), tmp_path, model_id="a", dtype="float32", progress=False)
    ways = rf"Choose another folder \(prism-deco evaluate --out DIR\), or delete {tmp_path}\.$"

    def refused(benchmark, says, **about):
        about = {"model_id": "a", "dtype": "float32", "progress": False} | about
        with pytest.raises(ValueError, match=f"^{tmp_path}.*{says}.*{ways}"):
            evaluate(fake_model(), benchmark, tmp_path, **about)

    refused(build_benchmark(keys), "other settings: model was a and is b", model_id="b")
    refused(build_benchmark(keys, max_new_tokens=5), "max_new_tokens was 128 and is 5")
    other = evaluate(fake_model(), build_benchmark(files.refcoco()), tmp_path / "boxes", progress=False)
    assert other["variants"] == ["quoted"]
    with pytest.raises(UsageError, match=r"variants was \['quoted'\] and is \['trained'\]"):
        trained = build_benchmark(files.refcoco(variants=["trained"]))
        evaluate(fake_model(), trained, tmp_path / "boxes", progress=False)
    refused(build_benchmark(keys), "dtype was float32 and is bfloat16", dtype="bfloat16")
    (tmp_path / "boxes/decoding.json").unlink()
    with pytest.raises(UsageError, match=r"boxes holds answers, but no decoding.json with their settings\. Choose"):
        evaluate(fake_model(), build_benchmark(files.refcoco()), tmp_path / "boxes", progress=False)
    one = build_benchmark(keys, limit=1)
    refused(one, "holds 3 answers, .* is not one of the 1 that this evaluation asks")
    refused(build_benchmark(files.vizwiz()), "is not one of the 2 that this evaluation asks")
    questions = json.loads((files.path / keys["annotations"]).read_text())
    questions = {k: v | {"question": "Why?"} for k, v in questions.items()}
    refused(build_benchmark(keys | {"annotations": files.json("q.json", questions)}), "the prompt of .* is 'Why")


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


@pytest.mark.parametrize("again", ["fail", "count_wrong"])
def test_a_question_is_asked_once_its_image_is_back(files, fake_model, tmp_path, again, caplog):
    keys = files.gqa(on_bad_image="count_wrong")
    whole = evaluate(fake_model(), build_benchmark(keys), tmp_path / "whole", progress=False)
    image = files.path / "images/n0.png"
    content = image.read_bytes()
    image.unlink()
    folder = tmp_path / "answers"
    caplog.set_level("INFO")
    evaluate(fake_model(), build_benchmark(keys), folder, progress=False)
    assert "tiny_gqa: 1 of 3 answers are missing" in caplog.text
    if again == "fail":
        kept = (folder / "predictions.jsonl").read_bytes()
        with pytest.raises(UsageError, match=r"Question 200: .*n0\.png"):
            evaluate(fake_model(), build_benchmark(keys, on_bad_image="fail"), folder, progress=False)
        assert (folder / "predictions.jsonl").read_bytes() == kept
    image.write_bytes(content)
    caplog.clear()
    model = fake_model()
    assert evaluate(model, build_benchmark(keys, on_bad_image=again), folder, progress=False) == whole
    assert [sorted(call) for call in model.calls] == [sorted(item.prompt for item in build_benchmark(keys).items())]
    assert "tiny_gqa: 3 questions, 2 of 3 answers already there" in caplog.text
    assert "answers are missing" not in caplog.text
    assert (folder / "predictions.jsonl").read_bytes() == (tmp_path / "whole/predictions.jsonl").read_bytes()


def test_an_evaluation_killed_without_an_image_leaves_no_question_twice(files, fake_model, tmp_path):
    keys = files.vqav2(on_bad_image="count_wrong")
    (files.path / "images/000.png").unlink()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(fake_model(dies_at=1), build_benchmark(keys), tmp_path, batch_size=1, progress=False)
        assert [(p.question_id, p.output) for p in load_predictions(tmp_path / "predictions.jsonl")] == [("0", None)]


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
    world = World.of_torchrun()
    with world.joined():
        result = evaluate(model, build_benchmark(keys), folder, batch_size=2, progress=False, world=world)
    report = [result, model.encoded, sum(map(len, model.calls)), world.is_main]
    (folder.parent / f"rank{rank}.json").write_text(json.dumps(report))


def _stem(path, prompt):
    return path.stem


def test_two_ranks_share_the_images(files, fake_model, tmp_path, free_port):
    keys = files.vqav2()
    benchmark = build_benchmark(keys)
    alone = evaluate(fake_model(_stem), benchmark, tmp_path / "alone", batch_size=2, progress=False)
    folder = tmp_path / "shared"
    shutil.copytree(tmp_path / "alone", folder)
    # an earlier process was killed after one answer
    done = benchmark.grade(predict(benchmark.items()[2], "002"))
    (folder / "predictions.jsonl").write_text(json.dumps(asdict(done)) + "\n" + '{"torn')
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, keys, folder, fake_model, free_port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [report[0] for report in reports] == [alone, alone]
    encoded = [{"000.png": 1, "002.png": 1}, {"001.png": 1}]  # the batch of the answer that was there is asked again
    assert [report[1] for report in reports] == encoded
    assert [report[3] for report in reports] == [True, False]
    assert (folder / "predictions.jsonl").read_bytes() == (tmp_path / "alone/predictions.jsonl").read_bytes()
    assert not list(folder.glob("predictions.rank*"))


@pytest.fixture
def shipped(files, tmp_path):
    """Paths of two benchmarks' YAMLs, the second without boxes."""
    paths = []
    for kind in ("refcoco", "gqa"):
        paths.append(tmp_path / f"{kind}.yaml")
        paths[-1].write_text(json.dumps({k: v for k, v in getattr(files, kind)().items() if k != "name"}))
    return [str(path) for path in paths]


def test_all_benchmarks_are_looked_at_before_any_is_asked(files, shipped):
    prepared = prepare(",".join(shipped), {"limit": 2, "split": None})
    assert [(benchmark.name, benchmark.limit, benchmark.split) for benchmark in prepared] == [
        ("refcoco", 2, "val"), ("gqa", 2, "")]  # fmt: skip
    for options, says in [
        ({"limt": 3}, "Unknown key of the benchmark refcoco 'limt'. Did you mean 'limit'"),
        ({"limit": "x"}, "limit=x must be a whole number"),
        ({"split": "tset"}, "refcoco, split 'tset': there are no questions"),
    ]:
        with pytest.raises(ValueError, match=says):
            prepare(shipped, options)
    with pytest.raises(
        ValueError, match="mini_gqa needs a folder with its files, .* set benchmark.mini_gqa.root=FOLDER"
    ):
        prepare("mini_gqa")
    with pytest.raises(ValueError, match="nowhere.*does not exist"):
        prepare("mini_gqa", root=files.path / "nowhere")
    (files.path / "images/7.png").unlink()
    with pytest.raises(ValueError, match="refcoco: the image .*7.png is missing"):
        prepare(shipped)


def test_keys_of_single_benchmarks(files, shipped):
    """They precede those of all benchmarks, and do not need a folder of the training data."""
    elsewhere = files.path.rename(files.path.with_name("elsewhere"))
    own = {"gqa": {"root": str(elsewhere), "limit": 1}, "refcoco": {"root": str(elsewhere)}}
    boxes, answers = prepare(shipped, {"limit": 2}, own, root=files.path)
    assert (boxes.limit, answers.limit) == (2, 1) and boxes.root == answers.root == elsewhere
    with pytest.raises(UsageError, match=r"Unknown benchmark.* 'gqu'\. Did you mean 'gqa'\?"):
        check_keys(shipped, (), {"gqu": {}})


def test_relevance_is_measured_where_there_are_boxes(shipped):
    assert prepare_one(shipped[0], {"limit": 1}, boxes=True).limit == 1
    assert prepare_one(shipped[1]).name == "gqa"
    with pytest.raises(ValueError, match="has no boxes to compare relevance with"):
        prepare_one(shipped[1], boxes=True)
    with pytest.raises(ValueError, match=r"is a group of benchmarks: .*gqa\.yaml\. Name one"):
        prepare_one(",".join(shipped))


def test_results_of_another_split_have_a_folder_of_their_own():
    assert [results_name("mini_gqa", split) for split in (None, "val", "test")] == [
        "mini_gqa", "mini_gqa", "mini_gqa-test"]  # fmt: skip
