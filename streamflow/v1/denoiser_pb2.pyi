from streamflow.v1 import encoder_pb2 as _encoder_pb2
from streamflow.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DenoiseRequest(_message.Message):
    __slots__ = ("conditioning", "negative_conditioning", "steps", "guidance_scale", "sampler", "seed", "width", "height", "init_latents", "strength", "mask", "noise", "source_conditioning", "guidance", "key", "preview_interval_steps", "true_cfg_scale", "adapters", "control", "control_image")
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INIT_LATENTS_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    TRUE_CFG_SCALE_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    CONTROL_IMAGE_FIELD_NUMBER: _ClassVar[int]
    conditioning: _encoder_pb2.Conditioning
    negative_conditioning: _encoder_pb2.Conditioning
    steps: int
    guidance_scale: float
    sampler: str
    seed: int
    width: int
    height: int
    init_latents: _types_pb2.Tensor
    strength: float
    mask: _types_pb2.Tensor
    noise: _types_pb2.Tensor
    source_conditioning: _encoder_pb2.Conditioning
    guidance: _types_pb2.GuidanceOptions
    key: str
    preview_interval_steps: int
    true_cfg_scale: float
    adapters: _containers.RepeatedCompositeFieldContainer[_types_pb2.Adapter]
    control: _types_pb2.Control
    control_image: _types_pb2.Tensor
    def __init__(self, conditioning: _Optional[_Union[_encoder_pb2.Conditioning, _Mapping]] = ..., negative_conditioning: _Optional[_Union[_encoder_pb2.Conditioning, _Mapping]] = ..., steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., sampler: _Optional[str] = ..., seed: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., init_latents: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., strength: _Optional[float] = ..., mask: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., noise: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., source_conditioning: _Optional[_Union[_encoder_pb2.Conditioning, _Mapping]] = ..., guidance: _Optional[_Union[_types_pb2.GuidanceOptions, _Mapping]] = ..., key: _Optional[str] = ..., preview_interval_steps: _Optional[int] = ..., true_cfg_scale: _Optional[float] = ..., adapters: _Optional[_Iterable[_Union[_types_pb2.Adapter, _Mapping]]] = ..., control: _Optional[_Union[_types_pb2.Control, _Mapping]] = ..., control_image: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ChangeRequest(_message.Message):
    __slots__ = ("key", "conditioning", "negative_conditioning", "source_conditioning", "guidance_scale", "guidance", "strength", "true_cfg_scale")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    SOURCE_CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    TRUE_CFG_SCALE_FIELD_NUMBER: _ClassVar[int]
    key: str
    conditioning: _encoder_pb2.Conditioning
    negative_conditioning: _encoder_pb2.Conditioning
    source_conditioning: _encoder_pb2.Conditioning
    guidance_scale: float
    guidance: _types_pb2.GuidanceOptions
    strength: float
    true_cfg_scale: float
    def __init__(self, key: _Optional[str] = ..., conditioning: _Optional[_Union[_encoder_pb2.Conditioning, _Mapping]] = ..., negative_conditioning: _Optional[_Union[_encoder_pb2.Conditioning, _Mapping]] = ..., source_conditioning: _Optional[_Union[_encoder_pb2.Conditioning, _Mapping]] = ..., guidance_scale: _Optional[float] = ..., guidance: _Optional[_Union[_types_pb2.GuidanceOptions, _Mapping]] = ..., strength: _Optional[float] = ..., true_cfg_scale: _Optional[float] = ...) -> None: ...

class ChangeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DenoiseEvent(_message.Message):
    __slots__ = ("progress", "latents", "preview")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    progress: DenoiseProgress
    latents: _types_pb2.Tensor
    preview: DenoisePreview
    def __init__(self, progress: _Optional[_Union[DenoiseProgress, _Mapping]] = ..., latents: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ..., preview: _Optional[_Union[DenoisePreview, _Mapping]] = ...) -> None: ...

class DenoiseProgress(_message.Message):
    __slots__ = ("step", "steps")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    step: int
    steps: int
    def __init__(self, step: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class DenoisePreview(_message.Message):
    __slots__ = ("step", "latents")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    latents: _types_pb2.Tensor
    def __init__(self, step: _Optional[int] = ..., latents: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...
