"""What tells the processes of one model from those of another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamflow.config import OF_ONE_MODEL, ModelSettings, NameSettings
from streamflow.families import check_checkpoint
from streamflow.families.flows import check_flow
from streamflow.families.source import local_folder
from streamflow.model_names import check_names, deployment_of, name_of


def settings_of_first(
    name: str, *, flow: str | None, adapters: Path | None, controls: Path | None
) -> dict[str, object]:
    """Settings of the default model's processes, of what was said on the command line.

    Raises:
        InvalidRequestError: a flow that there is not.
    """
    check_flow(flow)
    folders = {"adapters": adapters, "controls": controls}
    said = {"model_name": name or None, "flow": flow}
    said |= {field: str(folder.absolute()) for field, folder in folders.items() if folder is not None}
    return {field: value for field, value in said.items() if value is not None}


def folder_of(model: str | Path) -> Path:
    """Of a checkpoint; from the hub it is downloaded here, rather than by every process.

    Raises:
        InvalidRequestError: there is none.
        UnavailableError: the hub cannot be reached.
    """
    folder = local_folder(Path(model), allow_pickle=ModelSettings().allow_pickle)
    check_checkpoint(folder)
    return folder.absolute()


def settings_by_model(settings: Mapping[str, Any], more_models: Mapping[str, str | Path]) -> dict[str, dict[str, Any]]:
    """By name, the default model first: how the settings of its stages differ from those of all processes.

    Raises:
        InvalidRequestError: a model that cannot be called so, or that is not there.
    """
    given = {name: settings[name] for name in NameSettings.model_fields if name in settings}
    names = NameSettings(**given)
    default = name_of(settings["model"], names.model_name)
    check_names(more_models, deployment=names.deployment, default=default)
    found: dict[str, dict[str, Any]] = {default: {}}
    for name, folder in more_models.items():
        # Empty is as if it were not set: what is set for the default model is not for this one.
        plain = dict.fromkeys(OF_ONE_MODEL, "")
        deployment = deployment_of(names.deployment, name)
        found[name] = {**plain, "deployment": deployment, "model": folder_of(folder), "model_name": name}
    return found
