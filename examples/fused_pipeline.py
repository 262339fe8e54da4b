"""All stages in this process: no server, no Redis. The same request gives the same picture as a deployment does.

python examples/fused_pipeline.py "a large yellow triangle on a navy background" --steps 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from streamflow import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a large red circle at the left on a white background")
    parser.add_argument("--model", default="models/shapes", help="a checkpoint folder in diffusers layout")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("out/fused.png"))
    arguments = parser.parse_args()

    pipeline = Pipeline.from_pretrained(arguments.model)
    made = pipeline(arguments.prompt, steps=arguments.steps, seed=arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    made.images[0].save(arguments.output)
    print(arguments.output, made.timings)


if __name__ == "__main__":
    main()
