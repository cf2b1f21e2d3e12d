"""Debian packages to test with."""

from __future__ import annotations

import io
import tarfile


def package(files: dict[str, bytes]) -> bytes:
    """A Debian package with these files, by their paths."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    written = b"!<arch>\n"
    for name, content in {"debian-binary": b"2.0", "control.tar.xz": b"x", "data.tar.xz": archive.getvalue()}.items():
        written += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        written += b"\n" * (len(content) % 2)
    return written
