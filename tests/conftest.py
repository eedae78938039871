"""What all tests share: where the optional ground-truth data lies, and a quiet, repeatable hypothesis."""

import os
import time
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "dinox", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("dinox")

REPOSITORY = Path(__file__).resolve().parent.parent
STARTED = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`make faults FAULTS_MINUTES=15`: a campaign that would begin later than that is skipped."""
    minutes = os.environ.get("FAULTS_MINUTES")
    if minutes and item.get_closest_marker("fault") and time.monotonic() - STARTED > 60 * float(minutes):
        pytest.skip(f"the {minutes} minutes of FAULTS_MINUTES are over")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real CT series with ground truth (`expected.json`) beside a checkout; tests that need it skip without it."""
    folder = Path(os.environ.get("DINOX_GROUND_TRUTH", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "expected.json").is_file():
        pytest.skip("no ground-truth CT data beside this checkout (set DINOX_GROUND_TRUTH to its folder)")
    return folder
