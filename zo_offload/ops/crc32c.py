"""CRC32C of pages, by which damage on a disk is found: RFC 3720, appendix B.4.

A buffer's check is made of its pages' CRC32Cs, so that pages may be checked in any order and at
once. C++ where it was built; else NumPy, all pages side by side, at a hundredth of the speed.
"""

import ctypes
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from zo_offload.errors import KernelError
from zo_offload.ops.native import library

PAGE = 4096
POLYNOMIAL = 0x82F63B78
U32 = npt.NDArray[np.uint32]


def page_crcs(data: torch.Tensor) -> U32:
    """CRC32C of every page.

    Args:
        data: Contiguous, on the CPU; whole pages.

    Returns:
        uint32, one a page.
    """
    assert data.nbytes % PAGE == 0, data.nbytes
    pages = data.nbytes // PAGE
    native = _native()
    if native is None:
        return by_numpy(data.view(torch.uint8).numpy().reshape(pages, PAGE))
    found = np.empty(pages, np.uint32)
    native.zo_page_crcs(
        ctypes.c_void_p(data.data_ptr()),
        ctypes.c_uint64(pages),
        ctypes.c_void_p(found.ctypes.data),
    )
    return found


def by_numpy(rows: npt.NDArray[np.uint8]) -> U32:
    """CRC32C of every row of bytes.

    Example:
        >>> hex(int(by_numpy(np.frombuffer(b"123456789", np.uint8)[None])[0]))
        '0xe3069283'
    """
    tables = _tables()
    rows_of_words = rows.shape[1] // 4 * 4
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    words = np.ascontiguousarray(rows[:, :rows_of_words].T).reshape(-1, 4, len(rows))
    for four in words:
        value = crc ^ sum(four[i].astype(np.uint32) << np.uint32(8 * i) for i in range(4))
        crc = np.bitwise_xor.reduce(
            [tables[3 - i][value >> np.uint32(8 * i) & np.uint32(0xFF)] for i in range(4)]
        )
    for byte in rows[:, rows_of_words:].T:
        crc = crc >> np.uint32(8) ^ tables[0][(crc ^ byte) & np.uint32(0xFF)]
    return ~crc


def check_of(crcs: U32) -> int:
    """A buffer's check: of the list of its pages' CRC32Cs the same again, until one is left."""
    while True:
        pages = np.zeros(max(1, -(-crcs.nbytes // PAGE)) * PAGE, np.uint8)
        pages[: crcs.nbytes] = crcs.astype("<u4").view(np.uint8)
        crcs = page_crcs(torch.from_numpy(pages))
        if len(crcs) == 1:
            return int(crcs[0])


@lru_cache(maxsize=1)
def _tables() -> list[U32]:
    """Of a byte, and of it with one, two, three zero bytes behind it."""
    first = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = np.where(first & 1, first >> 1 ^ np.uint32(POLYNOMIAL), first >> 1).astype(
            np.uint32
        )
    tables = [first]
    for _ in range(3):
        before = tables[-1]
        tables.append(before >> np.uint32(8) ^ first[before & np.uint32(0xFF)])
    return tables


def _native() -> ctypes.CDLL | None:
    try:
        return library()
    except KernelError:
        return None
