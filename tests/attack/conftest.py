"""How the attacks run, and one table of how often each tried.

make attack            # a few minutes; the table is kept in data/measured/attack.txt
make attack SEED=7     # other random inputs
"""

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

from qlora_helpers.paths import data_path

settings.register_profile(
    "attack",
    max_examples=1000,
    deadline=None,  # a slow example says little on a machine that does other work, too
    database=None,  # what is found becomes a test
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.load_profile("attack")


@pytest.fixture
def chance(request):
    """Random numbers that are the same in each run with the same seed."""
    return random.Random(int(request.config.getoption("--hypothesis-seed")))


@pytest.fixture
def tries(request):
    """Counts what an attack tried, by how it ended. The first line of its docstring names it in the table."""
    counts = Counter()
    yield counts
    what = request.function.__doc__.strip().splitlines()[0].rstrip(".")
    request.node.user_properties.append(("tries", (what, dict(counts))))


def pytest_terminal_summary(terminalreporter, exitstatus):
    found: dict[str, Counter] = {}
    for report in terminalreporter.getreports(""):
        for name, value in report.user_properties if report.when == "teardown" else ():
            if name == "tries":
                found.setdefault(value[0], Counter()).update(value[1])
    lines = [
        f"{sum(counts.values()):7,}  {what}: {', '.join(f'{count:,} {how}' for how, count in sorted(counts.items()))}"
        for what, counts in sorted(found.items())
    ]
    if not lines:  # pytest reads this file in other runs, too
        return
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line)
    config = terminalreporter.config
    if exitstatus == 0 and config.args == ["tests/attack"] and not config.getoption("keyword"):  # all, and all right
        data_path("measured", "attack.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
