"""Training-free compressors against slow loops, one image, head and token at a time."""

import json

import pytest
import torch

from prism_deco.api import load
from prism_deco.backbones import build_backbone
from prism_deco.cli import main
from prism_deco.errors import UsageError
from prism_deco.evaluation.compressors import COMPRESSORS, compress
from prism_deco.inference import first_token_probabilities
from prism_deco.llms import build_llm
from prism_deco.llms.layers import decoder_layers
from prism_deco.projectors import build_projector
from prism_deco.report.collect import collect
from prism_deco.sequence import build_batch
from prism_deco.vlm import VLM

OPEN_CLIP = {"name": "small", "family": "clip", "model": "ViT-S-32", "pretrained": False, "image_size": 128}
PREFIX = {"mini_siglip": 0, "mini_dinov2": 5, "small": 1}


@pytest.fixture(scope="module")
def model():
    """(backbone, LLM) -> a linear model with random weights in float64, and two images."""

    def build(backbone="mini_siglip", llm="mini_qwen2", **options):
        torch.manual_seed(0)
        tower = build_backbone(backbone, pretrained=False)
        language = build_llm(llm, pretrained=False)
        projector = build_projector("linear", tower.embed_dim, language.embed_dim, tower.grid)
        vlm = VLM(tower, projector, language.model, **options).double().eval()
        for parameter in vlm.lm.parameters():  # else all positions get the same attention
            parameter.data *= 3
        [name] = tower.towers
        return vlm, language, {name: torch.randn(2, 3, tower.image_size, tower.image_size).double()}

    return build


def tower_attention(vlm, pixels):
    """Features, queries and keys of both images, and the number of heads."""
    trunk = vlm.backbone.trunk
    attention = trunk.blocks[trunk.taps[-1]].attn
    seen = []
    handle = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = vlm.features(pixels)
    handle.remove()
    heads, width = attention.num_heads, seen[0].shape[-1] // attention.num_heads
    if isinstance(attention, torch.nn.MultiheadAttention):
        weights, bias = attention.in_proj_weight, attention.in_proj_bias
    else:
        weights, bias = attention.qkv.weight, attention.qkv.bias
    queries, keys, _ = (seen[0] @ weights.T + bias).split(heads * width, dim=-1)
    return features, queries, keys, heads


