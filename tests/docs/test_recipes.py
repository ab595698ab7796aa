"""docs/recipes.md: its predictions are what `torchxihe plan` says today, and its costs follow from its numbers."""

import re
from pathlib import Path

from torchxihe.config.load import load_config
from torchxihe.plan.hardware import find_gpu
from torchxihe.plan.layout import layout_of
from torchxihe.plan.search import plan_of
from torchxihe.utils.words import duration, scaled

ROOT = Path(__file__).parents[2]
PRICE = 2.50


def rows(section: str) -> list[list[str]]:
    """The cells of the table in a section."""
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    lines = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    return [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]


def number(cell: str) -> float:
    """ "2.5 B" is 2.5e9."""
    found = re.fullmatch(r"\$?([\d.,]+) ?([kMBT]?)", cell.strip())
    assert found, cell
    return float(found[1].replace(",", "")) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2]]


def seconds(cell: str) -> float:
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    return sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+) (d|h|min|s)\b", cell))


def test_predictions_are_those_of_plan() -> None:
    table = rows("Predicted")
    for cells in table:
        preset, gpus, *written = (cell.strip() for cell in cells)
        count, gpu = gpus.split(" × ")
        config = load_config(preset.strip("`"))
        machine = find_gpu(gpu)
        plan = plan_of(config, layout_of(config.parallelism, int(count)), machine)
        tokens = config.training.tokens or config.total_steps * config.tokens_per_step
        speed, _ = plan.speed(machine)
        time = tokens / speed
        hours = f"{time / 3600 * int(count):,.1f}"
        memory = f"{plan.memory.total / 2**30:.1f}"
        assert written == [scaled(tokens), scaled(speed), memory, duration(time), hours], preset
    assert len(table) > 5


def test_times_and_costs_follow_from_what_was_measured() -> None:
    table = rows("Measured")
    for cells in table:
        goal, _, tokens, speed, _, time, cost, _ = (cell.strip() for cell in cells)
        assert abs(seconds(time) / (number(tokens) / number(speed)) - 1) < 0.03, goal
        if cost:
            gpus = 2 if "two GPUs" in goal else 1
            expected = seconds(time) / 3600 * PRICE * gpus
            assert abs(number(cost) - expected) < max(0.02 * expected, 0.01), goal
    assert len(table) > 5
