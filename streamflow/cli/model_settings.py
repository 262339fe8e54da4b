"""What tells the processes of one model from those of another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamflow.config import NameSettings
from streamflow.families import check_checkpoint
from streamflow.model_names import check_names, deployment_of, name_of


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
        check_checkpoint(folder)
        deployment = deployment_of(names.deployment, name)
        found[name] = {"deployment": deployment, "model": Path(folder).absolute(), "model_name": name}
    return found
