"""The processes of a job: joining them, agreeing, noticing those that are gone or stuck.

A job has one process a host (or several), all of which run the same command. What JAX
keeps to itself of its distributed service is touched here and nowhere else.
"""

from supcon_jax.hosts.agreement import (
    agree,
    code_version,
    from_first,
    gather,
    refuse_together,
)
from supcon_jax.hosts.joining import bind_address, initialize
from supcon_jax.hosts.launchers import Join, count_gpus, how_to_join
from supcon_jax.hosts.peers import beat, check_peers, count, index, leave
from supcon_jax.hosts.watchdog import Watchdog

__all__ = [
    "Join",
    "Watchdog",
    "agree",
    "beat",
    "bind_address",
    "check_peers",
    "code_version",
    "count",
    "count_gpus",
    "from_first",
    "gather",
    "how_to_join",
    "index",
    "initialize",
    "leave",
    "refuse_together",
]
