"""Numbers as people read them."""

from torchxihe.utils.words import BYTES, FLOPS, counted, scaled


def test_counted() -> None:
    assert [counted(n, "step") for n in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
    assert [counted(n, "entry") for n in (1, 2)] == ["1 entry", "2 entries"]


def test_scaled() -> None:
    numbers = (0, 999, 1000, 123_550_000, 999_960, 8.03e9, 2e16)
    assert [scaled(n) for n in numbers] == ["0", "999", "1.0 K", "123.5 M", "1.0 M", "8.0 B", "20,000.0 T"]
    assert [scaled(n, BYTES) for n in (999, 1000, 31.5 * 2**20)] == ["999 B", "1.0 KiB", "31.5 MiB"]
    assert scaled(2.5e13, FLOPS) == "25.0 TFLOP"
