"""The charts: which points are kept, where they are drawn, which ticks they get, how numbers are written."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train.report.chart import HEIGHT, WIDTH, Axis, Curve, Marks, draw_chart, joined, nice_ticks, thin
from dinox_train.report.numerals import gibibytes, number, percent, whole

PLAIN = Axis(write=number)


def paths(html: str, kind: str) -> list[list[tuple[float, float]]]:
    """The points of each path of a class."""
    found = re.findall(rf'<path class="{kind}" d="M([^"]*)"', html)
    return [[(float(x), float(y)) for x, y in (point.split() for point in path.split("L"))] for path in found]


@given(n=st.integers(0, 400), buckets=st.integers(1, 60), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_thinning_keeps_the_extremes_the_order_and_the_limit(n: int, buckets: int, seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=n)
    x = np.arange(n, dtype=float)
    kept_x, kept_y = thin(x, y, buckets)
    assert len(kept_x) <= max(2 * buckets, 0)
    assert (np.diff(kept_x) > 0).all()
    assert (y[kept_x.astype(int)] == kept_y).all()
    if n:
        assert kept_y.min() == y.min()
        assert kept_y.max() == y.max()


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6), count=st.integers(2, 8))
@settings(max_examples=100, deadline=None)
def test_ticks_are_inside_and_of_a_reasonable_number(low: float, span: float, count: int) -> None:
    ticks = nice_ticks(low, low + span, count)
    assert 0 <= len(ticks) <= count + 1
    assert all(low - 1e-3 * span <= tick <= low + 1.001 * span for tick in ticks)


def test_ticks_are_round() -> None:
    assert nice_ticks(0, 1, 4) == [0, 0.5, 1]
    assert nice_ticks(1, 1200, 5) == [500, 1000]
    assert nice_ticks(3.2, 8.4, 4) == [4, 6, 8]
    assert nice_ticks(7, 7, 5) == [7]


def test_points_stand_where_their_values_are() -> None:
    x = np.array([1.0, 2.0, 3.0, 5.0])
    html = draw_chart(
        "t", [Curve(name="c", x=x, y=np.array([0.0, np.nan, 1.0, 2.0]))], Axis(write=number, include=(0, 2))
    )
    assert paths(html, "first") == [[(0, HEIGHT), (WIDTH / 2, HEIGHT / 2), (WIDTH, 0)]]


def test_a_logarithmic_axis_needs_positive_values() -> None:
    x = np.arange(3.0)
    axis = Axis(write=number, logarithmic=True)
    positive = draw_chart("t", [Curve(name="c", x=x, y=np.array([0.1, 1.0, 10.0]))], axis)
    assert paths(positive, "first")[0][1][1] == pytest.approx(HEIGHT / 2)
    zero = draw_chart("t", [Curve(name="c", x=x, y=np.array([0.0, 1.0, 10.0]))], axis)
    assert paths(zero, "first")[0][1][1] > 0.8 * HEIGHT


def test_outliers_of_a_faint_curve_do_not_flatten_the_rest() -> None:
    x = np.arange(1000.0)
    y = np.sin(x / 50)
    y[500] = 1e6
    html = draw_chart("t", [Curve(name="c", x=x, y=y, faint=True)], PLAIN)
    heights = [down for _, down in paths(html, "first faint")[0]]
    assert max(heights) - sorted(heights)[5] > 0.8 * HEIGHT
    assert min(heights) == 0


@pytest.mark.parametrize("y", [[3.0], [0.0], [5.0, 5.0, 5.0], [-2.0, -2.0]])
def test_constant_and_single_values_are_drawn_inside(y: list[float]) -> None:
    html = draw_chart("t", [Curve(name="c", x=np.arange(1.0, len(y) + 1), y=np.array(y))], PLAIN)
    assert all(0 <= across <= WIDTH and 0 < down < HEIGHT for across, down in paths(html, "first")[0])
    assert "nan" not in html


def test_a_readout_names_the_update_and_every_curve_that_has_a_value_there() -> None:
    x = np.arange(1.0, 5.0)
    sparse = np.array([np.nan, np.nan, 7.0, np.nan])
    html = draw_chart("t", [Curve(name="a", x=x, y=x * 10), Curve(name="b", x=x, y=sparse, colour="second")], PLAIN)
    readouts = re.findall(r"<b>(.*?)</b>", html)
    assert readouts[0] == "update 1 · a 10"
    assert readouts[2] == "update 3 · a 30 · b 7"


def test_no_values_are_said_to_be_none() -> None:
    html = draw_chart("t", [Curve(name="c", x=np.arange(3.0), y=np.full(3, np.nan))], PLAIN, empty="Nothing <yet>.")
    assert "Nothing &lt;yet&gt;." in html
    assert "<svg" not in html


def test_numbers_are_short() -> None:
    written = [number(value) for value in (0, 3.14159, -0.5, 42.06, 1234.5, 0.0002, 1.5e-7, 2e6, 100, 0.9999)]
    assert written == ["0", "3.14", "-0.5", "42.1", "1,234", "2e-4", "1.5e-7", "2e6", "100", "1"]
    assert [percent(value) for value in (0, 0.0312, 0.4, 1)] == ["0 %", "3.1 %", "40 %", "100 %"]
    assert [whole(value) for value in (12, 76_800, 6_400_000, 1.28e9)] == ["12", "76,800", "6.40 M", "1,280 M"]
    assert [gibibytes(value) for value in (3 * 2**30, 2**29)] == ["3.0 GiB", "512 MiB"]


def test_what_happened_is_drawn_where_it_did_and_named_once() -> None:
    marks = Marks(resumed=[25, 25, 900], rolled_back=[50], skipped=[75], alarms=[(10, 20), (90, 400)])
    curve = Curve(name="c", x=np.arange(101.0), y=np.arange(101.0))
    html = draw_chart("t", [curve], PLAIN, marks=marks)
    assert re.findall(r'class="(?:resumed|back)" d="M([\d.]+)', html) == ["250.0", "500.0"]
    assert re.findall(r'class="alarm" d="M([\d.]+) 0H([\d.]+)V', html) == [("100.0", "200.0"), ("900.0", "1000.0")]
    for name in ("resumed", "went back", "not applied", "alarm"):
        assert html.count(f"</i>{name}</span>") == 1
    assert "went back" not in draw_chart("t", [curve], PLAIN, marks=Marks(rolled_back=[900]))


def test_alarms_that_touch_are_one_and_their_number_is_bounded() -> None:
    assert joined([(30, 40), (10, 20), (20, 25)], (0, 100)) == [(10, 25), (30, 40)]
    assert joined([(-5, 3), (99, 400), (200, 300)], (0, 100)) == [(0, 3), (99, 100)]
    many = [(begin, begin + 1) for begin in range(0, 10**6, 3)]
    assert len(joined(many, (0, 10**6))) == 1
    assert len(joined([(10 * begin, 10 * begin) for begin in range(10**5)], (0, 10**6))) <= 501


def test_a_line_begins_anew_where_updates_were_done_again() -> None:
    x = np.array([1.0, 2.0, 3.0, 2.0, 4.0])
    html = draw_chart("t", [Curve(name="c", x=x, y=np.zeros(5))], PLAIN)
    (line,) = re.findall(r'class="first" d="([^"]*)"', html)
    assert re.sub(r"[\d. ]+", "", line) == "MLLML"


def test_an_axis_spans_what_it_is_told_to() -> None:
    curve = Curve(name="c", x=np.array([5.0]), y=np.array([1.0]))
    html = draw_chart("t", [curve], PLAIN, over=(0.0, 10.0))
    assert paths(html, "first")[0][0][0] == WIDTH / 2
