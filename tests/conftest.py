"""What all tests share: the optional ground-truth data, a quiet, repeatable hypothesis, what the environment asks for.

DINOX_GROUND_TRUTH, DINOX_WITHOUT_EXTRAS and FAULTS_MINUTES are described in CONTRIBUTING.md.
"""

import gc
import os
import runpy
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core: more threads would wait for each other

import hypothesis
import psutil
import pytest
import torch

hypothesis.settings.register_profile(
    "dinox", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("dinox")

REPOSITORY = Path(__file__).resolve().parent.parent
STARTED = time.monotonic()


if os.environ.get("DINOX_WITHOUT_EXTRAS"):
    WITHOUT_EXTRAS = REPOSITORY / "tests" / "without_extras"
    runpy.run_path(str(WITHOUT_EXTRAS / "sitecustomize.py"))  # here, and in every process that a test starts:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(WITHOUT_EXTRAS), os.environ.get("PYTHONPATH")]))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, whoever is first


def _cut_off(_number: int, _frame: FrameType | None) -> None:
    for child in psutil.Process().children(recursive=True):
        child.kill()
    pytest.skip(f"the {os.environ['FAULTS_MINUTES']} minutes of FAULTS_MINUTES are over; until then nothing had failed")


def _reap_children() -> None:
    """Wait for what was killed: a Popen that is thrown away before that warns, and warnings are errors."""
    for child in [thing for thing in gc.get_objects() if type(thing) is subprocess.Popen]:
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=10)


@contextmanager
def _within_faults_minutes(item: pytest.Item) -> Iterator[None]:
    """`make faults FAULTS_MINUTES=15`: a campaign that is at work then is cut off, a later one does not begin.

    Out of time is a skip, not a failure: what the campaign had checked until then was right.
    """
    minutes = os.environ.get("FAULTS_MINUTES")
    if not minutes or not item.get_closest_marker("fault"):
        yield
        return
    left_s = STARTED + 60 * float(minutes) - time.monotonic()
    if left_s <= 0:
        pytest.skip(f"the {minutes} minutes of FAULTS_MINUTES are over")
    # Not SIGALRM: pytest-timeout has it.
    before = signal.signal(signal.SIGUSR1, _cut_off)
    timer = threading.Timer(left_s, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    try:
        yield
    except pytest.skip.Exception:
        _reap_children()
        raise
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `gpu` is skipped where torch sees none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with _within_faults_minutes(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _within_faults_minutes(item):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs measure of this machine is kept among the tests' files, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINOX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the checkout."""
    return REPOSITORY


FORBID_SOCKETS = """
import socket

def refuse(*arguments, **named):
    raise AssertionError("a socket was asked for: " + repr((arguments, named)))

class Refused(socket.socket):
    # multiprocessing and asyncio may name the class; nobody may connect, bind or send with it.
    connect = connect_ex = bind = sendto = refuse

socket.socket = Refused
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
"""


@pytest.fixture(scope="session")
def sockets_forbidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH: Python processes that have it, and those that they start, get no connection."""
    folder = tmp_path_factory.mktemp("forbid")
    # sitecustomize is imported by every Python process that has it on its path: workers are held to it as well.
    (folder / "sitecustomize.py").write_text(FORBID_SOCKETS)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real CT series with ground truth (`expected.json`) beside a checkout; tests that need it skip without it."""
    folder = Path(os.environ.get("DINOX_GROUND_TRUTH", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "expected.json").is_file():
        pytest.skip("no ground-truth CT data beside this checkout (set DINOX_GROUND_TRUTH to its folder)")
    return folder
