"""What the TensorRT runtime asks of the library is there: checked on its lean runtime, which needs no GPU."""

from __future__ import annotations

import ast
import inspect

import pytest

from streamflow.backends import tensorrt_runtime

trt = pytest.importorskip("tensorrt_lean_bindings")

OBJECTS = {"_engine": "ICudaEngine", "context": "IExecutionContext", "_runtime": "Runtime", "_trt": None}
ARGUMENTS = {
    "deserialize_cuda_engine": 1,
    "create_execution_context": 0,
    "set_optimization_profile_async": 2,
    "set_input_shape": 2,
    "get_tensor_shape": 1,
    "set_tensor_address": 2,
    "execute_async_v3": 1,
    "get_tensor_dtype": 1,
}


def used() -> list[tuple[str, str]]:
    """(class, attribute) for everything that is asked of the library's objects; the class is empty for the module."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(tensorrt_runtime))):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
        if name in OBJECTS:
            found.append((OBJECTS[name] or "", node.attr))
    return found


def test_everything_that_is_asked_for_is_there() -> None:
    asked = used()
    assert {"ICudaEngine", "IExecutionContext", "Runtime", ""} == {kind for kind, _ in asked}
    for kind, attribute in asked:
        assert hasattr(getattr(trt, kind) if kind else trt, attribute), f"{kind}.{attribute}"


def test_calls_have_as_many_arguments_as_the_library_takes() -> None:
    calls = {
        node.func.attr: len(node.args)
        for node in ast.walk(ast.parse(inspect.getsource(tensorrt_runtime)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ARGUMENTS
    }
    assert calls == ARGUMENTS
    for kind in ("ICudaEngine", "IExecutionContext", "Runtime"):
        for name, count in ARGUMENTS.items():
            method = getattr(getattr(trt, kind), name, None)
            if method is not None:
                overloads = [line for line in method.__doc__.splitlines() if f"{name}(self" in line]
                assert any(_required(line) <= count for line in overloads), overloads


def _required(signature: str) -> int:
    """Arguments without a default, beside self."""
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    return sum("=" not in argument for argument in inside.split(", ")) - 1
