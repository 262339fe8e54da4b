"""What a checkpoint's weights predict, and the schedule that goes with it, from its scheduler's config.

A flow-matching scheduler says it all. The schedulers of diffusion models do not: PeRFlow's and InstaFlow's weights are
published beside them, and nothing in such a folder tells them from plain Stable Diffusion. There it is a setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamflow.errors import InvalidRequestError
from streamflow.families.advice import ADVICE, FLOWS
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.files import read_json
from streamflow.flow.schedules import DynamicShift, ScheduleSpec
from streamflow.flow.spec import FlowSpec, WindowPrediction, WindowSpec

AUTO, RECTIFIED, INSTAFLOW, TWO_RF, PERFLOW = "auto", "rectified", "instaflow", "2rf", "perflow"
_FLOW_MATCHING = "FlowMatchEulerDiscreteScheduler"
_PERFLOW_SCHEDULER = "PeRFlowScheduler"
# Options of the flow-matching scheduler that change its sigmas in ways that are not built here.
_PLAIN_ONLY = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")


@dataclass(frozen=True, slots=True)
class Usage:
    """How a flow is used unless a request says otherwise, as its authors recommend."""

    sampler: str
    steps: int
    guidance_scale: float


_USAGES = {
    INSTAFLOW: Usage("instaflow", 1, 1.0),
    TWO_RF: Usage("instaflow", 25, 1.5),
}
_PERFLOW_USAGES: Mapping[WindowPrediction, Usage] = {
    "diff_eps": Usage("perflow", 8, 7.5),
    "ddim_eps": Usage("perflow", 6, 2.0),
    "velocity": Usage("perflow", 8, 7.5),
}


def check_flow(flow: str | None) -> None:
    """Raises InvalidRequestError for a flow that there is not; None = nothing was said."""
    if flow is not None and flow not in FLOWS:
        raise InvalidRequestError("flow", flow, "one of " + ", ".join(FLOWS))


def scheduler_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return read_json(checkpoint.folder, "scheduler/scheduler_config.json")


def flow_name(checkpoint: Checkpoint) -> str:
    """Which of `FLOWS` the weights are: what was set, or what the scheduler tells.

    Raises:
        InvalidRequestError: nothing tells, or the setting contradicts the scheduler.
    """
    said = checkpoint.flow if checkpoint.flow != AUTO else checkpoint.recommended.get("flow", AUTO)
    check_flow(said)
    scheduler = scheduler_config(checkpoint).get("_class_name")
    told = {_FLOW_MATCHING: RECTIFIED, _PERFLOW_SCHEDULER: PERFLOW}.get(str(scheduler))
    if told is None and said == AUTO:
        hint = (
            f"its scheduler, {scheduler}, does not tell what the weights were distilled to: write "
            f'{{"flow": "perflow"}} into {checkpoint.folder / ADVICE}, or set --flow (STREAMFLOW_FLOW) where it is the '
            "first or only model; plain diffusion models, which were distilled to none of these, are not served"
        )
        raise InvalidRequestError("flow", f"none for {checkpoint.folder}", ", ".join(FLOWS[1:]), hint)
    if told is not None and said not in (AUTO, told):
        raise InvalidRequestError("flow", said, f"{told} or {AUTO}, because of the scheduler {scheduler}")
    return told or str(said)


def diffusion_flow(
    checkpoint: Checkpoint, *, prediction: WindowPrediction, recommended: Usage
) -> tuple[FlowSpec, Usage]:
    """The flow of a UNet that was a diffusion model's once, fed timesteps up to 1000.

    Args:
        prediction: of PeRFlow weights of this family, where the scheduler does not say.
        recommended: usage of a rectified flow.
    """
    name, config = flow_name(checkpoint), scheduler_config(checkpoint)
    if name == RECTIFIED:
        # Of checkpoints with a flow-matching scheduler; with another one the grid is InstaFlow's.
        schedule = ScheduleSpec(shift=_static_shift(config))
        evaluates_data = checkpoint.recommended.get("evaluates_data", True)
        return FlowSpec(schedule=schedule, evaluates_data=evaluates_data), recommended
    if name in (INSTAFLOW, TWO_RF):
        return FlowSpec(velocity_sign=-1.0), _USAGES[name]
    windows = _windows(config, prediction)
    return FlowSpec(windows=windows), _PERFLOW_USAGES[windows.prediction]


def flow_matching(checkpoint: Checkpoint, *, pipeline_sigmas: bool) -> FlowSpec:
    """The flow of a transformer with a flow-matching scheduler.

    Args:
        pipeline_sigmas: the reference pipeline hands evenly spaced sigmas to the scheduler (FLUX), rather than leave
            the spacing to it (SD3).
    """
    config = scheduler_config(checkpoint)
    if config.get("_class_name") != _FLOW_MATCHING:
        given = f"{checkpoint.folder} with the scheduler {config.get('_class_name')}"
        raise InvalidRequestError("model", given, f"the scheduler {_FLOW_MATCHING}")
    flow_name(checkpoint)
    dynamic = config.get("use_dynamic_shifting", False)
    schedule = ScheduleSpec(
        shift=_dynamic_shift(config) if dynamic else _static_shift(config),
        grid="uniform" if pipeline_sigmas and not config.get("use_flow_sigmas") else "to-minimum",
        train_steps=config.get("num_train_timesteps", 1000),
    )
    return FlowSpec(schedule=schedule, round_up_strength=True)


def _static_shift(config: Mapping[str, Any]) -> float:
    _check_plain(config)
    if config.get("use_dynamic_shifting"):
        raise InvalidRequestError("model", "a scheduler with use_dynamic_shifting", "a static shift in this family")
    return float(config.get("shift", 1.0))


def _dynamic_shift(config: Mapping[str, Any]) -> DynamicShift:
    _check_plain(config)
    if config.get("time_shift_type", "exponential") != "exponential":
        raise InvalidRequestError("model", f"time_shift_type {config['time_shift_type']}", "exponential")
    return DynamicShift(
        base_tokens=config.get("base_image_seq_len") or 256,
        base_mu=config.get("base_shift") or 0.5,
        max_tokens=config.get("max_image_seq_len") or 4096,
        max_mu=config.get("max_shift") or 1.15,
    )


def _check_plain(config: Mapping[str, Any]) -> None:
    for option in _PLAIN_ONLY:
        if config.get(option):
            allowed = "a scheduler without it: it changes the sigmas in a way that is not served"
            raise InvalidRequestError("model", f"a scheduler with {option} {config[option]}", allowed)


def _windows(config: Mapping[str, Any], prediction: WindowPrediction) -> WindowSpec:
    named = config.get("prediction_type", "epsilon")
    known: Mapping[str, WindowPrediction] = {
        "diff_eps": "diff_eps",
        "ddim_eps": "ddim_eps",
        "velocity": "velocity",
        "v_prediction": "velocity",
        # The base model's own, which distillation kept in the file.
        "epsilon": prediction,
    }
    if named not in known:
        raise InvalidRequestError("model", f"a scheduler with prediction_type {named}", ", ".join(known))
    if config.get("beta_schedule", "scaled_linear") != "scaled_linear":
        raise InvalidRequestError("model", f"beta_schedule {config['beta_schedule']}", "scaled_linear")
    return WindowSpec(
        prediction=known[named],
        windows=config.get("num_time_windows", 4),
        beta_start=config.get("beta_start", 0.00085),
        beta_end=config.get("beta_end", 0.012),
        train_steps=config.get("num_train_timesteps", 1000),
    )