def patch_scores(queries, keys, heads, prefix):
    """float[B, heads, N]: softmax row by row. Without a class token, the mean over the rows."""
    images, length, channels = queries.shape
    width = channels // heads
    found = torch.zeros(images, heads, length - prefix, dtype=torch.float64)
    for b in range(images):
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            rows = []
            for i in range(1 if prefix else length):
                logits = [float(queries[b, i, own] @ keys[b, j, own]) / width**0.5 for j in range(length)]
                rows.append(torch.tensor(logits, dtype=torch.float64).softmax(0))
            found[b, h] = torch.stack(rows).mean(0)[prefix:]
    return found


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("backbone", ["mini_siglip", "mini_dinov2", OPEN_CLIP], ids=list(PREFIX))
def test_visionzip(model, backbone):
    vlm, _, pixels = model(backbone)
    [name] = pixels
    mlp, prefix, total = vlm.projector.mlp, PREFIX[name], vlm.projector.num_tokens
    contextual, dominant = 3, total // 2 - 3
    features, queries, keys, heads = tower_attention(vlm, pixels)
    scores = patch_scores(queries, keys, heads, prefix).sum(1)
    compress(vlm, "visionzip", dominant + contextual, contextual=contextual)
    found = vlm.visual_tokens(pixels)
    for b in range(2):
        order = sorted(range(total), key=lambda i: -scores[b, i])
        first, others = sorted(order[:dominant]), sorted(order[dominant:])
        metric = keys[b, prefix:].reshape(total, heads, -1).mean(1)
        step = len(others) // contextual
        targets = others[::step][:contextual]
        merged = {target: [] for target in targets}
        for other in set(others) - set(targets):
            merged[max(targets, key=lambda t: cosine(metric[other], metric[t]))].append(features[b, other])
        rows = [features[b, i] for i in first]
        for target, members in merged.items():
            rows.append(features[b, target] + (sum(members) / len(members) if members else 0))
        torch.testing.assert_close(found[b], mlp(torch.stack(rows)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["mini_siglip", "mini_dinov2", OPEN_CLIP], ids=list(PREFIX))
def test_prumerge(model, backbone):
    vlm, _, pixels = model(backbone)
    [name] = pixels
    mlp, prefix, total = vlm.projector.mlp, PREFIX[name], vlm.projector.num_tokens
    features, queries, keys, _ = tower_attention(vlm, pixels)
    scores = patch_scores(queries, keys, 1, prefix)[:, 0]
    keys = keys[:, prefix:]
    compress(vlm, "prumerge", 7)
    found = vlm.visual_tokens(pixels)
    for b in range(2):
        order = sorted(range(total), key=lambda i: -scores[b, i])
        rows = []
        for i in order[:6]:
            others = sorted(set(range(total)) - {i}, key=lambda j: -cosine(keys[b, i], keys[b, j]))[:32]
            rows.append(features[b, i] + sum(scores[b, j] * features[b, j] for j in others))
        rows.append(sum(scores[b, j] * features[b, j] for j in order[6:]))
        torch.testing.assert_close(found[b], mlp(torch.stack(rows)), rtol=1e-4, atol=1e-5)


def slow_fastv(vlm, llm, visual, prompt, layer, num_tokens, steps):
    """float64[steps, V], the logits of one prompt's greedy answer: no batch, no cache; dropped tokens stay, and are
    masked behind the layer."""
    body = vlm.lm.base_model
    batch = build_batch([llm.ask(prompt, len(visual))], vlm.projector.num_tokens)
    embeddings = vlm.embed(batch, torch.stack(visual) if visual else None)
    dropped, found, weights = None, [], []
    for _ in range(steps):
        length = embeddings.shape[1]
        places = torch.arange(length)[None]
        causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        hidden = embeddings
        for number, block in enumerate(decoder_layers(vlm.lm), start=1):
            mask = causal.clone()
            if number > layer:
                mask[..., dropped] = -torch.inf
                mask[0, 0, dropped, dropped] = 0  # a row must see something; nobody sees it
            cos_and_sin = body.rotary_emb(hidden, places)
            if number == layer and dropped is None:
                before = block.self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1]))
                hidden = block(hidden, attention_mask=mask, position_embeddings=cos_and_sin)
                before.remove()
                seen = weights[0][0, :, -1].mean(0)
                places_of_images = [i for i in range(length) if batch.visual[0, i]]
                kept = sorted(places_of_images, key=lambda i: -seen[i])[: num_tokens * len(visual)]
                dropped = sorted(set(places_of_images) - set(kept))
            else:
                hidden = block(hidden, attention_mask=mask, position_embeddings=cos_and_sin)
        found.append(vlm.logits(body.norm(hidden)[0, -1]))
        embeddings = torch.cat([embeddings, vlm.lm.get_input_embeddings()(found[-1].argmax()[None, None])], dim=1)
    return torch.stack(found)


