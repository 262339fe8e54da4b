"""Make pictures of a prompt, and say what made each.

streamflow up                       # in another terminal
python examples/generate.py "a small green star at the top on a navy background" --num-images 2
"""

from __future__ import annotations

import argparse

from streamflow import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a large red circle at the left on a white background")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--num-images", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument(
        "--output", default="out/generate", help="a folder, a file, or a pattern with {index} and {seed}"
    )
    arguments = parser.parse_args()

    with Client(arguments.address) as client:
        result = client.generate(
            arguments.prompt, num_images=arguments.num_images, steps=arguments.steps, seed=arguments.seed
        )
    for path, info in zip(result.save(arguments.output), result.infos, strict=True):
        print(f"{path}: seed {info.seed}, {info.steps} steps, guidance {info.guidance_scale:g}, {info.timings}")


if __name__ == "__main__":
    main()
