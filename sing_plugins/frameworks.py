"""The libraries that SING works in: where they are found, which versions, and what is patched in them.

Standard library only, since ``import torch`` reads this, and no dataclass: each takes a millisecond to be made.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from importlib import metadata


class Library:
    """A library in which SING has nothing to register: our package for it is imported by hand.

    Attributes:
        name: as the user knows it, and as it is imported.
        adapter: our package for it.
        distributions: the distributions that provide it.
        supported: first supported version, and first unsupported one.
    """

    def __init__(self, name: str, adapter: str, distributions: tuple[str, ...], supported: tuple[str, str]) -> None:
        self.name, self.adapter, self.distributions, self.supported = name, adapter, distributions, supported

    @property
    def range(self) -> str:
        """The supported versions, as pip writes them."""
        return f">={self.supported[0]},<{self.supported[1]}"

    @property
    def modules(self) -> tuple[str, ...]:
        """What is to be imported to see whether SING works in it."""
        return (self.adapter,)

    def installed(self) -> str | None:
        """The version at hand: what the imported package says of itself, else the installed distribution's, or None."""
        version = getattr(sys.modules.get(self.name), "__version__", None)  # a checkout may hide the distribution
        for distribution in self.distributions:
            if not isinstance(version, str):
                with suppress(Exception):  # not installed, or with broken metadata
                    version = metadata.version(distribution)
        return version if isinstance(version, str) else None

    def is_supported(self, version: str) -> bool:
        """Whether a version lies in the supported range."""
        return _release(self.supported[0]) <= _release(version) < _release(self.supported[1])

    def check_version(self) -> None:
        """Raise unless a supported version is installed.

        Raises:
            ModuleNotFoundError: it is not installed.
            RuntimeError: its version is not supported.
        """
        version = self.installed()
        if version is None:
            raise ModuleNotFoundError(f"{self.name} is not installed: pip install 'sing-plugins[{self.name}]'")
        if not self.is_supported(version):
            raise RuntimeError(f"SING supports {self.name} {self.range}, but {version} is installed")


class Framework(Library):
    """A framework that knows optimizers by name; its adapter is a :class:`sing_plugins.adapter.Adapter`.

    Attributes:
        triggers: the modules that are patched. The adapter's ``patch()`` is called after each of them was imported or
            reloaded, and patches those that :func:`sing_plugins.autoload.loaded` gives.
        misreads: None where an unknown name is an error. Else (a package, a variable): functions of that package
            build another optimizer for an unknown name, which they have in that variable.
    """

    def __init__(
        self,
        name: str,
        adapter: str,
        distributions: tuple[str, ...],
        supported: tuple[str, str],
        triggers: tuple[str, ...],
        misreads: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(name, adapter, distributions, supported)
        self.triggers, self.misreads = triggers, misreads

    @property
    def modules(self) -> tuple[str, ...]:
        """As for a library."""
        return self.triggers


FRAMEWORKS: dict[str, Framework] = {
    framework.name: framework
    for framework in (
        Framework(
            "transformers",
            "sing_transformers",
            ("transformers",),
            ("4.57", "6"),
            ("transformers.training_args", "transformers.trainer"),
        ),
        Framework(
            "timm",
            "sing_timm",
            ("timm",),
            ("1.0.12", "2"),
            ("timm.optim._optim_factory",),
            misreads=("timm.optim", "opt"),
        ),
        Framework(
            "fairseq",
            "sing_fairseq",
            ("fairseq-fixed", "fairseq"),
            ("0.12.2", "0.13"),
            ("fairseq.optim", "fairseq.trainer"),
        ),
    )
}

# Accelerate takes optimizers as objects and has no names.
LIBRARIES: dict[str, Library] = {"accelerate": Library("accelerate", "sing_accelerate", ("accelerate",), ("1.6", "2"))}


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version's release segment: "1.0.12.post1" → (1, 0, 12)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release.group().split(".")) if release else ()
