"""The CUDA driver as this project uses it: checked calls, and tensors over raw addresses.

`cuda.bindings` releases the interpreter's lock around every driver call, so a thread that maps
or waits does not hold up the one that launches.
"""

import ctypes
from typing import Any

import torch


class CudaError(RuntimeError):
    """A driver call failed. The context may be unusable afterwards (sticky errors)."""


def driver() -> Any:
    """The module `cuda.bindings.driver`, imported where it is first needed: CPU-only hosts do
    not have it."""
    from cuda.bindings import driver as module

    return module


def check(result: tuple[Any, ...]) -> Any:
    """Unpack (error, values...) of a driver call. Raises CudaError with the error's name."""
    error, *values = result
    if int(error) != 0:
        raise CudaError(f"CUDA driver: {getattr(error, 'name', error)}")
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


class _DlDevice(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DlDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DlTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DlDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DlDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DlManagedTensor(ctypes.Structure):
    _fields_ = (
        ("dl_tensor", _DlTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_DL_CPU, _DL_CUDA = 1, 2
_DL_UINT = 1
# A description must live as long as torch may look at it, and torch says when it is done only
# through a C callback. They are few (two per bound model) and small, so they are kept.
_descriptions: list[tuple[_DlManagedTensor, Any]] = []


def tensor_over(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """A uint8 tensor [num_bytes] over raw memory, which it does not own.

    Made through DLPack, which asks no questions about the address: on CUDA a range may be
    reserved and not mapped (the array interface would look the pointer up and refuse).
    """
    shape = (ctypes.c_int64 * 1)(num_bytes)
    kind, index = (_DL_CUDA, device.index or 0) if device.type == "cuda" else (_DL_CPU, 0)
    managed = _DlManagedTensor(
        _DlTensor(address, _DlDevice(kind, index), 1, _DlDataType(_DL_UINT, 8, 1), shape, None, 0),
        None,
        None,
    )
    _descriptions.append((managed, shape))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = new(ctypes.addressof(managed), b"dltensor", None)
    return torch.from_dlpack(capsule)
