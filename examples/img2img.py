"""Start from a picture: redraw all of it, or only where a mask is white.

streamflow up                       # in another terminal
python examples/img2img.py --strength 0.6
python examples/img2img.py --image photo.png --mask mask.png --prompt "a blue cross"
"""

from __future__ import annotations

import argparse

from PIL import Image

from streamflow import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a large blue circle at the left on a white background")
    parser.add_argument("--image", help="default: one that is made first")
    parser.add_argument("--mask", help="white = repaint, black = keep")
    parser.add_argument("--strength", type=float, default=0.6, help="how far it is changed, above 0 to 1")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--output", default="out/img2img.png")
    arguments = parser.parse_args()

    with Client(arguments.address) as client:
        if arguments.image is None:
            start = client.generate("a large red circle at the left on a white background", seed=7).images[0]
        else:
            start = Image.open(arguments.image)
        result = client.generate(
            arguments.prompt, image=start, mask=arguments.mask, strength=arguments.strength, steps=25, seed=8
        )
    print(*result.save(arguments.output))


if __name__ == "__main__":
    main()
