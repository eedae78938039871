"""How a report writes numbers, so that a reader can take them in at a glance."""

from __future__ import annotations


def number(value: float) -> str:
    """Four significant digits at most: 0.0002, 3.142, 12.3, 1,234; powers of ten where that is shorter."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    text = f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}" if abs(value) >= 1 else f"{value:.3g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(value: float) -> str:
    """A share as per cent, two digits: 0.031 is 3.1 %."""
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


def whole(value: float) -> str:
    """A count: 12,345; from a million on 1.23 M."""
    return f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:,.{2 if value < 1e8 else 0}f} M"


def gibibytes(value: float) -> str:
    """Bytes as GiB, or as MiB below one."""
    if value == 0:
        return "0"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
