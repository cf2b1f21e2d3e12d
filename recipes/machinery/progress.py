"""Where a long command is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TextIO


@dataclass
class Progress:
    """Shows where it is: a line that is rewritten on a terminal, a line every few seconds elsewhere."""

    stream: TextIO
    begin: float = field(default_factory=time.monotonic)
    shown: float = 0.0

    def say(self, text: str) -> None:
        """A line that stays."""
        clear = "\r\x1b[K" if self.stream.isatty() else ""
        print(f"{clear}[{self._clock()}] {text}", file=self.stream, flush=True)

    def step(self, title: str, step: int, total: int, loss: float) -> None:
        """A line that is passed over unless it is time for one."""
        now = time.monotonic()
        if now - self.shown < (0.2 if self.stream.isatty() else 5.0):
            return
        self.shown = now
        bar = ("#" * (20 * step // total)).ljust(20, ".")
        text = f"[{self._clock()}] {title}  [{bar}] step {step}/{total}  loss {loss:.3f}"
        if self.stream.isatty():
            print(f"\r{text}\x1b[K", end="", file=self.stream, flush=True)
        else:
            print(text, file=self.stream, flush=True)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.begin), 60)
        return f"{minutes:02}:{seconds:02}"
