"""`streamflow up` with services that do nothing; prints the ids of its processes as one line of JSON."""

from __future__ import annotations

import asyncio
import json
import sys

from streamflow.cli import up
from streamflow.cli.supervisor import SERVICES, LocalDeployment
from streamflow.config import default_model

SHAPES = default_model()
LIGHT = {kind: (sys.executable, "-m", "tests.cli.light_service", name) for kind, name in SERVICES.items()}


class Announcing(LocalDeployment):
    async def __aenter__(self) -> Announcing:
        await super().__aenter__()
        print(json.dumps({name: process.pid for name, process in self.processes.items()}), flush=True)
        return self


if __name__ == "__main__":
    asyncio.run(up._serve(Announcing(model=SHAPES, commands=LIGHT, grace_s=5, encoders=0, denoisers=0)))
