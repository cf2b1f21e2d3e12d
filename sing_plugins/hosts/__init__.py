"""The update rules that SING feeds: one file each, one table of them.

A host is written once, on lists of tensors (``torch._foreach_*``). :class:`sing_plugins.SING` calls it with all
tensors of a param group at once (``foreach=True``) or with one after the other (``foreach=False``), so that both
paths are the same arithmetic.
"""

from sing_plugins.hosts import adabelief, adafactor, adamw, sgd
from sing_plugins.hosts.base import Host, Totals

HOSTS: dict[str, Host] = {host.name: host for host in (adamw.HOST, adabelief.HOST, adafactor.HOST, sgd.HOST)}

__all__ = ["HOSTS", "Host", "Totals"]
