"""The bytes of a file in pieces, whether it is compressed or not. Memory stays that of a piece."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lightning_llm.data.gauge import Tell
from lightning_llm.data.places import file_kind
from lightning_llm.settings import UserError

PIECE = 1 << 16  # bytes
COMPRESSED_PIECE = 1 << 14  # of zstd, which may unfold to some thousand times of it
MAGIC = {  # how files begin
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ\0": "xz",
    b"BZh91AY&SY": "bzip2",
    b"ARROW1": "Arrow",
}
ENDINGS = {"gzip": ".gz", "zstd": ".zst"}


class Damaged(Exception):
    """The bytes end too early or are not what was compressed; what came before is sound."""


def read_pieces(path: Path, tell: Tell | None = None) -> Iterator[bytes]:
    """A file's content, decompressed as its name says.

    Args:
        tell: is told the share of the file's bytes that have been read.

    Raises:
        UserError: it is compressed in another way than its name says.
        Damaged: it cannot be read to its end.
    """
    _, codec = file_kind(path) or ("", "")
    size = path.stat().st_size
    with path.open("rb") as file:
        _refuse_other_codec(path, codec, file.read(16))
        file.seek(0)
        for piece in {"gzip": _gzip, "zstd": _zstd}.get(codec, _plain)(file):
            if tell:
                tell(file.tell() / size)
            yield piece


def read_lines(path: Path, tell: Tell | None = None) -> Iterator[bytes]:
    """A file's lines, without their ends; raises and tells as `read_pieces`."""
    begun: list[bytes] = []  # of a line that goes on
    for piece in read_pieces(path, tell):
        first, *others = piece.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if last := b"".join(begun):
        yield last


def _refuse_other_codec(path: Path, codec: str, begin: bytes) -> None:
    found = next((name for magic, name in MAGIC.items() if begin.startswith(magic)), "")
    if found and found != codec:
        remedy = f"Name it {path.stem if codec else path.name}{ENDINGS[found]}" if found in ENDINGS else "Convert it"
        raise UserError(str(path), f"is {found} by its content", remedy)


def _plain(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(PIECE), b"")


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield from iter(lambda: unpacked.read(PIECE), b"")
    except EOFError:
        raise Damaged("the gzip file ends in the middle") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise Damaged(f"gzip: {error}") from error


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """All frames of a file, one after the other. Readers of the library take a file cut short for one that is whole."""
    import zstandard

    try:
        frame = None
        while piece := file.read(COMPRESSED_PIECE):
            while piece:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                if unpacked := frame.decompress(piece):
                    yield unpacked
                piece = b""
                if frame.eof:
                    piece, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise Damaged(str(error).replace("zstd decompressor error", "zstd")) from error
    if frame is not None:
        raise Damaged("the zstd file ends in the middle")
