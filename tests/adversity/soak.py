"""Soak test, started by hand: processes use the same sessions for minutes while they are killed and the primary fails.

    python tests/adversity/soak.py --minutes 13

It prints the numbers of acknowledged steps. It stops with the complete history if data is lost, duplicated, left
over or comes back.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pymongo

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "examples"), str(HERE.parents[1] / "src")]

from life_walk import Walk  # noqa: E402

from fix_servers import Cluster  # noqa: E402
from killing import Child  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=13)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--sessions", type=int, default=8)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    end = time.monotonic() + options.minutes * 60
    with (
        Cluster(server_parameters={"enableTestCommands": 1}) as servers,
        pymongo.MongoClient[dict[str, Any]](servers.connection_string, tz_aware=True) as client,
    ):
        walk = Walk(
            servers.connection_string,
            client["soak"],
            options.seed,
            sessions=options.sessions,
            processes=options.processes,
            options={"serverSelectionTimeoutMS": 15000},
        )
        soak(walk, servers, end)


def soak(walk: Walk, servers: Cluster, end: float) -> None:
    failovers, told = 0, time.monotonic()
    while time.monotonic() < end:
        fails_over = walk.totals.rounds % 12 == 11

        def disturb(children: list[Child], fails_over: bool = fails_over) -> None:
            if fails_over:
                time.sleep(walk.random.uniform(0.1, 0.6))
                killed = servers.primary()
                servers.kill(killed)
                servers.primary()  # waits for a new primary
                servers.restart(killed)
            else:
                for child in children:
                    if walk.random.random() < 0.3:
                        pause = walk.random.uniform(0.05, 1.0)
                        threading.Timer(pause, child.kill_if_alive).start()

        walk.round(
            lambda: walk.random.choice([None, None, walk.random.randrange(1, 150)]),
            steps=8 if fails_over else 5,
            meanwhile=disturb,
        )
        failovers += fails_over
        if walk.totals.rounds % 25 == 0:
            walk.expire()
        if time.monotonic() - told > 30:
            print(f"{failovers} failovers, {walk.totals}", flush=True)
            told = time.monotonic()
    walk.end()
    print(f"{failovers} failovers, {walk.totals}")
    print("0 lost, 0 doubled, 0 came back, 0 orphans after the sweep")


if __name__ == "__main__":
    main()
