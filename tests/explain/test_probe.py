"""Probes: the linear reader against an explicit solution, both readers on images whose content is known."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from prism_deco.api import Model
from prism_deco.backbones import build_backbone
from prism_deco.cli import main
from prism_deco.config import load_config, save_config
from prism_deco.explain.objects import LabelledImage, read_objects
from prism_deco.explain.probe import Ridge, probe
from prism_deco.projectors import build_projector
from prism_deco.vlm import VLM

COLORS = {"red": (220, 30, 30), "blue": (40, 60, 220)}
BOX = {"box": [0, 0, 4, 4]}


def solve(x, y, penalty, new):
    """Ridge regression by its normal equations in the primal, the intercept a column of its own."""
    columns = np.hstack([x, np.ones((len(x), 1))])
    weights = np.diag([penalty] * x.shape[1] + [0.0])
    solution = np.linalg.solve(columns.T @ columns + weights, columns.T @ y)
    return np.hstack([new, np.ones((len(new), 1))]) @ solution


@pytest.mark.parametrize("width", [7, 60])
@pytest.mark.parametrize("noise", [0.02, 5.0])
def test_ridge_by_normal_equations_and_by_leaving_out_one_by_one(width, noise):
    rng = np.random.default_rng(1)
    x, new = (rng.normal(size=(rows, width)) * rng.uniform(0.5, 4, width) + 3 for rows in (24, 9))
    y = x @ rng.normal(size=(width, 3)) + noise * rng.normal(size=(24, 3)) - 2
    ridge = Ridge(torch.from_numpy(x))
    found = ridge.predict(ridge.gram(torch.from_numpy(new)), torch.from_numpy(y)).numpy()

    mean, std = x.mean(0), x.std(0, ddof=1)
    x, new = (x - mean) / std, (new - mean) / std
    unit = np.linalg.eigvalsh(x @ x.T).clip(0).mean()
    errors = {}
    for penalty in (unit * 10.0**power for power in range(-4, 4)):
        left_out = []
        for row in range(24):
            others = np.arange(24) != row
            left_out.append(solve(x[others], y[others], penalty, x[row : row + 1])[0] - y[row])
        errors[penalty] = np.square(left_out).mean()
        centred = torch.from_numpy(y - y.mean(0))
        closed = ridge._left_out_error(centred, ridge._vectors.T @ centred, torch.tensor(penalty))
        assert float(closed) == pytest.approx(errors[penalty], rel=1e-6)
    best = min(errors, key=lambda penalty: errors[penalty])
    np.testing.assert_allclose(found, solve(x, y, best, new), rtol=1e-6)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Images of one square each, red or blue, in one of the sixteen cells; every fifth is twice as wide as high, so
    that its letterbox moves what is in it."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("squares")
    images, annotations = [], []
    for number in range(200):
        name = ("red", "blue")[rng.integers(2)]
        wide = number % 5 == 0
        x, y = rng.integers(2, 13 if not wide else 45), rng.integers(2, 13)
        x, y = int(x + 16 * rng.integers(3)), int(y + 16 * rng.integers(3 if not wide else 1))
        image = Image.new("RGB", (128, 64) if wide else (64, 64), (90, 90, 90))
        image.paste(COLORS[name], (x, y, x + 14, y + 14))
        image.save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        box = {"image_id": number, "category_id": 3, "bbox": [x, y, 14, 14]}
        annotations.append(box | {"attributes": {"color": name}})
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "square"}]}
    (folder / "objects.json").write_text(json.dumps(coco))
    return folder


def model(projector="avgpool", tokens=16, pretrained=True, **options):
    torch.manual_seed(0)
    tower = build_backbone("mini_siglip", pretrained=pretrained)
    project = build_projector(projector, tower.embed_dim, 128, tower.grid, tokens)
    from prism_deco.llms import build_llm

    return VLM(tower, project, build_llm("mini_qwen2", pretrained=False).model, **options).eval()


def test_what_is_there_is_read_and_what_is_not_is_not(squares):
    images = read_objects(squares / "objects.json", squares)
    found = probe(model(), images[:150], images[150:], cells=2)
    assert found["classes"] == {"color": ["blue", "red"], "position": ["position"]}
    readers = found["readers"]
    for reader in ("linear", "mlp"):
        color = {name: readers[name][reader]["color"] for name in readers}
        assert color["patches"]["mean"] > 0.8 and color["tokens"]["mean"] > 0.8
        assert color["tokens"]["n"] == 50 and 0.3 < color["shuffled"]["mean"] < 0.7
        position = {name: readers[name][reader]["position"]["mean"] for name in readers}
        # One of sixteen cells by chance.
        assert position["tokens"] > 0.5 and position["shuffled"] < 0.3
    r2 = {name: readers[name]["linear"]["reconstruction_r2"] for name in ("tokens", "shuffled")}
    assert 0.3 < r2["tokens"] < 1 and r2["shuffled"] < 0.05
    # All patches, through an MLP that keeps most of each, tell more than their means in fours.
    everything = probe(model("linear", None), images[:150], images[150:], cells=2)
    assert everything["readers"]["tokens"]["linear"]["reconstruction_r2"] > r2["tokens"]


def test_tokens_of_a_blind_model_hold_nothing(squares):
    images = read_objects(squares / "objects.json", squares)
    readers = probe(model(blind=True), images[:150], images[150:], cells=2)["readers"]
    assert readers["tokens"]["linear"]["reconstruction_r2"] == pytest.approx(0, abs=0.01)
    for reader in ("linear", "mlp"):
        assert 0.3 < readers["tokens"][reader]["color"]["mean"] < 0.7 < readers["patches"][reader]["color"]["mean"]


def test_images_without_labels_are_reconstructed(squares):
    images = [LabelledImage(squares / f"{number}.png") for number in range(40)]
    found = probe(model(), images[:30], images[30:])
    assert found["classes"] == {} and set(found["readers"]) == {"tokens", "shuffled"}
    assert found["readers"]["tokens"]["linear"]["reconstruction_r2"] > 0.1


def test_a_diverged_run_is_an_error_of_the_user(squares):
    images = [LabelledImage(squares / f"{number}.png") for number in range(8)]
    diverged = model()
    with torch.no_grad():
        next(diverged.projector.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="visual tokens are not all finite"):
        probe(diverged, images[:6], images[6:])


COCO = {
    "images": [{"id": 4, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}],
    "annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "attributes": {"old": True}}],
    "categories": [{"id": 2, "name": "cat"}],
}


def test_objects_of_a_coco_file(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps(COCO))
    expected = [
        LabelledImage(tmp_path / "a.jpg"),
        LabelledImage(tmp_path / "b.jpg", (((1, 2, 4, 6), {"category": "cat", "old": "True"}),)),
    ]
    assert read_objects(tmp_path / "instances.json", tmp_path) == expected
    assert read_objects(tmp_path / "instances.json", tmp_path, limit=1) == expected[:1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"id": 7, "file_name": "../a.jpg"}]}, "leads out"),
        ({"images": [{"id": 7}]}, "file_name"),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2]}]}, "unpack"),
        ({"annotations": [{"image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4]}]}, "9"),
        ({"annotations": [{"image_id": 5, "category_id": 2, "bbox": [1, 2, 3, 4]}]}, "5"),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "attributes": [1]}]}, "TypeError"),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, -3, 4]}]}, r"bbox \[1, 2, -3, 4\]"),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, math.nan, 3, 4]}]}, "bbox"),
        *(
            ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "attributes": {name: 1}}]}, name)
            for name in ("category", "position", "reconstruction_r2")
        ),
        # A probe would be tested on an image that it was fitted to.
        ({"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "a.jpg"}]}, "the same file_name"),
        ({"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}]}, "the same id"),
        ({"categories": None}, "TypeError"),
    ],
)
def test_bad_labels_are_named(tmp_path, change, message):
    path = tmp_path / "instances.json"
    with pytest.raises(ValueError, match="is missing"):
        read_objects(path, tmp_path)
    path.write_text(json.dumps(COCO | change))
    with pytest.raises(ValueError, match=f"instances.json.*{message}"):
        read_objects(path, tmp_path)
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="it has no annotations"):
        read_objects(path, tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(load_config([]), folder / "config.yaml")
    loaded = Model(model(), None, load_config([]))  # type: ignore[arg-type]
    monkeypatch.setattr("prism_deco.api.load", lambda *_, **__: loaded)
    return folder


def test_the_command_writes_and_shows_what_was_read(run, squares, capsys):
    assert main(["probe", str(run), "--objects", str(squares / "objects.json"), "--limit", "80"]) == 0
    found = json.loads((run / "probe" / "probe.json").read_text())
    assert (found["run"], found["projector"]) == ("run", "avgpool")
    assert found["images"] == {"fit": 60, "test": 20}
    shown = capsys.readouterr().out
    value = found["readers"]["tokens"]["linear"]["reconstruction_r2"]
    assert "shuffled" in shown and f"{value:.3f}" in shown


def test_the_command_tests_on_images_that_it_did_not_fit_to(run, squares, tmp_path, monkeypatch):
    seen = {}

    def measure(_, fit, test):
        seen["fit"], seen["test"] = [one.path.name for one in fit], [one.path.name for one in test]
        return {"classes": {}, "readers": {}}

    monkeypatch.setattr("prism_deco.explain.probe.probe", measure)
    assert main(["probe", str(run), "--objects", str(squares / "objects.json"), "--limit", "80"]) == 0
    assert seen == {"fit": [f"{k}.png" for k in range(60)], "test": [f"{k}.png" for k in range(60, 80)]}


def test_the_command_takes_bare_images_and_says_what_is_missing(run, squares, tmp_path, capsys):
    assert main(["probe", str(run), "--images", str(squares), "--limit", "20", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["classes"] == {}
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    (run / "manifest.json").write_text(json.dumps({"benchmarks": str(tmp_path)}))
    (run / "model").mkdir()
    save_config(load_config([]), run / "model" / "config.yaml")
    for arguments in (["--images", str(tmp_path / "empty")], []):
        assert main(["probe", str(run), *arguments]) == 2
    assert "--objects FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["probe", str(run), "--limit", "0"])
    assert "--limit: '0' is not a whole number above 0" in capsys.readouterr().err
