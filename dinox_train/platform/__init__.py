"""The machine a run is on: the device, what it is and can do, what is set for it, and in which precision networks run.

Facts are found and measured, not matched by name; what was measured is kept by machine and version (`kept.py`). Runs
only read what `python -m dinox_train.platform tune` has tuned. Invariant: torch and numpy are all that is needed.
"""

from dinox_train.platform.device import check_compiler as check_compiler
from dinox_train.platform.device import choose_device as choose_device
from dinox_train.platform.precision import MatrixProducts as MatrixProducts
from dinox_train.platform.precision import PrecisionError as PrecisionError
from dinox_train.platform.precision import assert_precision as assert_precision
from dinox_train.platform.precision import autocast as autocast
from dinox_train.platform.precision import product_dtype as product_dtype
from dinox_train.platform.repeatable import make_deterministic as make_deterministic
from dinox_train.platform.software import describe as describe
