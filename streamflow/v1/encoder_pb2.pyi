from streamflow.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EncodeRequest(_message.Message):
    __slots__ = ("prompts", "init_image", "width", "height", "adapters")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    INIT_IMAGE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedScalarFieldContainer[str]
    init_image: bytes
    width: int
    height: int
    adapters: _containers.RepeatedCompositeFieldContainer[_types_pb2.Adapter]
    def __init__(self, prompts: _Optional[_Iterable[str]] = ..., init_image: _Optional[bytes] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[_types_pb2.Adapter, _Mapping]]] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("conditionings", "init_latents")
    CONDITIONINGS_FIELD_NUMBER: _ClassVar[int]
    INIT_LATENTS_FIELD_NUMBER: _ClassVar[int]
    conditionings: _containers.RepeatedCompositeFieldContainer[Conditioning]
    init_latents: _types_pb2.Tensor
    def __init__(self, conditionings: _Optional[_Iterable[_Union[Conditioning, _Mapping]]] = ..., init_latents: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Conditioning(_message.Message):
    __slots__ = ("tensors", "truncated")
    class TensorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _types_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_types_pb2.Tensor, _Mapping]] = ...) -> None: ...
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.MessageMap[str, _types_pb2.Tensor]
    truncated: str
    def __init__(self, tensors: _Optional[_Mapping[str, _types_pb2.Tensor]] = ..., truncated: _Optional[str] = ...) -> None: ...
