"""Follow a request: its place in the queue, its steps, previews of what it will be, and the image.

streamflow up                       # in another terminal
python examples/events_and_previews.py --steps 50
"""

from __future__ import annotations

import argparse
from pathlib import Path

from streamflow import Client
from streamflow.client import Accepted, Done, ImageReady, Preview, Progress, Queued


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a small cyan star above a small orange ring on a gray background")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("out/events"), help="a folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    with Client(arguments.address) as client:
        for event in client.stream(arguments.prompt, steps=arguments.steps, preview_interval_steps=5):
            match event:
                case Accepted():
                    print(f"accepted as {event.request_id}: {event.sampler}, {event.steps} steps, seed {event.seed}")
                case Queued():
                    print(f"{event.position} images ahead")
                case Progress():
                    print(f"step {event.step} of {event.steps}")
                case Preview():
                    event.image.save(arguments.output / f"step{event.step:02}.png")
                    print(f"preview of step {event.step}: {event.width}x{event.height}")
                case ImageReady():
                    event.image.save(arguments.output / "image.png")
                case Done():
                    print(f"{event.state} after {event.total_ms:.0f} ms; pictures are in {arguments.output}")


if __name__ == "__main__":
    main()