@pytest.mark.parametrize("llm", ["mini_qwen2", "mini_llama"])
@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_fastv(model, llm, layer):
    """In a batch with padding, of prompts with none, one and two images, and one prompt at a time."""
    prompts = ["What color is the left one?", "Is it red?", "Which number is on the plate in the corner?", "Two?"]
    vlm, language, pixels = model(llm=llm)
    tokens = list(20 * vlm.visual_tokens(pixels))  # what is in the image must matter
    visual = [[tokens[0]], [tokens[1]], [], [tokens[1], tokens[0]]]

    def generate(chosen):
        asked = [language.ask(prompts[k], len(visual[k])) for k in chosen]
        shown = [image for k in chosen for image in visual[k]]
        batch = build_batch(asked, vlm.projector.num_tokens, left_pad=True)
        output = vlm.lm.generate(
            inputs_embeds=vlm.embed(batch, torch.stack(shown) if shown else None),
            attention_mask=batch.attention_mask.long(),
            **{"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0},
            **{"output_logits": True, "return_dict_in_generate": True},
        )
        return torch.stack(output.logits, dim=1)

    vlm.lm.set_attn_implementation("eager")
    expected = [slow_fastv(vlm, language, v, p, layer, 5, 4) for v, p in zip(visual, prompts, strict=True)]
    vlm.lm.set_attn_implementation("sdpa")
    complete = generate(range(4))
    compress(vlm, "fastv", 5, layer=layer)
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(generate(range(4)), torch.stack(expected), **close)
    for k in range(4):
        torch.testing.assert_close(generate([k])[0], expected[k], **close)
    changed = (complete[:, 0] - torch.stack(expected)[:, 0]).abs().amax(1)
    assert changed[2] < 1e-4 < 0.01 < changed[[0, 1, 3]].min(), "only what is asked about images changes"


@pytest.mark.parametrize("turn_mask", ["causal", "block"])
@torch.no_grad()
def test_fastv_gives_likelihoods_behind_any_mask(model, turn_mask):
    vlm, language, pixels = model(turn_mask=turn_mask)
    tokens = list(vlm.visual_tokens(pixels))
    prompts = ["Is the largest of them red?", "Is it?"]
    vlm.lm.set_attn_implementation("eager")
    rows = []
    for prompt, image in zip(prompts, tokens, strict=True):
        [logits] = slow_fastv(vlm, language, [image], prompt, 1, 5, 1)
        ids = [language.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No")]
        rows.append(logits[ids].softmax(0))
    vlm.lm.set_attn_implementation("sdpa")
    compress(vlm, "fastv", 5, layer=1)
    visual = [[image] for image in tokens]
    found = first_token_probabilities(vlm, language, visual, prompts, ["Yes", "No"])
    torch.testing.assert_close(found.double(), torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_compressed_is_refused(model, tiny):
    def refused(words, name="visionzip", tokens=16, vlm=None, **options):
        with pytest.raises(UsageError, match=words):
            compress(vlm or model()[0], name, tokens, **options)

    refused("Unknown compressor 'fastvv'. Did you mean 'fastv'", "fastvv")
    refused("an image has 64 visual tokens; name fewer", tokens=64)
    refused("AvgPool has merged them already: name a run of projector=linear", tokens=2, vlm=tiny()[0])
    refused("num_tokens=1 is too few", "prumerge", 1)
    for number in (0, 16, 1.5, True, "2"):
        refused(f"compressor.contextual={number} must be a whole number from 1 to 15", contextual=number)
    refused("Unknown key of the compressor visionzip 'layer'", layer=1)
    refused("compressor.layer=3 must be a whole number from 1 to 2", "fastv", layer=3)
    two = build_backbone("mini_dinov2_siglip", pretrained=False)
    language = build_llm("mini_qwen2", pretrained=False)
    linear = build_projector("linear", two.embed_dim, language.embed_dim, two.grid)
    refused("reads the attention of one tower, and these are several", vlm=VLM(two, linear, language.model))
    rotary = {"name": "eva", "family": "timm", "model": "eva02_tiny_patch14_224", "pretrained": False, "image_size": 28}
    tower = build_backbone(rotary)
    linear = build_projector("linear", tower.embed_dim, language.embed_dim, tower.grid)
    refused("the attention of its blocks .* cannot be read", tokens=2, vlm=VLM(tower, linear, language.model))
    assert COMPRESSORS.names() == ["fastv", "prumerge", "visionzip"]


FAST = ["data=llava", "data.val_fraction=0", "recipe.max_steps=2", "recipe.global_batch_size=2", "trainer.threads=1",
        "recipe.micro_batch_size=2", "backbone.pretrained=false", "llm.pretrained=false"]  # fmt: skip


@pytest.fixture
def train(colors, files, tmp_path):
    """Trains a tiny run, and names its folder and a benchmark."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(json.dumps({k: v for k, v in files.gqa(max_new_tokens=3).items() if k != "name"}))
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]

    def run(*overrides):
        where = [f"runs_dir={tmp_path}", "run_id=run", f"evaluate.benchmarks={mine}"]
        assert main(["train", *source, *FAST, *where, *overrides]) == 0
        return tmp_path / "run", f"benchmark={mine}"

    return run


def outputs(folder):
    return [json.loads(line)["output"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_compressed_answers_have_places_of_their_own(train, capsys):
    """In training, then by `evaluate`; with an option, and as a comparison with the model compressed by hand."""
    more = "evaluate.compressors={fastv: {layer: 1}, prumerge: {}}"
    run, mine = train("projector=linear", more, "evaluate.num_tokens=[9]")
    whole = {path.name: path.read_bytes() for path in (run / "eval/mine").iterdir()}
    assert sorted(path.parent.name for path in run.glob("eval/*/mine")) == ["fastv9-layer1", "prumerge9"]
    assert main(["evaluate", str(run), mine, "compressor=visionzip", "compressor.contextual=4", "num_tokens=16"]) == 0
    folder = run / "eval/visionzip16-contextual4"
    assert {path.name: path.read_bytes() for path in (run / "eval/mine").iterdir()} == whole
    about = json.loads((folder / "tokens.json").read_text())
    assert about.pop("first_token_seconds") > 0
    assert about == {"num_tokens": 16, "compressor": "visionzip", "options": {"contextual": 4}}
    model = load(run)
    compress(model.vlm, "visionzip", 16, contextual=4)
    asked = [json.loads(line) for line in (folder / "mine/predictions.jsonl").read_text().splitlines()]
    images = [run.parent / "root" / record["image"] for record in asked]
    assert model.generate(images, [record["prompt"] for record in asked], 3) == outputs(folder / "mine")
    # Nothing is mixed in one folder.
    out = f"--out={run / 'eval'}"
    assert main(["evaluate", str(run), mine, "compressor=prumerge", "num_tokens=16", out]) == 2
    assert "holds answers of other settings: model was" in " ".join(capsys.readouterr().err.split())


def test_a_matryoshka_answers_with_each_number_of_tokens(train, caplog):
    run, mine = train(
        "projector=matryoshka", "projector.num_tokens=16", "projector.coarser=[4]", "evaluate.num_tokens=[4]"
    )
    assert main(["evaluate", str(run), mine, "num_tokens=1"]) == 0
    for number, folder in ((16, "mine"), (4, "tokens4/mine"), (1, "tokens1/mine")):
        model = load(run, num_tokens=number)
        assert model.vlm.projector.num_tokens == number
        records = [json.loads(line) for line in (run / "eval" / folder / "predictions.jsonl").read_text().splitlines()]
        images = [run.parent / "root" / record["image"] for record in records]
        assert model.generate(images, [record["prompt"] for record in records], 3) == outputs(run / "eval" / folder)
    assert json.loads((run / "eval/tokens1/tokens.json").read_text())["compressor"] is None
    # The number of the training is the run's own; one that it was not trained with is said to be none.
    assert "num_tokens=1: the run was trained with 16 and 4 visual tokens" in caplog.text
    assert main(["evaluate", str(run), mine, "num_tokens=16"]) == 0 and not (run / "eval/tokens16").exists()
    # In a report, what the training did not ask for is not mixed with what was trained so.
    variants = {cell.id.rpartition("/")[2]: cell.variant for cell in collect([run.parent])}
    assert variants == {run.name: "matryoshka", "tokens4": "matryoshka", "tokens1": "matryoshka trained with 16"}


def test_wrong_arguments_are_refused(train, capsys):
    run, mine = train("projector=linear", "evaluate.benchmarks=null")
    for arguments, words in (
        (["compressor=fastv"], "compressor=fastv needs a number of visual tokens"),
        (["num_tokens=9", "compressor.layer=1"], "compressor.layer belongs to no compressor"),
        (["num_tokens=9", "compressor=fastw"], "Unknown compressor 'fastw'"),
    ):
        assert main(["evaluate", str(run), mine, *arguments]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["projector=avgpool", "evaluate.compressors={fastv: {}}"], "AvgPool has merged them already"),
        (
            ["projector=linear", "evaluate.compressors={fastv: {layers: 1}}"],
            "Unknown key of the compressor fastv 'layers'",
        ),
        (["projector=linear"], "cannot make num_tokens=9"),
        (["projector=resampler", "projector.heads=2", "projector.kv_heads=1"], "depend on the number of visual tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(train, capsys, arguments, words):
    with pytest.raises(AssertionError):
        train(*arguments, "evaluate.num_tokens=[9]")
    said = " ".join(capsys.readouterr().err.split())
    assert words in said and "Training run" not in said
