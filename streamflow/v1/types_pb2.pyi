from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_JPEG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_WEBP: _ClassVar[ImageFormat]
    IMAGE_FORMAT_RAW: _ClassVar[ImageFormat]

class DecoderKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECODER_KIND_UNSPECIFIED: _ClassVar[DecoderKind]
    DECODER_KIND_TINY: _ClassVar[DecoderKind]
    DECODER_KIND_FULL: _ClassVar[DecoderKind]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_LOW: _ClassVar[Priority]
    PRIORITY_NORMAL: _ClassVar[Priority]
    PRIORITY_HIGH: _ClassVar[Priority]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_IMAGES: _ClassVar[JobState]
    JOB_STATE_ERROR: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
    JOB_STATE_DEADLINE: _ClassVar[JobState]

class GuidanceMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GUIDANCE_MODE_UNSPECIFIED: _ClassVar[GuidanceMode]
    GUIDANCE_MODE_FULL: _ClassVar[GuidanceMode]
    GUIDANCE_MODE_SELF_NEGATIVE: _ClassVar[GuidanceMode]
    GUIDANCE_MODE_ONETIME_NEGATIVE: _ClassVar[GuidanceMode]
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_JPEG: ImageFormat
IMAGE_FORMAT_WEBP: ImageFormat
IMAGE_FORMAT_RAW: ImageFormat
DECODER_KIND_UNSPECIFIED: DecoderKind
DECODER_KIND_TINY: DecoderKind
DECODER_KIND_FULL: DecoderKind
PRIORITY_UNSPECIFIED: Priority
PRIORITY_LOW: Priority
PRIORITY_NORMAL: Priority
PRIORITY_HIGH: Priority
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_IMAGES: JobState
JOB_STATE_ERROR: JobState
JOB_STATE_CANCELLED: JobState
JOB_STATE_DEADLINE: JobState
GUIDANCE_MODE_UNSPECIFIED: GuidanceMode
GUIDANCE_MODE_FULL: GuidanceMode
GUIDANCE_MODE_SELF_NEGATIVE: GuidanceMode
GUIDANCE_MODE_ONETIME_NEGATIVE: GuidanceMode

class GuidanceOptions(_message.Message):
    __slots__ = ("mode", "start_sigma", "end_sigma", "residual_strength")
    MODE_FIELD_NUMBER: _ClassVar[int]
    START_SIGMA_FIELD_NUMBER: _ClassVar[int]
    END_SIGMA_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_STRENGTH_FIELD_NUMBER: _ClassVar[int]
    mode: GuidanceMode
    start_sigma: float
    end_sigma: float
    residual_strength: float
    def __init__(self, mode: _Optional[_Union[GuidanceMode, str]] = ..., start_sigma: _Optional[float] = ..., end_sigma: _Optional[float] = ..., residual_strength: _Optional[float] = ...) -> None: ...

