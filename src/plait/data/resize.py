"""Pixels of another width and height, by torch's kernels for bytes.

They are called in torch's library, by its stable C interface: without torch's Python modules a job starts in
half a second less and has 100 MB less of memory. How values are passed, and who owns them:
https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html

Y, X = height and width, C = values of a pixel
"""

import ctypes
from ctypes import POINTER, byref, c_char_p, c_double, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

LIBRARY = "lib/libtorch_cpu.so"
INTERFACE = 2 << 56 | 13 << 48
"""Torch 2.13 is the first whose C interface has all that is called here."""


def resize(
    pixels_YXC: "Pixels",
    size: tuple[int, int],
    kernel: str,
    extent: tuple[float, float] | None = None,
) -> "Pixels":
    """Give pixels another size, each the weighed mean of those that it covers.

    Args:
        pixels_YXC: (Y, X, C).
        size: width and height to come.
        kernel: bilinear or bicubic.
        extent: width and height of the picture in these pixels, where the last ones stand beyond its edge.
    """
    if size == (extent or pixels_YXC.shape[1::-1]):
        return pixels_YXC
    scales = (size[1] / extent[1], size[0] / extent[0]) if extent else (None, None)
    library, name = _library(), f"_upsample_{kernel}2d_aa"
    if library:
        return _by_the_library(library, pixels_YXC, size, name, scales)
    return _by_its_modules(pixels_YXC, size, name, scales)


Scales = tuple[float, float] | tuple[None, None]
"""Of height and width, where they are not the ratio of the sizes."""


def _by_the_library(
    torch: ctypes.CDLL, pixels_YXC: "Pixels", size: tuple[int, int], kernel: str, scales: Scales
) -> "Pixels":
    """Resize without torch's Python modules.

    Raises:
        RuntimeError: torch refuses; with its own words.
    """
    import numpy as np

    width, height = size
    found_YXC = np.empty((height, width, pixels_YXC.shape[2]), np.uint8)
    # what is passed belongs to the kernel from then on, and what it returns to us
    values = (c_uint64 * 6)(
        _tensor(torch, pixels_YXC),
        _list(torch, height, width),
        False,  # whether corners are aligned
        *(_optional(torch, scale) for scale in scales),
        _tensor(torch, found_YXC),
    )
    name = f"aten::{kernel}".encode()
    _checked(torch, torch.torch_call_dispatcher(name, b"out", values, c_uint64(INTERFACE)))
    _checked(torch, torch.aoti_torch_delete_tensor_object(c_void_p(values[0])))
    return found_YXC


def _by_its_modules(pixels_YXC: "Pixels", size: tuple[int, int], kernel: str, scales: Scales) -> "Pixels":
    """The same with an older torch, such as that of NVIDIA's images, whose C interface has less."""
    import torch

    pixels_1CYX = torch.from_numpy(pixels_YXC)[None].permute(0, 3, 1, 2)
    # what torch.nn.functional.interpolate calls; that takes a size or scales, not both
    found_1CYX = getattr(torch.ops.aten, kernel)(pixels_1CYX, size[::-1], False, *scales)
    found: Pixels = found_1CYX.permute(0, 2, 3, 1).contiguous()[0].numpy()
    return found


@cache
def _library() -> ctypes.CDLL | None:
    """Torch's library; None where it is older than the interface, or has another name, as on a Mac."""
    torch = find_spec("torch")
    if not (torch and torch.origin):
        return None
    try:
        found = ctypes.CDLL(str(Path(torch.origin).parent / LIBRARY))
    except OSError:
        return None
    if not hasattr(found, "torch_new_stable_ivalue"):
        return None
    found.torch_exception_get_what.restype = c_char_p
    return found


def _checked(torch: ctypes.CDLL, code: int) -> None:
    if code:
        raise RuntimeError(torch.torch_exception_get_what().decode())


def _tensor(torch: ctypes.CDLL, pixels_YXC: "Pixels") -> Any:
    """A tensor of (1, C, Y, X) in the memory of an array."""
    height, width, channels = pixels_YXC.shape
    of_y, of_x, of_c = pixels_YXC.strides  # a pixel's values are bytes
    found = c_void_p()
    code = torch.aoti_torch_create_tensor_from_blob(
        c_void_p(pixels_YXC.ctypes.data),
        c_int64(4),
        (c_int64 * 4)(1, channels, height, width),
        (c_int64 * 4)(pixels_YXC.nbytes, of_c, of_y, of_x),
        c_int64(0),
        torch.aoti_torch_dtype_uint8(),
        torch.aoti_torch_device_type_cpu(),
        0,
        byref(found),
    )
    _checked(torch, code)
    return found.value


def _list(torch: ctypes.CDLL, *values: int) -> Any:
    found = c_void_p()
    _checked(torch, torch.torch_new_list_reserve_size(c_size_t(len(values)), byref(found)))
    for value in values:
        _checked(torch, torch.torch_list_push_back(found, c_uint64(value)))
    return found.value


def _optional(torch: ctypes.CDLL, value: float | None) -> Any:
    if value is None:
        return 0
    found = POINTER(c_double)()
    _checked(torch, torch.torch_new_stable_ivalue(byref(found)))
    found.contents.value = value
    return ctypes.cast(found, c_void_p).value
