"""Three ways to change a picture, as a contact sheet: img2img, inpainting, and following the difference of two texts.

python examples/editing.py                       # fused: no server is needed
python examples/editing.py --output out/editing.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from contact_sheet import contact_sheet
from PIL import Image, ImageDraw

from streamflow import Pipeline

BEFORE = "a large red circle at the left on a white background"
BLUE = "a large blue circle at the left on a white background"
STAR = "a large red star at the left on a white background"
PAIR = "a large red circle left of a large green square on a white background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/shapes", help="a checkpoint folder in diffusers layout")
    parser.add_argument("--output", type=Path, default=Path("out/editing.png"))
    arguments = parser.parse_args()

    pipeline = Pipeline.from_pretrained(arguments.model)
    before = pipeline(BEFORE, steps=8, seed=0).images[0]
    cells = [(before, BEFORE, "the picture to change")]

    def add(picture: Image.Image, prompt: str, note: str) -> None:
        cells.append((picture, prompt, note))

    for strength in (0.3, 0.6, 0.9):
        made = pipeline(BLUE, image=before, strength=strength, steps=20, seed=4)
        add(made.images[0], BLUE, f"img2img, strength {strength:g}")
    mask = Image.new("L", before.size)
    ImageDraw.Draw(mask).rectangle((before.width * 0.55, 0, before.width, before.height), fill=255)
    add(mask.convert("RGB"), "mask", "white is repainted")
    filled = pipeline(PAIR, image=before, mask=mask, strength=1.0, steps=20, seed=1)
    add(filled.images[0], PAIR, "inpainting, 20 Euler steps")
    refined = pipeline(PAIR, image=before, mask=mask, strength=1.0, sampler="H1P11R4", seed=1)
    add(refined.images[0], PAIR, "inpainting, H1P11R4")
    for prompt in (BLUE, STAR):
        edited = pipeline(
            prompt, image=before, source_prompt=BEFORE, sampler="flowedit", strength=0.9, steps=20, seed=2
        )
        add(edited.images[0], prompt, "FlowEdit, strength 0.9")

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(cells).save(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