class OutputOptions(_message.Message):
    __slots__ = ("format", "quality", "decoder", "embed_metadata")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    EMBED_METADATA_FIELD_NUMBER: _ClassVar[int]
    format: ImageFormat
    quality: int
    decoder: DecoderKind
    embed_metadata: bool
    def __init__(self, format: _Optional[_Union[ImageFormat, str]] = ..., quality: _Optional[int] = ..., decoder: _Optional[_Union[DecoderKind, str]] = ..., embed_metadata: bool = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class Control(_message.Message):
    __slots__ = ("name", "image", "scale")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    name: str
    image: bytes
    scale: float
    def __init__(self, name: _Optional[str] = ..., image: _Optional[bytes] = ..., scale: _Optional[float] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompts", "negative_prompt", "steps", "guidance_scale", "sampler", "seed", "num_images", "class_labels", "true_cfg_scale", "width", "height", "init_image", "strength", "mask_image", "output", "preview_interval_steps", "priority", "detach", "source_prompt", "guidance", "time_budget_s", "min_steps", "adapters", "control")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_IMAGES_FIELD_NUMBER: _ClassVar[int]
    CLASS_LABELS_FIELD_NUMBER: _ClassVar[int]
    TRUE_CFG_SCALE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INIT_IMAGE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    MASK_IMAGE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    TIME_BUDGET_S_FIELD_NUMBER: _ClassVar[int]
    MIN_STEPS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompts: _containers.RepeatedScalarFieldContainer[str]
    negative_prompt: str
    steps: int
    guidance_scale: float
    sampler: str
    seed: int
    num_images: int
    class_labels: _containers.RepeatedScalarFieldContainer[int]
    true_cfg_scale: float
    width: int
    height: int
    init_image: bytes
    strength: float
    mask_image: bytes
    output: OutputOptions
    preview_interval_steps: int
    priority: Priority
    detach: bool
    source_prompt: str
    guidance: GuidanceOptions
    time_budget_s: float
    min_steps: int
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    control: Control
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompts: _Optional[_Iterable[str]] = ..., negative_prompt: _Optional[str] = ..., steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., sampler: _Optional[str] = ..., seed: _Optional[int] = ..., num_images: _Optional[int] = ..., class_labels: _Optional[_Iterable[int]] = ..., true_cfg_scale: _Optional[float] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., init_image: _Optional[bytes] = ..., strength: _Optional[float] = ..., mask_image: _Optional[bytes] = ..., output: _Optional[_Union[OutputOptions, _Mapping]] = ..., preview_interval_steps: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ..., detach: bool = ..., source_prompt: _Optional[str] = ..., guidance: _Optional[_Union[GuidanceOptions, _Mapping]] = ..., time_budget_s: _Optional[float] = ..., min_steps: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., control: _Optional[_Union[Control, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "stage")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    stage: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., stage: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("waiting_ms", "encode_ms", "denoise_ms", "decode_ms")
    WAITING_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    DENOISE_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    waiting_ms: float
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    def __init__(self, waiting_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., denoise_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ...) -> None: ...

class ImageInfo(_message.Message):
    __slots__ = ("index", "seed", "format", "width", "height", "steps", "guidance_scale", "sampler", "model", "model_revision", "decoder", "timings")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    index: int
    seed: int
    format: ImageFormat
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    model: str
    model_revision: str
    decoder: DecoderKind
    timings: Timings
    def __init__(self, index: _Optional[int] = ..., seed: _Optional[int] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., sampler: _Optional[str] = ..., model: _Optional[str] = ..., model_revision: _Optional[str] = ..., decoder: _Optional[_Union[DecoderKind, str]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class StoredImage(_message.Message):
    __slots__ = ("info", "data")
    INFO_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    info: ImageInfo
    data: bytes
    def __init__(self, info: _Optional[_Union[ImageInfo, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("request", "model_revision", "tenant", "init_image_blob", "mask_blob", "control_blob")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    INIT_IMAGE_BLOB_FIELD_NUMBER: _ClassVar[int]
    MASK_BLOB_FIELD_NUMBER: _ClassVar[int]
    CONTROL_BLOB_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    model_revision: str
    tenant: str
    init_image_blob: str
    mask_blob: str
    control_blob: str
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., model_revision: _Optional[str] = ..., tenant: _Optional[str] = ..., init_image_blob: _Optional[str] = ..., mask_blob: _Optional[str] = ..., control_blob: _Optional[str] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data", "crc32")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    crc32: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StageStatus(_message.Message):
    __slots__ = ("stage", "worker_id", "model", "model_revision", "backend", "device", "slots", "slots_in_use", "backlog", "draining", "uptime_s", "counters", "call_ms", "row_ms", "row_counts", "work", "image_ms")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STAGE_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    CALL_MS_FIELD_NUMBER: _ClassVar[int]
    ROW_MS_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNTS_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    IMAGE_MS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    worker_id: str
    model: str
    model_revision: str
    backend: str
    device: str
    slots: int
    slots_in_use: int
    backlog: int
    draining: bool
    uptime_s: float
    counters: _containers.ScalarMap[str, int]
    call_ms: float
    row_ms: float
    row_counts: _containers.RepeatedScalarFieldContainer[int]
    work: _containers.RepeatedCompositeFieldContainer[SlotWork]
    image_ms: float
    def __init__(self, stage: _Optional[str] = ..., worker_id: _Optional[str] = ..., model: _Optional[str] = ..., model_revision: _Optional[str] = ..., backend: _Optional[str] = ..., device: _Optional[str] = ..., slots: _Optional[int] = ..., slots_in_use: _Optional[int] = ..., backlog: _Optional[int] = ..., draining: bool = ..., uptime_s: _Optional[float] = ..., counters: _Optional[_Mapping[str, int]] = ..., call_ms: _Optional[float] = ..., row_ms: _Optional[float] = ..., row_counts: _Optional[_Iterable[int]] = ..., work: _Optional[_Iterable[_Union[SlotWork, _Mapping]]] = ..., image_ms: _Optional[float] = ...) -> None: ...

class SlotWork(_message.Message):
    __slots__ = ("request_id", "index", "step", "steps", "timestep", "sampler")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TIMESTEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    step: int
    steps: int
    timestep: float
    sampler: str
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., timestep: _Optional[float] = ..., sampler: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("finished", "handed_back")
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    HANDED_BACK_FIELD_NUMBER: _ClassVar[int]
    finished: int
    handed_back: int
    def __init__(self, finished: _Optional[int] = ..., handed_back: _Optional[int] = ...) -> None: ...
