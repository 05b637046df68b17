"""Two processes use the same sessions and are killed anywhere: nothing is lost, duplicated, left over or comes back."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pymongo
import pytest
from life_walk import Walk

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.mark.timeout(1200)
def test_a_random_walk_of_two_processes(
    server: str, driver: pymongo.MongoClient[dict[str, Any]], database: str, pytestconfig: pytest.Config
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    walk = Walk(server, driver[database], seed)
    end = time.monotonic() + (300 if pytestconfig.getoption("--full-adversity") else 0)
    while walk.totals.rounds < 5 or not walk.totals.killed or time.monotonic() < end:
        walk.round(lambda: walk.random.choice([None, walk.random.randrange(1, 40), walk.random.randrange(1, 120)]))
        if not walk.totals.rounds % 5:
            walk.expire()
    walk.end()
    print(walk.totals)
    assert walk.totals.acknowledged
    assert walk.totals.expired or walk.totals.rounds < 10
