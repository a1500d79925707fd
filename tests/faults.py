"""The fault injector: main.py to which something happens at a given place.

    python -m tests.faults "kill@saving step 16+0.05" --config=... --workdir=...

A fault is ACTION@PLACE[+SECONDS]. PLACE is a regular expression for what the process says
that it does (`hosts.beat`): "compiling", "step 5", "kNN: test images", "saving step 12", or
"" for its very beginning. The action follows there, or so many seconds later. Which
process of a job it befalls is said by starting that one with it: `commands`. The program
itself knows nothing of it.
"""

import os
import re
import resource
import runpy
import signal
import sys
import threading
import time

from supcon_jax import hosts

SIGNALS = {
    "kill": signal.SIGKILL,
    "pause": signal.SIGSTOP,
    "terminate": signal.SIGTERM,
    "interrupt": signal.SIGINT,
}
ACTIONS = (*SIGNALS, "stick", "full")


def parse(fault):
    """Action, place and delay of a fault's text."""
    action, _, rest = fault.partition("@")
    place, _, delay = rest.partition("+")
    if action not in ACTIONS:
        raise ValueError(f"got the fault {fault!r}; allowed: {', '.join(ACTIONS)}")
    return action, re.compile(place), float(delay or 0)


def commands(size, arguments, faults):
    """Python's arguments for each process of a job; `faults` by rank."""
    return [
        [*(["-m", "tests.faults", faults[rank]] if rank in faults else ["main.py"])]
        + list(arguments)
        for rank in range(size)
    ]


def happen(action, doing):
    """What befalls this process; the time stands in its output."""
    print(f"FAULT {action} {time.time():.3f} at {doing}", file=sys.stderr, flush=True)
    if action == "stick":
        stuck_here()
    elif action == "full":  # no file can grow from now on
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    else:
        os.kill(os.getpid(), SIGNALS[action])


def stuck_here():
    """Alive, and its other threads too, but it never gets on."""
    time.sleep(3600)


def inject(fault):
    """Lets the fault happen, once, in this process."""
    action, place, delay = parse(fault)
    real, done = hosts.beat, threading.Event()

    def beat(doing, patience=1.0):
        arrive(doing)
        real(doing, patience)

    def arrive(doing):
        if done.is_set() or not place.search(doing):
            return
        done.set()
        if not delay:
            happen(action, doing)
            return
        timer = threading.Timer(delay, happen, (action, f"{doing} +{delay:.3f} s"))
        timer.daemon = True
        timer.start()

    hosts.beat = beat
    if not place.pattern:
        arrive("the beginning")


if __name__ == "__main__":
    inject(sys.argv[1])
    sys.argv = ["main.py", *sys.argv[2:]]
    runpy.run_path("main.py", run_name="__main__")
