"""Compiles native.c: the compiler, its flags and the file's name, at first use and for wheels (setup.py).

It imports only the standard library, because torch is missing where a wheel is built.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-std=gnu11", "-O3", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
OF_CAPABILITY = {  # not -march=native: one file serves every machine on which torch reports this capability
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"),
}
COMPILE_SECONDS = 60


class NoKernel(Exception):
    """Why the kernels are not available here."""


def compiler() -> str:
    """The machine's C compiler.

    Raises:
        NoKernel: there is none.
    """
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not found:
        raise NoKernel("no C compiler: neither cc nor gcc was found, and CC is not set")
    return found


def flags_for(capability: str) -> tuple[str, ...]:
    """The compiler flags for a processor, by torch's name for its capability.

    Raises:
        NoKernel: native.c has no code for it.
    """
    if capability not in OF_CAPABILITY:
        raise NoKernel(f"the kernels need a CPU with AVX2 or AVX-512, but torch reports {capability}")
    return (*FLAGS, *OF_CAPABILITY[capability])


def name_of(*made_by: str) -> str:
    """The library's file name. It contains a hash of the source and `made_by`, so that a stale file is not found.

    Raises:
        NoKernel: native.c cannot be read.
    """
    try:
        made_of = "\n".join((*made_by, SOURCE.read_text()))
    except OSError as error:  # a frozen application without the source
        raise NoKernel(f"the kernels' source cannot be read: {error}") from error
    return f"native-{digest_of(made_of.encode())[:16]}.so"


def digest_of(data: bytes) -> str:
    """SHA-256, as stored beside a library."""
    return hashlib.sha256(data).hexdigest()


def compiled(compiler: str, flags: tuple[str, ...], folder: Path) -> bytes:
    """The bytes of the library, compiled in a temporary folder inside `folder`.

    Compiling and linking are separate steps, because linking with -fopenmp would add a second OpenMP.

    Raises:
        NoKernel: the compiler fails, or the folder cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            half, whole = Path(inside, "native.o"), Path(inside, "native.so")
            _run(compiler, *flags, "-c", str(SOURCE), "-o", str(half))
            _run(compiler, "-shared", str(half), "-o", str(whole), "-lm")
            return whole.read_bytes()
    except OSError as error:
        raise NoKernel(f"the kernels cannot be compiled in {folder}: {error}") from error


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NoKernel(f"{command[0]} took longer than {COMPILE_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        raise NoKernel(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from error
