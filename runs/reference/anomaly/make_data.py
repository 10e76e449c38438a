"""Images of one coloured square each, and questions about it that a miniature learns in a minute: a LLaVA file to train
on, and POPE's files. `python make_data.py FOLDER`."""

import json
import random
import sys
from pathlib import Path

from PIL import Image

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHORT = "\nAnswer the question using a single word or phrase."
SIDE = 64


def draw(path: Path, color: str, rng: random.Random) -> None:
    """A square of 32 pixels somewhere on grey."""
    image = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    x, y = rng.randrange(SIDE // 2), rng.randrange(SIDE // 2)
    image.paste(COLORS[color], (x, y, x + SIDE // 2, y + SIDE // 2))
    image.save(path)


def exists(color: str) -> str:
    return f"Is there a {color} square in the image?"


def main(folder: Path) -> None:
    rng = random.Random(0)
    (folder / "train").mkdir(parents=True)
    (folder / "val").mkdir()
    records = []
    for number in range(800):
        color = rng.choice(list(COLORS))
        draw(folder / f"train/{number}.png", color, rng)
        other = rng.choice([name for name in COLORS if name != color])
        turns = [
            ("What color is the square?" + SHORT, color),
            (exists(color) + SHORT, "Yes"),
            (exists(other) + SHORT, "No"),
        ]
        rng.shuffle(turns)
        texts = [text for turn in turns for text in turn]
        texts[0] = "<image>\n" + texts[0]
        conversation = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
        records.append({"id": str(number), "image": f"train/{number}.png", "conversations": conversation})
    (folder / "train.json").write_text(json.dumps(records))
    lines = []
    for number in range(150):
        color = rng.choice(list(COLORS))
        draw(folder / f"val/{number}.png", color, rng)
        other = rng.choice([name for name in COLORS if name != color])
        for asked, label in ((color, "yes"), (other, "no")):
            line = {"question_id": len(lines), "image": f"val/{number}.png", "text": exists(asked), "label": label}
            lines.append(json.dumps(line))
    (folder / "pope_random.json").write_text("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
