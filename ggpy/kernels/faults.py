"""Reads of mapped files that the system can't serve, because a file was cut or its disk fails.

The system then sends SIGBUS, which ends a process, and whose handler can't be Python's: it runs in the thread and at the
instruction that read. The handler here, a few lines of LLVM's language, puts zeros in the place of what is missing, up to
the map's end, and notes that it did. The run ends with values that mean nothing, and `is_damaged` has it thrown away.
Linux only; elsewhere nothing is watched.
"""

import ctypes
import mmap
import signal
import sys
import threading
from typing import Any

#: Whether this system is one of those whose structures are known here.
IS_SUPPORTED = sys.platform == "linux" and sys.maxsize > 2**32

#: most maps that are watched; each a row of `_maps`
_MOST = 1024
#: start, end and 1 if zeros are there, of each map; zeros for none
_maps = (ctypes.c_int64 * (3 * _MOST))()
_lock = threading.Lock()

#: struct sigaction of glibc and musl for 64 bits: handler, mask, flags, restorer
_ACTION_BYTES, _MASK_BYTES = 152, 128
_SA_SIGINFO = 4
#: where siginfo_t has the address
_SI_ADDR = 16
_PROT_READ, _MAP_PRIVATE_FIXED_ANONYMOUS = 1, 0x32

_SOURCE = f"""
@maps = external global i8
@old_action = external global i8

declare i64 @mmap(i64, i64, i32, i32, i32, i64)
declare i32 @sigaction(i32, i64, i64)

define void @on_fault(i32 %signal, i64 %info, i64 %context) {{
entry:
  %info_at = add i64 %info, {_SI_ADDR}
  %info_p = inttoptr i64 %info_at to i64*
  %address = load i64, i64* %info_p
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %following, %other ]
  %done = icmp eq i64 %i, {_MOST}
  br i1 %done, label %not_ours, label %look
look:
  %row = mul i64 %i, 24
  %start_at = add i64 %row, ptrtoint (i8* @maps to i64)
  %end_at = add i64 %start_at, 8
  %note_at = add i64 %start_at, 16
  %start_p = inttoptr i64 %start_at to i64*
  %end_p = inttoptr i64 %end_at to i64*
  %note_p = inttoptr i64 %note_at to i64*
  %start = load i64, i64* %start_p
  %end = load i64, i64* %end_p
  %behind = icmp uge i64 %address, %start
  %before = icmp ult i64 %address, %end
  %inside = and i1 %behind, %before
  br i1 %inside, label %ours, label %other
other:
  %following = add i64 %i, 1
  br label %next
ours:
  %page = and i64 %address, -{mmap.PAGESIZE}
  %n = sub i64 %end, %page
  store volatile i64 1, i64* %note_p
  %got = call i64 @mmap(i64 %page, i64 %n, i32 {_PROT_READ}, i32 {_MAP_PRIVATE_FIXED_ANONYMOUS}, i32 -1, i64 0)
  %mapped = icmp eq i64 %got, %page
  br i1 %mapped, label %return, label %not_ours
not_ours:
  %ignored = call i32 @sigaction(i32 %signal, i64 ptrtoint (i8* @old_action to i64), i64 0)
  br label %return
return:
  ret void
}}
"""


def watch(start: int, n_bytes: int) -> int:
    """Watches a map of a file for reading; the number is for `is_damaged` and `forget`. -1: it isn't watched."""
    with _lock:
        for i in range(_MOST if IS_SUPPORTED else 0):
            if not _maps[3 * i]:
                _maps[3 * i + 2] = 0
                _maps[3 * i + 1] = start + -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                _maps[3 * i] = start
                return i
    return -1


def forget(number: int) -> None:
    """Ends watching."""
    if number >= 0:
        with _lock:
            _maps[3 * number] = _maps[3 * number + 1] = 0


def is_damaged(number: int) -> bool:
    """Whether zeros stand for a part of the map that couldn't be read."""
    return number >= 0 and bool(_maps[3 * number + 2])


_old = ctypes.create_string_buffer(_ACTION_BYTES)  # what others had for the signal


def compile_handler(llvm: Any) -> tuple[str, bytes]:
    """The handler's symbol and an object file for this machine."""
    machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic")
    return "on_fault", machine.emit_object(llvm.parse_assembly(_SOURCE))


def symbols() -> dict[str, int]:
    """Addresses of what the handler needs from outside."""
    libc = ctypes.CDLL(None)
    functions = {name: ctypes.cast(getattr(libc, name), ctypes.c_void_p).value for name in ("mmap", "sigaction")}
    return {"maps": ctypes.addressof(_maps), "old_action": ctypes.addressof(_old), **functions}  # type: ignore[dict-item]


def install(handler: int) -> None:
    """Sets the handler, given its address. What isn't in a map that is watched goes to the handler that was set before."""
    action = handler.to_bytes(8, sys.byteorder) + bytes(_MASK_BYTES) + _SA_SIGINFO.to_bytes(4, sys.byteorder)
    ctypes.CDLL(None).sigaction(int(signal.SIGBUS), action.ljust(_ACTION_BYTES, b"\0"), _old)
